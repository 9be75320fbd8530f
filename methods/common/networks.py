"""Small networks that several families build on.

Factories take `seeds`: None, or the number of seeds trained at once. Then weights and data carry a leading axis of seeds,
and a network's state is the stack of the states that single-seed networks would have.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU, "leaky_relu": nn.LeakyReLU}


class SeedsLinear(nn.Module):
    """nn.Linear for several seeds: weight (seeds, outputs, inputs), x (seeds, …, batch, inputs) -> (…, outputs)."""

    def __init__(self, seeds: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs ** -0.5
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.empty(seeds, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(seeds, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        seeds = len(self.weight)
        rows = x.reshape(seeds, -1, x.shape[-1]) if x.dim() > 3 else x.expand(seeds, -1, -1)
        out = torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight.mT)
        return out.view(*x.shape[:-1], -1) if x.dim() > 3 else out


class SeedsLayerNorm(nn.Module):
    """nn.LayerNorm over the last axis with weights of each seed; x (seeds, …, width)."""

    def __init__(self, seeds: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(seeds, width))
        self.bias = nn.Parameter(torch.zeros(seeds, width))

    def forward(self, x: Tensor) -> Tensor:
        shape = (len(self.weight), *[1] * (x.dim() - 2), x.shape[-1])
        return torch.addcmul(self.bias.view(shape), F.layer_norm(x, x.shape[-1:]), self.weight.view(shape))


def linear(inputs: int, outputs: int, seeds: int | None = None) -> nn.Module:
    return nn.Linear(inputs, outputs) if seeds is None else SeedsLinear(seeds, inputs, outputs)


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int, activation: str = "relu", squash: bool = False,
        seeds: int | None = None, layer_norm: bool = False) -> nn.Sequential:
    """Linear layers with `activation` between them, after a layer norm if wanted; `squash` puts tanh on the outputs."""
    sizes, layers = [inputs, *hidden], []
    for a, b in zip(sizes[:-1], sizes[1:]):
        layers.append(linear(a, b, seeds))
        if layer_norm:
            layers.append(nn.LayerNorm(b) if seeds is None else SeedsLayerNorm(seeds, b))
        layers.append(nn.ReLU(inplace=not layer_norm) if activation == "relu" else ACTIVATIONS[activation]())
    layers.append(linear(sizes[-1], outputs, seeds))
    return nn.Sequential(*layers, *([nn.Tanh()] if squash else []))


def describe_mlp(net: nn.Sequential) -> dict[str, str]:
    """The metadata with which `net` can be rebuilt from its safetensors export."""
    layers = [m for m in net if isinstance(m, nn.Linear)]
    names = {v: k for k, v in ACTIVATIONS.items()}
    between = next((names[type(m)] for m in net if type(m) in names), "relu")
    return {
        "kind": "mlp",
        "sizes": ",".join(str(n) for n in [layers[0].in_features, *(m.out_features for m in layers)]),
        "activation": between,
        "squash": str(isinstance(net[-1], nn.Tanh)).lower(),
        **({"layer_norm": "true"} if any(isinstance(m, nn.LayerNorm) for m in net) else {}),
    }


class EnsembleLinear(nn.Module):
    """`members` independent linear layers in one batched product. x (…seeds, members, batch, inputs) -> (…, outputs)."""

    def __init__(self, members: int, inputs: int, outputs: int, seeds: int | None = None):
        super().__init__()
        bound, lead = inputs ** -0.5, () if seeds is None else (seeds,)  # nn.Linear's own initialisation
        self.weight = nn.Parameter(torch.empty(*lead, members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*lead, members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return torch.baddbmm(self.bias, x, self.weight)
        out = torch.baddbmm(self.bias.flatten(0, 1), x.flatten(0, 1), self.weight.flatten(0, 1))
        return out.view(*x.shape[:-1], -1)

    def member(self, x: Tensor, index: int) -> Tensor:
        """One member alone. x (…seeds, batch, inputs) -> (…, outputs)."""
        if x.dim() == 2:
            return torch.addmm(self.bias[index], x, self.weight[index])
        return torch.baddbmm(self.bias[:, index], x, self.weight[:, index])


class EnsembleLayerNorm(nn.Module):
    """Layer norm with weights of each member; x (…seeds, members, batch, width)."""

    def __init__(self, members: int, width: int, seeds: int | None = None):
        super().__init__()
        lead = () if seeds is None else (seeds,)
        self.weight = nn.Parameter(torch.ones(*lead, members, 1, width))
        self.bias = nn.Parameter(torch.zeros(*lead, members, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:]), self.weight)

    def member(self, x: Tensor, index: int) -> Tensor:
        weight, bias = self.weight.select(-3, index), self.bias.select(-3, index)
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)


class Ensemble(nn.Module):
    """`members` independent networks with ReLU layers and one output each; also returns the penultimate features."""

    def __init__(self, members: int, inputs: int, hidden: tuple[int, ...], seeds: int | None = None, layer_norm: bool = False):
        super().__init__()
        sizes = [inputs, *hidden, 1]
        self.members = members
        self.layers = nn.ModuleList(EnsembleLinear(members, a, b, seeds) for a, b in zip(sizes[:-1], sizes[1:]))
        self.norms = nn.ModuleList(EnsembleLayerNorm(members, h, seeds) for h in hidden) if layer_norm else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(…seeds, batch, inputs) -> values (…seeds, members, batch), features (…seeds, members, batch, hidden[-1])."""
        x = x.expand(self.members, -1, -1) if x.dim() == 2 else x.unsqueeze(1).expand(-1, self.members, -1, -1)
        *hidden, last = self.layers  # a slice would build a ModuleList every time
        if self.norms is None:
            for layer in hidden:
                x = F.relu_(layer(x))
        else:
            for layer, norm in zip(hidden, self.norms):
                x = F.relu(norm(layer(x)))
        return last(x).squeeze(-1), x

    def one(self, x: Tensor, index: int) -> Tensor:
        """Values of one member alone (…seeds, batch)."""
        *hidden, last = self.layers
        if self.norms is None:
            for layer in hidden:
                x = F.relu_(layer.member(x, index))
        else:
            for layer, norm in zip(hidden, self.norms):
                x = F.relu(norm.member(layer.member(x, index), index))
        return last.member(x, index).squeeze(-1)


