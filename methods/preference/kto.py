"""KTO: responses are good or bad each for itself (Ethayarajh et al. 2024, arXiv 2402.01306).

    desirable     lambda_D (1 - sigma(beta (rho(y) - z0)))
    undesirable   lambda_U (1 - sigma(beta (z0 - rho(y))))
    z0 = max(0, mean of rho(y_{i+1} | x_i) over the batch), without gradient

a value as prospect theory has it, around a point of reference z0 that estimates KL(policy || reference) by responses that
answer other prompts: rows are shifted by one. Only what a response is worth beside z0 counts, not which response it was
compared to: the chosen responses of a batch are its desirable rows, the rejected ones its undesirable rows. Where a pair's label
is a probability p, either row is desirable in that measure. The loss is the mean over rows.

The rows that z0 needs go through the policy, and through the reference, once more without gradient. With few rows z0 is
noise: take 8 at least. `compared=pairs` is DPO.

The paper's own data come unpaired (envs with batches `unpaired`): one response a row, with a label, and as many of either kind as
there are. n_D and n_U are their numbers in the data; with `balance` c the lambda of one kind is raised until

    lambda_D n_D / (lambda_U n_U) = c,    which the paper wants in [1, 4/3].
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.preference.pairs import AT_ONCE, SIDES, PairPolicy
from runner.errors import UserError
from runner.interface import knob

ROW = ("prompt", "prompt_mask", "response", "mask")


class KTO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        desirable: float = knob(1.0, "lambda_D", low=0.0, source="paper", when={"compared": "to_point"})
        undesirable: float = knob(1.0, "lambda_U", low=0.0, source="paper", when={"compared": "to_point"})
        compared: str = knob("to_point", "a response's log-ratio is compared to the point z0, or to its pair's other side (DPO)",
                             choices=["to_point", "pairs"])
        balance: float = knob(0.0, "lambda_D n_D / (lambda_U n_U), to which one weight is raised; 0: both stay",
                              low=0.0, source="paper: 1 to 4/3", when={"compared": "to_point"})
        point: str = knob("mismatched", "z0: from responses to other prompts, or 0", choices=["mismatched", "zero"],
                          when={"compared": "to_point"})

    counts = (1.0, 1.0)  # n_D, n_U of the data, or a multiple of both

    def needs_reference(self):
        return True  # beside a method that needs none, too

    def prepare(self, data):
        """Beside pairs': rows of responses, each with the reference's log-probabilities as one more column."""
        told = super().prepare(data)
        if "response" not in data:
            return told
        columns, good = {k: v for k, v in data.items() if "/" not in k}, data["label"]
        self.counts = float(good.sum()), float((1 - good).sum())
        if self.config.compared == "pairs":
            raise UserError("method.compared=pairs needs pairs, and these responses are labelled each for itself\n"
                            "leave method.compared at to_point")
        if self.config.balance and not all(self.counts):
            raise UserError(f"of {len(good)} responses {self.counts[0]:g} are desirable: there is nothing to balance\n"
                            "give responses of both kinds, or method.balance=0")
        asked = {**{k: columns[k] for k in ROW}, **self.reference_weights()}
        return {**columns, **self.remembered("reference", asked, lambda: {"reference": self.reference_rows(columns)})}

    def reference_rows(self, columns) -> Tensor:
        """(N, T), the reference's log-probabilities of the stored responses' tokens."""
        parts = torch.arange(len(columns["response"])).split(AT_ONCE)
        with self.autocast():
            return torch.cat([self.score_reference({k: columns[k][i] for k in ROW})["log_prob"] for i in parts])

    def rows(self, batch):
        return {k: batch[k] for k in ROW} if "response" in batch else super().rows(batch)

    def pairs(self, batch):
        """Of responses each for itself: one side, (1, b, T)."""
        if "response" not in batch:
            return super().pairs(batch)
        sides = {f"{s}{end}": batch[f"{name}"] for s in SIDES for end, name in (("_mask", "mask"), ("_reference", "reference"))}
        both = super().pairs({**batch, **sides})
        both.mask, both.reference, both.length = both.mask[:1], both.reference[:1], both.length[:1]
        return both

    def summary(self, pairs):
        if len(pairs.rho) == len(SIDES):
            return super().summary(pairs)
        rho, good = pairs.rho.detach()[0], pairs.label
        chosen, fallen = ((good * x).sum() / good.sum().clamp(min=1e-6) for x in (rho, (rho < 0).float()))
        rejected = ((1 - good) * rho).sum() / (1 - good).sum().clamp(min=1e-6)
        return {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected, "fallen": fallen}

    def lambdas(self) -> tuple[float, float]:
        """lambda_D, lambda_U, in balance."""
        c, (good, bad) = self.config, self.counts
        if not (c.balance and c.desirable and c.undesirable):
            return c.desirable, c.undesirable
        factor = c.balance * c.undesirable * bad / (c.desirable * good)
        return c.desirable * max(factor, 1.0), c.undesirable / min(factor, 1.0)

    def loss(self, pairs):
        c = self.config
        if c.compared == "pairs":
            return super().loss(pairs)
        gain = c.beta * (pairs.rho - self.reference_point(pairs))
        good = torch.stack([pairs.label, 1 - pairs.label])[:len(gain)]
        desirable, undesirable = self.lambdas()
        return (good * desirable * torch.sigmoid(-gain) + (1 - good) * undesirable * torch.sigmoid(gain)).mean()

    def reference_point(self, pairs) -> Tensor:
        """z0, a scalar, the same on every process."""
        if self.config.point == "zero":
            return torch.zeros((), device=pairs.rho.device)
        z0 = self.engine.mean(self.mismatched(pairs.batch).mean()).clamp(min=0)
        pairs.told["reference_point"] = z0
        return z0

    @torch.no_grad()
    def mismatched(self, batch: dict[str, Tensor]) -> Tensor:
        """rho of every row's prompt with the next row's response; rows: the batch's (b,), or the chosen ones, then the rejected
        ones (2 b,)."""
        if "response" in batch:
            rows = {k: batch[k].roll(-1, 0) if k in ("response", "mask") else batch[k] for k in ROW}
        else:
            rows = {k: batch[k].repeat(2, 1) for k in ("prompt", "prompt_mask")}
            for key, suffix in (("response", ""), ("mask", "_mask")):
                rows[key] = torch.cat([batch[f"{side}{suffix}"] for side in SIDES]).roll(-1, 0)
        size = self.config.micro_rows or len(rows["mask"])
        out = []
        for i in range(0, len(rows["mask"]), size):
            part = {k: rows[k][i:i + size] for k in rows}
            out.append((self.score(part)["log_prob"] - self.score_reference(part)["log_prob"]).sum(1))
        return torch.cat(out)
