"""MODPO: multi-objective direct preference optimisation (Zhou et al. 2023, arXiv 2310.03708).

With weights w_1 of the objective that the pairs are about and w_2 = 1 - w_1 of another, whose reward r_2 is known or fitted,

    L = -log sigma( s(y_w) - s(y_l) ),   s(y) = [ beta rho(y) - w_2 r_2(y) ] / w_1,

so that the optimum is pi_ref exp((w_1 r_1 + w_2 r_2) / beta). r_2 without gradient: the implicit reward beta (log pi_2 - log
pi_ref) of a policy pi_2 that DPO fits to pairs of the other objective before training. Only its differences matter, but on the
scale of r_1's labels, which such a reward has.

| symbol | name |
|---|---|
| w_1 | weight, or, where that is 0, the batch's own column `weight` |
| 1 / w_1 | bounded by `most`: where w_1 goes to 0 every error of r_2 is amplified |
| r_2 | fitted in `margin_steps` Adam steps at `margin_rate` on data other/… |

Two baselines have the same data. combine=loss is the weighted sum of both objectives' losses w_1 L_1 + w_2 L_2; with w_1 = 1 it
and MODPO are DPO. combine=soup trains plain DPO on this objective, and what is judged is its policy mixed with pi_2 in weights,

    theta = w_1 theta_1 + w_2 theta_2        (rewarded soups: Rame et al. 2023, arXiv 2306.04488),

one mixture a run (`weight`), or, of a table, one a prompt. In a table that is pi_ref exp((w_1 r_1 + w_2 r_2) / beta) with both
rewards fitted apart, which nothing is lost by; networks have no such identity. Official code takes any frozen reward model for
r_2, and divides by w_1 unless it is 1.
"""

from __future__ import annotations

import copy
import dataclasses

import torch

from methods.preference.dpo import DPO
from methods.preference.pairs import SIDES, logistic, plus, times
from methods.tokens import scoring
from runner.errors import UserError
from runner.interface import knob


class MODPO(DPO):
    @dataclasses.dataclass(frozen=True)
    class Config(DPO.Config):
        combine: str = knob("margin", "the other objective's reward is a margin of this one's loss, or the losses are summed, or "
                            "two policies' weights are; none: only this objective counts",
                            choices=["margin", "loss", "soup", "none"], source="paper")
        weight: float = knob(0.0, "w_1; 0: what the batch's own column says", low=0.0, high=1.0, source="paper: 0 to 1",
                             when={"combine": ["margin", "loss"]})
        most: float = knob(10.0, "bound of 1 / w_1", low=1.0, source="project's choice", when={"combine": "margin"})
        margin_steps: int = knob(500, "Adam's steps that fit the other objective's reward", low=1, source="project's choice",
                                 when={"combine": "margin"})
        margin_rate: float = knob(0.2, "its learning rate", low=0.0, source="project's choice", when={"combine": "margin"})

    def setup(self, spec):
        super().setup(spec)
        if self.config.combine == "soup":
            table = getattr(self.policy, "kind", "") == "table"
            if not table and not self.config.weight or self.reference is None:
                raise UserError("combine=soup mixes all weights of two policies, of a table prompt by prompt, else all alike\n"
                                "say how: method.weight=0.5, for example, without adapters; or take policy.kind=table")
            self.alone, self.second = (copy.deepcopy(self.policy).requires_grad_(False) for _ in range(2))
            self.register_buffer("mixture", torch.zeros(spec.contexts, 1) if table else torch.zeros(()))

    def update(self, batch):
        if self.config.combine != "soup":
            return super().update(batch)
        copy_weights(self.policy, self.alone)
        told = super().update(batch)
        copy_weights(self.alone, self.policy)
        self.mix()
        return told

    @torch.no_grad()
    def mix(self):
        """The policy: both in the proportion of the weights."""
        for p, a, b in zip(*(m.parameters() for m in (self.policy, self.alone, self.second))):
            p.copy_(self.mixture * a + (1 - self.mixture) * b)

    def prepare(self, data):
        columns = super().prepare(data)
        if columns is None or self.config.combine == "none":
            return columns
        other = {k.removeprefix("other/"): v for k, v in data.items() if k.startswith("other/")}
        if not other:
            raise UserError("modpo needs pairs of a second objective, which this env has none of; known: env=fronts")
        with torch.no_grad():
            reference = self.score_reference(self.rows(other))["log_prob"].sum(1).view(2, -1)
        if self.config.combine == "loss":
            self.other = {**other, "reference": reference}
            return columns
        policy = self.fitted(other, reference)
        if self.config.combine == "soup":
            copy_weights(self.alone, self.policy)
            copy_weights(self.second, policy)
            if self.config.weight:
                self.mixture.fill_(self.config.weight)
            else:
                self.mixture[columns["prompt"][:, -1] - self.policy.shape.width, 0] = columns["weight"]
            return columns
        with torch.no_grad():
            scored = scoring.score(policy, *self.arguments(columns))["log_prob"].sum(1).view(2, -1)
        for side, theirs in zip(SIDES, scored):
            columns[f"{side}_other"] = self.config.beta * (theirs - columns[f"{side}_reference"].sum(1))
        return columns

    def arguments(self, columns):
        rows = self.rows(columns)
        return rows["prompt"], rows["prompt_mask"], rows["response"], rows["mask"].bool()

    def fitted(self, other, reference):
        """A policy that DPO has fitted to the other objective's pairs, all of them at once."""
        policy = copy.deepcopy(self.policy)
        adam = torch.optim.Adam(policy.parameters(), lr=self.config.margin_rate)
        arguments = self.arguments(other)
        for _ in range(self.config.margin_steps):
            rho = scoring.score(policy, *arguments, scoring.log_prob)["log_prob"].sum(1).view(2, -1) - reference
            adam.zero_grad()
            logistic(self.config.beta * (rho[0] - rho[1]), other["label"]).mean().backward()
            adam.step()
        return policy

    def share(self, pairs):
        """w_1 (b,)"""
        weight = self.config.weight
        return torch.full_like(pairs.label, weight) if weight else pairs.batch["weight"]

    def worth(self, pairs):
        if self.config.combine != "margin":
            return super().worth(pairs)
        w, other = self.share(pairs), torch.stack([pairs.batch[f"{s}_other"] for s in SIDES])
        shares = 1 / w.clamp(min=1 / self.config.most)
        beta = max(self.config.beta, 1e-12)
        return shares * (super().worth(pairs) - (1 - w) * other / beta)

    def weigh(self, z, pairs):
        weight = super().weigh(z, pairs)
        return times(weight, self.share(pairs)) if self.config.combine == "loss" else weight

    def penalty(self, pairs):
        penalty = super().penalty(pairs)
        if self.config.combine != "loss":
            return penalty
        index = pairs.batch["pair"]
        other = {k: v[index] for k, v in self.other.items() if k != "reference"}
        rho = self.score(self.rows(other), scoring.log_prob)["log_prob"].sum(1).view(2, -1) - self.other["reference"][:, index]
        losses = logistic(self.config.beta * (rho[0] - rho[1]), other["label"])
        return plus(penalty, ((1 - self.share(pairs)) * losses).mean())


@torch.no_grad()
def copy_weights(to, of):
    for p, q in zip(to.parameters(), of.parameters()):
        p.copy_(q)
