"""Gaussian mixtures, of which everything is known: samples, the denoiser at every noise level, tilted versions.

    p(x | c) = sum_k w_ck N(m_k, tau^2 I)
    D(x, s) = E[x0 | x0 + s e = x] = sum_k g_k (m_k + tau^2/V (x - m_k)),  V = tau^2 + s^2,  g_k ~ w_ck exp(-|x - m_k|^2 / 2V)
    v(x, t) = (x - D(x / (1-t), t / (1-t))) / t     in rectified flow's terms; written below so that t = 1 has no 0/0

Tilting p by exp(l . x / beta) gives a mixture again: means m_k + tau^2 l / beta, log w_k + l . m_k / beta.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Mixture:
    """means (K, d), std tau, weight (C + 1, K): of every condition, the last row that of no condition."""

    def __init__(self, means: Tensor, std: float, weight: Tensor):
        self.means, self.std = means, std
        self.weight = weight / weight.sum(1, keepdim=True)

    def to(self, device) -> Mixture:
        return Mixture(self.means.to(device), self.std, self.weight.to(device))

    def sample(self, condition: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """(n, d) from condition (n,), uniform (n,) in [0, 1), normal (n, d)."""
        edges = self.weight.cumsum(1)[condition]
        mode = (uniform[:, None] >= edges[:, :-1]).sum(1)
        return self.means[mode] + self.std * normal

    def responsibilities(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """P(mode | x_t) (n, K)."""
        keep, variance = self._terms(t)
        apart = (x[:, None] - keep[:, None, None] * self.means).square().sum(-1)
        return (self.weight[condition].log() - 0.5 * apart / variance[:, None]).softmax(1)

    def _terms(self, t: Tensor) -> tuple[Tensor, Tensor]:
        keep = 1 - t
        return keep, (keep * self.std).square() + t.square()

    def denoise(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """E[x0 | x_t = x], in rectified flow's terms: x (n, d), t (n,)."""
        keep, variance = self._terms(t)
        g = self.responsibilities(x, t, condition)
        middle = g @ self.means
        return middle + (keep * self.std ** 2 / variance)[:, None] * (x - keep[:, None] * middle)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """E[e - x0 | x_t = x] (n, d); for t > 0."""
        shape = x.shape
        x = x.flatten(1)
        return ((x - self.denoise(x, t, condition)) / t[:, None]).view(shape)

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
