"""KL-Cov: a penalty on the tokens of highest covariance of log-probability and advantage (Cui et al. 2025, arXiv 2505.22617).

    l = -A rho                             on all tokens (nothing is clipped)
    l = -A rho + coefficient |lp - lp_old| on the cov_share of the minibatch's tokens with the highest cov (clip_cov.py)
"""

from __future__ import annotations

import dataclasses

import torch

from methods.reasoning.base import GroupPolicy
from methods.reasoning.clip_cov import covariance
from runner.interface import knob


class KLCov(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        cov_share: float = knob(2e-4, "share of the tokens that are penalised, one at least; 0: GRPO, with its clip", low=0.0,
                                high=1.0, source="paper")
        dual_clip: float = knob(0.0, "c: with a negative advantage a token's loss is at most -A c; 0: no bound", low=0.0,
                                when={"cov_share": 0.0})
        coefficient: float = knob(1.0, "of |lp - lp_old|", low=0.0, source="paper")

    def surrogate(self, rows):
        c = self.config
        if not c.cov_share:
            return super().surrogate(rows)
        with torch.no_grad():
            cov = torch.where(rows.mask > 0, covariance(rows), -torch.inf)
            number = torch.clamp((c.cov_share * rows.mask.sum()).long(), min=1)
            chosen = cov.flatten().argsort(descending=True).argsort().view_as(cov) < number
        return -rows.advantage * rows.ratio + c.coefficient * chosen * rows.log_ratio.abs()
