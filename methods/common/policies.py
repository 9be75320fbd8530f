"""Policies that can score a list of candidates."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.common.networks import mlp

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class TanhGaussian(nn.Module):
    """a = tanh(z), z ~ N(m(s), exp(l(s))^2); l = low + (high - low)/2 (tanh(raw) + 1), as SAC's authors bound it.

    log pi(a|s) = log N(z) - sum_j 2 (log 2 - z_j - softplus(-2 z_j)): the exact log(1 - tanh^2 z), without an epsilon.
    """

    def __init__(self, observation_size, action_size, hidden, bounds=(-5.0, 2.0), seeds=None, layer_norm=False):
        super().__init__()
        self.net = mlp(observation_size, hidden, 2 * action_size, seeds=seeds, layer_norm=layer_norm)
        self.bounds = bounds

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(…, B, S) -> mean of z, log standard deviation of z, (…, B, A) each"""
        mean, raw = self.net(observation).chunk(2, -1)
        low, high = self.bounds
        return mean, low + 0.5 * (high - low) * (raw.tanh() + 1)

    def sample(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """noise (…, B, A), standard normal -> action (…, B, A), log-probability (…, B); both carry gradient."""
        mean, log_std = self(observation)
        z = torch.addcmul(mean, log_std.exp(), noise)
        return z.tanh(), self._log_prob(z, noise, log_std)

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """Of given actions (…, B, A); they are clipped to 1e-5 inside the bounds first. -> (…, B)"""
        mean, log_std = self(observation)
        z = action.clamp(-1 + 1e-5, 1 - 1e-5).atanh()
        return self._log_prob(z, (z - mean) * (-log_std).exp(), log_std)

    @staticmethod
    def _log_prob(z, noise, log_std):
        gaussian = -0.5 * noise.square() - log_std - LOG_SQRT_2PI
        return (gaussian - 2 * (math.log(2) - z - F.softplus(-2 * z))).sum(-1)

    def mode(self, observation: Tensor) -> Tensor:
        return self(observation)[0].tanh()


class FreeGaussian(nn.Module):
    """N(tanh(f(s)), exp(log_std)^2), log_std independent of the state; samples are clipped by whoever plays them. Whoever
    trains it calls keep_in_bounds() after every step (a clamp in here would hold log_std at a bound for good)."""

    def __init__(self, observation_size, action_size, hidden, bounds=(-5.0, 2.0), log_std=0.0, squash=True, seeds=None):
        super().__init__()
        self.net = mlp(observation_size, hidden, action_size, squash=squash, seeds=seeds)
        self.log_std = nn.Parameter(torch.full((action_size,) if seeds is None else (seeds, action_size), log_std))
        self.bounds = bounds

    def mode(self, observation: Tensor) -> Tensor:
        return self.net(observation)

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """(…, B, S), (…, B, A) -> (…, B)"""
        log_std = self.log_std.unsqueeze(-2)
        z = (action - self.net(observation)) * (-log_std).exp()
        return (-0.5 * z.square() - log_std - LOG_SQRT_2PI).sum(-1)

    @torch.no_grad()
    def keep_in_bounds(self):
        self.log_std.clamp_(*self.bounds)


class GaussianPolicy(nn.Module):
    """N(f(s), diag exp(log_std)^2) with a state-independent log_std; not squashed. Whoever trains it keeps
    log_std in `bounds` after every step: a clamp in here would pass no gradient beyond a bound, and hold it there.

    Observations are normalised by stored statistics: (s - offset) / scale.
    """

    def __init__(self, observation_size, action_size, hidden, activation, log_std, bounds):
        super().__init__()
        self.net = mlp(observation_size, hidden, action_size, activation)
        self.log_std = nn.Parameter(torch.full((action_size,), float(log_std)).clamp(*bounds))
        self.bounds = bounds
        self.register_buffer("offset", torch.zeros(observation_size))
        self.register_buffer("scale", torch.ones(observation_size))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(n, S) -> mean (n, A), log_std (A,)"""
        mean = self.net((observation - self.offset) / self.scale)
        return mean, self.log_std.clone()  # fsdp frees the parameter itself when forward ends

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


class ListPolicy(nn.Module):
    """A distribution over the items of a list, and over nothing else: softmax of a score f(x, y_i), an MLP on both.

    Weights start as N(0, 1) / sqrt(inputs), biases at 0.
    """

    def __init__(self, context_size, candidate_size, hidden, activation):
        super().__init__()
        self.net = mlp(context_size + candidate_size, hidden, 1, activation)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features ** -0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, context: Tensor, candidates: Tensor) -> Tensor:
        """context (n, S), candidates (n, P, A) -> scores (n, P)"""
        repeated = context.unsqueeze(1).expand(-1, candidates.shape[1], -1)
        return self.net(torch.cat([repeated, candidates], -1)).squeeze(-1)

    def log_prob(self, context: Tensor, candidates: Tensor) -> Tensor:
        """(n, S), (n, P, A) -> (n, P); every row's probabilities sum to 1."""
        return self(context, candidates).log_softmax(-1)
