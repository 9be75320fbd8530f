"""Generators aligned by pairs of their own samples, as they come. As it stands it is fine-tuning on the best of each group.

One update is one batch of rollouts, gone through `passes` times in `minibatches` steps of the optimiser:

    1. collect   Q = `prompts` conditions, G = `samples` each, by `steps` deterministic steps of the network `sampling`, which
                 is the one that learns; the reward of each, which is the proxy or a learned one (env.judge_run)
    2. pair      of each group the best as winner and the worst as loser; where all are equal the first two
    3. loss      and what else there is to pairs (methods/diffusion/preferences.py), each pass with its own t and noise

A sample is what is rewarded as one: P = Spec.points things, which share t, and whose errors are averaged. So the pairs are
(Q, P, *shape), the errors (2Q,).
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor

from methods.diffusion.preferences import PairRegression
from runner.interface import knob


class OnlinePairs(PairRegression):
    @dataclasses.dataclass(frozen=True)
    class Config(PairRegression.Config):
        prompts: int = knob(64, "Q: conditions a batch, and so pairs", low=1)
        samples: int = knob(8, "G: rollouts of each (officially 24)", low=2)
        steps: int = knob(10, "of a rollout (officially 40)", low=1)
        minibatches: int = knob(1, "optimiser steps a pass", low=1)
        passes: int = knob(1, "over a batch, each with its own times and noise (officially 39)", low=1)

    PARTS = ("collect", "pair", *PairRegression.PARTS)

    def steps_of_update(self):
        return self.config.minibatches * self.config.passes

    def velocity(self, network, x, t, condition):
        """Of samples of P things, x (n, P, *shape), too: t and the condition are one for all of them."""
        if x.dim() == len(self.spec.sample_shape) + 1:
            return super().velocity(network, x, t, condition)
        p = x.shape[1]
        flat = (x.flatten(0, 1), t.repeat_interleave(p), condition.repeat_interleave(p))
        return super().velocity(network, *flat).view_as(x)

    def update(self, batch):
        """batch: what `collect` made."""
        c = self.config
        pairs = {k: batch[k] for k in ("chosen", "rejected", "condition", "chosen_reward", "rejected_reward")}
        rows = vars(self.gather({k: v.repeat(c.passes, *[1] * (v.dim() - 1)) for k, v in pairs.items()}))
        number, told = c.passes * len(pairs["condition"]), []
        for some in torch.arange(number, device=self.device()).tensor_split(self.steps_of_update()):
            both = torch.cat([some, some + number])
            told.append(self.learn(SimpleNamespace(**{k: v[both] for k, v in rows.items() if k != "told"}, told={})))
        return {"reward": batch["reward"].mean(), "reward_gap": (batch["chosen_reward"] - batch["rejected_reward"]).mean(),
                **{k: torch.stack([line[k] for line in told]).mean() for k in told[0]}}

    def sampling(self) -> torch.nn.Module:
        """The network that pairs are drawn from."""
        return self.network

    # -- parts
    @torch.no_grad()
    def collect(self, stream) -> dict[str, Tensor]:
        """-> chosen, rejected (Q, P, *shape), condition, chosen_reward, rejected_reward (Q,); reward (Q G,) of all samples."""
        c, p = self.config, self.spec.points
        condition = stream.conditions(c.prompts).repeat_interleave(c.samples)
        noise = self.noise("start", (len(condition), p, *self.spec.sample_shape)).flatten(0, 1)
        times = self.grid(c.steps)
        with self.autocast():
            walk = self.walk(self.begin(noise), condition.repeat_interleave(p), self.sampling())
            for j in range(c.steps):
                walk.x = self.stride(walk, times, j, "ode", 0.0).mean
        x = walk.x.view(len(condition), p, *walk.x.shape[1:])
        reward = stream.reward(x, condition)
        best, worst = self.pair(reward)
        return {"chosen": x[best], "rejected": x[worst], "condition": condition[best], "chosen_reward": reward[best],
                "rejected_reward": reward[worst], "reward": reward}

    def pair(self, reward: Tensor) -> tuple[Tensor, Tensor]:
        """reward (Q G,) -> the rows (Q,) of winners, and of losers."""
        groups = reward.view(-1, self.config.samples)
        even = groups.amax(1) == groups.amin(1)
        first = torch.arange(len(groups), device=reward.device) * self.config.samples
        return first + groups.argmax(1).masked_fill(even, 0), first + groups.argmin(1).masked_fill(even, 1)
