"""Small networks that several families build on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU}


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int, activation: str = "relu", squash: bool = False) -> nn.Sequential:
    """Linear layers with `activation` between them; `squash` puts tanh on the outputs."""
    sizes, layers = [inputs, *hidden], []
    for a, b in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(a, b), nn.ReLU(inplace=True) if activation == "relu" else ACTIVATIONS[activation]()]
    layers.append(nn.Linear(sizes[-1], outputs))
    return nn.Sequential(*layers, *([nn.Tanh()] if squash else []))


def describe_mlp(net: nn.Sequential) -> dict[str, str]:
    """The metadata with which `net` can be rebuilt from its safetensors export."""
    linear = [m for m in net if isinstance(m, nn.Linear)]
    names = {v: k for k, v in ACTIVATIONS.items()}
    between = next((names[type(m)] for m in net if type(m) in names), "relu")
    return {
        "kind": "mlp",
        "sizes": ",".join(str(n) for n in [linear[0].in_features, *(m.out_features for m in linear)]),
        "activation": between,
        "squash": str(isinstance(net[-1], nn.Tanh)).lower(),
    }


class EnsembleLinear(nn.Module):
    """`members` independent linear layers in one batched product. x (members, batch, inputs) -> (…, outputs)."""

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs ** -0.5  # nn.Linear's own initialisation
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)

    def member(self, x: Tensor, index: int) -> Tensor:
        """One member alone. x (batch, inputs) -> (batch, outputs)."""
        return torch.addmm(self.bias[index], x, self.weight[index])


class Critics(nn.Module):
    """An ensemble of Q(s, a) with ReLU layers; also returns the penultimate features, which critic penalties need."""

    def __init__(self, members: int, observation_size: int, action_size: int, hidden: tuple[int, ...]):
        super().__init__()
        sizes = [observation_size + action_size, *hidden, 1]
        self.members = members
        self.layers = nn.ModuleList(EnsembleLinear(members, a, b) for a, b in zip(sizes[:-1], sizes[1:]))

    def forward(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, …) twice -> values (members, batch), features (members, batch, hidden[-1])."""
        x = torch.cat([observation, action], -1).expand(self.members, -1, -1)
        *hidden, last = self.layers  # a slice would build a ModuleList every time
        for layer in hidden:
            x = F.relu_(layer(x))
        return last(x).squeeze(-1), x

    def first(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q of the first member alone: values (batch,). Half the arithmetic where only one is needed."""
        x = torch.cat([observation, action], -1)
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu_(layer.member(x, 0))
        return last.member(x, 0).squeeze(-1)


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
