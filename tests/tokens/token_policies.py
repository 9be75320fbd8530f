"""Random policies, prompts and settings that tests of the token policies share."""

from __future__ import annotations

import torch

from methods.tokens.transformer import Shape, Transformer

SMALL = Shape(19, 32, 2, 4, 2, 48, context=64, qkv_bias=True)


def policy(shape: Shape = SMALL, seed: int = 0, loud: float = 12.0) -> Transformer:
    """A random policy; `loud` times the usual weights, so that what it says depends on what it read."""
    torch.manual_seed(seed)
    model = Transformer(shape)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(loud) if p.dim() == 2 and "embed" not in name else p.add_(0.1 * torch.randn_like(p))
    return model


def prompts(n: int, width: int, vocabulary: int, padded: bool = True):
    ids = torch.randint(1, vocabulary, (n, width))
    lengths = torch.randint(1, width + 1, (n,)) if padded else torch.full((n,), width)
    mask = torch.arange(width) >= width - lengths[:, None]
    return ids * mask, mask


CASES = {
    "plain": {}, "one sample": {"group": 1}, "greedy": {"temperature": 0.0}, "hot": {"temperature": 1.7},
    "nucleus": {"top_p": 0.7}, "adjusted": {"adjust": lambda logits: 0.5 + logits.std(-1, keepdim=True)},
    "one token": {"steps": 1}, "long": {"steps": 40},
}
