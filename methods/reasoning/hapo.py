"""HAPO: one score of a token's uncertainty sets temperature, advantage and clip range (Liu et al. 2025, arXiv 2509.16591).

    y     = log max(H, least_entropy);  y0 = its `pivot` quantile (nearest) over the tokens
    h     = (y - y0) / (max y - y0) above the pivot, (y - y0) / (y0 - min y) below it: in [-1, 1]

On top of DAPO (dynamic sampling, overlong shaping), each with its own switch:

    1. temperature    T' = T (1 + heat h), at every token drawn, from the raw logits; h with the statistics of the previous
                      batch, so that the first one is drawn at T. Log-probabilities are taken at T, not T'
    2. advantage      A_i = (r_i - mu) / (sd + 1e-6), mean and (population) deviation over the group's tokens, not its rows: the
                      sum of A over the tokens is 0. A group with some |A| >= 5 keeps GRPO's
    3. clip range     h <= 0: e_low (1 + widen |h|);  h > 0: e_high (1 + widen h)
    4. advantage      with rho inside (1 - e_low'/2, 1 + e_high'/2):  h <= 0: A (1 + redistribute h), shrunk
                      outside:                                        h > 0:  A (1 + redistribute h), enlarged
    5. dual clip      at 10

In 3 and 4, h is that of the current entropies over the whole minibatch; no gradient goes through h or rho.

In the released code the negative side is divided by min h, not |min h|: h >= 0 everywhere, so that the surest tokens get the
highest temperature, the widest upper clip and enlarged advantages (sign=released). It computes h per micro-batch. Its sampler
gets the statistics under a name that it does not know, so that part 1 may never have run there.

A deterministic token has y = log(1e-8) = -18.4, defines the lower end and squeezes all others' h to 0: `least_entropy` bounds it.
The authors warn that the method is sensitive to the overlong penalty: where all responses are about as long as allowed, switch
it off. Their reach of 10,240 tokens is not reproduced.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from methods.reasoning.base import group_statistics
from methods.reasoning.dapo import DAPO
from runner.interface import knob


class Spread(NamedTuple):
    """Statistics of y, scalars: the pivot and one over the distance to the greatest and to the least."""

    pivot: Tensor
    up: Tensor
    down: Tensor


def spread(entropy: Tensor, mask: Tensor, pivot: float, least: float) -> Spread:
    y = entropy.clamp(min=least).log()
    middle = torch.where(mask > 0, y, torch.nan).nanquantile(pivot, interpolation="nearest")
    up = torch.where(mask > 0, y, -torch.inf).max() - middle
    down = middle - torch.where(mask > 0, y, torch.inf).min()
    return Spread(middle, torch.where(up > 0, 1 / up, 0.0), torch.where(down > 0, 1 / down, 0.0))


def score(entropy: Tensor, known: Spread, least: float, released: bool) -> Tensor:
    """h, in [-1, 1]; in [0, 1] with the released code's sign."""
    y = entropy.clamp(min=least).log() - known.pivot
    h = (y * torch.where(y > 0, known.up, known.down)).clamp(-1.0, 1.0)
    return h.abs() if released else h


class Tempered:
    """A source whose rollouts are drawn at temperatures of their own (methods/tokens/engine.py on `adjust`)."""

    def __init__(self, source, adjust):
        self.source, self.adjust = source, adjust

    def problems(self, number):
        return self.source.problems(number)

    def rollouts(self, problems, samples, temperature=1.0, name="rollout"):
        return self.source.rollouts(problems, samples, temperature, name, self.adjust)


def token_level(batch: dict[str, Tensor], plain: Tensor, scale: str = "group") -> Tensor:
    """A (B,) compared within the group's tokens; `plain` for groups that this would make too large, or without contrast."""
    reward, group, length = batch["reward"], batch["group"], batch["mask"].sum(1)
    total = lambda values: torch.zeros(int(group.max()) + 1, device=group.device).index_add_(0, group, values)[group]  # noqa: E731
    advantage = reward - total(length * reward) / total(length)
    if scale != "none":
        variance = total(length * advantage.square()) / total(length)
        advantage = advantage / ((variance.sqrt() if scale == "group" else reward.std()) + 1e-6)
    keep = total((advantage.abs() >= 5).float()) > 0
    return torch.where(keep | (group_statistics(reward, group)[1] == 0), plain, advantage)


class HAPO(DAPO):
    @dataclasses.dataclass(frozen=True)
    class Config(DAPO.Config):
        pivot: float = knob(0.8, "quantile of log-entropy where h = 0", low=0.0, high=1.0, source="paper")
        least_entropy: float = knob(1e-8, "entropies below count as this", low=1e-30, source="official code")
        sign: str = knob("intended", "of h below the pivot; released: positive, as in the published code",
                         choices=["intended", "released"])
        heat: float = knob(0.05, "part 1: share by which the temperature rises or falls; 0: none", low=0.0, high=0.99,
                           source="paper")
        token_level: bool = knob(True, "part 2: mean and deviation over the group's tokens")
        widen: float = knob(1.0, "part 3: share by which the clip range is widened; 0: none", low=0.0, source="paper",
                            when={"learning_rate": 0.003})
        redistribute: float = knob(1.0, "part 4: share by which advantages change; 0: none", low=0.0, source="paper")

    def setup(self, spec):
        super().setup(spec)
        for name in Spread._fields:  # of the previous batch; at 0, h is 0
            self.register_buffer(f"spread_{name}", torch.zeros(()))

    def known(self) -> Spread:
        return Spread(*(getattr(self, f"spread_{name}") for name in Spread._fields))

    def temperature_of(self, logits: Tensor) -> Tensor:
        """Raw logits (B, V) -> temperatures (B, 1)."""
        c, lp = self.config, logits.log_softmax(-1)
        h = score(-(lp.exp() * lp).sum(-1, keepdim=True), self.known(), c.least_entropy, c.sign == "released")
        return c.temperature * (1 + c.heat * h)

    def collect(self, source):
        return super().collect(Tempered(source, self.temperature_of) if self.config.heat else source)

    def advantage(self, batch, old):
        plain = super().advantage(batch, old)
        return token_level(batch, plain, self.config.scale) if self.config.token_level else plain

    def observe(self, batch, old):
        super().observe(batch, old)
        now = spread(old["entropy"], batch["mask"], self.config.pivot, self.config.least_entropy)
        for name, value in now._asdict().items():
            getattr(self, f"spread_{name}").copy_(self.engine.mean(value))

    def weigh(self, rows):
        super().weigh(rows)
        c, entropy = self.config, rows.now["entropy"].detach()
        known = spread(entropy, rows.mask, c.pivot, c.least_entropy)
        h = score(entropy, known, c.least_entropy, c.sign == "released") * rows.mask
        above = h > 0
        rows.told["below_pivot"] = ((h < 0) * rows.mask).sum() / rows.mask.sum()
        if c.widen:
            rows.low = rows.low * torch.where(above, 1.0, 1 - c.widen * h)
            rows.high = rows.high * torch.where(above, 1 + c.widen * h, 1.0)
        if c.redistribute:
            inside = (rows.ratio > 1 - rows.low / 2) & (rows.ratio < 1 + rows.high / 2)
            rows.advantage = torch.where(above == inside, rows.advantage, rows.advantage * (1 + c.redistribute * h))
