"""Simulators behind one interface: state to the bit, scaled actions, time limits apart from true ends, refusals."""

from __future__ import annotations

import builtins
import json
import sys

import gymnasium
import numpy as np
import pytest

from envs.control.copies import Copies
from envs.control.dmc import DmcCopies
from runner.catalogue import Catalogue
from runner.compose import compose
from runner.errors import UserError
from runner.run import build

BOOK = Catalogue()
DMC = [n for n in BOOK.names("env") if n.startswith("dmc_")]
GYMNASIUM = ["ant", "halfcheetah", "hopper", "inverted_pendulum", "pendulum", "walker2d"]


def copies_of(env: str, number: int):
    entry = BOOK.get("env", env)
    if env in DMC:
        return DmcCopies(entry.values["domain"], entry.values["task"], number)
    return Copies(entry.values["id"], number)


@pytest.mark.parametrize("env", [*DMC, *GYMNASIUM])
def test_a_saved_simulator_goes_on_to_the_bit(env):
    """Saved in the middle of an episode, through json; the next steps and the next episode are the same."""
    first, random = copies_of(env, 2), np.random.default_rng(0)
    for i in range(2):
        first.reset(i, 5 + i)
    for _ in range(15):
        for i in range(2):
            if any(first.step(i, random.uniform(-1, 1, first.action_size))[2:]):
                first.reset(i)
    second = copies_of(env, 2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(10):
        for i in range(2):
            action = random.uniform(-1, 1, first.action_size)
            a, b = first.step(i, action), second.step(i, action)
            assert np.array_equal(a[0], b[0]) and a[1:] == b[1:]
            if any(a[2:]):
                assert np.array_equal(first.reset(i), second.reset(i))
    assert np.array_equal(first.reset(1), second.reset(1))


def test_the_suite_has_beers_kind_of_list_with_the_sizes_that_the_cards_tell():
    assert len(DMC) == 12
    for env in DMC:
        copies = copies_of(env, 1)
        summary = BOOK.get("env", env).card["summary"]
        assert summary.endswith(f"; {copies.observation_size} observations, {copies.action_size} actions"), env
        assert copies.reset(0, 3).shape == (copies.observation_size,)


def test_observations_are_joined_in_the_order_of_the_spec():
    copies = copies_of("dmc_hopper_hop", 1)
    flat, env = copies.reset(0, 1), copies.envs[0]
    entries = env.task.get_observation(env.physics)
    assert list(entries) == list(env.observation_spec()) == ["position", "velocity", "touch"]
    assert np.array_equal(flat, np.concatenate([entries["position"], entries["velocity"], entries["touch"]]))


def test_actions_are_scaled_to_bounds_that_differ_by_entry():
    copies = copies_of("dmc_quadruped_walk", 1)
    copies.reset(0, 0)
    for sign, bound in ((1, copies.high), (-1, copies.low)):
        copies.step(0, np.full(12, 5.0 * sign))  # beyond [-1, 1]: clipped first
        assert np.array_equal(copies.envs[0].physics.data.ctrl, bound)
    assert copies.high[:3].tolist() == [1.0, 1.1, 0.8] and copies.low[:3].tolist() == [-1.0, -1.0, -0.8]


def test_a_time_limit_of_the_suite_is_no_termination():
    copies = copies_of("dmc_cheetah_run", 1)
    copies.reset(0, 0)
    for step in range(1000):
        _, reward, terminated, truncated = copies.step(0, np.zeros(6))
        assert 0 <= reward <= 1 and not terminated
        assert truncated == (step == 999)


def test_a_discount_of_zero_is_a_termination():
    copies = DmcCopies("lqr", "lqr_2_1", 1)  # ends by itself when it has come to rest
    copies.reset(0, 0)
    physics = copies.envs[0].physics
    with physics.reset_context():
        physics.data.qpos[:] = 0
    assert copies.step(0, np.zeros(copies.action_size))[2:] == (True, False)


def test_the_same_seed_gives_the_same_episode_and_another_does_not():
    a, b = copies_of("dmc_reacher_hard", 1), copies_of("dmc_reacher_hard", 1)
    assert np.array_equal(a.reset(0, 7), b.reset(0, 7))
    assert not np.array_equal(a.reset(0, 8), b.reset(0, 7))


@pytest.mark.parametrize(("word", "says"), [("env.domain=cheeta", "cheetah"), ("env.task=runn", "did you mean: run")])
def test_names_that_the_suite_does_not_know(cli, word, says):
    told = cli("method=td3", "env=dmc_cheetah_run", "size=smoke", "logger=none", word)
    assert told.code == 2 and says in told.err and not (cli.cwd / "runs").exists()


def test_without_the_package_the_extra_is_named(cli, monkeypatch):
    usual = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "dm_control":
            raise ImportError("No module named 'dm_control'")
        return usual(name, *rest)

    for name in [n for n in sys.modules if n.split(".")[0] == "dm_control"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    told = cli("method=td3", "env=dmc_cheetah_run", "size=smoke", "logger=none")
    assert told.code == 2 and "pip install -e '.[dmc]'" in told.err and not (cli.cwd / "runs").exists()


def test_a_run_on_the_suite_has_its_reference_returns(cli):
    told = cli("method=td3", "env=dmc_walker_stand", "size=smoke", "logger=none", "--json")
    result = json.loads(told.out)
    assert told.code == 0 and result["status"] == "done"
    assert 0 < result["metrics"]["return"] <= 1000 and result["metrics"]["episode_length"] == 1000
    assert {"random policy", "all-zero action"} <= result["references"].keys()


@pytest.mark.parametrize("env", ["ant", "hopper", "walker2d", "inverted_pendulum"])
def test_gymnasium_tasks_have_references(env):
    _, world = build(compose([f"env={env}", "method=td3", "size=smoke"], BOOK), "cpu")
    rows = world.references(0)
    assert rows.keys() == {"random policy", "all-zero action"}
    assert rows["random policy"]["return"] != rows["all-zero action"]["return"]


class Wide(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))


class Tuples(Wide):
    action_space = gymnasium.spaces.Tuple([gymnasium.spaces.Discrete(3)])


class Numbers(Wide):
    action_space = gymnasium.spaces.Discrete(3)


class Named(Wide):
    observation_space = gymnasium.spaces.Dict({"a": gymnasium.spaces.Box(-1, 1, (2,))})
    action_space = gymnasium.spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(("cls", "says"), [(Wide, "unbounded action space"), (Tuples, "actions vectors or numbers"),
                                           (Numbers, "numbered actions"),
                                           (Named, "FlattenObservation")])
def test_spaces_that_do_not_fit_are_refused(cls, says):
    name = f"Ballast{cls.__name__}-v0"
    if name not in gymnasium.registry:
        gymnasium.register(name, cls)
    with pytest.raises(UserError, match=says):
        Copies(name, 1)
