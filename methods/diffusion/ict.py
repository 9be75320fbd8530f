"""iCT: improved techniques for training consistency models (Song & Dhariwal 2023, arXiv 2310.14189).

Six changes of consistency training, each a knob that can be undone:

| part | knob | |
|---|---|---|
| target   | average_target | the target is the network itself (no gradient), not its moving average; `average`, the moving
                             average that generates, is another thing and stays |
| distance | huber    | sqrt(|f - f'|^2 + c^2) - c, the norm over the whole sample, c = huber sqrt(D); 0: mean of squares |
| index    | density  | log_normal: i with the probability of (s_i, s_{i+1}) under log s ~ N(mean, std^2); or uniform |
| weight   | weigh    | 1 / (s_{i+1} - s_i) |
| schedule | doubling | N(k) = min(first 2^floor(k / K'), last) + 1, K' = floor(K / (log2(floor(last / first)) + 1)) |
|          | sensitivity | of the network to its time: less than before |

The paper's mean -1.1 and std 2 are for data of deviation 0.5. It has last = 1280, dropout 0.3 (0.2), no LPIPS, RAdam at 1e-4.
i is drawn by inversion: log s from the normal cut to [low, high], and the pair that it falls between.
There is no official code. A public implementation uses c of the whole sample for each coordinate; this does not.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from methods.diffusion import edm
from methods.diffusion.consistency import Consistency
from runner.interface import knob


class ICT(Consistency):
    @dataclasses.dataclass(frozen=True)
    class Config(Consistency.Config):
        first: int = knob(10, "pairs of levels at the start of the run", low=1, source="paper")
        last: int = knob(160, "and at its end", low=1)
        sensitivity: float = knob(0.015625, "the network's time is that times log sigma", low=1e-6)
        average_target: bool = knob(False, "the target is a moving average of the network")
        target_rate: float = knob(0.95, "of the target's moving average where there are `first` levels", low=0.0, high=1.0,
                                  when={"average_target": [True]})
        huber: float = knob(0.00054, "c / sqrt(D); 0: mean of squares", low=0.0, source="paper")
        density: str = knob("log_normal", "how pairs of levels are drawn", choices=["log_normal", "uniform"])
        mean: float = knob(-1.1, "of log sigma", source="paper")
        std: float = knob(2.0, "of log sigma", low=1e-3, source="paper")
        weigh: bool = knob(True, "a pair's distance is divided by the gap between its levels", source="paper")
        doubling: bool = knob(True, "the number of levels doubles in stages of equal length", source="paper")

    @property
    def keeps_target(self):
        return self.config.average_target

    # -- parts
    def schedule(self) -> Tensor:
        c = self.config
        if not c.doubling:
            return super().schedule()
        stages = math.log2(max(c.last // c.first, 1)) + 1
        doubled = (self.made / max(math.floor(self.planned / stages), 1)).floor().clamp(max=stages)
        return (c.first * 2 ** doubled).clamp(max=c.last) + 1

    def index(self, rows) -> Tensor:
        c = self.config
        if c.density == "uniform":
            return super().index(rows)
        low, high = (0.5 * (1 + math.erf((math.log(s) - c.mean) / (c.std * math.sqrt(2)))) for s in (c.lowest, c.highest))
        u = low + (high - low) * self.noise("index", (len(rows.x),), "uniform")
        sigma = (c.mean + c.std * torch.special.ndtri(u)).exp()
        ends = [s ** (1 / edm.RHO) for s in (c.lowest, c.highest)]
        place = (sigma ** (1 / edm.RHO) - ends[0]) / (ends[1] - ends[0])
        return torch.minimum((place * (rows.levels - 1)).floor().clamp(min=0), rows.levels - 2)

    def target(self) -> nn.Module:
        return super().target() if self.config.average_target else self.network

    def distance(self, rows) -> Tensor:
        if not self.config.huber:
            return super().distance(rows)
        apart = (rows.out - rows.aim).flatten(1)
        c = self.config.huber * math.sqrt(apart.shape[1])
        return (apart.square().sum(1) + c ** 2).sqrt() - c

    def weight(self, rows) -> Tensor:
        return 1 / (rows.high - rows.low) if self.config.weigh else super().weight(rows)
