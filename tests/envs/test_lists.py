"""Noisy lists: the bandit's formula, what each noise family does to the rewards, the reference, the metrics' ends, the
policy over lists, and runs that stop and continue."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch

from envs.lists.noisy import LEVELS, NOISE, Bandit, NoisyLists, corrupt, figures, generator
from methods.common.policies import ListPolicy
from runner.catalogue import Catalogue
from runner.checkpoint import Checkpoints
from runner.compose import compose
from runner.errors import UserError
from runner.interface import make_config
from runner.loop import Loop, seed_everything
from runner.run import assemble, execute
from runner.settings import Loop as Settings

BOOK = Catalogue()
SPLITS = ("train", "clean", "validation", "test")
ANCHORS = ("self", "ema", "copy_every_n", "uniform")


def bandit(seed=0, **values):
    return Bandit(NoisyLists.Config(**values), seed)


def job(method, *words):
    return compose([f"method={method}", "env=noisy_lists", "size=smoke", "logger=none", *words], BOOK)


def train(method, stream, updates):
    out = []
    for _ in range(updates):
        out.append({k: v.item() for k, v in method.update(stream.next()).items()})
        method.updates += 1
    return out


def weights(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- the bandit --------------------------------------------------------------------------------------------------------
def test_rewards_against_loops():
    b = bandit(3, train=5, clean=7, validation=3, test=4, noise="none")
    assert b.linear.norm().item() == pytest.approx(1.2, rel=1e-6)
    for name, number in zip(SPLITS, (5, 7, 3, 4), strict=True):
        lists = getattr(b, name)
        assert lists.context.shape == (number, 4) and lists.candidates.shape == (number, 6, 4)
        for n in range(number):
            x, raw = lists.context[n].tolist(), []
            for phi in lists.candidates[n].tolist():
                linear = sum(v * f for v, f in zip(b.linear.tolist(), phi, strict=True))
                cross = sum(x[k] * b.bilinear[k, m].item() * phi[m] for k in range(4) for m in range(4))
                raw.append(linear + 0.8 * cross)
            mean, deviation = statistics.mean(raw), statistics.stdev(raw)
            assert lists.reward[n].tolist() == pytest.approx([(r - mean) / deviation for r in raw], abs=1e-4)
            assert lists.best[n].item() == max(range(6), key=lambda i: raw[i])


def test_the_bandits_scale():
    entries = torch.cat([bandit(seed, train=1, clean=1, validation=1, test=1).bilinear.flatten() for seed in range(200)])
    assert entries.std().item() == pytest.approx(0.5, abs=0.03)
    b = bandit(noise="none", train=20_000)
    assert b.train.context.std().item() == pytest.approx(1, abs=0.02)
    assert b.train.candidates.std().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(b.train.reward.mean(-1), torch.zeros(20_000), rtol=0, atol=1e-5)
    torch.testing.assert_close(b.train.reward.std(-1), torch.ones(20_000), rtol=0, atol=1e-4)
    assert torch.bincount(b.train.best).min() > 3000  # no place of a list is special


def test_sizes_are_the_projects():
    b = bandit()
    assert [len(getattr(b, name).context) for name in SPLITS] == [256, 512, 256, 512]
    assert b.reference_batches.shape == (30, 64)
    rows = [{tuple(r) for r in getattr(b, name).context.tolist()} for name in SPLITS]
    assert len(set.union(*rows)) == 256 + 512 + 256 + 512  # no context is in two of them


def test_one_seed_gives_one_bandit_and_the_noise_touches_training_rewards_only():
    clean, other = bandit(5, noise="none"), bandit(6, noise="none")
    assert not torch.equal(clean.train.context, other.train.context) and not torch.equal(clean.linear, other.linear)
    for noise in ("gaussian", "flip", "cauchy", "shift"):
        for level in ("easy", "hard"):
            noisy = bandit(5, noise=noise, level=level)
            assert not torch.equal(noisy.train.reward, clean.train.reward)
            assert torch.equal(noisy.reference_batches, clean.reference_batches)
            for name in SPLITS:
                a, b = getattr(noisy, name), getattr(clean, name)
                assert torch.equal(a.candidates, b.candidates)
                if name != "test" or noise != "shift":
                    assert torch.equal(a.context, b.context) and torch.equal(a.best, b.best)
                if name not in ("train", "test"):
                    assert torch.equal(a.reward, b.reward)


def test_the_networks_are_not_drawn_like_the_bandit():
    """Both start from the run's seed: were it the same generator, weights and truth would be the same numbers."""
    for seed in (0, 1, 7):
        torch.manual_seed(seed)
        drawn, b = torch.randn(100_000), bandit(seed)
        for value in (b.train.context[0, 0], b.train.candidates[0, 0, 0], b.bilinear[0, 0] * 2):
            assert (drawn - value).abs().lt(1e-7).sum() <= 1


