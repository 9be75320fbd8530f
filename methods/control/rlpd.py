"""RLPD: online learning with prior data (Ball et al. 2023, arXiv 2302.02948).

REDQ with layer norm in the critics, whose every batch is, from the first on, one half stored data and one half online
transitions. Nothing is trained before online play.

| symbol | name |
|---|---|
| E, Z | critics, subset |
| G | critic_steps |
| rho (1/2) | offline_ratio |

With offline_ratio = 1 nothing that is played is learned from: REDQ on the data set, bit for bit. The official code
(ikostrikov/rlpd) has per-domain switches that are settings here: backup_entropy, the subset's size and the depth of the
networks.
"""

from __future__ import annotations

import dataclasses

from methods.control.redq import REDQ
from runner.interface import Feed, knob


class RLPD(REDQ):
    @dataclasses.dataclass(frozen=True)
    class Config(REDQ.Config):
        offline_ratio: float = knob(0.5, "share of stored data in every batch", low=0.0, high=1.0, source="paper, sec. 4.1")
        layer_norm: str = knob("critics", "which networks normalise the outputs of their hidden layers",
                               choices=["none", "critics", "all"], source="paper, sec. 4.2")

    def feed(self) -> Feed:
        return Feed(steps=1, stored=self.config.offline_ratio, start=self.updates == 0)
