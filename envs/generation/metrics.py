"""Distances between sets of samples, and what a picture of them looks like."""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 2 ** 25  # distances that are held at once, 128 MB


def over_pairs(x: Tensor, y: Tensor, kernel=None) -> Tensor:
    """Sum over all pairs of |x_i - y_j|, or of a kernel of it; in parts, where there are many."""
    parts = (torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist") for part in x.split(max(1, AT_ONCE // len(y))))
    return torch.stack([(part if kernel is None else kernel(part)).sum() for part in parts]).sum()


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of x (n, d), y (m, d), pairs of a sample with itself left out: its mean is 0 where the
    distributions are equal (values a little below 0 occur)."""
    def within(a):
        return over_pairs(a, a) / (len(a) * (len(a) - 1))

    return 2 * over_pairs(x, y) / (len(x) * len(y)) - within(x) - within(y)


def mmd(x: Tensor, y: Tensor, scale: float, widths=(0.1, 0.5, 1.0, 2.0)) -> Tensor:
    """Unbiased squared maximum mean discrepancy with the mean of Gaussian kernels of `widths` times `scale`."""
    def kernel(apart):
        return sum((-apart.square() / (2 * (w * scale) ** 2)).exp() for w in widths) / len(widths)

    def within(a):
        return (over_pairs(a, a, kernel) - len(a)) / (len(a) * (len(a) - 1))  # less the diagonal, where the kernel is 1

    return within(x) + within(y) - 2 * over_pairs(x, y, kernel) / (len(x) * len(y))


def frechet(x: Tensor, y: Tensor) -> Tensor:
    """|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^1/2) of Gaussian fits to x (n, d), y (m, d), in float64."""
    x, y = x.double(), y.double()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    sx, sy = (torch.atleast_2d(torch.cov(a.T)) for a in (x, y))
    # tr (S_x S_y)^1/2 = sum of the square roots of the eigenvalues of S_x^1/2 S_y S_x^1/2
    values, vectors = torch.linalg.eigh(sx)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sy @ root).clamp(min=0).sqrt().sum()
    return apart + sx.trace() + sy.trace() - 2 * cross


def effective(counts: Tensor) -> Tensor:
    """exp(entropy) of a histogram: how many of its bins are in use."""
    p = counts / counts.sum().clamp(min=1)
    return (-(p * p.clamp(min=1e-12).log()).sum()).exp()


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's, of x, y (n,) without equal values; 0 of fewer than two."""
    if len(x) < 2:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    ranks = torch.stack([v.argsort().argsort().double() for v in (x, y)])
    return torch.corrcoef(ranks)[0, 1]


def calibration_error(predicted: Tensor, happened: Tensor, bins: int = 10) -> Tensor:
    """Mean over n of the gap between the mean probability predicted and the share that happened, in equal bins of the former."""
    place = (predicted * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=predicted.device)
    return gap.index_add_(0, place, predicted.double() - happened.double()).abs().sum() / len(predicted)
