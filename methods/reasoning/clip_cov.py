"""Clip-Cov: no gradient on a few tokens that would sharpen the policy most (Cui et al. 2025, arXiv 2505.22617).

    cov_{i,t} = (A - mean A)(lp - mean lp), means over the response tokens of the minibatch

Entropy falls by the covariance of log-probability and advantage. Of the tokens whose ratio is not clipped and whose cov lies in
(cov_low, cov_high), max(1, cov_share * N) are drawn at random and taken out of the loss; the denominator keeps them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.reasoning.base import GroupPolicy
from runner.interface import knob


def covariance(rows) -> Tensor:
    """(b, T), 0 off the mask."""
    share = rows.mask / rows.mask.sum().clamp(min=1)
    a, lp = rows.advantage, rows.log_prob.detach()
    return (a - (a * share).sum()) * (lp - (lp * share).sum()) * rows.mask


class ClipCov(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        cov_share: float = knob(2e-4, "share of the tokens that are taken out, one at least; 0: none", low=0.0, high=1.0,
                                source="paper")
        cov_low: float = knob(1.0, "lower end of the covariances that are looked at", source="paper")
        cov_high: float = knob(5.0, "their upper end", source="paper")

    def weigh(self, rows):
        super().weigh(rows)
        c = self.config
        if not c.cov_share:
            return
        cov = covariance(rows)
        outside = ((rows.ratio < 1 - rows.low) & (rows.advantage < 0)) | ((rows.ratio > 1 + rows.high) & (rows.advantage > 0))
        among = (cov > c.cov_low) & (cov < c.cov_high) & (rows.mask > 0) & ~outside
        number = torch.clamp((c.cov_share * rows.mask.sum()).long(), min=1)
        key = torch.where(among, self.noise(f"cov{rows.number}", tuple(cov.shape), "uniform"), -1.0)
        rank = key.flatten().argsort(descending=True).argsort().view_as(key)
        out = among & (rank < number)
        rows.weight = rows.weight * ~out
        rows.told["taken_out"] = out.float().sum() / rows.mask.sum()
