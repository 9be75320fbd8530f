"""Distributions of which everything is known: samples, the denoiser at every noise level. Gaussian mixtures, tilted ones too:

    p(x | c) = sum_k w_ck N(m_k, tau^2 I)
    D(x, s) = E[x0 | x0 + s e = x] = sum_k g_k (m_k + tau^2/V (x - m_k)),  V = tau^2 + s^2,  g_k ~ w_ck exp(-|x - m_k|^2 / 2V)
    v(x, t) = (x - D(x / (1-t), t / (1-t))) / t     in rectified flow's terms; written below so that t = 1 has no 0/0

Tilting p by exp(l . x / beta) gives a mixture again: means m_k + tau^2 l / beta, log w_k + l . m_k / beta.

And boxes, evenly filled: given x_t every coordinate of x0 in a box [a, b] is a normal of mean x_t / (1-t) and deviation
s = t / (1-t), cut off at a and b, and the box's weight is multiplied by prod_d (Phi(z_b) - Phi(z_a)), z_a = (a - x_t / (1-t)) / s
and z_b alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Known:
    noise = ""  # what `sample` is given besides a uniform number for each: normal or uniform ones, (n, d)

    def sample(self, condition: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
        """(n, d) from condition (n,), uniform (n,) in [0, 1), noise (n, d)."""
        raise NotImplementedError

    def part(self, condition: Tensor, uniform: Tensor) -> Tensor:
        """Which of the K parts each sample is of, (n,), by their weights."""
        return (uniform[:, None] >= self.weight.cumsum(1)[condition][:, :-1]).sum(1)

    def denoise(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """E[x0 | x_t = x], in rectified flow's terms: x (n, d), t (n,)."""
        raise NotImplementedError

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """E[e - x0 | x_t = x] (n, d); for t > 0."""
        shape = x.shape
        x = x.flatten(1)
        return ((x - self.denoise(x, t, condition)) / t[:, None]).view(shape)


class Mixture(Known):
    """means (K, d), std tau, weight (C + 1, K): of every condition, the last row that of no condition."""

    noise = "normal"

    def __init__(self, means: Tensor, std: float, weight: Tensor):
        self.means, self.std = means, std
        self.weight = weight / weight.sum(1, keepdim=True)

    def to(self, device) -> Mixture:
        return Mixture(self.means.to(device), self.std, self.weight.to(device))

    def sample(self, condition, uniform, noise):
        return self.means[self.part(condition, uniform)] + self.std * noise

    def responsibilities(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """P(mode | x_t) (n, K)."""
        keep, variance = self._terms(t)
        apart = (x[:, None] - keep[:, None, None] * self.means).square().sum(-1)
        return (self.weight[condition].log() - 0.5 * apart / variance[:, None]).softmax(1)

    def _terms(self, t: Tensor) -> tuple[Tensor, Tensor]:
        keep = 1 - t
        return keep, (keep * self.std).square() + t.square()

    def denoise(self, x, t, condition):
        keep, variance = self._terms(t)
        g = self.responsibilities(x, t, condition)
        middle = g @ self.means
        return middle + (keep * self.std ** 2 / variance)[:, None] * (x - keep[:, None] * middle)

    def log_density(self, x: Tensor, condition: Tensor) -> Tensor:
        """log p(x | c), (n,)."""
        d = self.means.shape[1]
        apart = (x[:, None] - self.means).square().sum(-1)
        inside = self.weight[condition].log() - 0.5 * apart / self.std ** 2
        return inside.logsumexp(1) - d * torch.tensor(self.std * (2 * torch.pi) ** 0.5, device=x.device).log()

    def tilted(self, direction: Tensor, beta: float) -> Mixture:
        """p(x | c) exp(direction . x / beta), normalised; direction (d,)."""
        lean = (self.weight.log() + self.means @ direction / beta).softmax(1)
        return Mixture(self.means + self.std ** 2 * direction / beta, self.std, lean)


class Boxes(Known):
    """low, high (K, d): corners; weight (C + 1, K) as of a mixture. Computed in float64: its differences of tails need it."""

    noise = "uniform"
    NARROW = 1e-3  # width in deviations below which a box is a point but for its second moment

    def __init__(self, low: Tensor, high: Tensor, weight: Tensor):
        self.low, self.high = low.double(), high.double()
        self.weight = weight.double() / weight.sum(1, keepdim=True)

    def to(self, device) -> Boxes:
        return Boxes(self.low.to(device), self.high.to(device), self.weight.to(device))

    def sample(self, condition, uniform, noise):
        box = self.part(condition, uniform)
        return (self.low[box] + (self.high - self.low)[box] * noise).to(noise.dtype)

    def denoise(self, x, t, condition):
        dtype, x, t = x.dtype, x.double()[:, None], t.double().view(-1, 1, 1)
        below, above = ((1 - t) * edge - x for edge in (self.low, self.high))
        mirrored = below + above > 0  # the lower tail is the one that numbers resolve
        a, b = torch.where(mirrored, -above, below) / t, torch.where(mirrored, -below, above) / t
        width, middle = b - a, (a + b) / 2
        narrow = width < self.NARROW
        b = torch.where(narrow, a + 1, b)  # what is not used has to be finite, for gradients
        low, high = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
        mass = high + torch.log1p(-(low - high).exp())
        mean = (_log_normal(a) - mass).exp() - (_log_normal(b) - mass).exp()
        inside = torch.where(narrow, _log_normal(middle), mass - torch.where(narrow, 1.0, width).log())
        share = (self.weight[condition].log() + inside.sum(-1)).softmax(1)[..., None]
        # From the box's centre, in deviations of z; t / (1 - t) = size / width turns them into places.
        offset = torch.where(narrow, -middle * width / 12, (mean - middle) / torch.where(narrow, 1.0, width))
        place = (self.low + self.high) / 2 + torch.where(mirrored, -offset, offset) * (self.high - self.low)
        return (share * place).sum(1).to(dtype)

    def log_density(self, x: Tensor, condition: Tensor) -> Tensor:
        """log p(x | c), (n,); -inf outside."""
        within = ((x[:, None] >= self.low) & (x[:, None] < self.high)).all(-1)
        area = (self.high - self.low).prod(-1)
        return (within * self.weight[condition] / area).sum(1).log().to(x.dtype)


def _log_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi))