# -- the noise ---------------------------------------------------------------------------------------------------------
def noise_of(noise, level, seed=0, rows=20_000):
    reward = torch.randn(rows, 6, generator=torch.Generator().manual_seed(99))
    return reward, corrupt(reward, noise, level, generator(seed, NOISE))


def test_no_noise():
    assert torch.equal(*noise_of("none", "hard"))


@pytest.mark.parametrize("level, deviation, share", [("easy", 0.5, 0.05), ("medium", 1.0, 0.1), ("hard", 2.0, 0.2)])
def test_gaussian_noise_with_outliers(level, deviation, share):
    reward, noisy = noise_of("gaussian", level)
    error = noisy - reward
    assert abs(error.mean().item()) < 0.04  # outliers go both ways
    assert error.var().item() == pytest.approx(deviation ** 2 + 25 * share, rel=0.03)
    fourth = 3 * deviation ** 4 + 6 * deviation ** 2 * 25 * share + 625 * share
    assert error.pow(4).mean().item() == pytest.approx(fourth, rel=0.06)
    if level == "easy":  # apart from the bulk: they can be counted
        assert (error > 2.5).float().mean().item() == pytest.approx(share / 2, rel=0.06)
        assert (error < -2.5).float().mean().item() == pytest.approx(share / 2, rel=0.06)


@pytest.mark.parametrize("level, share", [("easy", 0.1), ("medium", 0.2), ("hard", 0.35)])
def test_flips_turn_whole_lists(level, share):
    reward, noisy = noise_of("flip", level)
    flipped = (noisy * reward).sum(-1) < 0
    assert flipped.float().mean().item() == pytest.approx(share, abs=0.012)
    error = noisy - torch.where(flipped.unsqueeze(1), -reward, reward)
    assert error.std().item() == pytest.approx(0.1, rel=0.02) and error.abs().max() < 0.6


@pytest.mark.parametrize("level, scale", [("easy", 0.25), ("medium", 0.5), ("hard", 1.0)])
def test_cauchy_tails(level, scale):
    reward, noisy = noise_of("cauchy", level)
    error = (noisy - reward).flatten()
    assert error.median().item() == pytest.approx(0, abs=0.03 * scale)
    assert error.abs().median().item() == pytest.approx(scale, rel=0.03)
    for many in (10, 100):
        beyond = 1 - 2 / math.pi * math.atan(many)
        assert (error.abs() > many * scale).float().mean().item() == pytest.approx(beyond, rel=0.12)
    assert error.abs().max() > 1000 * scale


@pytest.mark.parametrize("level, d", [("easy", 0.5), ("medium", 1.0), ("hard", 2.0)])
def test_shift_moves_the_test_contexts_alone(level, d):
    b = bandit(noise="shift", level=level, test=20_000, train=20_000, validation=20_000)
    assert b.test.context.mean(0).tolist() == pytest.approx([1.5 * d / 2] * 4, abs=0.06)
    assert b.test.context.std(0).tolist() == pytest.approx([1 + d / 2] * 4, rel=0.03)
    for name in ("train", "validation", "clean"):
        assert getattr(b, name).context.mean().abs() < 0.05
    assert torch.equal(b.test.best, b.reward(b.test.context, b.test.candidates).argmax(-1))
    reward, noisy = noise_of("shift", level)
    assert (noisy - reward).std().item() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("noise", [*LEVELS, "none"])
def test_corruption_is_fixed_over_epochs(noise):
    _, world, stream = assemble(job("kd", f"env.noise={noise}"))
    known = {tuple(x): r for x, r in zip(world.bandit.train.context.tolist(), world.bandit.train.reward.tolist(), strict=True)}
    seen = set()
    for _ in range(60):
        batch = stream.next()
        for x, r in zip(batch["context"].tolist(), batch["reward"].tolist(), strict=True):
            assert known[tuple(x)] == r
            seen.add(tuple(x))
    assert len(seen) == 32  # every list was drawn, most of them often


def test_the_same_data_for_different_methods():
    streams = [assemble(job(*words, "seed=3"))[2] for words in
               (("kd",), ("kd", "method.hidden=[9]"), *(("adpo", f"method.anchor={a}") for a in ANCHORS))]
    batches = [[s.next() for _ in range(5)] for s in streams]
    for others in batches[1:]:
        assert all(same(a, b) for a, b in zip(others, batches[0], strict=True))
    assert set(batches[0][0]) == {"context", "candidates", "reward"}
    assert batches[0][0]["reward"].shape == (8, 6)
    assert not same(assemble(job("kd", "seed=4"))[2].next(), batches[0][0])


