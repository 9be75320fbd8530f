"""Best-of-N and worst-of-N over arms, exact: p (X, K) probabilities, r (X, K) rewards, ties allowed.

    P(the best of N draws has reward r) = F(r)^N - F(r-)^N,   F(r) = P(R <= r),

shared within equal rewards in proportion to p. Win rates count ties half.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cumulative(p: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """P(R < r), P(R <= r) of every arm, (X, K)."""
    ordered, order = r.sort(-1)
    sums = torch.cat([torch.zeros_like(p[:, :1]), p.gather(-1, order).cumsum(-1)], -1)
    sums = sums / sums[:, -1:]
    below, upto = (sums.gather(-1, torch.searchsorted(ordered, r.contiguous(), right=right)) for right in (False, True))
    return below, upto


def best_of(p: Tensor, r: Tensor, n: int) -> Tensor:
    """Probabilities of the best of n draws, (X, K)."""
    below, upto = cumulative(p, r)
    share = p / (upto - below).clamp(min=torch.finfo(p.dtype).tiny)
    return (upto ** n - below ** n) * share


def worst_of(p: Tensor, r: Tensor, n: int) -> Tensor:
    return best_of(p, -r, n)


def wins(p: Tensor, other: Tensor, r: Tensor) -> Tensor:
    """P(r(y) > r(z)) + P(=) / 2 for y ~ p, z ~ other, (X,)."""
    below, upto = cumulative(other, r)
    return (p * (below + upto) / 2).sum(-1)
