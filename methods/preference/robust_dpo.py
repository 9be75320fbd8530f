"""Robust DPO: a loss whose mean over flipped labels is DPO's over the true ones (Ray Chowdhury et al. 2024, arXiv 2403.00409).

    L = [ -(1 - e) log sigma(z) + e log sigma(-z) ] / (1 - 2 e),   z = beta (rho(y_w) - rho(y_l)),   e = flip_rate

Linear in the label, so it is soft DPO with p' = (p - e) / (1 - 2 e), which lies outside [0, 1] where p is certain: the inverse of
cdpo's p' = p (1 - 2 e) + e. Unbiased where every label is turned with probability e, independently. Unbounded below: as
z grows the loss falls like -e z / (1 - 2 e), so that pairs seen once pull without end; the paper and this project train for a
fixed number of steps.
"""

from __future__ import annotations

import dataclasses

from methods.preference.pairs import PairPolicy, logistic
from runner.interface import knob


class RobustDPO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        flip_rate: float = knob(0.1, "e: the share of labels that is known to be wrong", low=0.0, high=0.499, source="paper")

    def link(self, z, pairs):
        e = self.config.flip_rate
        return logistic(z, (pairs.label - e) / (1 - 2 * e))
