"""Small classifiers of images: proxies that can be hacked, and gold ones that are never trained against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """Flat images of up to 8 pixels a side go through two hidden layers, larger ones through three strided convolutions first."""

    def __init__(self, shape: tuple[int, int, int], widths: tuple[int, int], classes: int):
        super().__init__()
        layers, size, side = [], shape[0], shape[1]
        if side > 8:
            for channels in (16, 32, 32):
                layers += [nn.Conv2d(size, channels, 3, stride=2, padding=1), nn.SiLU()]
                size, side = channels, (side + 1) // 2
        self.look = nn.Sequential(*layers, nn.Flatten())
        self.first, self.second = nn.Linear(size * side * side, widths[0]), nn.Linear(widths[0], widths[1])
        self.last = nn.Linear(widths[1], classes)

    def features(self, x: Tensor) -> Tensor:
        return F.silu(self.second(F.silu(self.first(self.look(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def fitted(x: Tensor, label: Tensor, widths: tuple[int, int], classes: int, seed: int, false: float = 0.0,
           steps: int = 600) -> Classifier:
    """A classifier of x (n, …) after `steps` batches of 128 (64 for a convolutional one); a share `false` of the labels
    is replaced by other classes. The same bits for the same arguments on one kind of processor, and no trace in the global
    generators."""
    g = torch.Generator().manual_seed(seed)
    if false:
        wrong = torch.rand(len(label), generator=g) < false
        label = torch.where(wrong, (label + torch.randint(1, classes, (len(label),), generator=g)) % classes, label)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = Classifier(tuple(x.shape[1:]), widths, classes)
        adam = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
        batch = 128 if len(net.look) == 1 else 64
        for _ in range(steps):
            rows = torch.randint(len(x), (batch,), generator=g)
            adam.zero_grad()
            F.cross_entropy(net(x[rows] + 0.1 * torch.randn(batch, *x.shape[1:], generator=g)), label[rows]).backward()
            adam.step()
    return net.requires_grad_(False).eval()


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """The logit of `label` less the largest other one, (n,)."""
    own = logits.gather(1, label[:, None]).squeeze(1)
    return own - logits.scatter(1, label[:, None], -torch.inf).max(1).values
