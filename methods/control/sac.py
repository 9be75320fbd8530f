"""SAC: soft actor-critic with a learned temperature (Haarnoja et al. 2018, arXiv 1812.05905).

The algorithm of methods/control/soft.py as it stands: twin critics, a tanh-Gaussian actor, entropy in the target and in
the actor's loss, the temperature driven to an entropy of -A.

Differences from the official code: one learning rate of 3e-4 for all (the paper's); log standard deviations are bounded
by a tanh to [-5, 2] instead of a clip to [-20, 2], which passes no gradient beyond its bounds.
"""

from __future__ import annotations

from methods.control.soft import SoftActorCritic


class SAC(SoftActorCritic):
    pass
