"""Velocities learned by regression: the algorithm that this family's supervised methods change. As it stands it is flow matching.

One update on samples x0 (n, *shape) with conditions c (n,), by its parts (methods/diffusion/flow.py has the notation):

    1. times         t (n,): sigmoid of a normal (SD3's choice), or uniform
    2. corrupt       x_t = (1 - t) x0 + t e;  target u = e - x0
    3. velocity      v(x_t, t, c); c is left out with probability `label_dropout`
    4. error         m_i = mean_d (v - u)^2, (n,)
    5. loss          mean_i m_i
    6. penalty       scalar beside the loss; none here                              (additive)
    7. after_update  the moving average of the weights, which generation uses       (additive)
    8. guide, follow of generation (methods/diffusion/base.py)

Sources: Lipman et al. 2023, Liu et al. 2022; Esser et al. 2024 (logit-normal times).
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor

from methods.common.parts import add
from methods.diffusion import flow
from methods.diffusion.base import Generator
from runner.interface import knob


class Regression(Generator):
    @dataclasses.dataclass(frozen=True)
    class Config(Generator.Config):
        label_dropout: float = knob(0.1, "probability with which the condition is left out in training", low=0.0, high=1.0)
        times: str = knob("logit_normal", "how t is drawn", choices=["logit_normal", "uniform"])

    PARTS = ("times", "corrupt", "velocity", "error", "loss", "penalty", "after_update", "guide", "follow")
    ADDITIVE = ("penalty", "after_update")

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: x (n, *shape), condition (n,) int64."""
        return self.learn(self.gather(batch))

    def learn(self, rows: SimpleNamespace) -> dict[str, Tensor]:
        """One step of the optimiser."""
        rows.x_t, rows.target = self.corrupt(rows.x, rows.noise, rows.t)
        rows.v = self.velocity(self.network, rows.x_t, rows.t, rows.condition)
        rows.error = self.error(rows)
        loss = self.loss(rows)
        penalty = self.penalty(rows)
        self.advance(add(loss, penalty))
        self.after_update(rows)
        return {"loss": loss.detach(), **rows.told}

    def gather(self, batch) -> SimpleNamespace:
        """The rows that go through the network: x, noise (n, *shape), t, condition (n,); told: metrics, to which parts add."""
        rows = SimpleNamespace(**batch, told={})
        rows.t, rows.noise = self.times(len(rows.x)), self.noise("noise", tuple(rows.x.shape))
        rows.condition = self.dropped(rows.condition)
        return rows

    def dropped(self, condition: Tensor) -> Tensor:
        """The condition, left out at random where the network knows a class that stands for none."""
        if not self.config.label_dropout or not getattr(self.network, "guided", True):
            return condition
        out = self.noise("label_dropout", (len(condition),), "uniform") < self.config.label_dropout
        return torch.where(out, self.spec.classes, condition)

    # -- parts
    def times(self, number: int) -> Tensor:
        if self.config.times == "uniform":
            return self.noise("times", (number,), "uniform")
        return self.noise("times", (number,)).sigmoid()

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, target), (n, *shape) each."""
        at = flow.rows(t, x)
        return (1 - at) * x + at * noise, noise - x

    def error(self, rows) -> Tensor:
        return (rows.v - rows.target).square().flatten(1).mean(1)

    def loss(self, rows) -> Tensor:
        return rows.error.mean()

    def penalty(self, rows) -> Tensor | None:
        return None
