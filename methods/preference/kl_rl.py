"""KL-RL: the expected reward less beta times the KL to the start, maximised (Ziegler et al. 2019, arXiv 1909.08593).

    J = mean_x [ sum_y pi(y | x) r(x, y) - beta KL(pi(. | x) || pi_ref(. | x)) ]

The algorithm of methods/preference/arms.py as it stands: exact sums over arms. The paper samples, by PPO, and adapts beta in
steps of at most a fifth of 0.1 a batch; here by the rule told there.
"""

from __future__ import annotations

from methods.preference.arms import ExactArms


class KLRL(ExactArms):
    pass
