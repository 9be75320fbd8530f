"""Pictures of samples: points of a plane as densities, images as tiles. All (H, W, 3) uint8."""

from __future__ import annotations

import torch
from torch import Tensor

COLOURS = torch.tensor([[0.12, 0.47, 0.71], [0.84, 0.37, 0.0], [0.17, 0.63, 0.17], [0.58, 0.4, 0.74],
                        [0.55, 0.34, 0.29], [0.89, 0.47, 0.76], [0.5, 0.5, 0.5], [0.74, 0.74, 0.13]])


def density(x: Tensor, group: Tensor, extent: float = 3.0, side: int = 240) -> Tensor:
    """Points x (n, 2) in [-extent, extent]^2, darker where there are more; each group (n,) in its colour."""
    x, group, ink = x.cpu(), group.cpu(), torch.zeros(side, side, 3)
    place = ((x + extent) / (2 * extent) * side).long()
    inside = ((place >= 0) & (place < side)).all(1)
    for g in group.unique().tolist():
        own = place[inside & (group == g)]
        counts = torch.bincount((side - 1 - own[:, 1]) * side + own[:, 0], minlength=side * side).view(side, side).float()
        counts = torch.nn.functional.avg_pool2d(counts[None, None], 3, 1, 1)[0, 0] * 9  # a point is 3 pixels wide
        ink += (1 - torch.exp(-counts))[..., None] * (1 - COLOURS[g % len(COLOURS)])
    return ((1 - ink).clamp(0, 1) * 255).to(torch.uint8)


def paths(way: Tensor, group: Tensor, extent: float = 3.0, side: int = 240) -> Tensor:
    """Ways (steps + 1, n, 2) from noise to samples, as points between the steps."""
    between = torch.linspace(0, 1, 12, device=way.device)[:-1, None, None, None]
    dense = (way[:-1] * (1 - between) + way[1:] * between).flatten(0, 2)
    return density(dense, group.repeat(len(dense) // len(group)), extent, side)


def tiles(images: Tensor, columns: int, scale: int = 1) -> Tensor:
    """images (n, C, H, W) in [-1, 1], one or three channels, row by row with a pixel between; each pixel `scale` wide."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    out = torch.ones(rows * (h + 1) - 1, columns * (w + 1) - 1, 3)
    shown = ((images.float().cpu().clamp(-1, 1) + 1) / 2).expand(n, 3, h, w).permute(0, 2, 3, 1)
    for i in range(n):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        out[top:top + h, left:left + w] = shown[i]
    return (out * 255).to(torch.uint8).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
