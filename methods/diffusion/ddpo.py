"""DDPO (Black et al. 2023, arXiv 2305.13301): policy gradients over the steps of DDPM's sampler, which here are DDIM's with eta
= 1 in rectified flow's scale (methods/diffusion/flow.py, `ddim`): the same clipped ratio of step densities, means over
dimensions, as in Flow-GRPO, which took them from here.

Differences: the network is one of velocities, and its time is flow's; DDPO's own advantage is normalised by statistics kept for
every prompt over batches, here by those of the batch's group; its defaults for images: eps 1e-4, one pass, no KL.
"""

from __future__ import annotations

import dataclasses

from methods.diffusion.policy_gradient import FlowPolicy
from runner.interface import knob


class DDPO(FlowPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(FlowPolicy.Config):
        sde: str = knob("ddim", "kind of the stochastic steps", choices=["flow", "dance", "cps", "ddim"], source="paper")
        noise_level: float = knob(1.0, "eta: of DDIM", low=1e-6, source="paper")
