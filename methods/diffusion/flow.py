"""Rectified flow: its conversions, time grids and sampling steps. One convention everywhere: t = 0 is data, t = 1 pure noise.

    x_t = (1 - t) x0 + t e,   e ~ N(0, I),   velocity u = e - x0

| from the velocity v at (x, t) | |
|---|---|
| data    x0^ = x - t v | noise  e^ = x + (1 - t) v |
| score   s = -e^ / t   | back   v = (x - x0^) / t = -(x + t s) / (1 - t) |

The same model in other clothes: variance exploding x_s = x_t / (1 - t) with s = t / (1 - t) (EDM's sigma); variance preserving
x_t / sqrt((1-t)^2 + t^2), whose abar is (1-t)^2 / ((1-t)^2 + t^2) (DDPM).

A sampling step goes from t to t' < t. It is a Gaussian N(mean, std^2 I); an ODE's has std 0. h = t - t' > 0.

| step | std | mean |
|---|---|---|
| ode   | 0 | x - h v (Euler) |
| flow  | sigma sqrt(h), sigma = a sqrt(t / (1 - t)) | x (1 - sigma^2 h / 2t) - h v (1 + sigma^2 (1-t) / 2t) (Flow-GRPO's SDE) |
| dance | sigma sqrt(h), sigma = a | the same mean (DanceGRPO) |
| cps   | t' sin(a pi / 2) | (1 - t') x0^ + sqrt(t'^2 - std^2) e^ (coefficients preserving) |
| ddim  | DDIM's with eta = a, in the variance-preserving clothes | (DDPO at a = 1) |

All but the Euler error share the marginals of the ODE. In a flow step the factor of h v is 1 + a^2 / 2 at every t < 1.
Sources: Liu et al. 2022 (rectified flow); Esser et al. 2024 (logit-normal times, shift); Liu et al. 2025 (Flow-GRPO, arXiv
2505.05470); Xue et al. 2025 (DanceGRPO); Song et al. 2020 (DDIM).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = ("ode", "flow", "dance", "cps", "ddim")


class Step(NamedTuple):
    """A Gaussian step. factor: of -h v in the mean, the weight that the step's gradient gives the velocity."""

    mean: Tensor
    std: Tensor     # broadcastable to mean's rows
    factor: Tensor


def grid(steps: int, shift: float = 1.0, device=None, end: float = 0.0) -> Tensor:
    """(steps + 1,) times from 1 to 0: linear, then t <- S t / (1 + (S - 1) t); S > 1 spends more steps on noise. end > 0: the
    linear times end there, and the last step goes from it to 0 (SD3's scheduler: 0.003)."""
    made = {"dtype": torch.float64, "device": device}  # made there: a copy cannot be captured
    t = torch.linspace(1, end, steps + (not end), **made)
    t = torch.cat([t, torch.zeros(1, **made)]) if end else t
    return (shift * t / (1 + (shift - 1) * t)).float()


def rows(t: Tensor, x: Tensor) -> Tensor:
    """t (n,) with trailing axes of length 1, to multiply x (n, …); numbers and () stay as they are."""
    return t.reshape(-1, *[1] * (x.dim() - 1)) if t.dim() else t


def to_data(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return x - rows(t, x) * v


def to_noise(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return x + (1 - rows(t, x)) * v


def from_data(x: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """The velocity that predicts `data`; t > 0."""
    return (x - data) / rows(t, x)


class Coefficients(NamedTuple):
    """Of Gaussian steps x' ~ N(scale x - length factor v, std^2 I); one number each, or one for each of several steps."""

    scale: Tensor
    length: Tensor  # h
    factor: Tensor
    std: Tensor

    def of(self, rows) -> Coefficients:
        """Those of some steps: an index or a slice."""
        return Coefficients(*(c[rows] for c in self))


def coefficients(kind: str, t: Tensor, to: Tensor, amount: float = 0.0, first: Tensor | None = None) -> Coefficients:
    """Of steps from t to `to` < t, (); or (n,); `amount`: the noise level a; `first`: the grid's second time, which stands for
    t = 1 where sigma would be infinite."""
    h = t - to
    if kind == "ode":
        return Coefficients(torch.ones_like(h), h, torch.ones_like(h), torch.zeros_like(h))
    if kind in ("flow", "dance"):
        below = torch.where(t >= 1, first if first is not None else to, t)
        variance = amount ** 2 * t / (1 - below) if kind == "flow" else torch.full_like(t, amount ** 2)
        return Coefficients(1 - variance * h / (2 * t), h, 1 + variance * (1 - t) / (2 * t), (variance * h).sqrt())
    if kind == "cps":
        std = to * math.sin(amount * math.pi / 2)
        along = (to ** 2 - std ** 2).clamp(min=0).sqrt()
    elif kind == "ddim":
        now, then = (1 - t).square() + t.square(), (1 - to).square() + to.square()
        ab, ab_to = (1 - t).square() / now, (1 - to).square() / then
        # eta^2 (1-ab')/(1-ab) (1 - ab/ab'), and back into rectified flow's scale, in which x' has 1/sqrt(then) of it
        variance = amount ** 2 * (1 - ab_to) / (1 - ab) * (1 - ab / ab_to)
        along, std = (1 - ab_to - variance).clamp(min=0).sqrt() * then.sqrt(), (variance * then).sqrt()
    else:
        raise ValueError(f"no sampling step is called '{kind}'; there are {', '.join(STEPS)}")
    # mean = (1 - t') x0^ + along e^
    return Coefficients(1 - to + along, h, ((1 - to) * t - along * (1 - t)) / h, std)


def move(x: Tensor, v: Tensor, by: Coefficients) -> Step:
    """x, v (n, …), `by` one number each or (n,). In float32 whatever the network's precision."""
    x, v = x.float(), v.float()
    scale, length, factor, std = (rows(c, x) for c in by)
    return Step(scale * x - length * factor * v, std, factor)


def step(kind: str, x: Tensor, v: Tensor, t: Tensor, to: Tensor, amount: float = 0.0, first: Tensor | None = None) -> Step:
    """One step of a sampler from x, v (n, …); t, to: () or (n,)."""
    return move(x, v, coefficients(kind, t, to, amount, first))


def log_prob(x: Tensor, at: Step, dims: int = 1, over: str = "mean") -> Tensor:
    """log N(x; mean, std^2) over everything but the first `dims` axes (see `aggregate`)."""
    z = (x - at.mean) / at.std
    return aggregate(-0.5 * z.square() - at.std.log() - 0.5 * math.log(2 * math.pi), dims, over)


def aggregate(values: Tensor, dims: int, over: str) -> Tensor:
    """One number from the D behind the first `dims` axes: their mean (DDPO's and Flow-GRPO's convention, to which their clip
    ranges belong), their sum (a density's), or the sum over sqrt(D), whose deviation does not depend on D."""
    values = values.flatten(dims)
    mean = values.mean(-1)
    return mean if over == "mean" else mean * values.shape[-1] ** (1.0 if over == "sum" else 0.5)


def features(t: Tensor, octaves: int = 8) -> Tensor:
    """t (n,) -> (n, 2 octaves): sin and cos of pi 2^k t, k = 0 … octaves - 1."""
    angle = t[:, None] * (math.pi * 2.0 ** torch.arange(octaves, device=t.device))
    return torch.cat([angle.sin(), angle.cos()], 1)
