"""PPO-Lagrangian: PPO under cost limits, by a multiplier for each (Ray, Achiam and Amodei 2019, "Benchmarking Safe
Exploration in Deep Reinforcement Learning").

The policy climbs the Lagrangian's advantage (part objective), the multipliers climb the surplus once an iteration:

    A <- (A - sum_j lambda_j A_Cj) / (1 + sum_j lambda_j)
    lambda_j <- max(0, lambda_j + eta (J_Cj - d_j))

| symbol | name |
|---|---|
| d | cost_limit (per episode, undiscounted) |
| J_C | cost_return |
| eta | multiplier_rate |

A is in units of the scaled reward, so lambda is scaled reward per cost. cost_limit < 0 means no constraint: PPO. Differences
from the official code (openai/safety-starter-agents): plain gradient ascent on lambda, not Adam on its softplus.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.control.ppo import PPO
from runner.interface import knob


class PPOLagrangian(PPO):
    @dataclasses.dataclass(frozen=True)
    class Config(PPO.Config):
        cost_limit: float = knob(0.5, "d: cost allowed per episode, for every channel; below 0: no constraint")
        multiplier_rate: float = knob(0.05, "eta: step of the multipliers", low=0.0, source="project's choice")
        multiplier: float = knob(0.0, "lambda at the start", low=0.0)

    def limits(self, spec):
        return [self.config.cost_limit] * spec.costs if self.config.cost_limit >= 0 else []

    def setup(self, spec):
        super().setup(spec)
        if self.constrained:
            self.register_buffer("multipliers", torch.full_like(self.limit, self.config.multiplier))

    def objective(self, data):
        advantage = super().objective(data)
        if not self.constrained:
            return advantage
        self.multipliers.add_(self.config.multiplier_rate * (self.cost_return - self.limit)).clamp_(min=0)
        self.told["multiplier"] = self.multipliers.max()
        self.told["surplus"] = (self.cost_return - self.limit).max()
        return (advantage - data["cost_advantage"] @ self.multipliers) / (1 + self.multipliers.sum())
