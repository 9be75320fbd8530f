"""Data sets of PointMass, in closed form: played by known policies from a fixed seed, the same on every machine.

    medium   200 episodes of tanh(-0.3 p - 0.1 v) + 0.3 noise
    mix      160 episodes of uniformly random actions and 40 of the teacher (with its own noise, e^-1.5)
    replay   200 episodes of the teacher with noise that falls from 1 to 0.1

The stable version (g = 0, c = .5) unless set otherwise. `score` is 100 (J - J_uniform) / (J_teacher - J_uniform) on the
evaluation's own start states; `log_regret` log10(1 + J_teacher - J), because the score saturates.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from envs.control.base import EVALUATION_SEED
from envs.control.pointmass import PointMass
from runner.interface import Metric, knob

DATA_SEED = 4242


class ScoredPointMass(PointMass):
    """PointMass with returns put between those of uniform actions and of the teacher."""

    metrics = {
        **PointMass.metrics,
        "score": Metric("max", "", "return, 0 for uniform actions and 100 for the teacher"),
        "log_regret": Metric("min", "log10 reward", "log10(1 + J_teacher - J)"),
    }

    def evaluate(self, method, seed):
        result = super().evaluate(method, seed)
        bounds = self._bounds()
        low, high = bounds["random policy"]["return"], bounds["teacher"]["return"]
        result["score"] = 100 * (result["return"] - low) / (high - low)
        result["log_regret"] = math.log10(1 + max(0.0, high - result["return"]))
        return result

    def _bounds(self) -> dict[str, dict[str, float]]:
        if not hasattr(self, "_known"):
            mean = self.teacher().mean
            self._known = {"teacher": self._summary(self.play(mean, self.config.episodes, EVALUATION_SEED)),
                           **super().references(0)}
        return self._known

    def references(self, seed: int):
        return self._bounds()


class PointMassData(ScoredPointMass):
    @dataclasses.dataclass(frozen=True)
    class Config(ScoredPointMass.Config):
        data: str = knob("medium", "which data set", choices=["medium", "mix", "replay"], source="project's choice")
        data_episodes: int = knob(200, "episodes of 100 steps in it", low=1, source="project's choice")

    def columns(self) -> dict[str, Tensor]:
        c, generator = self.config, np.random.default_rng(DATA_SEED)
        n, horizon = c.data_episodes, 100
        teacher = lambda s: np.tanh(-2 * s[:, :3] - 1.5 * s[:, 3:])  # noqa: E731
        medium = lambda s: np.tanh(-0.3 * s[:, :3] - 0.1 * s[:, 3:])  # noqa: E731
        if c.data == "medium":
            groups = [(n, medium, np.full(n, 0.3))]
        elif c.data == "mix":
            experts = math.ceil(n / 5)
            groups = [(n - experts, None, None), (experts, teacher, np.full(experts, math.exp(-1.5)))]
        else:
            groups = [(n, teacher, np.linspace(1.0, 0.1, n))]
        parts = [self._episodes(number, policy, std, horizon, generator) for number, policy, std in groups if number]
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    def _episodes(self, number, policy, std, horizon, generator) -> dict[str, Tensor]:
        copies = self.copies(number)
        state = generator.standard_normal((number, 6))
        steps = []
        for _ in range(horizon):
            action = generator.uniform(-1, 1, (number, 3)) if policy is None else \
                np.clip(policy(state) + std[:, None] * generator.standard_normal((number, 3)), -1, 1)
            after, reward = copies.dynamics(state, action)
            steps.append((state, action, reward, after))
            state = after
        columns = [torch.from_numpy(np.stack(part, 1)).float().flatten(0, 1) for part in zip(*steps)]  # by episode
        observation, action, reward, after = columns
        start = torch.zeros(number, horizon)
        start[:, 0] = 1
        return {"observation": observation, "action": action, "reward": reward, "terminated": torch.zeros(len(reward)),
                "next_observation": after, "start": start.flatten()}
