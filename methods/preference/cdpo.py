"""Conservative DPO: labels that may be wrong (Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO").

    L = -(1 - e) log sigma(z) - e log sigma(-z),   z = beta (rho(y_w) - rho(y_l)),   e = flip_rate

which is label smoothing: soft DPO with p' = p (1 - 2 e) + e in the place of p = P(y_w beats y_l). Where a pair occurs once its
optimum is bounded, z = log((1 - e) / e); DPO's is not. Under symmetric flips at rate e in the data as well as in the loss the
margins are those of labels flipped twice, smaller than the true ones; robust_dpo undoes the flips instead.
"""

from __future__ import annotations

import dataclasses

from methods.preference.pairs import PairPolicy, logistic
from runner.interface import knob


class CDPO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        flip_rate: float = knob(0.1, "e: the share of labels that is taken to be wrong", low=0.0, high=0.499)

    def link(self, z, pairs):
        e = self.config.flip_rate
        return logistic(z, pairs.label * (1 - 2 * e) + e)
