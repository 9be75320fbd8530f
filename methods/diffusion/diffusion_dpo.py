"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908): DPO on errors of the predicted noise,

    L = - mean log sigmoid( -(beta / 2) [ (||e^ - e||^2_w - ref) - (||e^ - e||^2_l - ref) ] / D ),  t uniform

A velocity's error times (1 - t) is the error of the noise that it predicts, so that at equal times this is Flow-DPO with the
theory's weight: part `error` here, `weight=theory` there. `noise_error` off is Flow-DPO with constant beta. Officially beta
5000 with a mean over D, where noise errors are small; the schedule's factor is in it.
Differences: times are uniform in flow's t, not in the steps of a variance-preserving schedule.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from methods.diffusion.flow_dpo import FlowDPO
from runner.interface import knob


class DiffusionDPO(FlowDPO):
    @dataclasses.dataclass(frozen=True)
    class Config(FlowDPO.Config):
        times: str = knob("uniform", "how t is drawn", choices=["logit_normal", "uniform"], source="paper")
        noise_error: bool = knob(True, "errors are those of the predicted noise", source="paper")

    def error(self, rows) -> Tensor:
        m = super().error(rows)
        return m * (1 - rows.t).square() if self.config.noise_error else m
