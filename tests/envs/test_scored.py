"""Scored responses: the log, values of prompts by sampling and exact, drawing by weight, shares of processes, exact metrics."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from envs.pairs.bandit import ARM, CONTEXT, arm, context
from envs.pairs.scored import Scored
from runner.errors import UserError

_spec = importlib.util.spec_from_file_location("lab", Path(__file__).parents[1] / "conformance" / "lab.py")
lab = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)


def assembled(*overrides):
    return lab.assembled("sft", *overrides, env="bandit_logged")


def numbers(rows):
    """(prompt, response, reward) -> contexts, arms, rewards."""
    x, y, r = zip(*rows)
    return torch.tensor([ord(a) - CONTEXT for a in x]), torch.tensor([ord(b) - ARM for b in y]), torch.tensor(r)


def test_the_log_holds_both_policies_and_noise_only_where_it_should():
    words = "env.logged=6000", "env.noisy=0.25", "env.poor=0.5"
    _, world, stream = assembled(*words)
    x, y, reward = numbers(stream.rows)
    true = torch.sigmoid(world.task.reward)[x, y]
    assert ((reward - true).abs() > 1e-6).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert reward.min() >= 0 and reward.max() <= 1
    counts = torch.zeros_like(world.task.reward).index_put_((x, y), torch.ones(6000), accumulate=True)
    r = world.task.reward
    expected = (0.5 * (r.softmax(-1) + (-2 * r).softmax(-1))) * counts.sum(-1, keepdim=True)
    torch.testing.assert_close(counts, expected, rtol=0, atol=5 * expected.max().sqrt().item())
    assert assembled(*words)[2].rows == stream.rows and assembled(*words, "seed=1")[2].rows != stream.rows


def test_training_begins_at_the_fit_of_the_log():
    method, world, stream = assembled("env.smoothing=0.25")
    x, y, _ = numbers(stream.rows)
    counts = torch.full((4, 5), 0.25).index_put_((x, y), torch.ones(60), accumulate=True)
    torch.testing.assert_close(world.table(method), (counts / counts.sum(-1, keepdim=True)).log())
    told = world.evaluate(method, 0)
    p, true = world.table(method).exp(), torch.sigmoid(world.task.reward)
    by_hand = sum(p[i, j].item() * true[i, j].item() for i in range(4) for j in range(5)) / 4
    assert told["value"] == pytest.approx(by_hand, rel=1e-5) and told["kl"] == pytest.approx(0, abs=1e-6)


def test_sampled_values_come_to_the_exact_ones():
    method, world, stream = assembled()
    exact = (world.table(method).exp() * torch.sigmoid(world.task.reward)).sum(1)
    many = Scored(method, stream.rows, 8, stream.judge, 4000)
    values = many.sampled_values()
    for i in range(4):
        assert values[context(i)] == pytest.approx(exact[i].item(), abs=0.02)
    assert many.sampled_values() == values  # a function of the seed
    known = assembled("env.values=\"exact\"")[2].data()
    x, _, reward = numbers(stream.rows)
    torch.testing.assert_close(known["value"], exact[x])
    assert known["reward"].tolist() == pytest.approx(reward.tolist())


def test_rows_are_what_was_logged():
    method, _, stream = assembled()
    data = stream.data()
    for i in (0, 7, 59):
        prompt, response, reward = stream.rows[i]
        text = method.tokenizer.decode(data["prompt"][i]), method.tokenizer.decode(data["response"][i])
        assert (*text, data["reward"][i].item()) == (prompt, response, pytest.approx(reward))
        assert data["mask"][i].tolist() == [1] and data["prompt_mask"][i].all()


def test_rows_are_drawn_by_weight_and_shared_by_processes():
    method, world, stream = assembled("env.logged=5", "env.batch_size=4000")
    data = stream.data()
    stream.replace({**data, "number": torch.arange(5), "draw": torch.tensor([0.0, 1, 0, 3, 0])})
    counts = stream.next()["number"].bincount(minlength=5)
    assert counts[[0, 2, 4]].eq(0).all() and counts[3].item() / 4000 == pytest.approx(0.75, abs=0.03)
    stream.replace({**data, "number": torch.arange(5)})
    assert stream.next()["number"].bincount(minlength=5).min() > 700
    assert not any(k.startswith("start/") or k == "draw" for k in stream.next())

    rows, zero = stream.rows, {context(i): 0.0 for i in range(4)}
    whole, parts = Scored(method, rows, 8, stream.judge, 1, values=zero), []
    for rank in (0, 1):
        method.processes = (rank, 2)
        part = Scored(method, rows, 4, stream.judge, 1, values=zero)
        part.replace({**part.data(), "number": torch.arange(5)})
        parts.append(part.next()["number"])
    method.processes = (0, 1)
    whole.replace({**whole.data(), "number": torch.arange(5)})
    assert torch.equal(torch.cat(parts), whole.next()["number"])


def test_the_weights_to_begin_from_are_there_when_values_are_sampled():
    method, _, stream = assembled()
    start = {**method.policy.state_dict(), "theta": torch.randn(4, 5)}
    seen = []

    def judge(prompt, response):
        seen.append(method.policy.theta.detach().clone())
        return 0.5

    data = Scored(method, [(context(1), arm(2), 0.3)], 4, judge, 1, start=start).data()
    assert torch.equal(seen[0], start["theta"]) and data["value"].eq(0.5).all()
    assert torch.equal(data["start/theta"], start["theta"])
    with pytest.raises(UserError, match="no scored responses"):
        Scored(method, [], 4, judge, 1)
