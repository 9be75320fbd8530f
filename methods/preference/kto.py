"""KTO: responses are good or bad each for itself (Ethayarajh et al. 2024, arXiv 2402.01306).

    desirable     lambda_D (1 - sigma(beta (rho(y) - z0)))
    undesirable   lambda_U (1 - sigma(beta (z0 - rho(y))))
    z0 = max(0, mean of rho(y_{i+1} | x_i) over the batch), without gradient

a value as prospect theory has it, around a point of reference z0 that estimates KL(policy || reference) by responses that
answer other prompts: rows are shifted by one. Only what a response is worth beside z0 counts, not which response it was
compared to: the chosen responses of a batch are its desirable rows, the rejected ones its undesirable rows. Where a pair's label
is a probability p, either row is desirable in that measure. The loss is the mean over rows.

The rows that z0 needs go through the policy, and through the reference, once more without gradient. With few rows z0 is
noise: take 8 at least. `compared=pairs` is DPO. Not reproduced: data that come unpaired, with unequal numbers of both kinds
(the paper balances lambda_D n_D / (lambda_U n_U) into [1, 4/3]; pairs are balanced).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.preference.pairs import SIDES, PairPolicy
from runner.interface import knob


class KTO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        desirable: float = knob(1.0, "lambda_D", low=0.0, source="paper", when={"compared": "to_point"})
        undesirable: float = knob(1.0, "lambda_U", low=0.0, source="paper", when={"compared": "to_point"})
        compared: str = knob("to_point", "a response's log-ratio is compared to the point z0, or to its pair's other side (DPO)",
                             choices=["to_point", "pairs"])
        point: str = knob("mismatched", "z0: from responses to other prompts, or 0", choices=["mismatched", "zero"],
                          when={"compared": "to_point"})

    def needs_reference(self):
        return True  # beside a method that needs none, too

    def loss(self, pairs):
        c = self.config
        if c.compared == "pairs":
            return super().loss(pairs)
        gain = c.beta * (pairs.rho - self.reference_point(pairs))
        good = torch.stack([pairs.label, 1 - pairs.label])
        return (good * c.desirable * torch.sigmoid(-gain) + (1 - good) * c.undesirable * torch.sigmoid(gain)).mean()

    def reference_point(self, pairs) -> Tensor:
        """z0, a scalar, the same on every process."""
        if self.config.point == "zero":
            return torch.zeros((), device=pairs.rho.device)
        z0 = self.engine.mean(self.mismatched(pairs.batch).mean()).clamp(min=0)
        pairs.told["reference_point"] = z0
        return z0

    @torch.no_grad()
    def mismatched(self, batch: dict[str, Tensor]) -> Tensor:
        """rho (2 b,) of every row's prompt with the next row's response; rows: the chosen ones, then the rejected ones."""
        rows = {k: batch[k].repeat(2, 1) for k in ("prompt", "prompt_mask")}
        for key, suffix in (("response", ""), ("mask", "_mask")):
            rows[key] = torch.cat([batch[f"{side}{suffix}"] for side in SIDES]).roll(-1, 0)
        size = self.config.micro_rows or len(rows["mask"])
        out = []
        for i in range(0, len(rows["mask"]), size):
            part = {k: rows[k][i:i + size] for k in rows}
            out.append((self.score(part)["log_prob"] - self.score_reference(part)["log_prob"]).sum(1))
        return torch.cat(out)
