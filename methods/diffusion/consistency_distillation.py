"""Consistency distillation (Song et al. 2023, arXiv 2303.01469): the neighbour of a noisy point lies on the teacher's path, one
step of an ODE solver down, where consistency training keeps the data and the noise:

    partner   euler: x' = x + (s_i - s_{i+1}) d(x, s_{i+1}),  d(x, s) = (x - D(x, s)) / s
              heun: the mean of d at both ends instead (the paper's)
    schedule  N = `levels`, constant

The rate of the target's average is target_rate^(first / N), and first = levels makes it target_rate. Difference from the official
code: squares where the paper's images have LPIPS. The teacher is the world's exact distribution, or the network that the world
offers to start from; with teacher_guidance the student learns guided samples.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.diffusion import edm, flow
from methods.diffusion.consistency import Consistency
from methods.diffusion.teacher import Taught
from runner.interface import Spec, knob


class ConsistencyDistillation(Taught, Consistency):
    @dataclasses.dataclass(frozen=True)
    class Config(Consistency.Config):
        gradient_norm: float = knob(0.0, "bound of the gradient's norm; 0: none", low=0.0, when={"levels": 2})
        first: int = knob(18, "pairs of levels at the start of the run", low=1)
        last: int = knob(150, "and at its end", low=1, when={"levels": 0})
        levels: int = knob(18, "N; 0: it grows from `first` to `last`", low=0, source="paper")
        solver: str = knob("heun", "how the neighbour is found; data: as in consistency training", source="paper",
                           choices=["euler", "heun", "data"])
        teacher: str = knob("auto", "the world's exact distribution, the network that it offers to start from, or the first "
                            "where there is one", choices=["auto", "exact", "start"])
        teacher_guidance: float = knob(1.0, "w: classifier-free guidance of the teacher; 1: none")

    @property
    def asks_teacher(self):
        return self.config.solver != "data"

    @property
    def begins_as(self):
        return "velocity" if self.learns_from_start else self.kind

    @property
    def keeps_start(self):
        return self.learns_from_start

    starts = keeps_start

    def setup(self, spec: Spec):
        super().setup(spec)
        self.find_teacher()

    def load_start(self, start):
        if start:
            self.fill(self.reference, start)
            self.begun = True

    def update(self, batch):
        self.require_start()
        return super().update(batch)

    def slope(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """dx / dsigma of the teacher's path."""
        t = edm.to_time(sigma)
        return (x - self.teach(x * flow.rows(1 - t, x), t, condition)) / flow.rows(sigma, x)

    # -- parts
    def schedule(self) -> Tensor:
        if not self.config.levels:
            return super().schedule()
        return torch.full_like(self.made, max(self.config.levels, 2))

    def partner(self, rows) -> Tensor:
        if self.config.solver == "data":
            return super().partner(rows)
        x, gap = rows.at_high, flow.rows(rows.low - rows.high, rows.x)
        slope = self.slope(x, rows.high, rows.condition)
        if self.config.solver == "heun":
            slope = 0.5 * (slope + self.slope(x + gap * slope, rows.low, rows.condition))
        return x + gap * slope
