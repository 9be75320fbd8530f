"""A residual network over flat samples: points of a plane, small images."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.common.stored import load_run
from methods.diffusion.flow import features
from runner.interface import Spec, knob


class ResidualMLP(nn.Module):
    """(x (n, *shape), t (n,), condition (n,)) -> (n, *shape). The condition `classes` means none."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int, octaves: int, label: int):
        super().__init__()
        self.shape, self.octaves = shape, octaves
        size = math.prod(shape)
        self.label = nn.Embedding(classes + 1, label)
        self.enter = nn.Linear(size + 2 * octaves + label, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.leave = nn.Linear(width, size)

    def hidden(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The last hidden layer, (n, width)."""
        h = F.silu(self.enter(torch.cat([x.flatten(1), features(t, self.octaves), self.label(condition)], 1)))
        for block in self.blocks:
            h = h + F.silu(block(h))
        return h

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.leave(self.hidden(x, t, condition)).view(-1, *self.shape)


class MLP:
    @dataclasses.dataclass(frozen=True)
    class Config:
        width: int = knob(128, "of the hidden layers", low=1)
        depth: int = knob(3, "hidden layers, residual from the second on", low=1)
        octaves: int = knob(8, "sines and cosines of the time", low=1)
        label_width: int = knob(16, "of the condition's embedding", low=1)
        path: str = knob("", "folder of a finished run (or its weights.safetensors) to start from; empty: the env's start")

    def __init__(self, config):
        self.config = config
        self.own_weights = bool(config.path)

    def build(self, spec: Spec) -> nn.Module:
        c = self.config
        network = ResidualMLP(spec.sample_shape, spec.classes, c.width, c.depth, c.octaves, c.label_width)
        return load_run(network, c.path, ("averaged", "network")) if c.path else network
