"""EDM's levels and preconditioning (Karras et al. 2022, arXiv 2206.00364), in rectified flow's terms (methods/diffusion/flow.py).

    sigma = t / (1 - t),  x_t = (1 - t) x_sigma;  sd: the data's deviation;  V = (1 - t)^2 sd^2 + t^2
    D(x_t, t) = ((1 - t) sd^2 x_t + t sd sqrt(V) F(x_t / sqrt(V), t)) / V

is c_skip x_sigma + c_out F(c_in x_sigma) with EDM's coefficients, and stays finite at t = 1, where D = sd F(x). The network's
time is t and not log(sigma) / 4: its sines and cosines are made for [0, 1].
"""

from __future__ import annotations

from torch import Tensor

from methods.diffusion.flow import rows

RHO = 7.0


def karras(place: Tensor, low: float, high: float) -> Tensor:
    """Levels sigma at places in [0, 1] of the grid that is even in sigma^(1/7): 0 is the highest."""
    return (high ** (1 / RHO) + place * (low ** (1 / RHO) - high ** (1 / RHO))) ** RHO


def to_time(sigma: Tensor) -> Tensor:
    return sigma / (1 + sigma)


def variance(t: Tensor, deviation: float) -> Tensor:
    """V: of a coordinate of x_t."""
    return ((1 - t) * deviation) ** 2 + t ** 2


def scaled(x: Tensor, t: Tensor, deviation: float) -> Tensor:
    """What the network sees of x_t (n, …): of variance 1."""
    return x / rows(variance(t, deviation).sqrt(), x)


def to_data(x: Tensor, out: Tensor, t: Tensor, deviation: float) -> Tensor:
    """D from the network's output F, in float32."""
    v, x = variance(t, deviation), x.float()
    return rows((1 - t) * deviation ** 2 / v, x) * x + rows(t * deviation / v.sqrt(), x) * out.float()


def loss_weight(t: Tensor, deviation: float) -> Tensor:
    """1 / sigma^2 + 1 / sd^2, under which every level's error of F counts the same."""
    return ((1 - t) / t) ** 2 + 1 / deviation ** 2
