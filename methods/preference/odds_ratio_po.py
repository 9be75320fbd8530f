"""ORPO: imitation with an odds ratio beside it, in one stage and without a reference (Hong et al. 2024, arXiv 2403.07691).

    L = NLL(y_w) - lambda log sigma( log odds(y_w) - log odds(y_l) ),   log odds(y) = s - log(1 - e^s),   s = l(y) / n

s is the mean log-probability of a token, NLL(y_w) = -s(y_w), both averaged over the batch. beta scales the difference of log
odds; the paper has none (1). s is cut at -1e-6: a response that is certain has no odds.

With score=log_ratio, nll 0, odds_weight 1 this is DPO. (The project has other methods named ORPO; hence the long name.)
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from methods.preference.pairs import PairPolicy, plus, preferred, times
from runner.interface import knob


class OddsRatioPO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        beta: float = knob(1.0, "scale of the difference of log odds", low=0.0, source="paper")
        odds_weight: float = knob(0.1, "lambda", low=0.0, source="paper")
        nll: float = knob(1.0, "weight of the preferred response's negative log-likelihood a token", low=0.0, source="paper")
        score: str = knob("log_odds", "what is compared: log odds, or DPO's log-ratios", choices=["log_odds", "log_ratio"],
                          source="paper")

    def needs_reference(self):
        return self.config.score == "log_ratio"

    def worth(self, pairs):
        return super().worth(pairs) if self.config.score == "log_ratio" else log_odds(per_token(pairs))

    def weigh(self, z, pairs):
        return times(super().weigh(z, pairs), torch.full_like(z, self.config.odds_weight))

    def penalty(self, pairs):
        nll, penalty = self.config.nll, super().penalty(pairs)
        return plus(penalty, -nll * preferred(per_token(pairs), pairs.label).mean()) if nll else penalty


def per_token(pairs) -> Tensor:
    """s (2, b)"""
    return (pairs.log_prob * pairs.mask).sum(-1) / pairs.length.clamp(min=1)


def log_odds(s: Tensor) -> Tensor:
    """s - log(1 - e^s), elementwise, accurate for s near 0 and for s far below it."""
    s = s.clamp(max=-1e-6)
    near = s > -math.log(2)
    return s - torch.where(near, (-torch.expm1(torch.where(near, s, -1.0))).log(), torch.log1p(-torch.where(near, -1.0, s).exp()))
