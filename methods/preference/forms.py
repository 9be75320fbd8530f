"""Losses on scores u (B, P) of a candidate list: pairs and rankings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_pairs(reward: Tensor) -> tuple[Tensor, Tensor]:
    """Two distinct positions per row, each (B, 1), uniformly."""
    rows, size = reward.shape
    i = torch.randint(size, (rows, 1), device=reward.device)
    j = (i + 1 + torch.randint(size - 1, (rows, 1), device=reward.device)) % size
    return i, j


def pairwise(difference: Tensor, preference: Tensor) -> Tensor:
    """-t log sigma(D) - (1 - t) log sigma(-D), elementwise; t = 1 prefers the first."""
    return -(preference * F.logsigmoid(difference) + (1 - preference) * F.logsigmoid(-difference))


def plackett_luce(score: Tensor, reward: Tensor, top_k: int = 0, smoothing: float = 0.0, poly: float = 0.0) -> Tensor:
    """-log P(ranking by reward, descending) under Plackett-Luce with logits `score`. (B, P) twice -> (B,).

    sum_{k < P} L_k,  L_k = logsumexp_{j >= k} u_(j) - u_(k). `top_k` > 0 keeps the first positions; `smoothing` e makes
    L_k (1 - e) L_k + e (logsumexp - mean_{j >= k} u_(j)); `poly` adds poly (1 - exp(-L_k)), of the smoothed L_k.
    """
    u = score.gather(-1, reward.argsort(-1, descending=True))
    rest = u.flip(-1).logcumsumexp(-1).flip(-1)  # logsumexp over j >= k; its gradient is exact, unlike a running max's
    positions = u.shape[-1] - 1
    losses = (rest - u)[..., :positions]
    if smoothing > 0:
        count = torch.arange(u.shape[-1], 0, -1, device=u.device, dtype=u.dtype)
        mean = u.flip(-1).cumsum(-1).flip(-1) / count
        losses = (1 - smoothing) * losses + smoothing * (rest - mean)[..., :positions]
    if poly > 0:
        losses = losses + poly * (1 - torch.exp(-losses))
    if top_k > 0:
        losses = losses[..., :top_k]
    return losses.sum(-1)


def gumbel_ranking(utility: Tensor) -> Tensor:
    """Utilities plus Gumbel noise: sorting them draws a ranking from Plackett-Luce with these utilities."""
    noise = torch.rand_like(utility).clamp_(1e-20, 1 - 1e-7)
    return utility - torch.log(-torch.log(noise))
