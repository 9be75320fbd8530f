"""Gymnasium simulators whose actions are numbers to choose from, for methods that learn from rollouts."""

from __future__ import annotations

import dataclasses

from envs.control.copies import Copies
from envs.control.simulator import Simulator
from runner.interface import knob


class Numbered(Simulator):
    @dataclasses.dataclass(frozen=True)
    class Config(Simulator.Config):
        id: str = knob("CartPole-v1", "Gymnasium's name of the environment")

    def copies(self, number, **options):
        return Copies(self.config.id, number, numbered=True, **options)
