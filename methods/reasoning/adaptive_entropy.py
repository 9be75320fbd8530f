"""Adaptive entropy bonus: a weight that rises while entropy is below a target (as in Skywork-OR1, arXiv 2505.22312, and TRL).

    L = L_GRPO - c_k mean_t H;   c_{k+1} = clip(c_k + step if H_k <= H_target else c_k - step, 0, most)

H_k is the mean entropy of the batch at the start of update k; the bonus is off in an update whose H_k is above the target.
Started at 0. TRL's step is 0.005 and its target 0.2. The mean is over tokens, whatever the policy loss does.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.reasoning.base import GroupPolicy, plus
from runner.interface import knob


class AdaptiveEntropy(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        entropy_target: float = knob(0.2, "H_target, nats a token", low=0.0, source="TRL")
        entropy_step: float = knob(0.005, "change of the weight an update", low=0.0, source="TRL")
        most_weight: float = knob(1.0, "upper bound of the weight; 0: no bonus", low=0.0, source="TRL")

    def setup(self, spec):
        super().setup(spec)
        self.register_buffer("entropy_weight", torch.zeros(()))
        self.register_buffer("entropy_on", torch.zeros(()))

    def observe(self, batch, old):
        super().observe(batch, old)
        c, mask = self.config, batch["mask"]
        entropy = self.engine.mean((old["entropy"] * mask).sum() / mask.sum())
        low = entropy <= c.entropy_target
        self.entropy_weight.add_(torch.where(low, c.entropy_step, -c.entropy_step)).clamp_(0.0, c.most_weight)
        self.entropy_on.copy_(low)
        self.told["entropy_weight"] = self.entropy_weight.clone()

    def penalty(self, rows):
        penalty = super().penalty(rows)
        if not self.config.most_weight:
            return penalty
        bonus = self.aggregate(rows.now["entropy"], rows, "token_mean")
        return plus(penalty, -self.entropy_weight * self.entropy_on * bonus)
