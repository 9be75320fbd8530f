"""PPO: proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347), the clipped form.

Two changes to A2C's losses (methods/control/onpolicy.py):

    policy   mean max( -A rho, -A clip(rho, 1-eps, 1+eps) )
    value    0.5 mean max( (V-R)^2, (V_old + clip(V-V_old, -eps, eps) - R)^2 )

| symbol | name |
|---|---|
| eps | clip |
| c_e, c_v | entropy_weight, value_weight |
| gamma, lambda | discount, trace |

The paper clips the policy alone; its official code (openai/baselines) clips the value, too, and normalises observations,
rewards and advantages: the defaults here, with the settings of the common reimplementations (Huang et al. 2022). Different
from these: episodes that end by time go on in the value of their last observation, and the normalisation of observations
stands still during an iteration.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.control.a2c import A2C
from runner.interface import knob


class PPO(A2C):
    @dataclasses.dataclass(frozen=True)
    class Config(A2C.Config):
        clip: float = knob(0.2, "eps: bound of the ratio's distance from 1; 0: no clipping", low=0.0, source="paper, table 3")
        clip_values: bool = knob(True, "bound the value's change by eps, too", source="openai/baselines", when={"clip": 0.2})

    def policy_loss(self, mini, ratio):
        eps = self.config.clip
        if eps == 0:
            return super().policy_loss(mini, ratio)
        loss = -mini["advantage"] * ratio
        return torch.maximum(loss, -mini["advantage"] * ratio.clamp(1 - eps, 1 + eps)).mean()

    def value_loss(self, mini, value):
        eps = self.config.clip
        if eps == 0 or not self.config.clip_values:
            return super().value_loss(mini, value)
        near = mini["value"] + (value - mini["value"]).clamp(-eps, eps)
        return 0.5 * torch.maximum((value - mini["return"]).square(), (near - mini["return"]).square()).mean()
