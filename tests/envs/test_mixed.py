"""The stream of kind `mixed`: what it plays, what it hands out, its probes and its state."""

from __future__ import annotations

import pytest
import torch

from envs.control.mixed import PROBE, Mixed
from envs.control.stored import Stored
from runner.catalogue import Catalogue
from runner.compose import compose
from runner.interface import Feed
from runner.run import build

BOOK = Catalogue()
COLUMNS = ("observation", "action", "reward", "terminated", "next_observation")


class Learner:
    """A method as the stream knows it: plays 0.5, believes that every value is `belief`."""

    batches = 1

    def __init__(self, *feeds, belief=0.0):
        self.feeds, self.updates, self.belief = feeds, 0, belief

    def feed(self):
        return self.feeds[min(self.updates, len(self.feeds) - 1)]

    def act(self, observation, explore):
        return torch.full((len(observation), 3), 0.5) + (0.1 * torch.randn(len(observation), 3) if explore else 0)

    def inspect(self, batch):
        return {"value": torch.tensor(self.belief), "rows": torch.tensor(float(len(batch["reward"])))}


def make(learner, *words, evaluate=None, seed=0):
    world = build(compose(["method=wsrl", "env=pointmass_medium", "size=smoke", "logger=none", *words], BOOK), "cpu")[1]
    columns = world.columns()
    columns["reward"] = columns["reward"] * world.config.reward_scale
    torch.manual_seed(seed)
    return Mixed(world.copies(world.config.copies), columns, learner, world.config, seed, torch.device("cpu"),
                 evaluate or (lambda method: 0.0)), columns


def advance(stream, number):
    out = []
    for _ in range(number):
        out.append({k: v.clone() for k, v in stream.next().items()})
        stream.method.updates += 1
    return out


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(batch):
    return [tuple(r) for r in torch.cat([batch["observation"], batch["action"], batch["reward"][:, None]], 1).tolist()]


def test_stored_batches_are_those_of_kind_offline_with_all_columns():
    learner = Learner(Feed(), Feed(steps=3), Feed())  # what is played changes nothing
    stream, columns = make(learner)
    offline = Stored(columns, 16, 0, "cpu")
    for batch in advance(stream, 12):
        assert equal(batch, offline.next()) and "start" in batch
    assert stream.env_steps == 3


def test_shares_hold_in_every_part_of_a_batch():
    learner = Learner(Feed(steps=40, stored=0.25), Feed(steps=1, stored=0.25))
    learner.batches = 3
    stream, columns = make(learner)
    known = set(rows(columns))
    for batch in advance(stream, 5):
        assert set(batch) == set(COLUMNS) and len(batch["reward"]) == 48
        stored = torch.tensor([r in known for r in rows(batch)]).view(3, 16)
        assert (stored.sum(1) == 4).all()
    assert stream.env_steps == 44


def test_online_rows_are_what_was_played_with_scaled_rewards():
    stream, _ = make(Learner(Feed(steps=30, stored=0.0)))
    batch = advance(stream, 1)[0]
    assert (batch["action"] - 0.5).abs().max() < 0.6 and batch["action"].std() > 0.05  # the learner's own, with noise
    p, v, a = batch["observation"][:, :3], batch["observation"][:, 3:], batch["action"].clamp(-1, 1)
    torch.testing.assert_close(batch["reward"], -0.01 * (p.square().sum(1) + 0.1 * v.square().sum(1) + 0.01 * a.square().sum(1)))


@pytest.mark.parametrize(("feed", "steps"), [(Feed(steps=1, stored=0.0), 16), (Feed(steps=1, stored=0.5), 8),
                                             (Feed(steps=1, stored=1.0), 1), (Feed(steps=100, stored=0.0), 100),
                                             (Feed(steps=1, stored=0.0, start=True), 21), (Feed(copied=50, stored=0.0), 0)])
def test_steps_played_before_the_first_online_batch(feed, steps):
    stream, _ = make(Learner(feed))
    advance(stream, 1)
    assert stream.env_steps == steps


def test_copied_transitions_are_stored_ones():
    stream, columns = make(Learner(Feed(copied=500, stored=0.0), Feed(stored=0.0)), "env.capacity=300")
    known = set(rows(columns))
    assert all(r in known for batch in advance(stream, 3) for r in rows(batch))
    assert stream.total == 500 and stream.env_steps == 0


def test_probes_are_made_at_the_switch_and_every_so_many_steps():
    seen = []

    def evaluate(learner):
        seen.append(learner.updates)
        return {2: 10.0, 3: 4.0}.get(learner.updates, 9.0)

    learner = Learner(Feed(), Feed(), Feed(steps=50, stored=0.0), Feed(steps=10, stored=0.0), belief=-0.5)
    stream, _ = make(learner, "env.probe_steps=20", "env.reward_scale=0.1", evaluate=evaluate)
    advance(stream, 2)
    assert not seen and stream.summary() == {} and "probe/return" not in stream.counters()
    advance(stream, 1)
    assert [p["env_steps"] for p in stream.probes] == [0, 20, 40] and seen == [2, 2, 2]
    learner.belief = -0.75
    advance(stream, 3)
    assert [p["env_steps"] for p in stream.probes] == [0, 20, 40, 60, 80]
    returns = [10.0, 10.0, 10.0, 4.0, 9.0]
    assert stream.summary() == pytest.approx({"dip": 6.0, "online_return": sum(returns) / 5, "value_fall": 0.25 / 0.1})
    last = stream.counters()
    assert last["probe/return"] == 9 and last["probe/stored_value"] == -0.75
    assert last["probe/stored_rows"] == PROBE and last["probe/online_rows"] == 80


def test_probes_touch_no_random_state():
    feeds = Feed(), Feed(steps=50, stored=0.5), Feed(steps=3, stored=0.5)
    with_probes, without = (make(Learner(*feeds), f"env.probe_steps={n}")[0] for n in (10, 0))
    torch.manual_seed(5)
    one = advance(with_probes, 8)
    torch.manual_seed(5)
    other = advance(without, 8)
    assert all(equal(a, b) for a, b in zip(one, other, strict=True)) and len(with_probes.probes) == 7 and not without.probes


@pytest.mark.parametrize("done", [1, 3, 6])
def test_state_round_trips_before_and_after_the_switch(done):
    feeds = [Feed(), Feed(), Feed(steps=30, stored=0.0), Feed(steps=2, stored=0.25)]
    words = ("env.probe_steps=10", "env.capacity=25")
    stream, _ = make(Learner(*feeds), *words)
    advance(stream, done)
    state, random_state = stream.state_dict(), torch.get_rng_state()
    first, total = stream.journal_first(), stream.journal_size()
    saved = stream.journal_rows(first, total).clone() if total else None
    wanted = advance(stream, 4)
    again, _ = make(Learner(*feeds), *words, seed=0)
    again.method.updates = done
    if saved is not None:
        again.load_journal(saved, first)
    again.load_state_dict(state)
    torch.set_rng_state(random_state)
    assert all(equal(a, b) for a, b in zip(advance(again, 4), wanted, strict=True))
    assert again.probes == stream.probes and again.counters() == stream.counters()
