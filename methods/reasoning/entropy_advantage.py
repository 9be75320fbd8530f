"""Entropy-based advantage shaping: uncertain tokens count for more (Cheng et al. 2025, arXiv 2506.14758).

    A_{i,t} <- A_{i,t} + min(alpha sg(H_{i,t}), |A_{i,t}| / kappa)

H is the current policy's exact entropy, as a number: unlike an entropy bonus, nothing but the log-probability is differentiated.
For kappa > 1 no advantage changes its sign; at 1, as in one re-implementation, a negative one can become 0. Where A is 0 nothing
is added. Not reproduced: the paper's gain in pass@k of 7B models.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.reasoning.base import GroupPolicy
from runner.interface import knob


class EntropyAdvantage(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        entropy_alpha: float = knob(0.4, "alpha; 0: GRPO", low=0.0, source="paper")
        kappa: float = knob(2.0, "at most this part of an advantage is added to it", low=1.0, source="paper")

    def weigh(self, rows):
        super().weigh(rows)
        c = self.config
        if not c.entropy_alpha:
            return
        more = torch.minimum(c.entropy_alpha * rows.now["entropy"].detach(), rows.advantage.abs() / c.kappa) * rows.mask
        rows.advantage = rows.advantage + more
        rows.told["advantage_added"] = more.sum() / rows.mask.sum().clamp(min=1)
