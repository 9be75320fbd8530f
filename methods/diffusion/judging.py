"""Reward models of samples, from pairs. As it stands: the Bradley-Terry likelihood (Christiano et al. 2017, arXiv 1706.03741).

    L = - mean log sigma( r(x_w, c) - r(x_l, c) ) + center mean (r_w + r_l)^2

r is a network of its own (methods/diffusion/rater.py) on finished samples and their condition; the pairs are samples of the
generator that the env offers to start from, which stays as it is. The parts:

    1. loss      of pairs with ratings winner, loser (n,) and tie (n,): whether the labeller saw no difference
    2. penalty   the level. Pairs tell only differences, condition by condition, and methods that weigh rewards over several
                 conditions want one level for all (Eisenstein et al. 2023, arXiv 2312.09244; 0.01 there)       (additive)

Bradley-Terry knows no ties. The world hands them out ordered by a coin, and they are learned from like that, or left out.

A finished run rewards other methods in the place of the env's proxy: env.judge_run=FOLDER (envs/generation/base.py).
Generation's settings say how the pairs' samples are drawn.
"""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.common.networks import adam
from methods.common.parts import add
from methods.diffusion.base import Generator
from methods.diffusion.rater import Rater
from runner.interface import Spec, knob


class Judging(Generator):
    @dataclasses.dataclass(frozen=True)
    class Config(Generator.Config):
        learning_rate: float = knob(1e-3, "AdamW's", low=0.0)
        gradient_norm: float = knob(1.0, "bound of the gradient's norm; 0: none", low=0.0)
        average: float = knob(0.0, "rate of the moving average of the weights that rating uses; 0: the weights themselves",
                              low=0.0, high=1.0)
        width: int = knob(64, "of the hidden layers", low=1)
        depth: int = knob(2, "hidden layers", low=1)
        center: float = knob(0.01, "weight of (r_w + r_l)^2", low=0.0, source="arXiv 2312.09244")
        ties: str = knob("coin", "a tie is a pair ordered by a coin, or left out", choices=["coin", "drop"],
                         when={"env.ties": 0.5})

    PARTS = ("loss", "penalty")
    ADDITIVE = ("penalty",)
    starts = True
    judges = True  # what it has learned is a judgement; its samples are the start's

    def setup(self, spec: Spec):
        super().setup(spec)
        c = self.config
        self.network.requires_grad_(False)
        self.averaged = None
        self.rating = Rater(spec.sample_shape, spec.classes, (c.width,) * c.depth)
        self.smoothed = copy.deepcopy(self.rating).requires_grad_(False) if c.average else None

    def make_optimizers(self):
        super().make_optimizers()
        c = self.config
        self.optimizers = {"network": adam(self.rating.parameters(), c.learning_rate, weight_decay=c.weight_decay)}

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: chosen, rejected (n, *shape), condition, tie (n,)."""
        x = torch.cat([batch["chosen"], batch["rejected"]])
        winner, loser = self.rating(x, batch["condition"].repeat(2)).float().chunk(2)
        rows = SimpleNamespace(winner=winner, loser=loser, tie=batch["tie"], told={})
        loss, penalty = self.loss(rows), self.penalty(rows)
        self.advance(add(loss, penalty))
        if self.smoothed is not None:
            with torch.no_grad():
                torch._foreach_lerp_(list(self.smoothed.parameters()), list(self.rating.parameters()), 1 - self.config.average)
        clear, right = (~rows.tie).float(), (winner > loser).float()
        return {"loss": loss.detach(), "accuracy": (right * clear).sum() / clear.sum().clamp(min=1), **rows.told}

    @torch.no_grad()
    def score(self, x: Tensor, condition: Tensor) -> Tensor:
        """r (n,) of finished samples."""
        return (self.rating if self.smoothed is None else self.smoothed)(x, condition).float()

    def tie_probability(self, difference: Tensor) -> Tensor:
        """Of a tie, between samples whose ratings differ by so much (n,)."""
        return torch.zeros_like(difference)

    def export(self):
        source = self.rating if self.smoothed is None else self.smoothed
        return dict(source.state_dict()), {"kind": "reward", "shape": ",".join(map(str, self.spec.sample_shape))}

    # -- parts
    def loss(self, rows) -> Tensor:
        each = -F.logsigmoid(rows.winner - rows.loser)
        if self.config.ties == "coin":
            return each.mean()
        clear = (~rows.tie).float()
        return (each * clear).sum() / clear.sum().clamp(min=1)

    def penalty(self, rows) -> Tensor | None:
        level = (rows.winner + rows.loser).square().mean()
        rows.told["level"] = level.detach()
        return self.config.center * level if self.config.center else None
