"""DDPG: deep deterministic policy gradient (Lillicrap et al. 2016, arXiv 1509.02971).

The family's base algorithm as it stands (methods/control/base.py): one critic, no smoothing of the target action, actor
and targets moved at every update. BEER and others call it DPG.

Differences from the paper: Gaussian instead of Ornstein-Uhlenbeck noise, two hidden layers of 256, Adam 3e-4 for both
networks, no weight decay, no batch normalisation: the settings of the TD3 comparison, so that td3 differs from ddpg by
TD3's three changes and by nothing else.
"""

from __future__ import annotations

from methods.control.base import ActorCritic


class DDPG(ActorCritic):
    pass
