"""HyPO: preferences offline, the KL online (Song et al. 2024, arXiv 2406.01462).

DPO holds the policy near the reference only where data lie. Beside its loss on pairs stands the true reverse KL, estimated by
the policy's own responses to the batch's prompts:

    L = L_DPO + lambda L_KL
    sampled   y^1 .. y^k ~ pi(. | x);  c_j = log pi(y^j) - log pi_ref(y^j), b_j the mean of the others', both without gradient;
              L_KL = mean_j (c_j - b_j) log pi(y^j), whose gradient is unbiased for that of KL(pi || pi_ref), its value not the KL
    exact     KL(pi || pi_ref) summed over all responses, where they are one token
    offline   mean of rho over the data's responses, the control: it is negative where responses are pushed down, and rewards
              leaving them; no KL of anything once the policy has moved

Log-probabilities are sums over tokens: for long responses lambda must be tiny. The metric `kl` is the mean of c_j. This is not
the later "Hybrid-DPO" of the same name (arXiv 2602.11902). The official code was not at hand: lambda 1e-4, k = 2, beta 0.05 and
the centring are reconstructions. Samples are drawn at temperature 1.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from methods.preference.pairs import PairPolicy, plus
from methods.tokens import lora, scoring
from runner.errors import UserError
from runner.interface import knob


class HyPO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        kl_weight: float = knob(1e-4, "lambda", low=0.0, source="paper")
        kl: str = knob("sampled", "where from: the policy's samples, all responses, or the data's (a control)",
                       choices=["sampled", "exact", "offline"], source="paper")
        responses: int = knob(2, "k: samples to each prompt of the batch", low=1, source="paper", when={"kl": "sampled"})

    @property
    def own_samples(self):
        return self.config.kl == "sampled" and self.config.kl_weight > 0

    def needs_reference(self):
        return self.config.kl_weight > 0 or super().needs_reference()  # beside a method that needs none, too

    def setup(self, spec):
        super().setup(spec)
        if self.config.kl == "exact" and self.response_length() != 1:
            raise UserError(f"method.kl=exact sums over all responses, which here have up to {self.response_length()} tokens\n"
                            "take method.kl=sampled; exact is for responses of one token, such as env=bandit")

    def penalty(self, pairs):
        c, penalty = self.config, super().penalty(pairs)
        if not c.kl_weight:
            return penalty
        value = {"sampled": self.sampled, "exact": self.exact, "offline": lambda p: p.rho.mean()}[c.kl](pairs)
        return plus(penalty, c.kl_weight * value)

    def sampled(self, pairs) -> Tensor:
        prompt, mask, k = pairs.batch["prompt"], pairs.batch["prompt_mask"], self.config.responses
        uniforms = self.noise("responses", (len(prompt) * k, self.response_length()), "uniform")
        out = self.respond(prompt, mask, k, uniforms)
        rows = {"prompt": prompt.repeat_interleave(k, 0), "prompt_mask": mask.repeat_interleave(k, 0),
                "response": out.response, "mask": out.mask}
        log_prob, cost = self.likelihood(rows)
        cost = cost.view(-1, k)
        pairs.told["kl"] = cost.mean()
        centred = cost - (cost.sum(1, keepdim=True) - cost) / (k - 1) if k > 1 else cost
        return (centred.flatten() * log_prob).mean()

    def likelihood(self, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(log pi (B,) with gradient, log pi - log pi_ref (B,) without), `micro_rows` rows at a time."""
        def one(part):
            return self.score(part, scoring.log_prob)["log_prob"].sum(1)

        size = self.config.micro_rows or len(rows["mask"])
        parts = [{k: v[i:i + size] for k, v in rows.items()} for i in range(0, len(rows["mask"]), size)]
        own = [one(p) if len(parts) == 1 else checkpoint(one, p, use_reentrant=False) for p in parts]
        theirs = [self.score_reference(p)["log_prob"].sum(1) for p in parts]
        log_prob = torch.cat(own)
        return log_prob, log_prob.detach() - torch.cat(theirs)

    def exact(self, pairs) -> Tensor:
        prompt, mask = pairs.batch["prompt"], pairs.batch["prompt_mask"]
        own = table(self.policy, prompt, mask)
        with torch.no_grad(), contextlib.nullcontext() if self.reference is not None else lora.reference(self.policy):
            theirs = table(self.reference or self.policy, prompt, mask)
        value = (own.exp() * (own - theirs)).sum(-1).mean()
        pairs.told["kl"] = value.detach()
        return value


def table(policy, prompt: Tensor, mask: Tensor) -> Tensor:
    """log pi of every first token, (b, V)."""
    return (policy.hidden(prompt, mask)[:, -1] @ policy.head.T).float().log_softmax(-1)