# -- the reference -----------------------------------------------------------------------------------------------------
def test_the_reference_is_the_same_for_all_methods_and_noises():
    method, world, _ = assemble(job("kd", "seed=3"))
    wanted = weights(method.policy)
    assert same(wanted, weights(method.reference))
    for noise in ("none", "cauchy"):
        for anchor in ANCHORS:
            other, its, _ = assemble(job("adpo", f"method.anchor={anchor}", f"env.noise={noise}", "seed=3"))
            assert same(weights(other.policy), wanted) and same(weights(other.reference), wanted)
            if anchor != "uniform":
                assert same(weights(other.anchor), wanted)
            assert its.references(3) == world.references(3)
    untrained, _, _ = assemble(job("kd", "seed=3", "env.reference_steps=0"))
    assert not same(weights(untrained.policy), wanted)
    assert not same(weights(assemble(job("kd", "seed=3", "env.reference_learning_rate=0.1"))[0].policy), wanted)


def test_the_reference_stays_and_the_policy_moves():
    method, world, stream = assemble(job("adpo", "method.anchor=ema"))
    wanted, rows = weights(method.reference), world.references(0)
    assert world.evaluate(method, 0) == {**rows["reference"], "kl_to_reference": pytest.approx(0, abs=1e-7)}
    metrics = train(method, stream, 5)
    assert set(metrics[0]) == {"loss", "candidate_log_prob"}
    assert same(weights(method.reference), wanted) and world.references(0) == rows
    assert not same(weights(method.policy), wanted) and not same(weights(method.anchor), wanted)
    assert world.evaluate(method, 0)["kl_to_reference"] > 0
    trained = {id(p) for group in method.optimizers["policy"].param_groups for p in group["params"]}
    assert trained == {id(p) for p in method.policy.parameters()}


def test_the_reference_lies_between_chance_and_a_half():
    rows = [assemble(compose(["method=kd", "env=noisy_lists", "logger=none", f"seed={seed}"], BOOK))[1].references(seed)
            for seed in range(4)]
    for row in rows:
        assert 1 / 6 + 0.05 < row["reference"]["win_mass"] < 0.5
        assert row["reference"]["win_mass"] < row["reference"]["top1"]
        assert row["uniform policy"]["win_mass"] == pytest.approx(1 / 6, rel=1e-5)


# -- the metrics -------------------------------------------------------------------------------------------------------
def test_ends_of_the_metrics():
    method, world, _ = assemble(job("kd"))

    def knows(sharpness):
        def log_prob(context, candidates):
            best = world.bandit.reward(context, candidates).argmax(-1)
            return (sharpness * torch.nn.functional.one_hot(best, 6).float()).log_softmax(-1)
        return SimpleNamespace(log_prob=log_prob)

    oracle = world.evaluate(knows(1000.0), 0)
    assert oracle["win_mass"] == oracle["top1"] == 1 and 0 < oracle["kl_to_reference"] < 100
    assert world.validate(knows(1000.0)) == {"validation_loss": pytest.approx(0, abs=1e-6)}
    uniform = world.evaluate(knows(0.0), 0)
    assert uniform["win_mass"] == pytest.approx(1 / 6, rel=1e-5) == uniform["top1"]
    assert uniform == world.references(0)["uniform policy"]
    assert world.validate(knows(0.0)) == {"validation_loss": pytest.approx(math.log(6), rel=1e-5)}
    wrong = world.evaluate(knows(-1000.0), 0)
    assert wrong["win_mass"] == wrong["top1"] == 0
    assert set(oracle) == set(world.metrics) and world.metrics["win_mass"].direction == "max"


def test_metrics_against_a_loop():
    g = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(20, 6, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    best = torch.randint(6, (20,), generator=g)
    wins, hits, kl = [], [], []
    for p, q, b in zip(policy.tolist(), reference.tolist(), best.tolist(), strict=True):
        wins.append(math.exp(p[b]))
        hits.append(float(max(range(6), key=lambda i: p[i]) == b))
        kl.append(sum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True)))
    assert figures(policy, reference, best) == pytest.approx(
        {"win_mass": statistics.mean(wins), "top1": statistics.mean(hits), "kl_to_reference": statistics.mean(kl)})


