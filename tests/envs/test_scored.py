"""Scored responses: the log, values of prompts by sampling and exact, drawing by weight, shares of processes, exact metrics."""

from __future__ import annotations

import collections
import importlib.util
from pathlib import Path

import pytest
import torch

from envs.pairs.arms import ARMS, figures
from envs.pairs.scored import Scored
from runner.errors import UserError

_spec = importlib.util.spec_from_file_location("lab", Path(__file__).parents[1] / "conformance" / "lab.py")
lab = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)


def assembled(*overrides):
    return lab.assembled("sft", *overrides, env="scored_arms")


def test_the_log_holds_both_policies_and_noise_only_where_it_should():
    _, world, _ = assembled("env.items=4000", "env.noisy=0.25", "env.contexts=10", "env.sharpness=2.0", "env.good=0.5")
    reward = torch.tensor([r for *_, r in world.log])
    true = torch.tensor([world.judge(p, r) for p, r, _ in world.log])
    assert ((reward - true).abs() > 1e-6).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert reward.min() >= 0 and reward.max() <= 1
    best, worst = world.true.argmax(1), world.true.argmin(1)
    arms = collections.Counter((int(p), ARMS.index(r)) for p, r, _ in world.log)
    for x in range(10):  # the ends are what the two policies like
        assert min(arms[x, int(best[x])], arms[x, int(worst[x])]) > 4000 / 10 / len(ARMS)
    again = assembled("env.items=4000", "env.noisy=0.25", "env.contexts=10", "env.sharpness=2.0", "env.good=0.5")[1]
    assert again.log == world.log and assembled("env.world_seed=1")[1].log != assembled()[1].log
    assert world.judge("03", "af.") == world.true[3, 0].item() and world.judge("03", "aa.") == world.judge("03", "af") == 0


def test_gold_metrics_are_exact():
    method, world, _ = assembled()
    p = world.arms(method).exp()
    told, total = world.evaluate(method, 0), 0.0
    for x in range(6):
        prompt, prompt_mask = method.encode([f"{x:02d}"])
        for y, arm in enumerate(ARMS):
            response, mask = method.encode_responses([arm])
            one = method.score({"prompt": prompt, "prompt_mask": prompt_mask, "response": response, "mask": mask})
            assert p[x, y].item() == pytest.approx(one["log_prob"].sum().exp().item(), rel=1e-4)
            total += p[x, y].item() * world.true[x, y].item()
    assert told["reward"] == pytest.approx(total / 6) and told["valid"] == pytest.approx(p.sum().item() / 6)
    assert figures(torch.eye(20).double()[:1], torch.full((1, 20), 0.5))["arm_entropy"] == 0


def test_sampled_values_come_to_the_exact_ones():
    """Of a policy that has learned a little, so that there is something to be worth."""
    method, world, stream = assembled("env.contexts=4", "method.learning_rate=0.01")
    lab.train(method, stream, 60)
    exact = (world.arms(method).exp() * world.true).sum(1)
    assert exact.max() > 0.2
    many = Scored(method, world.log, 8, world.judge, 4000)
    values = many.sampled_values()
    for x in range(4):
        assert values[f"{x:02d}"] == pytest.approx(exact[x].item(), abs=0.03)
    assert many.sampled_values() == values  # a function of the seed
    world.config = type(world.config)(**{**vars(world.config), "values": "exact"})
    known = world.stream(method, "scored", 0).data()
    prompts = [p for p, _, _ in world.log]
    torch.testing.assert_close(known["value"], torch.stack([exact[int(p)] for p in prompts]).float())
    assert known["reward"].tolist() == pytest.approx([r for *_, r in world.log])


def test_rows_are_what_was_logged():
    method, world, stream = assembled()
    data = stream.data()
    for i in (0, 7, 63):
        prompt, response, reward = world.log[i]
        text = method.tokenizer.decode(data["prompt"][i]), method.tokenizer.decode(data["response"][i])
        assert (*text, data["reward"][i].item()) == (prompt, response, pytest.approx(reward))
        assert data["mask"][i].tolist() == [1, 1, 1] and data["prompt_mask"][i].all()


def test_rows_are_drawn_by_weight_and_shared_by_processes():
    method, world, stream = assembled("env.items=5", "env.batch_size=4000")
    data = stream.data()
    stream.replace({**data, "number": torch.arange(5), "draw": torch.tensor([0.0, 1, 0, 3, 0])})
    counts = stream.next()["number"].bincount(minlength=5)
    assert counts[[0, 2, 4]].eq(0).all() and counts[3].item() / 4000 == pytest.approx(0.75, abs=0.03)
    stream.replace({**data, "number": torch.arange(5)})
    assert stream.next()["number"].bincount(minlength=5).min() > 700
    assert not any(k.startswith("start/") or k == "draw" for k in stream.next())

    whole = Scored(method, world.log, 8, world.judge, 1, values=dict.fromkeys((p for p, _, _ in world.log), 0.0))
    parts = []
    for rank in (0, 1):
        method.processes = (rank, 2)
        part = Scored(method, world.log, 4, world.judge, 1, values=whole.values)
        part.replace({**part.data(), "number": torch.arange(5)})
        parts.append(part.next()["number"])
    method.processes = (0, 1)
    whole.replace({**whole.data(), "number": torch.arange(5)})
    assert torch.equal(torch.cat(parts), whole.next()["number"])


def test_the_weights_to_begin_from_are_there_when_values_are_sampled():
    method, world, _ = assembled()
    start = {k: torch.randn_like(v) for k, v in method.policy.state_dict().items()}
    seen = []

    def judge(prompt, response):
        seen.append(method.policy.lm_head.weight.clone())
        return 0.5

    data = Scored(method, world.log, 4, judge, 1, start=start).data()
    assert torch.equal(seen[0], start["lm_head.weight"]) and data["value"].eq(0.5).all()
    assert torch.equal(data["start/lm_head.weight"], start["lm_head.weight"])
    with pytest.raises(UserError, match="no scored responses"):
        Scored(method, [], 4, world.judge, 1)
