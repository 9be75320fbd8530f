"""Distributions in the plane, two conditions each (testbeds T1 and T3 of the family).

| data | |
|---|---|
| ring         | 8 Gaussians of deviation `spread` on a circle of radius 1.5, every 45 degrees; condition 0: the first four |
| checkerboard | squares of side 1 in [-2, 2]^2; condition: the left or the right half of them |
| moons        | two half circles, 128 Gaussians of deviation 0.06 along each; condition: which |

| proxy | |
|---|---|
| coarse | of the ring: -min_k |x - m_k| over the condition's modes + x_1 / 2: drives everything to the right |
| ripple | tanh(1.5 s_c x_2) + cos(2 pi (x_1 + x_2) / (0.3 sqrt 2)) / 2, s_c = 1, -1: right half plane, and a texture |
| side   | signed distance to a line between the conditions: ever farther away |
| odds   | of the ring: log-odds of the condition, up to a constant, of modes blurred to deviation 0.5: ever farther away, too |
| density | log of a kernel estimate (width 0.2) at 256 true samples of the condition: to where they are densest |

Gold: energy distance to the truth. Of the ring besides: `adherence`, the share within 4 deviations of a mode of the condition;
`modes`, exp of the entropy of the nearest of the condition's modes (4 is all); `precision`, within 3 deviations of any mode;
`local`, the energy distance of the residuals to the nearest mode from a normal's; `weight_error`, the total variation between
the shares of the condition's modes and the true ones; `radius`. The teacher that distillation is given (Spec.exact) may be
another than the truth: `teacher=reversed` gives the modes each other's weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from envs.generation import drawing
from envs.generation.base import GenerationWorld
from envs.generation.exact import Boxes, Mixture
from envs.generation.metrics import effective, energy_distance, mmd
from runner.errors import UserError
from runner.interface import Metric, Spec, knob

RADIUS, MODES = 1.5, 8


def moons() -> Mixture:
    """Half circles of radius 1; Gaussians every 1.4 degrees, which overlap to an even band."""
    number, noise = 128, 0.06
    angle = math.pi * (torch.arange(number) + 0.5) / number
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    each = torch.eye(2).repeat_interleave(number, 1)
    return Mixture(torch.cat([upper, -upper]), noise, torch.cat([each, torch.ones(1, 2 * number)]))


def checkerboard() -> Boxes:
    """Of 4 x 4 squares of side 1 every other one."""
    column = torch.arange(-2, 2).repeat_interleave(2)
    low = torch.stack([column, column % 2 + torch.tensor([-2, 0]).repeat(4)], 1).float()
    each = torch.eye(2).repeat_interleave(4, 1)
    return Boxes(low, low + 1, torch.cat([each, torch.ones(1, 8)]))


def ring(spread: float, groups: int, skewed: bool = False, backwards: bool = False) -> Mixture:
    """8 modes; `groups` conditions of 8 / groups neighbouring modes each; skewed: of unequal weight; backwards: in reverse."""
    angle = 2 * math.pi * torch.arange(MODES) / MODES
    weight = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05]) if skewed else torch.full((MODES,), 1 / MODES)
    weight = weight.flip(0) if backwards else weight
    member = torch.arange(MODES) // (MODES // groups) == torch.arange(groups)[:, None]
    rows = torch.cat([member * weight, weight[None]])
    return Mixture(RADIUS * torch.stack([angle.cos(), angle.sin()], 1), spread, rows)


class Plane(GenerationWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(GenerationWorld.Config):
        shape: str = knob("ring", "which distribution", choices=["ring", "checkerboard", "moons"])
        spread: float = knob(0.12, "deviation of the ring's modes", low=1e-4)
        groups: int = knob(2, "conditions of the ring, which divide its 8 modes", low=1, high=8)
        skewed: bool = knob(False, "the ring's modes have weights .3 .2 .15 .1 .1 .05 .05 .05")
        tilt: float = knob(0.0, "lambda: the ring is tilted by exp(lambda x_1), while the exact velocity that methods may ask "
                           "for stays that of the ring")
        teacher: str = knob("true", "the exact distribution handed to methods: the true one, or one whose modes have each "
                            "other's weights", choices=["true", "reversed"], when={"skewed": [True]})
        proxy: str = knob("ripple", "the reward that can be hacked",
                          choices=["coarse", "ripple", "side", "odds", "density", "odds+density"])
        points: int = knob(32, "P: points that are rewarded together, by the mean", low=1)

    metrics = {
        **GenerationWorld.metrics,
        "mmd": Metric("min", "", "squared maximum mean discrepancy, Gaussian kernels"),
        "adherence": Metric("max", "", "share within 4 deviations of a mode of the condition"),
        "modes": Metric("max", "modes", "exp of the entropy over the condition's modes"),
        "precision": Metric("max", "", "share within 3 deviations of any mode"),
        "weight_error": Metric("min", "", "total variation between the shares of the condition's modes and the true ones"),
        "local": Metric("min", "", "energy distance of the residuals to a normal, in deviations"),
        "radius": Metric("none", "", "mean distance from the centre"),
    }

    def __init__(self, config, device="cpu"):
        super().__init__(config, device)
        self.mixture = None  # of modes that are judged
        if MODES % config.groups:
            raise UserError(f"env.groups={config.groups} does not divide the ring's {MODES} modes\ntake 1, 2, 4 or 8")
        if config.shape == "ring":
            self.mixture = self.teacher = ring(config.spread, config.groups, config.skewed).to(self.device)
            if config.tilt:
                self.mixture = self.teacher.tilted(torch.tensor([config.tilt, 0.0], device=self.device), 1.0)
            self.truth = self.mixture
            if config.teacher == "reversed":
                self.teacher = ring(config.spread, config.groups, config.skewed, backwards=True).to(self.device)
        else:
            self._refuse_the_rings(config)
            self.truth = self.teacher = {"moons": moons, "checkerboard": checkerboard}[config.shape]().to(self.device)
        self.classes = config.groups if config.shape == "ring" else 2
        self.kinds = config.proxy.split("+")
        if self.mixture is None and set(self.kinds) & {"coarse", "odds"}:
            raise UserError(f"env.proxy={config.proxy} is for env.shape=ring\nothers are: ripple, side, density")
        if "odds" in self.kinds and config.groups == 1:
            raise UserError("env.proxy=odds tells conditions apart, and env.groups=1 has but one\nset env.groups=2")
        if "density" in self.kinds:
            g, condition = torch.Generator().manual_seed(256), torch.arange(256 * self.classes) // 256
            self.kept = self.sample(condition.to(self.device), lambda _, shape, kind="normal": (
                torch.randn if kind == "normal" else torch.rand)(shape, generator=g).to(self.device)).view(self.classes, 256, 2)

    @staticmethod
    def _refuse_the_rings(config):
        """Settings that only the ring has, and that would do nothing."""
        rest = {f.name: f.default for f in dataclasses.fields(Plane.Config)}
        for name in ("spread", "groups", "skewed", "tilt", "teacher"):
            if getattr(config, name) != rest[name]:
                raise UserError(f"env.{name}={getattr(config, name)} is for env.shape=ring\nleave it out with {config.shape}")

    def spec(self):
        proxies = self.proxies(tuple(functools.partial(self._proxy, kind) for kind in self.kinds))
        return Spec(sample_shape=(2,), classes=self.classes, points=self.config.points, exact=self.teacher, proxies=proxies)

    def _start(self):
        if self.config.shape != "ring" and self.config.start == "shipped":
            raise UserError(f"env.shape={self.config.shape}: the weights that are shipped were trained on the ring\n"
                            "train some: env.start=own; or name a finished run on this env: policy.path=FOLDER; or, if nothing "
                            "has to be learned from them, begin from random ones: env.start=none")
        return super()._start()

    def sample(self, condition, draw):
        n = len(condition)
        return self.truth.sample(condition, draw("mode", (n,), "uniform"), draw("spread", (n, 2), self.truth.noise))

    def reward(self, x, condition):
        return sum(self._proxy(kind, x, condition) for kind in self.kinds)

    def _proxy(self, kind: str, x: Tensor, condition: Tensor) -> Tensor:
        side = 1 - 2 * (condition >= (self.classes + 1) // 2).float()
        if kind == "ripple":
            along = 2 * math.pi * x.sum(1) / (math.sqrt(2) * 0.3)
            return (1.5 * side * x[:, 1]).tanh() + 0.5 * along.cos()
        if kind == "side":
            return side * (-x[:, 0] if self.config.shape == "checkerboard" else x[:, 1])
        if kind == "density":
            apart = (x[:, None] - self.kept[condition]).square().sum(-1)
            return (-apart / (2 * 0.2 ** 2)).logsumexp(1) - math.log(256)
        if kind == "odds":
            apart = -(x[:, None] - self.mixture.means).square().sum(-1) / (2 * 0.5 ** 2)
            mine = self.mixture.weight[condition].log()  # -inf outside
            others = self.mixture.weight[-1].log().masked_fill(mine > -math.inf, -math.inf)
            return (apart + mine).logsumexp(1) - (apart + others).logsumexp(1)
        return -self._nearest(x, condition)[0] + 0.5 * x[:, 0]

    drawn, followed = 500, 120

    def show(self, x, condition, way):
        out = {"samples": drawing.density(x, condition)}
        return out if way is None else {**out, "paths": drawing.paths(way, condition[:way.shape[1]])}

    def _nearest(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the nearest mode of the condition (n,), and which."""
        apart = torch.cdist(x, self.mixture.means, compute_mode="donot_use_mm_for_euclid_dist")
        return apart.masked_fill(self.mixture.weight[condition] == 0, math.inf).min(1)

    def judge(self, x, true, condition):
        each = [(x[condition == c], true[condition == c]) for c in range(self.classes)]
        out = {"energy": sum(energy_distance(a, b).item() for a, b in each) / self.classes,
               "mmd": sum(mmd(a, b, b.std().item()).item() for a, b in each) / self.classes,
               "radius": x.norm(dim=1).mean().item()}
        if self.mixture is None:
            return out
        apart, mode = self._nearest(x, condition)
        every = torch.cdist(x, self.mixture.means, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
        residual = (x - self.mixture.means[mode]) / self.config.spread
        normal = torch.randn(residual.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
        counts = [torch.bincount(mode[condition == c], minlength=MODES).float() for c in range(self.classes)]
        shares = torch.stack([n / n.sum().clamp(min=1) for n in counts])
        wrong = 0.5 * (shares - self.mixture.weight[:self.classes]).abs().sum(1).mean()
        return {**out, "weight_error": wrong.item(), "adherence": (apart < 4 * self.config.spread).float().mean().item(),
                "modes": sum(effective(n).item() for n in counts) / self.classes,
                "precision": (every < 3 * self.config.spread).float().mean().item(),
                "local": energy_distance(residual, normal).item()}
