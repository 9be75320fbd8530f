"""Dosing: a small treatment problem with a cost, known true dynamics and a log of competent behaviour (a testbed of this
project, after arXiv 2505.16242). Health deficit h, fluid load w, oxygen o; actions fluid f and pressor u in [0, 1], given as
[-1, 1]; n are independent N(0, 1):

    h <- clip(h + .10 - .25 f (1 - w) - .15 u + .03 n, 0, 2)
    w <- .9 w + .3 f
    o <- clip(.95 o + .05 - .10 max(w - .8, 0) - .05 max(u - .8, 0) + .01 n, 0, 1)        (w as it was before)
    reward -h, or -5 and the end where h >= 1.8;  cost 1 for o < .92 and 1 for w > 1
    start h ~ U[.6, 1.2], w ~ U[0, .3], o = 1; 20 steps

Behaviour: f = clip(.3 + .3 h - .2 w + .1 n), u = clip(.2 + .2 h + .1 n). It never gives much to the healthy, which is
harmful in o and w; a simulator made of its log cannot know.

Methods that play (`rollouts`) learn in that simulator: the next row, reward, cost and end of the logged (s, a) nearest to
the present one, features scaled to [-1, 1] by the log. Methods that read learn from the log itself (`offline`). All of them
are judged in the true dynamics. `out_of_support` is the share of visited (s, a) whose Gaussian kernel density under the log
lies below the 5 % quantile of the log's own, at the sharpest bandwidth for which no more of a second log does (within two
standard errors of 5 %, or of the least there is).
`simulator_gap` is the distance between the return in the simulator and the true one: how little the simulator can be trusted
where the policy goes. `cost_gap` is the same of costs.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch

from envs.control.base import EVALUATION_SEED, ControlWorld
from envs.control.copies import OwnCopies
from envs.control.rollouts import Rollouts
from runner.errors import UserError
from runner.interface import Metric, knob

HORIZON, DEATH = 20, 1.8
LOG_SEED, SECOND_SEED = 3535, 5353


def advance(state: np.ndarray, action: np.ndarray, noise: np.ndarray):
    """state (…, 3), action (…, 2) in [-1, 1], noise (…, 2) -> next state, reward, cost, terminated"""
    h, w, o = np.moveaxis(state, -1, 0)
    f, u = np.moveaxis((np.clip(action, -1, 1) + 1) / 2, -1, 0)
    h = np.clip(h + 0.10 - 0.25 * f * (1 - w) - 0.15 * u + 0.03 * noise[..., 0], 0, 2)
    o = np.clip(0.95 * o + 0.05 - 0.10 * np.maximum(w - 0.8, 0) - 0.05 * np.maximum(u - 0.8, 0) + 0.01 * noise[..., 1], 0, 1)
    w = 0.9 * w + 0.3 * f
    dead = h >= DEATH
    return np.stack([h, w, o], -1), np.where(dead, -5.0, -h), (o < 0.92) * 1.0 + (w > 1), dead


def first(generator: np.random.Generator) -> np.ndarray:
    return np.array([generator.uniform(0.6, 1.2), generator.uniform(0, 0.3), 1.0])


def behaviour(state: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """state (…, 3), noise (…, 2) -> action (…, 2) in [-1, 1]"""
    f = np.clip(0.3 + 0.3 * state[..., 0] - 0.2 * state[..., 1] + 0.1 * noise[..., 0], 0, 1)
    u = np.clip(0.2 + 0.2 * state[..., 0] + 0.1 * noise[..., 1], 0, 1)
    return np.stack([f, u], -1) * 2 - 1


class DosingCopies(OwnCopies):
    """The true dynamics."""

    observation_size, action_size, costs, horizon = 3, 2, 1, HORIZON

    def __init__(self, number: int):
        super().__init__(number)
        self.cost = np.zeros((number, 1))                                          # of the last step
        self.told = {"cost": self.cost[:, 0], "died": np.zeros(number)}

    def start(self, generator):
        return first(generator)

    def transition(self, index, action):
        """-> next state, reward, cost, terminated"""
        return advance(self.state[index], action, self.generators[index].standard_normal(2))

    def advance(self, index, action):
        state, reward, self.cost[index], dead = self.transition(index, action)
        self.told["died"][index] = dead
        return state, reward, dead


class NearestCopies(DosingCopies):
    """The simulator: every step goes where the nearest logged step went. Key, reward, cost and end are one row."""

    def __init__(self, number: int, log: dict[str, np.ndarray]):
        super().__init__(number)
        self.log = log
        rows = np.concatenate([log["observation"], log["action"]], 1)
        self.low, self.width = rows.min(0), np.maximum(rows.max(0) - rows.min(0), 1e-9)
        self.keys = (rows - self.low) / self.width
        self.squares = (self.keys ** 2).sum(1)

    def transition(self, index, action):
        key = (np.concatenate([self.state[index], action]) - self.low) / self.width
        row = int(np.argmin(self.squares - 2 * self.keys @ key))
        log = self.log
        return log["next_observation"][row], log["reward"][row], log["cost"][row], log["terminated"][row]


@functools.lru_cache(2)
def logged(steps: int, seed: int) -> dict[str, np.ndarray]:
    """The first `steps` steps of the behaviour's episodes, as columns; the worlds of a process share them."""
    generator, rows = np.random.default_rng(seed), []
    while len(rows) < steps:
        state, start, dead, t = first(generator), True, False, 0
        while t < HORIZON and not dead:
            action = behaviour(state, generator.standard_normal(2))
            after, reward, cost, dead = advance(state, action, generator.standard_normal(2))
            rows.append((state, action, reward, dead, after, cost, start))
            state, start, t = after, False, t + 1
    columns = zip(*rows[:steps])
    names = ("observation", "action", "reward", "terminated", "next_observation", "cost", "start")
    return {n: np.array(c) for n, c in zip(names, columns)}


