"""R-DPO: DPO against longer answers (Park et al. 2024, arXiv 2403.19159).

    L = -log sigma( beta (rho(y_w) - rho(y_l)) + a (n_w - n_l) ),   n = number of tokens

The margin of a longer winner is counted as reached in part, that of a longer loser is asked for more: the implicit reward is
r - a n, so a > 0 holds length down. The paper calls a alpha. Where responses have one token this is DPO.
"""

from __future__ import annotations

import dataclasses

from methods.preference.pairs import PairPolicy, plus
from runner.interface import knob


class RDPO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        length_price: float = knob(0.01, "a: of a token; the paper's 0.01 for chat, 0.2 for summaries", low=0.0, source="paper")

    def margin(self, pairs):
        a, margin = self.config.length_price, super().margin(pairs)
        return plus(margin, -a * (pairs.length[0] - pairs.length[1])) if a else margin
