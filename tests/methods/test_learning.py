"""That methods learn, in seconds: each against a reference of the env, far from where chance leads.

Rewards of PointMass are divided by 100, so that coefficients which multiply returns are the papers' scaled alike."""

from __future__ import annotations

import pytest

from runner.catalogue import Catalogue
from runner.compose import compose
from runner.run import assemble

BOOK = Catalogue()


def learned(*words) -> tuple[dict, dict]:
    """(gold metrics, references) after loop.steps updates at size=claim."""
    job = compose([*words, "logger=none", "hardware=cpu", "env.episodes=32"], BOOK)
    method, world, stream = assemble(job)
    for _ in range(job.config["loop"]["steps"]):
        method.update(stream.next())
        method.updates += 1
    return world.evaluate(method, 0), world.references(0)


def test_sac_solves_pointmass():
    """2,500 updates: nearer to the teacher than nine tenths of what doing nothing lacks (-45 against -28 and -1,050)."""
    result, references = learned("method=sac", "env=pointmass", "env.gravity=0.0", "env.drag=0.5", "loop.steps=2500",
                                 "method.temperature=0.01")
    assert result["return"] > 0.1 * references["all-zero action"]["return"]


@pytest.fixture(scope="module")
def cloned() -> float:
    return learned("method=bc", "env=pointmass_medium", "loop.steps=1500")[0]["return"]


@pytest.mark.parametrize(("name", "words"), [
    ("iql", ["loop.steps=3000", "method.inverse_temperature=300", "method.decay_steps=3000"]),
    ("cql", ["loop.steps=2000", "method.conservative_weight=0.005", "method.sampled_actions=3", "method.hidden=[64,64]",
             "method.actor_learning_rate=0.001", "method.temperature=0.01"])])
def test_offline_values_beat_cloning_the_mediocre_policy(name, words, cloned):
    """By a quarter of the clone's own distance to the teacher."""
    result, references = learned(f"method={name}", "env=pointmass_medium", *words)
    assert result["return"] > cloned + 0.25 * (references["teacher"]["return"] - cloned)


def test_rlpd_learns_from_stored_and_online_data():
    """2,000 environment steps, 4,000 critic steps; early policies push the point away, far below doing nothing."""
    result, references = learned("method=rlpd", "env=pointmass_medium", "loop.steps=2000", "method.critics=3",
                                 "method.critic_steps=2", "env.start_steps=100", "method.temperature=0.01",
                                 "method.actor_learning_rate=0.001", "env.probe_steps=0")
    assert result["return"] > 0.5 * references["all-zero action"]["return"]


@pytest.fixture(scope="module")
def cloned_replay() -> float:
    return learned("method=bc", "env=pointmass_replay", "loop.steps=3000")[0]["return"]


@pytest.mark.parametrize(("name", "words"), [
    ("td3_bc", ["loop.steps=3000", "method.alpha=1"]),
    ("iql", ["loop.steps=3000", "method.inverse_temperature=300", "method.decay_steps=3000"]),
    ("cql", ["loop.steps=2000", "method.conservative_weight=0.05", "method.sampled_actions=3", "method.hidden=[64,64]",
             "method.temperature=0.01"])])
def test_offline_values_beat_cloning_a_whole_replay(name, words, cloned_replay):
    """Data of every quality: the clone is the mean of them, values choose among them. Over five seeds at 4,000 updates the
    clone returned -30.6, td3_bc -29.0, iql -28.8 and cql -28.5, each seed better than any clone; the teacher returns -28.0."""
    result, references = learned(f"method={name}", "env=pointmass_replay", *words)
    assert result["return"] > cloned_replay
    assert result["return"] > 1.1 * references["teacher"]["return"]