class Support:
    """Where the log has data: Gaussian kernel density over (s, a) scaled to [-1, 1], up to a factor."""

    def __init__(self, log, second, share: float = 0.05):
        rows, held_out = self._rows(log), self._rows(second)
        self.low, self.width = rows.min(0).values, (rows.max(0).values - rows.min(0).values).clamp_min(1e-9)
        self.keys = self._scaled(rows)
        own = torch.cdist(self.keys[:1000], self.keys).square()
        other = torch.cdist(self._scaled(held_out)[:1000], self.keys).square()

        def outside(h: float) -> tuple[torch.Tensor, float]:
            threshold = (own * (-0.5 / h ** 2)).exp().mean(1).quantile(share)
            return threshold, ((other * (-0.5 / h ** 2)).exp().mean(1) < threshold).float().mean().item()

        grid = torch.logspace(-2, 0.5, 16).tolist()  # too sharp a kernel sees the log's own rows alone, all else is outside
        shares = [outside(h)[1] for h in grid]
        most = max(share, min(shares)) + 2 * (share * (1 - share) / len(other)) ** 0.5
        self.bandwidth = next(h for h, found in zip(grid, shares) if found <= most)
        self.threshold = outside(self.bandwidth)[0]

    @staticmethod
    def _rows(log):
        return torch.cat([torch.as_tensor(log[k], dtype=torch.float32) for k in ("observation", "action")], 1)

    def _scaled(self, rows):
        return (rows - self.low) / self.width * 2 - 1

    def outside(self, observation, action) -> torch.Tensor:
        """(n,) of truth values"""
        rows = self._scaled(torch.cat([observation.float(), action.float().clamp(-1, 1)], 1))
        parts = [(torch.cdist(p, self.keys).square() * (-0.5 / self.bandwidth ** 2)).exp().mean(1) for p in rows.split(2000)]
        return torch.cat(parts) < self.threshold


@functools.lru_cache(1)
def supported(steps: int) -> Support:
    return Support(logged(steps, LOG_SEED), logged(1000, SECOND_SEED))


class Dosing(ControlWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(ControlWorld.Config):
        logged_steps: int = knob(5000, "steps of the log", low=100)
        simulator: str = knob("nearest", "where playing methods learn", choices=["nearest", "exact"])

    metrics = {
        "return": Metric("max", "reward", "undiscounted return of the deterministic policy in the true dynamics"),
        "return_std": Metric("none", "reward", "standard deviation over episodes"),
        "episode_length": Metric("none", "steps"),
        "cost": Metric("min", "per episode", "violated limits in the true dynamics"),
        "deaths": Metric("min", "", "share of episodes that end in death"),
        "out_of_support": Metric("min", "", "share of visited (s, a) in the true dynamics that the log does not support"),
        "simulator_return": Metric("none", "reward", "return in the simulator made of the log"),
        "simulator_cost": Metric("none", "per episode", "violated limits in that simulator"),
        "simulator_gap": Metric("min", "reward", "|return in the simulator - true return|"),
        "cost_gap": Metric("min", "per episode", "|true cost - the simulator's|"),
    }

    def __init__(self, config, device="cpu"):
        super().__init__(config, device)
        self.log = logged(config.logged_steps, LOG_SEED)

    @functools.cached_property
    def support(self) -> Support:
        return supported(self.config.logged_steps)

    def copies(self, number, **options):
        if options:
            raise UserError("env dosing has no picture to render; video works for simulators such as halfcheetah")
        return DosingCopies(number)

    def columns(self):
        return {k: torch.from_numpy(v) for k, v in self.log.items()}

    def stream(self, method, kind, seed):
        c = self.config
        if kind not in ("rollouts", "cost_rollouts"):
            return super().stream(method, kind, seed)
        copies = NearestCopies(c.copies, self.log) if c.simulator == "nearest" else DosingCopies(c.copies)
        columns = {k: v.to(self.device, torch.float32) for k, v in self.columns().items()}
        return Rollouts(copies, method, c, seed, self.device, columns=columns)

    def _figures(self, policy) -> dict[str, float]:
        played = self.play(policy, self.config.episodes, EVALUATION_SEED)
        model = self.play(policy, self.config.episodes, EVALUATION_SEED, NearestCopies(self.config.episodes, self.log))
        outside = self.support.outside(played["observations"].cpu(), played["actions"])
        mean = lambda p, name: p["told"][name].mean().item()  # noqa: E731
        result = {**self._summary(played), "cost": mean(played, "cost"), "deaths": mean(played, "died"),
                  "out_of_support": outside.float().mean().item(),
                  "simulator_return": model["returns"].mean().item(), "simulator_cost": mean(model, "cost")}
        return {**result, "simulator_gap": abs(result["simulator_return"] - result["return"]),
                "cost_gap": abs(result["cost"] - result["simulator_cost"])}

    def evaluate(self, method, seed):
        return self._figures(lambda o: method.act(o, explore=False))

    def references(self, seed):
        generator, numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        policies = {
            "behaviour": lambda o: torch.from_numpy(behaviour(o.cpu().double().numpy(), numbers.standard_normal((len(o), 2)))),
            "random policy": lambda o: torch.rand(len(o), 2, generator=generator) * 2 - 1,
            "all-zero action": lambda o: torch.zeros(len(o), 2),
        }
        return {name: self._figures(policy) for name, policy in policies.items()}
