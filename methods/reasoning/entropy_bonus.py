"""Entropy bonus: GRPO - c agg(H), the oldest way to keep a policy from becoming sharp (Williams & Peng 1991).

H is the exact entropy of a token over the whole vocabulary, aggregated as the policy loss is: another aggregation is another
strength (so in verl; TRL always takes the mean over tokens). Language models use 0.001 to 0.05; small ones need ten times that.
"""

from __future__ import annotations

import dataclasses

from methods.reasoning.base import GroupPolicy, plus
from runner.interface import knob


class EntropyBonus(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        entropy_weight: float = knob(0.02, "c", low=0.0, source="project's choice")

    def penalty(self, rows):
        penalty = super().penalty(rows)
        if not self.config.entropy_weight:
            return penalty
        return plus(penalty, -self.config.entropy_weight * self.aggregate(rows.now["entropy"], rows))
