"""Pairs of a flow's own samples: who wins a group, what an update is, when the reference is made anew."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from token_methods import bare

from envs.generation.plane import Plane
from methods.diffusion.flow_dpo import FlowDPO
from methods.diffusion.flow_dpo_online import FlowDPOOnline
from methods.diffusion.flow_sft import FlowSFT
from methods.diffusion.flow_sft_online import FlowSFTOnline
from methods.diffusion.mlp import MLP
from runner.interface import Spec


def made(cls, moved=0.0, points=1, **values):
    torch.manual_seed(0)
    method = bare(cls, **values)
    method.blueprint = MLP(MLP.Config(width=16, depth=2))
    method.setup(Spec(sample_shape=(2,), classes=2, points=points))
    method.make_optimizers()
    method.prepare({})
    with torch.no_grad():
        for p in method.network.parameters():
            p.add_(moved * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return method


def pairs(n=6, points=1):
    g = torch.Generator().manual_seed(1)
    return {"chosen": torch.randn(n, points, 2, generator=g), "rejected": torch.randn(n, points, 2, generator=g),
            "condition": torch.arange(n) % 2, "chosen_reward": torch.randn(n, generator=g),
            "rejected_reward": torch.randn(n, generator=g), "reward": torch.randn(2 * n, generator=g)}


def stored(batch):
    """The same pairs of single things as offline methods get them."""
    return {k: v[:, 0] if v.dim() == 3 else v for k, v in batch.items() if k != "reward"}


def weights(method):
    return [p.detach().clone() for p in method.network.parameters()]


def test_the_best_of_a_group_wins_against_its_worst():
    """All rewards of a group of three out of {0, 1, 2}, in groups side by side."""
    groups = torch.tensor(list(itertools.product((0.0, 1.0, 2.0), repeat=3)))
    best, worst = bare(FlowSFTOnline, samples=3).pair(groups.flatten())
    for i, (group, b, w) in enumerate(zip(groups.tolist(), best.tolist(), worst.tolist())):
        assert b // 3 == w // 3 == i and b != w
        if len(set(group)) == 1:
            assert (b % 3, w % 3) == (0, 1)
        else:
            assert group[b % 3] == max(group) and group[w % 3] == min(group)


@pytest.mark.parametrize(("online", "offline", "values"), [(FlowSFTOnline, FlowSFT, {}), (FlowDPOOnline, FlowDPO, {"beta": 5.0}),
                                                          (FlowDPOOnline, FlowDPO, {"beta": 5.0, "weight": "theory"})])
def test_on_given_pairs_it_is_the_offline_update(online, offline, values):
    batch = pairs()
    ours, theirs = made(online, 0.2, **values), made(offline, 0.2, **values)
    assert ours.update(batch)["loss"].item() == pytest.approx(theirs.update(stored(batch))["loss"].item(), rel=1e-5)
    for a, b in zip(weights(ours), weights(theirs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_things_rewarded_as_one_share_time_and_their_errors_are_averaged():
    method, batch = made(FlowDPOOnline, 0.2, points=3, beta=2.0), pairs(points=3)
    rows = method.gather(batch)
    rows.x_t, rows.target = method.corrupt(rows.x, rows.noise, rows.t)
    rows.v = method.velocity(method.network, rows.x_t, rows.t, rows.condition)
    error = rows.error = method.error(rows)
    reference = method.reference_error(rows)
    assert error.shape == reference.shape == (12,) and rows.x.shape == (12, 3, 2)
    for i, j in ((0, 0), (7, 2)):
        x, u = rows.x_t[i, j][None], rows.target[i, j]
        torch.testing.assert_close(rows.v[i, j], method.network(x, rows.t[i:i + 1], rows.condition[i:i + 1])[0])
        torch.testing.assert_close(x[0], (1 - rows.t[i]) * rows.x[i, j] + rows.t[i] * rows.noise[i, j])
        torch.testing.assert_close(u, rows.noise[i, j] - rows.x[i, j])
    torch.testing.assert_close(error[7], sum((rows.v[7, j] - rows.target[7, j]).square().mean() for j in range(3)) / 3)
    gap = (error - reference)[:6] - (error - reference)[6:]
    torch.testing.assert_close(method.loss(rows), -torch.nn.functional.logsigmoid(-gap).mean())


def test_the_reference_is_made_anew_after_so_many_steps():
    method, start = made(FlowDPOOnline, ref_update_step=3, minibatches=2), None
    start, batch = weights(method), pairs()
    kept = []
    for update in range(3):  # of two optimiser steps: the third step lies in the second update, the sixth ends the third
        method.updates = update
        told = method.update(batch)
        kept.append([p.clone() for p in method.reference.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(kept[0], start))
    assert not any(torch.equal(a, b) for a, b in zip(kept[1], start))
    assert all(torch.equal(a, b) for a, b in zip(kept[2], weights(method))) and method.made == 6
    assert math.isfinite(told["loss"])
    for never in (0, 99):
        method = made(FlowDPOOnline, ref_update_step=never)
        method.update(batch)
        assert all(torch.equal(a, b) for a, b in zip(method.reference.parameters(), start))
    fresh = made(FlowDPOOnline, ref_update_step=1)  # always at its own reference: the loss begins at log 2 each time
    for update in range(3):
        fresh.updates = update
        assert fresh.update(batch)["loss"].item() == pytest.approx(math.log(2), rel=1e-5)


def test_every_pass_has_its_own_noise_and_every_minibatch_its_share():
    method, seen = made(FlowSFTOnline, minibatches=3, passes=2), []
    method.learn = lambda rows: seen.append(rows) or {"loss": torch.zeros(())}
    method.update(pairs())
    assert [len(r.t) for r in seen] == [4] * 6 and method.steps_of_update() == 6
    first, second = (torch.cat([r.x.chunk(2)[0] for r in seen[i:i + 3]]) for i in (0, 3))
    assert torch.equal(first, pairs()["chosen"]) and torch.equal(first, second)
    assert not torch.equal(seen[0].t, seen[3].t) and not torch.equal(seen[0].noise, seen[3].noise)
    for r in seen:  # a pair stays together
        for column in (r.t, r.condition, r.noise):
            assert torch.equal(*column.chunk(2))


def test_rollouts_are_the_generators_own_and_rewarded_by_the_world():
    world = Plane(Plane.Config(start="none", points=4))
    method = made(FlowDPOOnline, points=4, prompts=5, samples=6, steps=7)
    stream = world.stream(method, "rewarded", 0)
    stream.ready(1)
    batch = method.collect(stream)
    assert batch["chosen"].shape == (5, 4, 2) and batch["reward"].shape == (30,) and batch["condition"].shape == (5,)
    groups = batch["reward"].view(5, 6)
    torch.testing.assert_close(batch["chosen_reward"], groups.amax(1))
    torch.testing.assert_close(batch["rejected_reward"], groups.amin(1))
    for side in ("chosen", "rejected"):
        torch.testing.assert_close(stream.reward(batch[side], batch["condition"]), batch[f"{side}_reward"])
    with torch.no_grad():
        for p in method.network.parameters():  # the reference samples
            p.add_(0.3)
    assert torch.equal(method.collect(stream)["chosen"], batch["chosen"])
    method.config = type(method.config)(**{**vars(method.config), "rollouts": "current"})
    batch = method.collect(stream)
    groups = batch["reward"].view(5, 6)
    noise = method.noise("start", (30, 4, 2)).flatten(0, 1)
    condition = stream.conditions(5).repeat_interleave(24)
    method.config = type(method.config)(**{**vars(method.config), "sampler_steps": 7})
    x = method.draw(noise, condition).x.view(30, 4, 2)
    torch.testing.assert_close(x[groups.argmax(1) + 6 * torch.arange(5)], batch["chosen"])
