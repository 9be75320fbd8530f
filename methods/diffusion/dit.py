"""A diffusion transformer (Peebles & Xie 2023, arXiv 2212.09748): patches as tokens, pre-norm blocks whose norms are shifted,
scaled and gated by the time and the condition (adaLN-zero). DiT-B at patch 2 has 12 blocks of width 768: 130 million
parameters. All norms' shifts, scales and gates come from one product.

With hardware.compile=true and half precision on a GPU, blocks run in the fused kernels of dit_triton.py: the same formulas."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.common.stored import load_run
from runner.errors import UserError
from runner.interface import Spec, knob


def embedding_of(t: Tensor, width: int) -> Tensor:
    """t (n,) in [0, 1] -> (n, width): sines and cosines of 1000 t at geometric frequencies."""
    half = width // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device) / half)
    angle = 1000.0 * t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


def positions(side: tuple[int, int], width: int) -> Tensor:
    """(tokens, width): sines and cosines of row and column."""
    def one(n):
        frequency = torch.exp(-math.log(10000.0) * torch.arange(width // 4) / (width // 4))
        angle = torch.arange(n)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], 1)

    rows, columns = one(side[0]), one(side[1])
    return torch.cat([rows[:, None].expand(-1, side[1], -1), columns[None].expand(side[0], -1, -1)], 2).flatten(0, 1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (n, tokens, width); modulation (n, 6, width): shift, scale, gate of attention, then of the MLP."""
        n, tokens, width = x.shape
        shift, scale, gate, shift2, scale2, gate2 = modulation[:, None].unbind(2)
        h = F.layer_norm(x, (width,)) * (1 + scale) + shift
        q, k, v = self.qkv(h).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + gate * self.out(h)
        h = F.layer_norm(x, (width,)) * (1 + scale2) + shift2
        return x + gate2 * self.fall(F.gelu(self.rise(h), approximate="tanh"))


class DiT(nn.Module):
    """(x (n, C, H, W), t (n,), condition (n,)) -> (n, C, H, W). The condition `classes` means none."""

    compiles = True

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, depth: int, heads: int, patch: int):
        super().__init__()
        self.shape, self.patch = shape, patch
        side = (shape[1] // patch, shape[2] // patch)
        size = shape[0] * patch * patch
        self.enter = nn.Linear(size, width)
        self.register_buffer("place", positions(side, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.label.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation, self.leave = nn.Linear(width, (6 * depth + 2) * width), nn.Linear(width, size)
        for layer in (self.modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.fused = False

    def compile_blocks(self):
        """Fused kernels in half precision on a GPU, else torch.compile."""
        weight = self.blocks[0].qkv.weight
        if weight.is_cuda and weight.shape[1] // self.blocks[0].heads in (16, 32, 64, 128):
            self.fused = True
        for block in self.blocks:
            block.compile()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        c, height, width = self.shape
        p = self.patch
        tokens = x.view(-1, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        signal = F.silu(self.time(embedding_of(t, 256)) + self.label(condition))
        h = self.enter(tokens)
        h = h + self.place.to(h.dtype)  # under autocast the residual stream has the products' precision: half the bytes
        if self.fused and h.element_size() == 2:
            from methods.diffusion import dit_triton
            h = dit_triton.transformer(self, h, signal)
        else:
            *blocks, end = self.modulations(self.modulation(signal).to(h.dtype))
            for block, modulation in zip(self.blocks, blocks):
                h = block(h, modulation)
            shift, scale = end[:, None].unbind(2)
            h = F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift
        h = self.leave(h)
        return h.view(-1, height // p, width // p, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(-1, c, height, width)

    def modulations(self, joint: Tensor) -> list[Tensor]:
        """What `modulation` gives: (n, 6, width) for each block, (n, 2, width) for the end."""
        numbers = [6] * len(self.blocks) + [2]
        width = joint.shape[1] // sum(numbers)
        return [m.unflatten(1, (-1, width)) for m in joint.split([n * width for n in numbers], 1)]

    def products(self, rows: int) -> int:
        """Multiply-adds of a forward pass on `rows` samples: matrices and attention."""
        tokens = self.shape[1] * self.shape[2] // self.patch ** 2
        width, size = self.leave.in_features, self.leave.out_features
        block = tokens * (12 * width * width + 2 * tokens * width) + 6 * width * width
        return rows * (len(self.blocks) * block + 2 * tokens * size * width + 2 * width * width + 256 * width + width * width)


class DiTPolicy:
    @dataclasses.dataclass(frozen=True)
    class Config:
        width: int = knob(128, "of the residual stream; a multiple of 4", low=4)
        depth: int = knob(4, "blocks", low=1)
        heads: int = knob(4, "of attention; the width is divided among them", low=1)
        patch: int = knob(2, "side of a patch, which must divide the image's", low=1)
        path: str = knob("", "folder of a finished run (or its weights.safetensors) to start from; empty: the env's start")

    def __init__(self, config):
        self.config = config
        self.own_weights = bool(config.path)

    def build(self, spec: Spec) -> nn.Module:
        c, shape = self.config, spec.sample_shape
        if len(shape) != 3 or shape[1] % c.patch or shape[2] % c.patch:
            raise UserError(f"policy=dit is for images whose sides policy.patch={c.patch} divides; this env's samples are "
                            f"{' x '.join(map(str, shape))}\ntake policy=mlp, or another policy.patch")
        if c.width % c.heads or c.width % 4:
            raise UserError(f"policy.width={c.width}: policy.heads={c.heads} and 4 must divide it")
        network = DiT(shape, spec.classes, c.width, c.depth, c.heads, c.patch)
        return load_run(network, c.path, ("averaged", "network")) if c.path else network