# -- the policy --------------------------------------------------------------------------------------------------------
def test_list_policy_against_loops():
    torch.manual_seed(0)
    policy = ListPolicy(3, 2, (7, 5), "tanh").double()
    linear = [m for m in policy.net if isinstance(m, torch.nn.Linear)]
    torch.nn.init.normal_(linear[1].bias)
    context, candidates = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 6, 2, dtype=torch.float64)
    found = policy.log_prob(context, candidates)
    for n in range(4):
        scores = []
        for phi in candidates[n]:
            h = context[n].tolist() + phi.tolist()
            for k, layer in enumerate(linear):
                h = [sum(w * v for w, v in zip(row, h, strict=True)) + b
                     for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)]
                h = h if k == 2 else [math.tanh(v) for v in h]
            scores.append(h[0])
        total = math.log(sum(math.exp(s) for s in scores))
        assert found[n].tolist() == pytest.approx([s - total for s in scores], rel=1e-9)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(policy.log_prob(context, candidates[:, order]), found[:, order])
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(4, dtype=torch.float64))


def test_list_policy_starts_at_unit_scale():
    torch.manual_seed(0)
    for layer in ListPolicy(40, 60, (400, 300), "tanh").net[::2]:
        assert layer.weight.std().item() * layer.in_features ** 0.5 == pytest.approx(1, rel=0.15)
        assert layer.bias.eq(0).all()


def test_export_is_the_scorer():
    method, _, _ = assemble(job("kd"))
    tensors, description = method.export()
    assert description["sizes"] == "8,64,64,1" and same(tensors, weights(method.policy.net))


@pytest.mark.parametrize("words", [["method.anchor=teacher"], ["method.anchor=on_policy"], ["method.teacher_ratio=true"]])
def test_what_lists_cannot_serve_is_refused(words):
    with pytest.raises(UserError, match="method.anchor must be"):
        assemble(job("adpo", *words))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    world = NoisyLists(make_config([NoisyLists.Config], {}))
    with pytest.raises(UserError, match="one process"):
        world.stream(None, "candidates", 0)


# -- runs --------------------------------------------------------------------------------------------------------------
VARIANTS = [["kd"], *(["adpo", f"method.anchor={a}"] for a in ANCHORS), ["adpo", "method.form=pairwise_hard"]]


@pytest.mark.parametrize("words", VARIANTS, ids=" ".join)
def test_state_round_trips_through_a_checkpoint(words, tmp_path):
    def new():
        return Loop(*assemble(job(*words)), Settings(steps=10), seed=0, checkpoints=Checkpoints(tmp_path))

    first = new()
    train(first.method, first.stream, 5)
    first.step = 5
    first.save()
    told = train(first.method, first.stream, 5)
    seed_everything(99)
    second = new()
    assert second.resume() == ["continuing from step 5"]
    assert train(second.method, second.stream, 5) == told
    assert same(weights(first.method), weights(second.method))
    assert first.world.evaluate(first.method, 0) == second.world.evaluate(second.method, 0)


@pytest.mark.parametrize("words", VARIANTS, ids=" ".join)
def test_a_run_that_is_cut_off_ends_as_if_it_were_not(words, tmp_path):
    one = job(*words, f"runs={tmp_path}", "loop.save_steps=5")
    whole = execute(one, quiet=True)
    assert whole["status"] == "done" and set(whole["metrics"]) == set(NoisyLists.metrics)
    assert set(whole["references"]) == {"reference", "uniform policy"}
    folder = tmp_path / whole["name"]
    lines = (folder / "metrics.jsonl").read_bytes()
    assert "validation_loss" in lines.decode()
    for newer in Checkpoints(folder / "checkpoints").steps()[:-1]:  # as left by a kill after the first checkpoint
        shutil.rmtree(folder / "checkpoints" / f"step_{newer:09d}")
    (folder / "weights.safetensors").unlink()
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    again = execute(one, quiet=True)
    assert again["metrics"] == whole["metrics"] and again["references"] == whole["references"]
    assert (folder / "metrics.jsonl").read_bytes() == lines
    assert "continuing from step 5" in (folder / "events.jsonl").read_text()


def test_anchoring_keeps_win_mass_under_heavy_noise(tmp_path):
    """The testbed's point, on one seed: unanchored pairs end below the reference, anchored ones do not."""
    found = {}
    for anchor in ("uniform", "self"):
        words = ["method=adpo", "env=noisy_lists", "logger=none", f"runs={tmp_path}", "method.form=pairwise_hard",
                 f"method.anchor={anchor}", "env.level=hard"]
        found[anchor] = execute(compose(words, BOOK), quiet=True)
    reference = found["self"]["references"]["reference"]["win_mass"]
    assert found["uniform"]["metrics"]["win_mass"] < reference - 0.05
    assert found["self"]["metrics"]["win_mass"] > found["uniform"]["metrics"]["win_mass"] + 0.1
