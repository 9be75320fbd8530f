"""Best-of-n: n draws of the policy at its start, of which a fitted reward model chooses (Stiennon et al. 2020, arXiv 2009.01325).

Training is the reward model's (methods/preference/reward_model.py); what is sampled is the policy as it was at the start.

Over arms nothing is sampled: with F the distribution of the model's rewards under pi_ref,

    P(chosen reward = r) = F(r)^n - F(r-)^n,   shared among arms of equal reward in proportion to pi_ref,

so that gold metrics are exact. KL(best of n || pi_ref) <= log n - (n - 1)/n (`kl_bound`; equal but for ties), and with the true
judge, which every bandit tells as the reference row `best of N`, n draws win n / (n + 1) of the time against one.

Policies over tokens keep their start beside the trunk that is trained. For every response that is asked for n are drawn from it,
independently, and the one that the model rates highest is given, the first of equal ones. Its KL is not a sum over tokens, which
no metric claims then: `kl_bound` stands for it.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch

from methods.preference.reward_model import RewardModel
from methods.tokens import lora
from runner.interface import Completions, knob

AT_ONCE = 4096  # responses that are drawn at once


class BestOfN(RewardModel):
    @dataclasses.dataclass(frozen=True)
    class Config(RewardModel.Config):
        n: int = knob(16, "draws, of which one is chosen", low=1, source="project's choice")

    judges = False   # it decodes
    plain = False    # whether this is the start, whose draws are given as they are

    def setup(self, spec):
        super().setup(spec)
        self.draws_of_one = self.config.n
        if not spec.arms and self.reference is None and not lora.adapted(self.policy):
            self.reference = copy.deepcopy(self.policy).requires_grad_(False)  # what is sampled

    def update(self, batch):
        n = self.config.n
        return {**super().update(batch), "kl_bound": batch["label"].new_full((), math.log(n) - (n - 1) / n)}

    def with_weights(self, weights=None):
        other = super().with_weights(weights)
        if other is not None:
            other.plain, other.draws_of_one = True, 1
        return other

    @torch.no_grad()
    def complete(self, texts, samples, uniforms, temperature=1.0, fresh=True, steps=None):
        """The best of n draws of the start for every response that is asked for. The first draws use `uniforms`, the others
        numbers that follow from them."""
        n = self.config.n
        if self.spec.arms or self.plain:
            return super().complete(texts, samples, uniforms, temperature, fresh, steps)
        start, size = self.with_weights(), max(1, AT_ONCE // (samples * n))
        parts = []
        for begin in range(0, len(texts), size):
            some, own = texts[begin:begin + size], uniforms[begin * samples:(begin + size) * samples]
            drawn = start.complete(some, samples * n, numbers(own, n), temperature, not begin, steps)
            rows = {k: getattr(drawn, k) for k in ("prompt", "prompt_mask", "response")} | {"mask": drawn.mask.float()}
            best = self.rate(rows).view(-1, n).argmax(1)
            index = torch.arange(len(best), device=best.device) * n + best
            parts.append(([drawn.texts[i] for i in index], [getattr(drawn, k)[index] for k in Completions._fields[1:]]))
        whole = [torch.cat(t) for t in zip(*(t for _, t in parts))] if len(parts) > 1 else parts[0][1]
        return Completions([t for told, _ in parts for t in told], *whole)


def numbers(uniforms: torch.Tensor, n: int) -> torch.Tensor:
    """(B, T) -> (B n, T): every row followed by n - 1 rows of further numbers, the same for the same rows."""
    seed = int(float(uniforms.double().sum()) * 2 ** 20)
    more = torch.rand(len(uniforms), n - 1, uniforms.shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.cat([uniforms[:, None], more.to(uniforms)], 1).flatten(0, 1)
