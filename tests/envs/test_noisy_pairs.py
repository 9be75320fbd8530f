"""Noisy lists as pairs: the same lists, every pair once, flips counted, the reference a function of the seed, exact metrics."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from envs.lists import noisy
from envs.pairs.bandit import ARM, CONTEXT
from runner.errors import UserError

_spec = importlib.util.spec_from_file_location("lab", Path(__file__).parents[1] / "conformance" / "lab.py")
lab = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)


def assembled(*overrides, name="dpo"):
    return lab.assembled(name, *overrides, env="noisy_pairs")


def chosen_is_better(world, pairs):
    x, w, l = torch.tensor([(ord(p.prompt) - CONTEXT, ord(p.chosen) - ARM, ord(p.rejected) - ARM) for p in pairs]).T
    return world.bandit.train.reward[x, w] > world.bandit.train.reward[x, l]


def test_every_two_candidates_of_the_lists_of_noisy_lists_are_a_pair():
    _, world, stream = assembled('env.noise="cauchy"', 'env.level="hard"')
    pairs = world.pairs(world.bandit.train)
    assert len(pairs) == stream.size == 16 * 15 and len({(p.prompt, frozenset((p.chosen, p.rejected))) for p in pairs}) == 240
    assert chosen_is_better(world, pairs).all() and all(p.label == 1 for p in pairs)
    lists = noisy.Bandit(world.config, 0)
    assert torch.equal(lists.train.reward, world.bandit.train.reward)


def test_a_share_is_turned_and_soft_labels_are_logistic():
    _, world, _ = assembled("env.p_flip=0.25")
    assert (~chosen_is_better(world, world.pairs(world.bandit.train))).sum().item() == 60
    _, world, _ = assembled('env.labels="soft"')
    for p in world.pairs(world.bandit.train)[::17]:
        gap = world.bandit.train.reward[ord(p.prompt) - CONTEXT, [ord(p.chosen) - ARM, ord(p.rejected) - ARM]]
        assert p.label == pytest.approx(torch.sigmoid((gap[0] - gap[1]) / 0.5).item())


def test_the_reference_is_a_function_of_the_seed_and_learned_from_clean_lists():
    tables = [assembled(*words, name=name)[1].reference_table for name, words in
              (("dpo", ()), ("ipo", ('env.noise="flip"',)), ("dpo", ("seed=1",)))]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    _, world, _ = assembled("env.reference_steps=30", "env.clean=512", "env.test=256", "env.reference_batch=64")
    told = world.references(0)
    assert 0.22 < told["reference"]["win_mass"] < 0.5 and told["uniform policy"]["win_mass"] == pytest.approx(1 / 6)
    assert told["reference"]["accuracy"] == 0.5 and told["reference"]["kl_to_reference"] == 0


def test_metrics_are_the_lists_own_and_training_starts_at_the_reference():
    method, world, stream = assembled()
    assert world.evaluate(method, 0)["kl_to_reference"] == pytest.approx(0, abs=1e-6)
    before = world.evaluate(method, 0)["win_mass"]
    lab.train(method, stream, 30)
    test, log_p = world.bandit.test, method.policy.scores(world.tested()).log_softmax(-1).detach()
    by_hand = sum(log_p[i, int(test.best[i])].exp().item() for i in range(32)) / 32
    assert world.evaluate(method, 0)["win_mass"] == pytest.approx(by_hand, rel=1e-5) and by_hand != before
    features = torch.cat([test.context[3].expand(6, -1), test.candidates[3]], -1)
    torch.testing.assert_close(method.policy.features[int(world.tested()[3])], features)


def test_a_table_is_refused():
    from runner.compose import compose
    from runner.run import assemble
    with pytest.raises(UserError, match="policy.kind=mlp"):
        assemble(compose(["method=dpo", "env=noisy_pairs", "policy.kind=table", "size=smoke", "logger=none"], lab.BOOK))
