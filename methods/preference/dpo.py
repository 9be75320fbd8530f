"""DPO: direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290).

    L = mean_b[ -log sigma( beta (rho(y_w) - rho(y_l)) ) ],   rho(y) = log pi(y | x) - log pi_ref(y | x)

The algorithm of methods/preference/pairs.py as it stands. Where pairs carry a probability p that y_w beats y_l, the loss is
the soft one, -p log sigma(z) - (1-p) log sigma(-z); over all pairs with p = sigma(r_i - r_j) its optimum is
pi_ref exp(r / beta) / Z.

The paper trains with RMSprop at 5e-7, 150 steps of warm-up, batches of 64 and the gradient's norm clipped at 10; here AdamW,
with a rate for small models (`paper` size: the paper's). Sums of log-probabilities, as in the official code.
"""

from __future__ import annotations

from methods.preference.pairs import PairPolicy


class DPO(PairPolicy):
    pass
