"""Flow matching (Lipman et al. 2023, arXiv 2210.02747; rectified flow: Liu et al. 2022, arXiv 2209.03003): a network learns the
velocity of straight lines from data to noise,

    L = E || v(x_t, t, c) - (e - x0) ||^2 / D,   x_t = (1 - t) x0 + t e,

and follows it back from noise. This is the family's regression as it stands (methods/diffusion/regression.py): t is a sigmoid of
a normal, as in Stable Diffusion 3 (Esser et al. 2024), and the condition is left out in a tenth of the rows, so that guidance
can be had.

`model=exact` puts the world's own velocity, where it knows one, in the network's place, and `model=given` keeps the network as it
comes (`policy.path`, or the env's start): then nothing is trained, and what is compared is guidance alone.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.diffusion.regression import Regression
from runner.errors import UserError
from runner.interface import Spec, knob


class FlowMatching(Regression):
    @dataclasses.dataclass(frozen=True)
    class Config(Regression.Config):
        model: str = knob("trained", "the network; the world's exact velocity, or the network as it comes (policy.path, or the "
                          "env's start), with which nothing is trained", choices=["trained", "exact", "given"])

    @property
    def starts(self):
        return self.config.model == "given"

    def setup(self, spec: Spec):
        super().setup(spec)
        if self.config.model == "exact":
            self.use_exact()

    def update(self, batch):
        if self.config.model == "given" and not self.begun:
            raise UserError("method.model=given: no network is given\nname one: policy.path=FOLDER; or take the env's start, "
                            "where it has one: env.start=shipped or own, not none")
        if self.config.model != "trained":
            return {"loss": torch.zeros((), device=self.device())}
        return super().update(batch)
