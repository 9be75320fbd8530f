"""Stochastic policies for on-policy learning, and running statistics. A distribution is a tuple of tensors.

Both policies offer forward (rows, S) -> distribution, and on distributions sample, mode, log_prob (rows,), entropy (rows,)
and kl(p, q) = KL(p || q) (rows,), in nats and closed form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from methods.common.networks import mlp

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def orthogonal(net: nn.Sequential, last: float) -> nn.Sequential:
    """Orthogonal weights with gain sqrt 2, `last` in the last layer; biases at 0."""
    layers = [m for m in net if isinstance(m, nn.Linear)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, last if layer is layers[-1] else math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return net


class Gaussian(nn.Module):
    """N(f(s), diag exp(2 log_std)); log_std does not depend on the state, actions are not squashed. (mean, log_std)"""

    def __init__(self, inputs: int, hidden: tuple[int, ...], actions: int, log_std: float):
        super().__init__()
        self.net = orthogonal(mlp(inputs, hidden, actions, "tanh"), 0.01)
        self.log_std = nn.Parameter(torch.full((actions,), float(log_std)))

    def forward(self, seen: Tensor):
        mean = self.net(seen)
        return mean, self.log_std + torch.zeros_like(mean)  # no view: fsdp frees the parameter when forward ends

    def sample(self, d) -> Tensor:
        return d[0] + d[1].exp() * torch.randn_like(d[0])

    def mode(self, d) -> Tensor:
        return d[0]

    def log_prob(self, d, action: Tensor) -> Tensor:
        return (-0.5 * ((action - d[0]) * (-d[1]).exp()).square() - d[1] - LOG_SQRT_2PI).sum(-1)

    def entropy(self, d) -> Tensor:
        return (d[1] + 0.5 + LOG_SQRT_2PI).sum(-1)

    def kl(self, p, q) -> Tensor:
        ratio = (p[1] - q[1]).exp().square()
        return (0.5 * (ratio + ((p[0] - q[0]) * (-q[1]).exp()).square() - 1) + q[1] - p[1]).sum(-1)


class Categorical(nn.Module):
    """softmax(f(s)) over numbered actions. (log probabilities,)"""

    def __init__(self, inputs: int, hidden: tuple[int, ...], actions: int):
        super().__init__()
        self.net = orthogonal(mlp(inputs, hidden, actions, "tanh"), 0.01)

    def forward(self, seen: Tensor):
        return (self.net(seen).log_softmax(-1),)

    def sample(self, d) -> Tensor:
        return (d[0] - torch.empty_like(d[0]).exponential_().log()).argmax(-1)  # Gumbel's trick; NaN raises nothing here

    def mode(self, d) -> Tensor:
        return d[0].argmax(-1)

    def log_prob(self, d, action: Tensor) -> Tensor:
        return d[0].gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self, d) -> Tensor:
        return -(d[0].exp() * d[0]).sum(-1)

    def kl(self, p, q) -> Tensor:
        return (p[0].exp() * (p[0] - q[0])).sum(-1)


class Running(nn.Module):
    """Mean and variance of all rows seen so far; forward: (x - mean) / sqrt(var + 1e-8), clipped to +-10."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.tensor(1e-4))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) * self.rate()).clamp(-10, 10)

    def rate(self) -> Tensor:
        return (self.var + 1e-8).rsqrt()

    @torch.no_grad()
    def see(self, rows: Tensor, average=lambda x: x):
        """rows (n, …): merged by Chan's formula. `average` makes means over processes, each with n rows."""
        n, mean = len(rows), average(rows.mean(0))
        var = average((rows - mean).square().mean(0))
        total, away = self.count + n, mean - self.mean
        self.var.copy_((self.var * self.count + var * n + away.square() * self.count * n / total) / total)
        self.mean.add_(away * n / total)
        self.count.copy_(total)