class Critics(Ensemble):
    """An ensemble of Q(s, a)."""

    def __init__(self, members: int, observation_size: int, action_size: int, hidden: tuple[int, ...],
                 seeds: int | None = None, layer_norm: bool = False):
        super().__init__(members, observation_size + action_size, hidden, seeds, layer_norm)

    def forward(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """(…seeds, batch, …) twice -> values (…seeds, members, batch), features (…seeds, members, batch, hidden[-1])."""
        return super().forward(torch.cat([observation, action], -1))

    def first(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q of the first member alone: values (…seeds, batch). Half the arithmetic where only one is needed."""
        return self.one(torch.cat([observation, action], -1), 0)


def adam(parameters, learning_rate: float, **options) -> torch.optim.Adam:
    """Adam in one fused call, fit for a CUDA graph; AdamW when `weight_decay` is given."""
    parameters = list(parameters)
    kind = torch.optim.AdamW if options.get("weight_decay") else torch.optim.Adam
    cuda = parameters[0].is_cuda
    return kind(parameters, lr=learning_rate, fused=True, **({"capturable": True} if cuda else {}), **options)


class CosineRate(nn.Module):
    """A learning rate that falls from `start` to 0 over `steps` updates: start (1 + cos(pi t / steps)) / 2. Kept as tensors,
    because a captured CUDA graph cannot read Python's counter of updates."""

    def __init__(self, start: float, steps: int):
        super().__init__()
        self.start, self.steps = start, steps
        self.register_buffer("made", torch.zeros(()))
        self.register_buffer("rate", torch.tensor(float(start)))

    def drive(self, optimizer: torch.optim.Optimizer):
        """Set the rate of this update's step, and count it."""
        self.rate.copy_((self.made / self.steps).clamp(max=1.0).mul(math.pi).cos().add(1).mul(0.5 * self.start))
        self.made.add_(1)
        for group in optimizer.param_groups:
            group["lr"] = self.rate  # again every time: loading an optimiser's state puts a copy there


class frozen:
    """`with frozen(parameters)`: they take no gradient inside (a loss that passes through, but does not train them)."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters

    def __enter__(self):
        for p in self.parameters:
            p.requires_grad_(False)

    def __exit__(self, *_):
        for p in self.parameters:
            p.requires_grad_(True)


@torch.no_grad()
def polyak(target: list[Tensor], online: list[Tensor], rate: float):
    """target <- (1 - rate) target + rate online, in one call."""
    torch._foreach_lerp_(target, online, rate)
