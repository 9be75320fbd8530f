"""PointMass: a point in three dimensions to be held at the origin; small enough for tests, with a teacher in closed form.

    v <- clip(v + .1 (3 a + g sin p - c v), +-20),  p <- clip(p + .1 v, +-20)
    reward -(|p|^2 + .1 |v|^2 + .01 |a|^2) at the state before the step; start p, v ~ N(0, 1); 100 steps, no termination

Stable: g = 0, c = .5. Unstable (gravity .5, drag 0): small errors of a student matter. The teacher's mean is
tanh(-2 p - 1.5 v), its standard deviation e^-1.5, not squashed. The numbers are this project's choice.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from envs.control.base import ControlWorld
from envs.control.copies import OwnCopies
from runner.interface import knob

HORIZON = 100


class PointMassCopies(OwnCopies):
    observation_size, action_size, horizon = 6, 3, HORIZON

    def __init__(self, number: int, gravity: float, drag: float):
        super().__init__(number)
        self.gravity, self.drag = gravity, drag

    def start(self, generator):
        return generator.standard_normal(6)

    def dynamics(self, state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """state (…, 6), action (…, 3) in [-1, 1] -> next state, reward (…,)"""
        p, v = state[..., :3], state[..., 3:]
        reward = -((p * p).sum(-1) + 0.1 * (v * v).sum(-1) + 0.01 * (action * action).sum(-1))
        v = np.clip(v + 0.1 * (3 * action + self.gravity * np.sin(p) - self.drag * v), -20, 20)
        return np.concatenate([np.clip(p + 0.1 * v, -20, 20), v], -1), reward

    def advance(self, index, action):
        return *self.dynamics(self.state[index], action), False


class PointMassTeacher:
    observation_size, action_size, std = 6, 3, math.exp(-1.5)

    def mean(self, observation: torch.Tensor) -> torch.Tensor:
        """(n, 6) -> (n, 3)"""
        return torch.tanh(-2 * observation[:, :3] - 1.5 * observation[:, 3:])


class PointMass(ControlWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(ControlWorld.Config):
        gravity: float = knob(0.5, "g: pull away from the origin; 0.5 is the unstable version", source="project's choice")
        drag: float = knob(0.0, "c: 0.5 in the stable version", low=0.0, source="project's choice")
        teacher_std: float = knob(0.22313, "the teacher's own standard deviation, e^-1.5", low=1e-6, source="project's choice")

    def copies(self, number, **options):
        if options:
            from runner.errors import UserError
            raise UserError("env pointmass has no picture to render; video works for simulators such as halfcheetah")
        return PointMassCopies(number, self.config.gravity, self.config.drag)

    def teacher(self):
        teacher = PointMassTeacher()
        teacher.std = self.config.teacher_std
        return teacher
