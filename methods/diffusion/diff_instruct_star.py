"""Diff-Instruct*: one-step generators from human preferences (Luo et al. 2024, arXiv 2410.20898).

Maximise a reward while a distance of scores, not a KL, keeps the generator near its teacher:

    J = E[-reward_weight R(x, c)] + E_t w E_{x_t} d(s_theta(x_t) - s_real(x_t)),   d(y) = sqrt(|y|^2 + c^2) - c

x_t drawn from the generator without a gradient. Its gradient equals that of (score projection)

    L = w y^T (D_fake(x_t) - x) / sqrt(|y|^2 + c^2),   y = D_real(x_t) - D_fake(x_t)

where gradients flow through x and through x_t into both denoisers, whose weights are frozen; c is in the unit of D here.
Detaching both would leave -y / |y|, DMD's direction of length 1.

| knob | |
|---|---|
| divergence | score: as above; kl: DMD's (with a reward: Diff-Instruct++) |
| huber      | c / sqrt(D) |
| guided     | where teacher_guidance w acts. inside: in D_real, as anywhere; outside: D_real stays as it is, and the guidance is
               a reward of its own, + (w - 1) (D_u - D_c)^T x |

The paper's weights: reward_weight 100 on ImageReward, w = 7.5, an SDXL generator distilled before. There is no official training
code; c, optimiser and levels follow its relatives (SIM, SiD). L is a sum over coordinates, DMD's loss a mean: reward_weight
weighs differently in the two.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.diffusion.distillation import Distillation
from runner.interface import knob


class DiffInstructStar(Distillation):
    @dataclasses.dataclass(frozen=True)
    class Config(Distillation.Config):
        reward_weight: float = knob(0.1, "of the world's differentiable proxies in the loss", low=0.0)
        divergence: str = knob("score", "from the teacher: of scores, or the KL", choices=["score", "kl"], source="paper")
        huber: float = knob(1e-3, "c / sqrt(D): where the distance of scores turns from squares to lengths", low=0.0)
        guided: str = knob("inside", "guidance as the teacher's, or as a reward", choices=["inside", "outside"], source="paper",
                           when={"teacher_guidance": 2.0})

    def match(self, rows) -> Tensor:
        c = self.config
        if c.divergence == "kl":
            return super().match(rows)
        x_t, rows.t, rows.u = self.noised("match", rows.x, whole=False)
        fake = self.denoise(self.fake, x_t, rows.t, rows.condition)
        outside = c.guided == "outside"
        real = self.taught(x_t, rows.t, rows.condition) if outside else self.teach(x_t, rows.t, rows.condition)
        rows.x_t, rows.data = x_t.detach(), real.detach()
        apart = (real - fake).flatten(1)
        length = (apart.square().sum(1, keepdim=True) + c.huber ** 2 * apart.shape[1] + 1e-12).sqrt()
        each = (apart / length * (fake - rows.x).flatten(1)).sum(1)
        with torch.no_grad():
            weight = self.weight(rows)
            if outside:
                none = self.taught(rows.x_t, rows.t, torch.full_like(rows.condition, self.spec.classes))
                lean = (c.teacher_guidance - 1) * (none - rows.data)
        if outside:
            each = each + (lean * rows.x).flatten(1).sum(1)
        return weight * each
