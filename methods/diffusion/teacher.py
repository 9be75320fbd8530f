"""A frozen teacher: the world's exact distribution, or the network that the world offers to start from, a velocity.

For generators whose Config has `teacher` (auto, exact, start) and `teacher_guidance`. The network is kept as `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.diffusion import flow
from runner.errors import UserError


class Taught:
    begun = False        # whether the world's weights came, or the policy's own (policy.path)
    asks_teacher = True

    @property
    def learns_from_start(self) -> bool:
        """Whether the teacher is the network that the world offers."""
        kind = self.config.teacher
        return self.asks_teacher and (kind == "start" or kind == "auto" and self.spec.exact is None)

    def find_teacher(self):
        self.mixture = None if self.learns_from_start else self.spec.exact
        if self.config.teacher == "exact" and self.spec.exact is None:
            raise UserError("method.teacher=exact: this env knows no exact distribution\nenvs of mixtures do, such as ring; or "
                            "take the network that it offers to start from: method.teacher=start")

    def require_start(self):
        if self.starts and not self.begun:
            raise UserError("there are no weights to start or to learn from\nmethod.teacher and method.initial want a trained "
                            "velocity: a finished run of flow_matching on this env (policy.path=FOLDER), or what the env "
                            "offers (env.start=shipped or own), where it does")

    def taught(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """D_real(x_t, t) (n, …) without guidance."""
        v = self.mixture.velocity(x, t, condition) if self.mixture is not None else self.reference(x, t, condition).float()
        return flow.to_data(x, v, t)

    def teach(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """D_real, guided."""
        w, data = self.config.teacher_guidance, self.taught(x, t, condition)
        if w == 1:
            return data
        return data + (w - 1) * (data - self.taught(x, t, torch.full_like(condition, self.spec.classes)))
