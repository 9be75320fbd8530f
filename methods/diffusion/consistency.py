"""Consistency models: one network maps every noisy point of a path to the path's end. The algorithm that this family's
consistency methods change; as it stands it is consistency training (Song et al. 2023).

    f(x, s) = c_skip x + c_out F(c_in x, s),   c_skip = sd^2 / ((s - low)^2 + sd^2),  c_out = sd (s - low) / sqrt(s^2 + sd^2)

so that f(x, low) = x exactly; s is the level sigma, x = x0 + s e (variance exploding, as the papers have it). One update on x0
(n, *shape), c (n,), by its parts:

     1. schedule      N(k), number of levels at update k of K: ceil(sqrt(k/K ((last + 1)^2 - first^2) + first^2) - 1) + 1
        levels        s_i = (low^(1/7) + i / (N - 1) (high^(1/7) - low^(1/7)))^7, i = 0 … N - 1
     2. index         i (n,) in 0 … N - 2, which pair (s_i, s_{i+1}): uniform
     3. partner       of x0 + s_{i+1} e, the point at s_i: x0 + s_i e, the same e
     4. target        network that says where the partner leads, without a gradient: a moving average of the network whose rate is
                      target_rate^(first / N)
     5. distance      d (n,) of f at s_{i+1} to that: mean of squares
     6. weight        of each pair's distance, (n,): 1
     7. after_update  the moving averages of the target and of the weights that generation uses               (additive)
     8. velocity, guide   of generation: v = (x_t - f) / t in rectified flow's terms (methods/diffusion/base.py)

Generation begins at `highest` and, with more steps, goes on from levels between it and `middle`, the last of them: f, fresh noise
of the next level, f again (flow.py's step `cps` at a = 1).

N is computed on the device, from a counter that is part of the state. Differences from the official code: the network's time is
`sensitivity` log s, times its own frequencies (methods/diffusion/flow.py, `features`); no dropout, no LPIPS.
Sources: Song et al. 2023 (arXiv 2303.01469); Karras et al. 2022 (EDM).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from methods.common.networks import CosineRate
from methods.diffusion import edm, flow
from methods.diffusion.base import Generator
from runner.errors import UserError
from runner.interface import Spec, knob


class Consistency(Generator):
    @dataclasses.dataclass(frozen=True)
    class Config(Generator.Config):
        learning_rate: float = knob(1e-3, "RAdam's", low=0.0)
        weight_decay: float = knob(0.0, "RAdam's, decoupled", low=0.0)
        decay: str = knob("constant", "course of the learning rate over the run", choices=["constant", "cosine"])
        average: float = knob(0.99, "rate of the moving average of the weights that generation uses; 0: the weights themselves",
                              low=0.0, high=1.0)
        sampler: str = knob("cps", "steps of generation (methods/diffusion/flow.py)",
                            choices=["ode", "flow", "dance", "cps", "ddim"])
        sampler_noise: float = knob(1.0, "a: noise level of a stochastic sampler; cps at 1 predicts and puts noise on anew",
                                    low=0.0, when={"sampler_steps": 4})
        sampler_steps: int = knob(1, "K: steps of generation", low=1)
        shift: float = knob(1.0, "S: of the levels of more than two steps; above 1 they lie higher", low=1e-3,
                            when={"sampler_steps": 4})
        middle: float = knob(0.821, "sigma at which the last of several steps begins", low=1e-3, source="paper",
                             when={"sampler_steps": 4})
        deviation: float = knob(1.0, "sd: of the data's coordinates", low=1e-3)
        lowest: float = knob(0.01, "sigma of the lowest level, at which the network is the identity", low=1e-5)
        highest: float = knob(10.0, "sigma of the highest level, at which generation begins", low=1e-2)
        first: int = knob(2, "pairs of levels at the start of the run", low=1, source="paper")
        last: int = knob(150, "and at its end", low=1, source="paper")
        target_rate: float = knob(0.95, "of the target's moving average where there are `first` levels", low=0.0, high=1.0,
                                  source="paper")
        sensitivity: float = knob(0.125, "the network's time is that times log sigma", low=1e-6)

    PARTS = ("schedule", "index", "partner", "target", "distance", "weight", "after_update", "velocity", "guide")
    ADDITIVE = ("after_update",)
    kind = "consistency"
    keeps_target = True  # whether `target` is a moving average of the network

    def setup(self, spec: Spec):
        super().setup(spec)
        c = self.config
        if not c.lowest < c.highest:
            raise UserError(f"method.lowest={c.lowest} is no level below method.highest={c.highest}")
        if c.sampler_steps > 1 and not c.lowest <= c.middle <= c.highest:
            raise UserError(f"method.middle={c.middle} does not lie between method.lowest={c.lowest} and method.highest="
                            f"{c.highest}")
        self.averaging = copy.deepcopy(self.network).requires_grad_(False) if self.keeps_target else None
        self.register_buffer("made", torch.zeros(()))

    def check_network(self):
        if hasattr(self.network, "grid"):
            raise UserError("consistency models ask a network at levels and times of their own, and this policy has a schedule\n"
                            "take policy=unet or policy=dit; methods that train a pipeline further are flow_matching, flow_grpo, "
                            "flow_dpo, dmd with method.initial=start, …")
        super().check_network()

    def make_optimizers(self):
        c, parameters = self.config, list(self.network.parameters())
        self.optimizers = {"network": torch.optim.RAdam(parameters, c.learning_rate, weight_decay=c.weight_decay,
                                                        decoupled_weight_decay=True, capturable=parameters[0].is_cuda)}
        if c.decay == "cosine" and self.planned:
            self.rate = CosineRate(c.learning_rate, self.planned).to(self.device())

    # -- levels
    def sigma(self, index: Tensor, levels: Tensor) -> Tensor:
        """s_i of `levels` levels."""
        return edm.karras(1 - index / (levels - 1), self.config.lowest, self.config.highest)

    def progress(self) -> Tensor:
        """k / K in [0, 1]."""
        return (self.made / max(self.planned, 1)).clamp(max=1.0)

    def consistent(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """f(x, s) of x (n, …) in the variance-exploding scale, s (n,); in float32."""
        sd, above, x = self.config.deviation, sigma - self.config.lowest, x.float()
        whole = (sigma ** 2 + sd ** 2).sqrt()
        out = network(x / flow.rows(whole, x), self.config.sensitivity * sigma.log(), condition).float()
        return flow.rows(sd ** 2 / (above ** 2 + sd ** 2), x) * x + flow.rows(sd * above / whole, x) * out

    # -- learning
    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: x (n, *shape), condition (n,) int64."""
        rows = SimpleNamespace(**batch, told={}, levels=self.schedule())
        rows.index = self.index(rows)
        rows.low, rows.high = self.sigma(rows.index, rows.levels), self.sigma(rows.index + 1, rows.levels)
        rows.noise = self.noise("noise", tuple(rows.x.shape))
        rows.at_high = rows.x + flow.rows(rows.high, rows.x) * rows.noise
        rows.out = self.consistent(self.network, rows.at_high, rows.high, rows.condition)
        with torch.no_grad():
            rows.aim = self.consistent(self.target(), self.partner(rows), rows.low, rows.condition)
        loss = (self.weight(rows) * self.distance(rows)).mean()
        self.advance(loss)
        self.after_update(rows)
        return {"loss": loss.detach(), "levels": rows.levels, **rows.told}

    # -- parts
    def schedule(self) -> Tensor:
        first, last = self.config.first, self.config.last
        return ((self.progress() * ((last + 1) ** 2 - first ** 2) + first ** 2).sqrt() - 1).ceil().clamp(min=1) + 1

    def index(self, rows) -> Tensor:
        u = self.noise("index", (len(rows.x),), "uniform")
        return torch.minimum((u * (rows.levels - 1)).floor(), rows.levels - 2)

    def partner(self, rows) -> Tensor:
        return rows.x + flow.rows(rows.low, rows.x) * rows.noise

    def target(self) -> nn.Module:
        return self.averaging

    def distance(self, rows) -> Tensor:
        return (rows.out - rows.aim).square().flatten(1).mean(1)

    def weight(self, rows) -> Tensor:
        return torch.ones_like(rows.low)

    def after_update(self, rows):
        super().after_update(rows)
        if self.averaging is not None:
            rate = (self.config.first * math.log(max(self.config.target_rate, 1e-30)) / rows.levels).exp()
            kept, now = list(self.averaging.parameters()), [p.detach() for p in self.network.parameters()]
            torch._foreach_mul_(kept, rate)
            torch._foreach_add_(kept, torch._foreach_mul(now, 1 - rate))
        self.made.add_(1)

    def velocity(self, network: nn.Module, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        sigma = (t / (1 - t)).clamp(self.config.lowest, self.config.highest)
        return flow.from_data(x, self.consistent(network, x / flow.rows(1 - t, x), sigma, condition), t)

    # -- generation
    def grid(self, steps: int | None = None) -> Tensor:
        """Times from `highest` over `middle`, evenly in log sigma before the shift, to 0."""
        c, k = self.config, steps or self.config.sampler_steps
        place = flow.grid(max(k - 1, 1), c.shift)[:k]  # 1 … 0
        sigma = c.middle * (c.highest / c.middle) ** place
        return torch.cat([edm.to_time(sigma), torch.zeros(1)]).to(self.device())

    def walk(self, noise: Tensor, condition: Tensor, network=None):
        return super().walk(noise * (self.config.highest / (1 + self.config.highest)), condition, network)

    def export(self):
        tensors, kind = super().export()
        return tensors, {**kind, "deviation": str(self.config.deviation)}
