"""Policies that can score a list of candidates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from methods.common.networks import mlp

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class GaussianPolicy(nn.Module):
    """N(f(s), diag exp(log_std)^2) with a state-independent log_std, kept in `bounds` by a clamp; not squashed.

    Observations are normalised by stored statistics: (s - offset) / scale.
    """

    def __init__(self, observation_size, action_size, hidden, activation, log_std, bounds):
        super().__init__()
        self.net = mlp(observation_size, hidden, action_size, activation)
        self.log_std = nn.Parameter(torch.full((action_size,), float(log_std)))
        self.bounds = bounds
        self.register_buffer("offset", torch.zeros(observation_size))
        self.register_buffer("scale", torch.ones(observation_size))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(n, S) -> mean (n, A), log_std (A,)"""
        mean = self.net((observation - self.offset) / self.scale)
        return mean, self.log_std.clamp(*self.bounds)

    def log_prob(self, observation: Tensor, actions: Tensor) -> Tensor:
        """observation (n, S), actions (n, P, A) -> (n, P), in float32."""
        mean, log_std = self(observation)
        z = (actions - mean.unsqueeze(1)) * (-log_std).exp()
        return -0.5 * z.square().sum(-1) - (log_std + LOG_SQRT_2PI).sum()

    def sample(self, observation: Tensor, number: int) -> Tensor:
        """(n, S) -> (n, number, A)"""
        mean, log_std = self(observation)
        noise = torch.randn(len(mean), number, mean.shape[-1], device=mean.device, dtype=mean.dtype)
        return mean.unsqueeze(1) + log_std.exp() * noise
