"""Rewards for short responses: the baselines of DRPO, on any advantage (`rloo+length_penalty` is the first paper's).

    normalised   r = c (1 - alpha sigmoid((T_i - mean T) / std T)), mean and std over the group's correct responses
                 (Arora & Zanette 2025, arXiv 2502.04463: RLOO-LP)
    linear       r = c (1 - alpha T_i / T_max)
    adaptive     r = c - alpha (T_i / T_max) max(solve rate of the prompt, 1/G)       (ALP, arXiv 2506.05256)

Each is what it takes off the verifier's reward. Inside a group's mean a long correct response can get a negative advantage:
`right_pushed_down` tells the share of the correct ones that do. std is the population's, plus 1e-7 as in the paper's code;
a single correct response is of mean length. T_max is the constant length of a response.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.reasoning.base import GroupPolicy
from methods.reasoning.disco import group_sums
from runner.interface import knob


class LengthPenalty(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        length_alpha: float = knob(0.2, "alpha; 0: none", low=0.0, source="paper")
        length_form: str = knob("normalised", "see above", choices=["normalised", "linear", "adaptive"])

    def reward(self, batch):
        reward, c = super().reward(batch), self.config
        if not c.length_alpha:
            return reward
        right, length, group = (batch["correct"] > 0).float(), batch["length"], batch["group"]
        share = length / self.response_length()
        count, size = group_sums(right, group), group_sums(torch.ones_like(right), group)
        if c.length_form == "linear":
            return reward - c.length_alpha * right * share
        if c.length_form == "adaptive":
            return reward - c.length_alpha * share * torch.maximum(count, torch.ones_like(count)) / size
        mean = group_sums(right * length, group) / count.clamp(min=1)
        deviation = (group_sums(right * (length - mean).square(), group) / count.clamp(min=1)).sqrt()
        return reward - c.length_alpha * right * torch.sigmoid((length - mean) / (deviation + 1e-7))

    def observe(self, batch, old):
        super().observe(batch, old)
        right = (batch["correct"] > 0).float()
        advantage = (batch["advantage"] * batch["mask"]).sum(1)
        self.told["right_pushed_down"] = ((advantage < 0) * right).sum() / right.sum().clamp(min=1)
