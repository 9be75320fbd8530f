"""The stream of kind `rollouts`: what it hands out, in which order, and that it continues to the bit."""

from __future__ import annotations

import types

import numpy as np
import torch

from envs.control.copies import Copies
from envs.control.rollouts import Rollouts
from envs.control.tomato import START, TablePolicy, TomatoCopies
from runner.interface import Method


class Counting:
    """Copy i counts its steps: observation [i, t], reward t; even copies terminate after 3 steps, odd ones are cut after 5."""

    observation_size, action_size, actions, costs = 2, 1, None, 2

    def __init__(self, number):
        self.envs, self.t, self.cost, self.seen = range(number), [0] * number, np.zeros((number, 2)), []

    def reset(self, index, seed=None):
        self.t[index] = 0
        return np.array([index, 0.0])

    def step(self, index, action):
        self.seen.append(float(action[0]))
        self.t[index] += 1
        self.cost[index] = self.t[index], -self.t[index]
        t = self.t[index]
        return np.array([index, float(t)]), float(t), index % 2 == 0 and t == 3, index % 2 == 1 and t == 5


class Echo(Method):
    """Acts 10 times the time it sees: nothing is clipped on the way."""

    def __init__(self):
        super().__init__(None)

    def act(self, observation, explore):
        assert explore and observation.dtype == torch.float32
        return 10 * observation[:, 1:]


def stream(steps=7, copies=2, scale=0.5):
    config = types.SimpleNamespace(rollout_steps=steps, reward_scale=scale)
    return Rollouts(Counting(copies), Echo(), config, 0, torch.device("cpu"))


def test_rows_in_order_with_the_observation_before_the_reset():
    rolled = stream()
    batch = rolled.next()
    assert batch["observation"].shape == (7, 2, 2) and batch["cost"].shape == (7, 2, 2)
    even, odd = [0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 1]
    assert batch["observation"][..., 1].T.tolist() == [even, odd]
    assert batch["next_observation"][..., 1].T.tolist() == [[x + 1 for x in even], [x + 1 for x in odd]]
    assert batch["reward"].T.tolist() == [[(x + 1) / 2 for x in even], [(x + 1) / 2 for x in odd]]
    assert batch["cost"][..., 0].T.tolist() == [[x + 1 for x in even], [x + 1 for x in odd]]
    assert batch["terminated"].T.tolist() == [[0, 0, 1, 0, 0, 1, 0], [0] * 7]
    assert batch["ended"].T.tolist() == [[0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0]]
    assert batch["action"].squeeze(2).tolist() == (10 * batch["observation"][..., 1]).tolist()
    assert rolled.player.copies.seen[:4] == [0, 0, 10, 10]
    again = rolled.next()  # episodes go on where they were
    assert again["observation"][0, :, 1].tolist() == [1, 2]
    counters = rolled.counters()
    assert counters["env_steps"] == 28 and counters["train_return"] == 6.0 and counters["train_cost"] == 0.0


def test_state_continues_to_the_bit():
    """On a real simulator, in the middle of episodes, with a policy of its own randomness."""
    class Random(Echo):
        def act(self, observation, explore):
            return torch.randn(len(observation), 1)

    config = types.SimpleNamespace(rollout_steps=150, reward_scale=1.0)

    def new(seed):
        return Rollouts(Copies("InvertedPendulum-v5", 2), Random(), config, seed, torch.device("cpu"))

    torch.manual_seed(0)
    first = new(3)
    first.next()
    state, numbers = first.state_dict(), torch.get_rng_state()
    wanted = first.next()
    second = new(8)
    second.load_state_dict(state)
    torch.set_rng_state(numbers)
    found = second.next()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[k], found[k]) for k in wanted)
    assert first.counters() == second.counters()


def test_the_reference_plays_beside_and_its_draws_are_saved():
    table = np.full((26, 512, 4), 0.25)
    config = types.SimpleNamespace(rollout_steps=30, reward_scale=1.0)

    class Down(Echo):
        def act(self, observation, explore):
            return torch.full((len(observation),), 2)

    def new():
        return Rollouts(TomatoCopies(3), Down(), config, 0, torch.device("cpu"), TablePolicy(table, 1, "cpu"), TomatoCopies(3))

    first = new()
    batch = first.next()
    assert batch["reference_observation"].shape == (90, 36) and batch["reference_action"].shape == (90,)
    assert batch["reference_probability"].shape == (30, 3, 4) and torch.all(batch["reference_probability"] == 0.25)
    assert batch["action"].eq(2).all() and len(batch["reference_action"].unique()) == 4
    assert batch["reference_observation"][0, START] == 1 and first.counters()["env_steps"] == 90
    state = first.state_dict()
    wanted = first.next()
    second = new()
    second.load_state_dict(state)
    found = second.next()
    assert all(torch.equal(wanted[k], found[k]) for k in wanted)


def test_numbered_actions_of_gymnasium():
    copies = Copies("CartPole-v1", 1, numbered=True)
    assert (copies.actions, copies.action_size, copies.observation_size) == (2, None, 4)
    copies.reset(0, 1)
    before = copies.envs[0].unwrapped.state
    right = copies.step(0, np.int64(1))[0]
    copies.reset(0, 1)
    assert np.allclose(copies.envs[0].unwrapped.state, before) and not np.allclose(copies.step(0, np.int64(0))[0], right)
