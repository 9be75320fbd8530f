"""MADPO: every pair's loss weighted by its margin under a reward model (arXiv 2510.05342).

With h = r(y_w) - r(y_l) from a reward model that was fitted to the same pairs first, and is then held fixed,

    c(|h|) = 1/C + (C - 1/C) / (1 + C exp(lambda (|h| - tau)))          c(0) near C, c(tau) = 1, c(inf) = 1/C;  C = c_max
    w(h)   = sigma(c h) / sigma(h) where h > -tau, else 1
    L      = mean_b[ -w log sigma(z) ],   z = beta (rho(y_w) - rho(y_l))

Labels that follow sigma(h) then weigh sigma(c h) : sigma(-c h), so the optimum has z = c(|h|) h: small margins are learned
larger, large ones smaller. With tau = 6.91 nearly all margins lie below tau and c is near C: DPO with beta / C, nearly. Where a
label is a probability p, L = -p w(h) log sigma(z) - (1 - p) w(-h) log sigma(-z). `labels` model: p is sigma(h), the reward
model's own.

The reward model is a second policy like the one that is trained: r = log pi_r - log pi_ref, known up to a constant of the prompt,
which margins do not contain, so that its Bradley-Terry likelihood is DPO's loss at beta = 1. It is fitted in `prepare`, by AdamW
for `reward_steps` steps, from the same start and in a fixed order, so that a continued run finds the same margins; only these
are kept. It is on the scale of Bradley-Terry by construction (a z-scored reward would not be).

Differences: the official class has tau = 2 by default; c_min is 1 / c_max here as there. The loss is not divided by the sum of
weights (nor there). A pair's weight uses the ordered margin, |h| only in c.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.preference.pairs import AT_ONCE, PairPolicy, logistic
from methods.tokens import scoring
from runner.interface import knob


class MADPO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        c_max: float = knob(2.0, "C: how much small margins grow; large ones shrink to 1 / C", low=1.0, source="paper")
        steepness: float = knob(1.0, "lambda", low=0.0, source="paper")
        tau: float = knob(6.91, "the margin that is left as it is", low=0.0, source="paper")
        labels: str = knob("given", "the data's labels, or the reward model's probabilities", choices=["given", "model"])
        reward_steps: int = knob(500, "steps of the reward model", low=1)
        reward_rate: float = knob(0.01, "its learning rate", low=0.0)
        reward_rows: int = knob(0, "pairs a step of it; 0: all", low=0)

    def needs_reference(self):
        return True  # the reward model's; beside a method that needs none, too

    def prepare(self, data):
        columns, c = super().prepare(data), self.config
        if columns is not None and (c.c_max > 1 or c.labels == "model"):
            columns["reward_margin"] = self.margins(columns)
        return columns

    def link(self, z, pairs):
        h, c = pairs.batch.get("reward_margin"), self.config
        if h is None:
            return super().link(z, pairs)
        p = torch.sigmoid(h) if c.labels == "model" else pairs.label
        won, lost = (weight(m, c.c_max, c.steepness, c.tau) for m in (h, -h))
        pairs.told["weight"] = (p * won + (1 - p) * lost).mean()
        return -(p * won * F.logsigmoid(z) + (1 - p) * lost * F.logsigmoid(-z))

    # -- the reward model
    def margins(self, columns: dict[str, Tensor]) -> Tensor:
        """h (N,) of every stored pair, by a reward model fitted to all of them."""
        c, model = self.config, copy.deepcopy(self.policy)
        number = len(columns["label"])
        rows = min(c.reward_rows or number, number)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=c.reward_rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + 7)
        for _ in range(c.reward_steps):
            drawn = torch.randperm(number, generator=generator)[:rows].to(columns["label"].device) if rows < number else None
            batch = columns if drawn is None else {k: v[drawn] for k, v in columns.items()}
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                for part in self.parts(batch):
                    (logistic(self.reward_gap(model, part), part["label"]).sum() / rows).backward()
            optimizer.step()
        with torch.no_grad():
            return torch.cat([self.reward_gap(model, part) for part in self.parts(columns)])

    def parts(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        size = self.config.micro_rows or (AT_ONCE if self.large() else len(batch["label"]))
        return [{k: v[i:i + size] for k, v in batch.items()} for i in range(0, len(batch["label"]), size)]

    def reward_gap(self, model, batch: dict[str, Tensor]) -> Tensor:
        """r(y_w) - r(y_l), (b,)."""
        pairs = self.pairs(batch)
        self.see(pairs, self.score(self.rows(batch), scoring.log_prob, policy=model))
        return pairs.rho[0] - pairs.rho[1]


def amplification(h: Tensor, c_max: float, steepness: float, tau: float) -> Tensor:
    """c(|h|), elementwise."""
    return 1 / c_max + (c_max - 1 / c_max) / (1 + c_max * (steepness * (h.abs() - tau)).clamp(max=80).exp())


def weight(h: Tensor, c_max: float, steepness: float, tau: float) -> Tensor:
    """w(h), elementwise."""
    grown = amplification(h, c_max, steepness, tau) * h
    return torch.where(h > -tau, (F.logsigmoid(grown) - F.logsigmoid(h)).exp(), 1.0)
