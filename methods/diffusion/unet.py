"""A small convolutional U-Net over images: two halvings, residual blocks with group norm, time and condition added in each."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.common.stored import load_run
from methods.diffusion.flow import features
from runner.errors import UserError
from runner.interface import Spec, knob


class Block(nn.Module):
    """Two 3x3 convolutions around an added embedding, and the input beside them."""

    def __init__(self, inputs: int, outputs: int, width: int):
        super().__init__()
        self.first_norm, self.first = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.embed = nn.Linear(width, outputs)
        self.second_norm, self.second = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.beside = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.first(F.silu(self.first_norm(x))) + self.embed(F.silu(embedding))[:, :, None, None]
        return self.beside(x) + self.second(F.silu(self.second_norm(h)))


class UNet(nn.Module):
    """(x (n, C, H, W), t (n,), condition (n,)) -> (n, C, H, W). The condition `classes` means none."""

    def __init__(self, shape: tuple[int, int, int], classes: int, channels: tuple[int, ...], octaves: int = 8):
        super().__init__()
        width = 4 * channels[0]
        self.octaves = octaves
        self.label, self.time = nn.Embedding(classes + 1, width), nn.Linear(2 * octaves, width)
        self.enter = nn.Conv2d(shape[0], channels[0], 3, padding=1)
        sizes = [channels[0], *channels]
        self.down = nn.ModuleList(Block(a, b, width) for a, b in zip(sizes[:-1], sizes[1:]))
        self.middle = Block(channels[-1], channels[-1], width)
        back = [*reversed(channels)]
        self.up = nn.ModuleList(Block(a + skip, skip, width) for a, skip in zip([channels[-1], *back[:-1]], back))
        self.leave_norm, self.leave = nn.GroupNorm(8, channels[0]), nn.Conv2d(channels[0], shape[0], 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        embedding = self.time(features(t, self.octaves)) + self.label(condition)
        h, kept = self.enter(x), []
        for i, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if i else h, embedding)
            kept.append(h)
        h = self.middle(h, embedding)
        for i, block in enumerate(self.up):
            h = block(torch.cat([h if not i else F.interpolate(h, scale_factor=2.0), kept.pop()], 1), embedding)
        return self.leave(F.silu(self.leave_norm(h)))


class UNetPolicy:
    @dataclasses.dataclass(frozen=True)
    class Config:
        channels: tuple[int, ...] = knob((32, 64, 64), "at each resolution, multiples of 8; all but the first halve it", low=8)
        path: str = knob("", "folder of a finished run (or its weights.safetensors) to start from; empty: the env's start")

    def __init__(self, config):
        self.config = config
        self.own_weights = bool(config.path)

    def build(self, spec: Spec) -> nn.Module:
        shape, halvings = spec.sample_shape, len(self.config.channels) - 1
        if len(shape) != 3 or shape[1] % 2 ** halvings or shape[2] % 2 ** halvings:
            raise UserError(f"policy=unet is for images whose sides {2 ** halvings} divides; this env's samples are "
                            f"{' x '.join(map(str, shape))}\ntake policy=mlp, or fewer policy.channels")
        if not self.config.channels or any(c % 8 for c in self.config.channels):
            raise UserError(f"policy.channels={list(self.config.channels)}: each must be a multiple of 8, and one is needed")
        network = UNet(shape, spec.classes, self.config.channels)
        return load_run(network, self.config.path, ("averaged", "network")) if self.config.path else network
