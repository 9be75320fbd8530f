"""Comparisons of behaviour segments of PointMass: the batches of kind `preferences`. No reward is shown to a method.

A segment is 16 steps from a random place in an episode of the noisy teacher (noise of each episode uniform in [0.3, 1]; the
stable version). Of two segments the one with the higher score is preferred:

    regret           sum_{t < k-1} r_t + V(s_{k-1}) - V(s_0): the sum of the teacher's advantages, of which regret is the
                     negative; V by 64 roll-outs of the teacher over 100 steps, with noise common to all states
    partial_return   sum_{t < k} r_t, which also pays for having started near the goal

Comparisons are dense (any two segments, drawn anew for each batch) or a fixed list of random pairs. Of held-out segments it is
asked how often a method orders two of them as the score does.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from envs.control.pointmass import HORIZON
from envs.control.pointmass_data import DATA_SEED, ScoredPointMass
from runner.draws import BLOCK, Draws
from runner.errors import UserError
from runner.interface import Metric, Stream, knob


class Preferences(Stream):
    """Pairs of segments with the probability that the second is preferred (1, 0, or 1/2 for a tie)."""

    lookahead = BLOCK

    def __init__(self, segments: dict[str, Tensor], pairs: Tensor | None, batch_size: int, seeds: int | list[int], device):
        """segments: observation (N, k, S), action (N, k, A), label_score (N,); pairs (M, 2) of their numbers, or None: any
        two different ones."""
        self.device, self.batch_size = torch.device(device), batch_size
        self.segments = {k: v.to(self.device) for k, v in segments.items()}
        self.pairs = None if pairs is None else pairs.to(self.device)
        self.draws, self.taken = Draws(seeds, device), 0

    def data(self) -> dict[str, Tensor]:
        """The segments without their scores: observation (N, k, S), action (N, k, A)."""
        return {k: v for k, v in self.segments.items() if k != "label_score"}

    def ready(self, number: int):
        self.draws.ready(self.taken)

    def take(self) -> dict[str, Tensor]:
        """observation (…, B, 2, k, S), action (…, B, 2, k, A), preferred (…, B)"""
        number = len(self.segments["label_score"])
        bits = self.draws("pairs", (self.batch_size, 2), self.taken, "bits")
        self.taken += 1
        if self.pairs is None:
            first = bits[..., 0] % number
            index = torch.stack([first, (first + 1 + bits[..., 1] % (number - 1)) % number], -1)
        else:
            index = self.pairs[bits[..., 0] % len(self.pairs)]
        score = self.segments["label_score"][index]
        preferred = 0.5 * (1 + (score[..., 1] - score[..., 0]).sign())
        return {"observation": self.segments["observation"][index], "action": self.segments["action"][index],
                "preferred": preferred}

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


class Segments(ScoredPointMass):
    @dataclasses.dataclass(frozen=True)
    class Config(ScoredPointMass.Config):
        segments: int = knob(500, "segments that are compared", low=2, source="project's choice")
        held_out_segments: int = knob(200, "further ones, on which the order is tested", low=2, source="project's choice")
        length: int = knob(16, "steps of a segment", low=2, high=100, source="project's choice")
        noise: tuple[float, ...] = knob((0.3, 1.0), "lowest and highest noise of the teacher that makes them", low=0.0,
                                        source="project's choice")
        labels: str = knob("regret", "what decides which of two segments is preferred", choices=["regret", "partial_return"],
                           source="paper, sec. 3")
        comparisons: int = knob(0, "pairs with a label; 0: all of them", low=0)
        roll_outs: int = knob(64, "of the teacher, to value a state", low=1, when={"labels": "regret"}, source="official code")

    metrics = {
        **ScoredPointMass.metrics,
        "preference_accuracy": Metric("max", "", "share of held-out pairs that the method orders as the labels do"),
        "distance_preferred": Metric("none", "", "mean |mu(s) - a| on the better half of the segments learned from"),
        "distance_dispreferred": Metric("none", "", "the same on the worse half"),
    }

    def stream(self, method, kind, seed):
        if kind != "preferences":
            return super().stream(method, kind, seed)
        c, pairs = self.config, None
        if c.comparisons:
            random = np.random.default_rng(DATA_SEED + 1)
            first = random.integers(c.segments, size=c.comparisons)
            second = (first + random.integers(1, c.segments, size=c.comparisons)) % c.segments
            pairs = torch.from_numpy(np.stack([first, second], 1))
        return Preferences(self.learned(), pairs, c.batch_size, seed, self.device)

    def learned(self) -> dict[str, Tensor]:
        """The segments that are compared: observation (N, k, 6), action (N, k, 3), label_score (N,)."""
        return {k: v[:self.config.segments] for k, v in self._all().items()}

    def held_out(self) -> dict[str, Tensor]:
        return {k: v[self.config.segments:] for k, v in self._all().items()}

    def _all(self) -> dict[str, Tensor]:
        if hasattr(self, "_made"):
            return self._made
        c, random = self.config, np.random.default_rng(DATA_SEED)
        if len(c.noise) != 2 or c.noise[0] > c.noise[1]:
            raise UserError(f"env.noise={list(c.noise)} must be a lowest and a highest noise: env.noise=[0.3,1.0]")
        number, copies = c.segments + c.held_out_segments, self.copies(1)
        level = random.uniform(*c.noise, (number, 1))
        begin = random.integers(HORIZON - c.length + 1, size=number)
        state, seen, done, rewards = random.standard_normal((number, 6)), [], [], []
        for _ in range(HORIZON):
            action = np.clip(teacher_mean(state) + level * random.standard_normal((number, 3)), -1, 1)
            seen.append(state)
            done.append(action)
            state, reward = copies.dynamics(state, action)
            rewards.append(reward)
        steps = begin + np.arange(c.length)[:, None]  # (k, N)
        pick = lambda x: np.stack(x)[steps, np.arange(number)].swapaxes(0, 1)  # noqa: E731
        observation, action, reward = pick(seen), pick(done), pick(rewards)
        if c.labels == "regret":
            values = self.values(np.concatenate([observation[:, 0], observation[:, -1]]), random)
            score = reward[:, :-1].sum(1) + values[number:] - values[:number]
        else:
            score = reward.sum(1)
        self._returns = np.stack(rewards).sum(0)
        self._made = {"observation": torch.from_numpy(observation).float(), "action": torch.from_numpy(action).float(),
                      "label_score": torch.from_numpy(score).float()}
        return self._made

    def values(self, states: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """V of the teacher with its own noise: states (n, 6) -> (n,), undiscounted rewards of 100 steps."""
        c, copies = self.config, self.copies(1)
        state, total = np.repeat(states[:, None], c.roll_outs, 1), 0.0
        for _ in range(HORIZON):
            noise = c.teacher_std * random.standard_normal((c.roll_outs, 3))
            state, reward = copies.dynamics(state, np.clip(teacher_mean(state) + noise, -1, 1))
            total = total + reward
        return total.mean(1)

    # -- the yardstick
    def evaluate(self, method, seed):
        result = super().evaluate(method, seed)
        held = {k: v.to(self.device) for k, v in self.held_out().items()}
        scored = method.score_segments(held["observation"], held["action"])
        first, second = torch.triu_indices(len(scored), len(scored), 1, device=self.device)
        truth = (held["label_score"][second] - held["label_score"][first]).sign()
        said = (scored[second] - scored[first]).sign()
        result["preference_accuracy"] = (0.5 * (1 + truth * said))[truth != 0].mean().item()
        learned = {k: v.to(self.device) for k, v in self.learned().items()}
        chosen = method.act(learned["observation"].flatten(0, 1), explore=False).view_as(learned["action"])
        distance = (chosen - learned["action"]).norm(dim=-1).mean(1)
        better = learned["label_score"] >= learned["label_score"].median()
        result["distance_preferred"] = distance[better].mean().item()
        result["distance_dispreferred"] = distance[~better].mean().item()
        return result

    def references(self, seed):
        self._all()
        row = {"return": float(self._returns.mean()), "return_std": float(self._returns.std()), "episode_length": float(HORIZON)}
        return {**super().references(seed), "noisy teacher, the data": row}


def teacher_mean(state: np.ndarray) -> np.ndarray:
    """(…, 6) -> (…, 3)"""
    return np.tanh(-2 * state[..., :3] - 1.5 * state[..., 3:])
