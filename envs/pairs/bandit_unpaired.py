"""The bandit of envs/pairs/bandit.py whose pairs are taken apart: an arm is desirable where it won, undesirable where it lost.

Of the desirable rows the share `keep_desirable` stays; `one_each` keeps one side of every pair. Methods on pairs learn from the
whole pairs, so that what is lost by labels of single responses, and by their imbalance, can be told.
"""

from __future__ import annotations

import dataclasses

from envs.pairs import unpaired
from envs.pairs.bandit import BanditWorld
from runner.interface import knob


class UnpairedBandit(BanditWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(BanditWorld.Config):
        keep_desirable: float = knob(1.0, "share of the desirable rows that stays", low=0.0, high=1.0)
        one_each: bool = knob(False, "one side of every pair alone is shown, either with probability 1/2")

    def stream(self, method, kind, seed):
        if kind != "unpaired":
            return super().stream(method, kind, seed)
        self.task, self.method, c = self.make(method.seed), method, self.config
        rows = unpaired.split(self.task.pairs(), c.keep_desirable, c.one_each, f"{method.seed}/unpaired")
        return unpaired.stored(self, method, rows)
