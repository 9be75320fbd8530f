"""Flow-RWR (Liu et al. 2025, arXiv 2501.13918): reward-weighted regression of a flow,

    L = mean_i w_i m_i + velocity_kl mean_d (v - v_ref)^2,   w_i = exp(r_i / beta) / mean_j exp(r_j / beta)

over all samples of the pairs, winners and losers; r standardised over the batch, weights of mean 1, so that neither the
reward's scale nor its offset changes the step. beta -> infinity is flow matching on all samples. `raw` weights by the reward
itself, as the public code does, which has no such invariance.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from methods.common.parts import add
from methods.diffusion.preferences import PairRegression
from runner.interface import knob


class FlowRWR(PairRegression):
    @dataclasses.dataclass(frozen=True)
    class Config(PairRegression.Config):
        beta: float = knob(1.0, "temperature of the weights, in deviations of the reward; 0: fine-tuning on winners", low=0.0,
                           source="paper")
        raw: bool = knob(False, "the reward itself is the weight, as in the public code")
        velocity_kl: float = knob(0.0, "weight of the distance to the start's velocity", low=0.0)

    @property
    def keeps_start(self):
        return self.config.velocity_kl > 0

    def loss(self, rows) -> Tensor:
        c = self.config
        if not c.beta:
            return super().loss(rows)
        if c.raw:
            return (rows.reward * rows.error).mean()
        r = (rows.reward - rows.reward.mean()) / (rows.reward.std() + 1e-6)
        return ((r / c.beta).softmax(0) * rows.error).sum()

    def penalty(self, rows) -> Tensor | None:
        more = super().penalty(rows)
        if not self.config.velocity_kl:
            return more
        own = self.config.velocity_kl * (rows.v - self.reference_velocity(rows)).square().mean()
        return add(more, own)
