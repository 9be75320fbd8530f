"""Random transitions of a given shape: a data set for speed alone."""

from __future__ import annotations

import dataclasses

import torch

from envs.control.stored import Stored
from runner.interface import Spec, World, knob


class RandomData(World):
    @dataclasses.dataclass(frozen=True)
    class Config:
        rows: int = knob(1_000_000, "transitions", low=1)
        observation_size: int = knob(17, "S", low=1)
        action_size: int = knob(6, "A", low=1)
        batch_size: int = knob(256, "transitions of a batch", low=1)

    def spec(self):
        return Spec(observation_size=self.config.observation_size, action_size=self.config.action_size)

    def stream(self, method, kind, seed):
        c, generator = self.config, torch.Generator().manual_seed(0)
        s = torch.randn(c.rows, c.observation_size, generator=generator)
        a = torch.rand(c.rows, c.action_size, generator=generator) * 2 - 1
        after = s + 0.1 * torch.randn(s.shape, generator=generator)
        reward = torch.randn(c.rows, generator=generator)
        start = (torch.arange(c.rows) % 1000 == 0).float()
        return Stored({"observation": s, "action": a, "reward": reward, "terminated": torch.zeros(c.rows),
                       "next_observation": after, "start": start}, c.batch_size, seed, self.device)

    def evaluate(self, method, seed):
        return {}
