"""A teacher policy: an actor's mean network, read from an export, with a fixed standard deviation around it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from runner.errors import UserError

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU}


class Teacher:
    """pi_T(a | s) = N(mean(s), std^2 I), not squashed; actions are clipped only when they are sent to the simulator."""

    def __init__(self, mean: nn.Module, std: float, observation_size: int, action_size: int):
        self._mean, self.std = mean, std
        self.observation_size, self.action_size = observation_size, action_size

    @torch.no_grad()
    def mean(self, observation: Tensor) -> Tensor:
        """(n, S) -> (n, A)"""
        return self._mean(observation)

    @classmethod
    def load(cls, path: str | Path, std: float, device) -> Teacher:
        """Read what `python -m runner export RUN --to FILE.safetensors` wrote."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise UserError(f"teacher {path}: no such file")
        try:
            with safe_open(path, "pt") as f:
                meta = f.metadata() or {}
                tensors = {k: f.get_tensor(k) for k in f.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"teacher {path} cannot be read: {error}") from None
        if meta.get("kind") != "mlp":
            raise UserError(f"teacher {path} does not hold an actor network (kind: {meta.get('kind', 'unknown')}); "
                            "make one with `python -m runner export RUN --to FILE`")
        try:
            sizes = [int(n) for n in meta["sizes"].split(",")]
            layers = []
            for inputs, outputs in zip(sizes[:-1], sizes[1:]):
                layers += [nn.Linear(inputs, outputs), _ACTIVATIONS[meta["activation"]]()]
            net = nn.Sequential(*layers[:-1], *([nn.Tanh()] if {"true": True, "false": False}[meta["squash"]] else []))
            net.load_state_dict(tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"teacher {path}: its description does not fit its tensors: {error}") from None
        return cls(net.to(device).requires_grad_(False), std, sizes[0], sizes[-1])
