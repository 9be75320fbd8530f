"""Distribution matching distillation (Yin et al. 2023, arXiv 2311.18828) without its regression loss: a one-step generator
descends the KL from its own distribution to the teacher's at every level of noise,

    grad = E[ w (D_fake(x_t) - D_real(x_t)) dG / dtheta ],   w = 1 / mean_d |x - D_real(x_t)|

This is the family's base as it stands (methods/diffusion/distillation.py); with normaliser=none it is Diff-Instruct (Luo et al.
2023, arXiv 2305.18455), with reward_weight and that Diff-Instruct++.
"""

from __future__ import annotations

from methods.diffusion.distillation import Distillation


class DMD(Distillation):
    pass
