"""Flow matching (Lipman et al. 2023, arXiv 2210.02747; rectified flow: Liu et al. 2022, arXiv 2209.03003): a network learns the
velocity of straight lines from data to noise,

    L = E || v(x_t, t, c) - (e - x0) ||^2 / D,   x_t = (1 - t) x0 + t e,

and follows it back from noise. This is the family's base as it stands (methods/diffusion/regression.py): t is a sigmoid of a
normal, as in Stable Diffusion 3 (Esser et al. 2024), and the condition is left out in a tenth of the rows, so that guidance can
be had.
"""

from __future__ import annotations

from methods.diffusion.regression import Regression


class FlowMatching(Regression):
    pass
