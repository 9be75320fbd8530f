"""From rewards over a list (…, P) to a target distribution q over it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def zscore(reward: Tensor) -> Tensor:
    """(r - mean) / std over the last dimension, std unbiased; 0 where all rewards agree to 1e-6 (no signal, no noise
    blown up)."""
    centred = reward - reward.mean(-1, keepdim=True)
    std = reward.std(-1, keepdim=True)
    return torch.where(std < 1e-6, torch.zeros_like(reward), centred / (std + 1e-8))


def _smoothed_cdf(reward: Tensor, bandwidth: Tensor) -> Tensor:
    """F_i = mean_j Phi((r_i - r_j) / h): the empirical distribution function, smoothed by a Gaussian kernel."""
    z = (reward.unsqueeze(-1) - reward.unsqueeze(-2)) / bandwidth.unsqueeze(-1)
    return (0.5 * (1 + torch.erf(z / math.sqrt(2)))).mean(-1)


def rank_kde(reward: Tensor) -> Tensor:
    """logit(F), F clipped to [1e-3, 1 - 1e-3], bandwidth 1.06 min(sd, IQR / 1.34) n^(-1/5) (Silverman's).

    The influence of one outlier is bounded: its rank counts, not its size.
    """
    n = reward.shape[-1]
    quartile = torch.quantile(reward.float(), torch.tensor([0.25, 0.75], device=reward.device), dim=-1)
    spread = torch.minimum(reward.std(-1), (quartile[1] - quartile[0]).to(reward.dtype) / 1.34)
    bandwidth = 1.06 * spread * n ** -0.2 + 1e-6
    return torch.logit(_smoothed_cdf(reward, bandwidth.unsqueeze(-1)).clamp(1e-3, 1 - 1e-3))


def smoothed_rank(reward: Tensor) -> Tensor:
    """z(F), bandwidth 1.06 * 1.4826 * MAD * n^(-1/5) + 1e-6: the other reconstruction of the paper's robust form."""
    n = reward.shape[-1]
    # quantile, because torch's median takes the lower of the two middle values
    deviation = (reward - reward.quantile(0.5, -1, keepdim=True)).abs().quantile(0.5, -1, keepdim=True)
    return zscore(_smoothed_cdf(reward, 1.06 * 1.4826 * deviation * n ** -0.2 + 1e-6))


_UTILITIES = {"raw": lambda r: r, "zscore": zscore, "rank_kde": rank_kde, "smoothed_rank": smoothed_rank}


def distribution(reward: Tensor, kind: str, temperature: float) -> Tensor:
    """q (…, P): softmax(utility(reward) / temperature), or one-hot at the best candidate for `hard`."""
    if kind == "hard":
        return torch.nn.functional.one_hot(reward.argmax(-1), reward.shape[-1]).to(reward.dtype)
    return (_UTILITIES[kind](reward) / temperature).softmax(-1)
