"""Schedules of DDPM's kind as rectified flows (methods/diffusion/flow.py). Step k = 0 … K - 1 keeps ab_k of the data's variance:

    x_k = sqrt(ab_k) x0 + sqrt(1 - ab_k) e,   ab_k = prod_{l <= k} (1 - b_l)
    t = s / (1 + s),  s = sqrt((1 - ab) / ab);   x_t = r x_k,  r = sqrt((1-t)^2 + t^2)

| betas | b_k |
|---|---|
| linear            | from b_0 to b_1, evenly |
| scaled_linear     | their roots evenly |
| squaredcos_cap_v2 | 1 - a((k+1)/K) / a(k/K), at most .999, a(u) = cos^2(pi/2 (u + .008) / 1.008) |

| a network predicts | velocity |
|---|---|
| epsilon: e | (e - x) / (1 - t) |
| sample: x0 | (x - x0) / t |
| v_prediction: sqrt(ab) e - sqrt(1 - ab) x0 | v / r + (2t - 1) x / r^2 |

Sources: Ho et al. 2020; Nichol & Dhariwal 2021 (cosine); Salimans & Ho 2022 (v); Lin et al. 2023, arXiv 2305.08891 (a last step
of noise alone; trailing steps).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods.diffusion import flow

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def betas(kind: str, steps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """(K,) float64."""
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64).square()
    if kind == "squaredcos_cap_v2":
        kept = ((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2).cos().square()
        return (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    raise ValueError(f"no schedule is called '{kind}'; there are {', '.join(BETAS)}")


def table(beta: Tensor, to_noise: bool = False) -> Tensor:
    """t of every step, (K,), rising; to_noise: sqrt(ab) is shifted and scaled so that the last step is noise alone."""
    kept = (1 - beta).cumprod(0)
    if to_noise:
        root = kept.sqrt()
        kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    noise = ((1 - kept) / kept).sqrt()
    return torch.where(kept > 0, noise / (1 + noise), 1.0).float()


def place(times: Tensor, t: Tensor) -> Tensor:
    """The step k (n,) of t (n,): the first whose time is not below it."""
    return torch.searchsorted(times, t.contiguous()).clamp(max=len(times) - 1)


def size(x: Tensor, t: Tensor) -> Tensor:
    """r, to divide x_t by or multiply x_k with."""
    at = flow.rows(t, x)
    return ((1 - at).square() + at.square()).sqrt()


def velocity(kind: str, x: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
    """From what a network predicts at x / size(x, t)."""
    at = flow.rows(t, x)
    if kind == "epsilon":
        return (predicted - x) / (1 - at)
    if kind == "sample":
        return flow.from_data(x, predicted, t)
    r = size(x, t)
    return predicted / r + (2 * at - 1) * x / r.square()


def trailing(times: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """(steps + 1,) times: from the last step of the schedule by strides of K / steps, then 0. shift S spreads the steps' shares
    of K like `flow.grid` spreads times. At most K steps."""
    number, device = len(times), times.device
    u = torch.linspace(1, 1 / steps, steps, dtype=torch.float64, device=device)
    down = torch.arange(steps, device=device)
    k = (number * shift * u / (1 + (shift - 1) * u)).round().long() - 1
    k = torch.maximum((k + down).cummin(0).values - down, steps - 1 - down)  # no step twice
    return torch.cat([times[k], times.new_zeros(1)])
