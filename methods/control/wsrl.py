"""WSRL: warm-start reinforcement learning without retaining offline data (Zhou et al. 2024, arXiv 2412.07762).

At the switch to online play (methods/control/finetune.py) nothing is updated, the temperature included, while the frozen
pre-trained policy, stochastic, plays K steps into the empty replay: a warm-up. Only then soft actor-critic begins, on online
transitions alone. The paper's diagnosis is that without these steps the first targets, at states that the pessimistic
values were never backed up on, are too low, and that the error spreads until values of the stored data have collapsed.

| symbol | name |
|---|---|
| K | warmup (at least a batch, as in the official code) |

warmup_source = stored fills the replay with K transitions of the data set instead: the paper's control for "any K".
The env's `probe_steps` records return and values from the switch on, every few hundred steps: curves with wider spacing
hide what this is about.
"""

from __future__ import annotations

import dataclasses

from methods.control.finetune import FineTune
from runner.interface import Feed, knob


class WSRL(FineTune):
    @dataclasses.dataclass(frozen=True)
    class Config(FineTune.Config):
        warmup: int = knob(5000, "K: environment steps played at the switch before anything is updated", low=0,
                           source="paper, sec. 5")
        warmup_source: str = knob("play", "where the warm-up's transitions come from", choices=["play", "stored"],
                                  source="paper, sec. 6")

    def feed(self) -> Feed:
        feed, c = super().feed(), self.config
        if self.updates != c.offline_updates:
            return feed
        if c.warmup_source == "stored":
            return feed._replace(copied=c.warmup)
        return feed._replace(steps=max(c.warmup, feed.steps))
