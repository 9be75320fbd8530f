"""Cal-QL: calibrated conservative Q-learning (Nakamoto et al. 2023, arXiv 2303.05479).

CQL never pushes values of the policy's actions below what the data's own behaviour earned from there:

    Q_i(s, a_p), Q_i(s, a_n)  <-  max( Q_i(s, .), G(s) )      inside the log-sum-exp, before the correction by densities;

the uniform actions are left alone (part sampled_values). G is the discounted Monte-Carlo return-to-go of the logged
trajectory, computed once before training; a maximum that takes G passes no gradient. calibrated = false is CQL.

G ends where the log does: at a time limit nothing is added for what would have followed, as in the official code
(nakamotoo/Cal-QL). That makes G too high near the ends of episodes whose rewards are negative.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.control.cql import CQL
from runner.errors import UserError
from runner.interface import knob


class CalQL(CQL):
    @dataclasses.dataclass(frozen=True)
    class Config(CQL.Config):
        calibrated: bool = knob(True, "bound the values of the policy's actions from below by the data's returns",
                                source="paper, sec. 5")

    def prepare(self, data):
        replaced = super().prepare(data)
        if not self.config.calibrated:
            return replaced
        if "start" not in data:
            raise UserError("cal_ql computes returns along trajectories: the data set must say where episodes begin ('start')")
        returns = returns_to_go(data["reward"], data["terminated"], data["start"], self.config.discount)
        return {**(replaced or data), "return_to_go": returns.to(data["reward"].dtype)}

    # -- parts
    def sampled_values(self, batch):
        values, log_density = super().sampled_values(batch)
        if not self.config.calibrated or "return_to_go" not in batch:  # online transitions have no returns yet
            return values, log_density
        n = self.config.sampled_actions
        bound = batch["return_to_go"].unsqueeze(-2).unsqueeze(-2)
        batch["bound_rate"] = (values.detach()[..., n:, :] < bound).to(values.dtype).mean((-3, -2, -1))
        return torch.cat([values[..., :n, :], torch.maximum(values[..., n:, :], bound)], -2), log_density

    def update_models(self, batch):
        metrics = super().update_models(batch)
        return metrics | ({"bound_rate": batch["bound_rate"]} if "bound_rate" in batch else {})


def returns_to_go(reward: Tensor, terminated: Tensor, start: Tensor, discount: float) -> Tensor:
    """Discounted sums of rewards to the end of each episode, (N,) in float64: G_t = r_t + discount G_{t+1} within an episode.

    By doubling: after k rounds sum holds 2^k steps, factor what the next 2^k are multiplied with."""
    total = reward.double().clone()
    ends = torch.cat([start[1:] > 0, start.new_ones(1) > 0]) | (terminated > 0)
    factor = torch.full_like(total, discount).masked_fill_(ends, 0.0)
    step = 1
    while step < len(total):
        total[:-step] = total[:-step] + factor[:-step] * total[step:]
        factor[:-step] = factor[:-step] * factor[step:]
        factor[-step:] = 0.0
        step *= 2
    return total
