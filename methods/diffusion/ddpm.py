"""DDPM (Ho et al. 2020, arXiv 2006.11239), generated from by DDIM's steps (Song et al. 2020, arXiv 2010.02502).

    x_k = sqrt(ab_k) x0 + sqrt(1 - ab_k) e,   ab_k = prod_{l <= k} (1 - b_l),   k = 0 … K - 1
    b linear from 1e-4 to 0.02 at K = 1000; with other K times 1000 / K, so that as much noise comes together (at most 0.999)
    L = E || e_theta(x_k, k, c) - e ||^2 / D,  k uniform

A rectified flow in other clothes (methods/diffusion/schedule.py). Parts that differ: `times` are those of the K steps; `velocity`
gives the network x_k and k / K, and turns the noise that it predicts into a velocity; `error` is that of the noise, (1 - t)^2
times the velocity's. Generation begins at the last step, where a hundredth of the data is left (ab = 4e-5), with x_k = noise;
sampler=ddim with sampler_noise=1 is DDPM's ancestral sampling (posterior variance), on `sampler_steps` of the K steps.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.diffusion import schedule
from methods.diffusion.regression import Regression
from runner.errors import UserError
from runner.interface import Spec, knob


class DDPM(Regression):
    @dataclasses.dataclass(frozen=True)
    class Config(Regression.Config):
        process: str = knob("ddpm", "noise prediction on the steps of a schedule, or flow matching", choices=["ddpm", "flow"])
        times: str = knob("logit_normal", "how t is drawn", choices=["logit_normal", "uniform"], when={"process": ["flow"]})
        shift: float = knob(1.0, "S: of the time grid; above 1 more steps are spent on noise", low=1e-3,
                            when={"process": ["flow"]})
        schedule_steps: int = knob(1000, "K", low=2, source="paper")
        sampler: str = knob("ddim", "steps of generation (methods/diffusion/flow.py)",
                            choices=["ode", "flow", "dance", "cps", "ddim"])
        sampler_noise: float = knob(1.0, "eta: noise level of a stochastic sampler", low=0.0, source="paper")

    @property
    def kind(self):
        return "velocity" if self.config.process == "flow" else "epsilon"

    def setup(self, spec: Spec):
        super().setup(spec)
        c = self.config
        if c.process == "ddpm" and c.sampler_steps > c.schedule_steps:
            raise UserError(f"method.sampler_steps={c.sampler_steps}: the schedule has {c.schedule_steps} steps "
                            "(method.schedule_steps)\ntake at most that many")
        self.register_buffer("table", schedule.table(schedule.betas(
            "linear", c.schedule_steps, 0.1 / c.schedule_steps, min(20 / c.schedule_steps, 0.999))), persistent=False)

    def check_network(self):
        if self.config.process == "ddpm" and hasattr(self.network, "grid"):
            raise UserError("method=ddpm has a schedule of its own, and so has this policy\ntake method=flow_matching; with "
                            "method.model=given it is used as it comes")
        super().check_network()

    def times(self, number: int) -> Tensor:
        if self.config.process == "flow":
            return super().times(number)
        k = (self.noise("times", (number,), "uniform") * len(self.table)).long()
        return self.table[k]

    def velocity(self, network, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        if self.config.process == "flow":
            return super().velocity(network, x, t, condition)
        place = schedule.place(self.table, t).float() / len(self.table)
        return schedule.velocity("epsilon", x, t, network(x / schedule.size(x, t), place, condition))

    def error(self, rows) -> Tensor:
        if self.config.process == "flow":
            return super().error(rows)
        return super().error(rows) * (1 - rows.t).square()

    def grid(self, steps: int | None = None) -> Tensor:
        if self.config.process == "flow":
            return super().grid(steps)
        k = torch.linspace(len(self.table) - 1, 0, steps or self.config.sampler_steps, device=self.table.device).round().long()
        return torch.cat([self.table[k], self.table.new_zeros(1)])

    def begin(self, noise: Tensor) -> Tensor:
        if self.config.process == "flow":
            return super().begin(noise)
        return noise * schedule.size(noise, self.table[-1])

    def export(self):
        tensors, kind = super().export()
        return tensors, kind if self.config.process == "flow" else {**kind, "schedule_steps": str(self.config.schedule_steps)}
