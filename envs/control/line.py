"""LineWorld: walk to the end of a line when half of the data walk the wrong way.

Position x in [0, 100], start 0. An action a in [-1, 1] moves by 2 a + N(0, 0.05^2). Reaching x >= 95 ends the episode with
reward 1; otherwise reward 0 (sparse), or the progress made / 100 (dense). 60 steps at most. The observation is x / 100.

Data, 10,000 single transitions, x uniform on [0, 100]: in the left half (x < 50) actions are U[.5, 1] on even cells of
width 2 and U[-1, -.5] on odd ones; in the right half U[.3, 1]. At a bad state a good action lies within a distance of 2, so
that a method may borrow it from there; cloning what was done at each state goes back and forth. The numbers are this
project's choice. The transitions are no episodes, so there is no column `start`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from envs.control.base import EVALUATION_SEED, ControlWorld
from runner.errors import UserError
from runner.interface import Metric, knob

DATA_SEED = 4242
LENGTH, GOAL, STRIDE, NOISE = 100.0, 95.0, 2.0, 0.05


class LineCopies:
    """The interface of envs/control/copies.py without a simulator."""

    observation_size, action_size = 1, 1

    def __init__(self, number: int, dense: bool, horizon: int):
        self.dense, self.horizon, self.envs = dense, horizon, range(number)
        self.x, self.steps = np.zeros(number), [0] * number
        self.generators = [np.random.default_rng(i) for i in range(number)]

    def reset(self, index, seed=None):
        if seed is not None:
            self.generators[index] = np.random.default_rng(seed)
        self.x[index], self.steps[index] = 0.0, 0
        return np.zeros(1)

    def step(self, index, action):
        a = np.clip(float(np.asarray(action).reshape(-1)[0]), -1, 1)
        before = self.x[index]
        self.x[index], reward, reached = move(before, a, self.generators[index].standard_normal(), self.dense)
        self.steps[index] += 1
        return self.x[index:index + 1] / LENGTH, float(reward), bool(reached), not reached and self.steps[index] >= self.horizon

    def close(self):
        pass

    def state_dict(self):
        return [{"x": float(self.x[i]), "steps": self.steps[i], "generator": g.bit_generator.state}
                for i, g in enumerate(self.generators)]

    def load_state_dict(self, states):
        for i, saved in enumerate(states):
            self.x[i], self.steps[i] = saved["x"], saved["steps"]
            self.generators[i].bit_generator.state = saved["generator"]


def move(x, action, noise, dense: bool):
    """-> next position, reward, whether the goal is reached; numbers or arrays"""
    after = np.clip(x + STRIDE * action + NOISE * noise, 0.0, LENGTH)
    reached = after >= GOAL
    return after, reached + ((after - x) / LENGTH if dense else 0.0), reached


class Line(ControlWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(ControlWorld.Config):
        dense: bool = knob(False, "whether progress is rewarded, too", source="project's choice")
        horizon: int = knob(60, "steps of an episode at most", low=1, source="project's choice")
        rows: int = knob(10_000, "transitions in the data", low=2, source="project's choice")

    metrics = {
        **ControlWorld.metrics,
        "success_rate": Metric("max", "", "share of episodes that reach the goal"),
        "data_distance": Metric("min", "", "distance of (x / 100, a) from the data's nearest pair, mean over visited states"),
        "overestimation": Metric("none", "reward", "mean of Q(s, pi(s)) less the discounted return that followed"),
    }

    def copies(self, number, **options):
        if options:
            raise UserError("env line has no picture to render; video works for simulators such as halfcheetah")
        return LineCopies(number, self.config.dense, self.config.horizon)

    def teacher(self):
        raise UserError("env line has no teacher")

    def columns(self) -> dict[str, Tensor]:
        n, random = self.config.rows, np.random.default_rng(DATA_SEED)
        x = random.uniform(0, LENGTH, n)
        forward, back, right = random.uniform(0.5, 1, n), random.uniform(-1, -0.5, n), random.uniform(0.3, 1, n)
        action = np.where(x >= LENGTH / 2, right, np.where((x // 2) % 2 == 0, forward, back))
        after, reward, reached = move(x, action, random.standard_normal(n), self.config.dense)
        columns = {"observation": x[:, None] / LENGTH, "action": action[:, None], "reward": reward, "terminated": reached,
                   "next_observation": after[:, None] / LENGTH}
        return {k: torch.from_numpy(np.asarray(v, dtype=np.float32)) for k, v in columns.items()}

    def evaluate(self, method, seed):
        played = self.play(lambda o: method.act(o, explore=False), self.config.episodes, EVALUATION_SEED)
        result = self._summary(played)
        states = played["observations"]
        actions = method.act(states, explore=False)
        data = self.columns()
        result["data_distance"] = nearest(torch.cat([states, actions.to(states)], 1),
                                          torch.cat([data["observation"], data["action"]], 1).to(states)).mean().item()
        assessed = method.assess(states, actions)
        if assessed is not None:
            result["overestimation"] = (assessed[0].mean(0).double().cpu() - self._followed(played, method)).mean().item()
        return result

    def _summary(self, played):
        return {**super()._summary(played), "success_rate": played["terminated"].double().mean().item()}

    def _followed(self, played, method) -> Tensor:
        """Discounted rewards after each visited state, in the order of `play`: step by step, over the episodes alive."""
        lengths, discount = played["lengths"].long(), getattr(method.config, "discount", 1.0)
        x = torch.full((len(lengths), int(lengths.max())), float("nan"), dtype=torch.float64)
        alive = torch.stack([lengths > t for t in range(x.shape[1])], 1)
        x.T[alive.T] = played["observations"][:, 0].double().cpu() * LENGTH
        total = torch.zeros_like(x)
        later = torch.zeros(len(lengths), dtype=torch.float64)
        for t in reversed(range(x.shape[1])):
            last = lengths - 1 == t
            reward = (last & played["terminated"]).double()
            if self.config.dense:  # the last step's own end is not among the states seen; the return tells it
                after = x[:, t + 1] if t + 1 < x.shape[1] else torch.full_like(later, float("nan"))
                ended = played["returns"] - played["terminated"].double()
                reward = reward + torch.where(last, ended - x[:, t] / LENGTH, (after - x[:, t]) / LENGTH)
            later = torch.where(alive[:, t], reward * self.config.reward_scale + discount * later, later)
            total[:, t] = later
        return total.T[alive.T]


def nearest(queries: Tensor, keys: Tensor, chunk: int = 2048) -> Tensor:
    """Euclidean distance from each query (n, D) to the nearest key (N, D): (n,)"""
    return torch.cat([torch.cdist(q, keys).amin(1) for q in queries.split(chunk)])
