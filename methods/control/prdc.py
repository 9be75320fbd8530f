"""PRDC: policy regularisation with dataset constraint (Ran et al., ICML 2023, arXiv 2306.06569).

TD3+BC whose anchor action is not the one logged at s, but that of the nearest data point in the joint space:

    a* = action of argmin_i || (beta s, pi(s)) - (beta s_i, a_i) ||_2 over the whole data set,   no gradient

beta -> infinity gives TD3+BC (if states are unique), beta = 0 any action seen anywhere.

| symbol | name |
|---|---|
| beta | beta; null: the logged action, which is td3_bc |
| k | neighbours, averaged (1 in the paper's analysis) |
| alpha | alpha (2.5; 40 on halfcheetah, 7.5 on antmaze) |

The neighbours are exact (methods/control/neighbours.py), on the device, within the captured update.

Differences from the official code (LAMDA-RL/PRDC): it searches a KD-tree on the host; it passes k as a list, which selects
the k-th neighbour alone (equal at k = 1); its class default of beta is 2, its command line's 1; 2 here.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.control.base import Sample
from methods.control.neighbours import Neighbours
from methods.control.td3_bc import TD3BC
from runner.interface import knob


class PRDC(TD3BC):
    @dataclasses.dataclass(frozen=True)
    class Config(TD3BC.Config):
        beta: float | None = knob(2.0, "weight of the state in the distance; null: the logged action (td3_bc)", low=0.0,
                                  source="paper, sec. 5.1")
        neighbours: int = knob(1, "data points whose actions are averaged", low=1, source="paper, eq. 5")

    def prepare(self, data):
        replaced = super().prepare(data)
        if self.config.beta is not None:
            seen = replaced or data
            self.index = Neighbours(torch.cat([self.config.beta * seen["observation"], seen["action"]], 1))
            self.actions = seen["action"].contiguous()
        return replaced

    def anchor(self, batch, sample: Sample):
        if self.config.beta is None:
            return super().anchor(batch, sample)
        key = torch.cat([self.config.beta * batch["observation"], sample.action.detach()], -1)
        nearest = self.index.nearest(key.reshape(-1, key.shape[-1]), self.config.neighbours)  # (…B, k)
        return self.actions[nearest].mean(-2).view_as(sample.action), None
