"""Consistency training (Song et al. 2023, arXiv 2303.01469): a one-step generator learned from data alone,

    L = E d( f_theta(x0 + s_{i+1} e, s_{i+1}),  f_target(x0 + s_i e, s_i) ),

the same noise at two neighbouring levels, ever more of them. This is the family's base as it stands
(methods/diffusion/consistency.py), with squares where the paper's images have LPIPS.
"""

from __future__ import annotations

from methods.diffusion.consistency import Consistency


class ConsistencyTraining(Consistency):
    pass
