"""DanceGRPO (Xue et al. 2025, arXiv 2505.07818): Flow-GRPO's contemporary. What differs:

    transition  the SDE's noise is one constant, sigma = eta (0.3), instead of a sqrt(t / (1 - t)): `sde=dance`; then k = 1 +
                eta^2 (1 - t) / 2t depends on the step
    initial     all rollouts of a condition begin at the same noise (`shared`), so that what their advantages tell comes from
                the steps alone

Not reproduced: only a random 60 % of the steps are trained there (all are here), and best-of-n selection of rollouts.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from methods.diffusion.policy_gradient import FlowPolicy
from runner.interface import knob


class DanceGRPO(FlowPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(FlowPolicy.Config):
        sde: str = knob("dance", "kind of the stochastic steps", choices=["flow", "dance", "cps", "ddim"], source="paper")
        noise_level: float = knob(0.3, "eta: of the stochastic steps", low=1e-6, source="paper")
        shared: bool = knob(True, "rollouts of a condition begin at the same noise", source="paper")

    def initial(self, number: int, points: int) -> Tensor:
        if not self.config.shared:
            return super().initial(number, points)
        each = self.noise("start", (number // self.config.samples, points, *self.spec.sample_shape))
        return each.repeat_interleave(self.config.samples, 0)
