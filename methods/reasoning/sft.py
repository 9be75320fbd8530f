"""Supervised fine-tuning: cross-entropy on the response tokens of demonstrations,

    L = - sum_t m_t log pi(y_t | x, y_<t) / sum_t m_t

The algorithm of methods/tokens/demonstrated.py as it stands. Starting points of reinforcement are made by it: `python -m runner
data build countdown`.
"""

from __future__ import annotations

from methods.tokens.demonstrated import Demonstrated


class SFT(Demonstrated):
    pass
