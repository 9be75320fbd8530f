"""The 80/20 rule: policy gradients only on the tokens of highest entropy (Wang et al. 2025, arXiv 2506.01939).

    mask'_{i,t} = m 1[H_old > quantile_{1 - share} of H_old over the batch]

One threshold for the whole batch, from the policy that sampled. renormalise=false keeps all tokens in the denominator (TRL): the
loss, and with it the step, shrinks to about `share`, a change that alone stabilises; true divides by the tokens that are left.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.reasoning.base import GroupPolicy
from runner.interface import knob


class TopEntropy(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        share: float = knob(0.2, "of the tokens that are learned from; 1: all", low=0.0, high=1.0, source="paper")
        renormalise: bool = knob(False, "divide by the tokens that are left")

    def observe(self, batch, old):
        super().observe(batch, old)
        self.threshold = torch.quantile(old["entropy"][batch["mask"] > 0], 1 - self.config.share)

    def weigh(self, rows):
        super().weigh(rows)
        if self.config.share == 1.0:
            return
        rows.weight = rows.weight * (rows.old["entropy"] > self.threshold)
        if self.config.renormalise:
            rows.weight = rows.weight * rows.tokens / self.engine.mean((rows.weight * rows.mask).sum()).clamp(min=1)
