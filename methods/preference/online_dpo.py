"""Online DPO: DPO on pairs of the policy's own responses, judged as they come (Guo et al. 2024, arXiv 2402.04792).

    y, y' ~ pi_t(. | x);  the oracle says which is preferred;  L = -log sigma( beta (rho(y_w) - rho(y_l)) )

The algorithm of methods/preference/online.py as it stands. The oracle is the env's: the greater true reward, or, where
preferences are no order, its matrix. The paper asks a language model, and takes one step a batch of samples.
"""

from __future__ import annotations

from methods.preference.online import OnlinePairs


class OnlineDPO(OnlinePairs):
    pass
