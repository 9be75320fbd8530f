"""A reward model of samples: the Bradley-Terry likelihood of pairs (Christiano et al. 2017, arXiv 1706.03741),

    L = - mean log sigma( r(x_w, c) - r(x_l, c) ) + center mean (r_w + r_l)^2.

The base of this family's reward models as it stands (methods/diffusion/judging.py): what it learns from, and how a finished run
rewards other methods. Its sister for responses is reward_model (methods/preference).
"""

from __future__ import annotations

from methods.diffusion.judging import Judging


class SampleRewardModel(Judging):
    pass
