"""Draw tokens from logits by inverse cumulative distribution: one uniform number a row, nothing else is random."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = 1024  # vocabularies up to this size: one cumulative sum. Larger ones: over sums of blocks, then inside one block
BLOCK = 128


def product(hidden: Tensor, head: Tensor) -> Tensor:
    """Logits hidden @ head.T in float32: (n, width), (V, width) -> (n, V). Half-precision factors are not rounded again."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, head.t(), out_dtype=torch.float32)
    return F.linear(hidden, head).float()


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """Per row the first index whose cumulative sum exceeds the target: (B, n), (B, 1) -> (B, 1), within the row."""
    return torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[-1] - 1)


def choose(p: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative sum exceeds uniform * total. p (B, V) >= 0, uniform (B, 1) in [0, 1) -> (B, 1)."""
    if p.shape[-1] <= PLAIN:
        sums = p.cumsum(-1)
        return _first_above(sums, sums[:, -1:] * uniform)
    extra = -p.shape[-1] % BLOCK
    blocks = (F.pad(p, (0, extra)) if extra else p).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1).cumsum(-1)
    target = sums[:, -1:] * uniform
    block = _first_above(sums, target)
    before = F.pad(sums, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).cumsum(-1)
    # The two sums of a block differ by rounding; below its own last sum some index inside is always found.
    rest = torch.minimum(target - before, inside[:, -1:] * (1 - 2.0 ** -24))
    return (block * BLOCK + _first_above(inside, rest)).clamp_(max=p.shape[-1] - 1)


def nucleus(p: Tensor, share: Tensor | float) -> Tensor:
    """p with zeros outside the smallest set of most probable tokens that holds `share` of it (equal ones stay together)."""
    ranked = p.sort(-1, descending=True).values
    last = (ranked.cumsum(-1) < share).sum(-1, keepdim=True).clamp_(max=p.shape[-1] - 1)
    return p.masked_fill(p < ranked.gather(-1, last), 0.0)


def draw(logits: Tensor, uniform: Tensor, temperature: Tensor | float | None,
         top_p: Tensor | float | None) -> tuple[Tensor, Tensor]:
    """Tokens (B, 1) and their probabilities (B, 1) under the distribution they were drawn from.

    logits (B, V) float32; uniform (B, 1). temperature 0: greedy, and the probability is that of temperature 1; None: 1,
    without a pass over the logits. top_p None: all of the distribution."""
    if isinstance(temperature, float) and temperature == 0:
        p = logits.softmax(-1)
        token = logits.argmax(-1, keepdim=True)
        return token, p.gather(-1, token)
    p = (logits if temperature is None else logits / temperature).softmax(-1)
    if top_p is None:
        token = choose(p, uniform)
        return token, p.gather(-1, token)
    p = nucleus(p, top_p)
    token = choose(p, uniform)
    return token, p.gather(-1, token) / p.sum(-1, keepdim=True)
