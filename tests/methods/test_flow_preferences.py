"""Flows and pairs of samples: which loss is which at which knob, gradients in closed form, where pairs come from."""

from __future__ import annotations

import math

import pytest
import torch
from token_methods import bare

from envs.generation.plane import Plane
from methods.diffusion.diffusion_dpo import DiffusionDPO
from methods.diffusion.flow_dpo import FlowDPO
from methods.diffusion.flow_matching import FlowMatching
from methods.diffusion.flow_rwr import FlowRWR
from methods.diffusion.flow_sft import FlowSFT
from methods.diffusion.mlp import MLP
from runner.interface import Spec


def made(cls, moved=0.0, **values):
    torch.manual_seed(0)
    method = bare(cls, **values)
    method.blueprint = MLP(MLP.Config(width=16, depth=2))
    method.setup(Spec(sample_shape=(2,), classes=2))
    method.make_optimizers()
    method.prepare({})
    with torch.no_grad():
        for p in method.network.parameters():
            p.add_(moved * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return method


def pairs(n=6):
    g = torch.Generator().manual_seed(1)
    return {"chosen": torch.randn(n, 2, generator=g), "rejected": torch.randn(n, 2, generator=g),
            "condition": torch.arange(n) % 2, "chosen_reward": torch.randn(n, generator=g),
            "rejected_reward": torch.randn(n, generator=g)}


def rows_of(method, batch):
    rows = method.gather(batch)
    rows.x_t, rows.target = method.corrupt(rows.x, rows.noise, rows.t)
    rows.v = method.velocity(method.network, rows.x_t, rows.t, rows.condition)
    rows.error = method.error(rows)
    return rows


def test_a_pair_shares_time_noise_and_condition():
    method = made(FlowSFT, label_dropout=0.5)
    rows = method.gather(pairs(64))
    for column in (rows.t, rows.noise, rows.condition):
        winner, loser = column.chunk(2)
        assert torch.equal(winner, loser)
    assert 0 < (rows.condition == 2).float().mean() < 1


def test_fine_tuning_is_flow_matching_of_the_winners():
    sft, fm, batch = made(FlowSFT), made(FlowMatching, learning_rate=5e-4, label_dropout=0.0), pairs()
    told = sft.update(batch)["loss"], fm.update({"x": batch["chosen"], "condition": batch["condition"]})["loss"]
    torch.testing.assert_close(*told)
    for a, b in zip(sft.network.parameters(), fm.network.parameters()):
        torch.testing.assert_close(a, b)


def test_dpo_begins_at_log_two_with_the_gradient_of_the_errors():
    """At the reference the loss is log 2 and its gradient beta / 4 times that of m_w - m_l."""
    method, batch = made(FlowDPO, beta=8.0), pairs()
    rows = rows_of(method, batch)
    loss = method.loss(rows)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    winner, loser = rows.error.chunk(2)
    weights = list(method.network.parameters())
    ours = torch.autograd.grad(loss, weights, retain_graph=True)
    expected = torch.autograd.grad(2.0 * (winner - loser).mean(), weights)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_dpo_by_hand():
    method, batch = made(FlowDPO, moved=0.3, beta=3.0), pairs()
    for weight in ("constant", "theory"):
        method.config = type(method.config)(**{**vars(method.config), "weight": weight})
        rows = rows_of(method, batch)
        reference = method.reference(rows.x_t, rows.t, rows.condition)
        m, m_ref = ((v - rows.target).square().mean(1) for v in (rows.v, reference))
        total = 0.0
        for i in range(6):
            beta = 3.0 * ((1 - rows.t[i]) ** 2 if weight == "theory" else 1)
            total -= torch.sigmoid(-0.5 * beta * ((m[i] - m_ref[i]) - (m[i + 6] - m_ref[i + 6]))).log() / 6
        torch.testing.assert_close(method.loss(rows), total)


def test_errors_of_noise_are_the_theorys_weight():
    """Diffusion-DPO is Flow-DPO with beta (1 - t)^2, given the times."""
    flow, noise, batch = (made(FlowDPO, 0.2, weight="theory", times="uniform"), made(DiffusionDPO, 0.2), pairs())
    torch.testing.assert_close(flow.loss(rows_of(flow, batch)), noise.loss(rows_of(noise, batch)))
    rows = rows_of(noise, batch)
    predicted = rows.x_t + (1 - rows.t)[:, None] * rows.v
    torch.testing.assert_close(rows.error, (predicted - rows.noise).square().mean(1), rtol=1e-4, atol=1e-5)


def test_weights_of_rewards_ignore_scale_and_offset():
    method, batch = made(FlowRWR, 0.1, beta=0.5), pairs()
    told = method.loss(rows_of(method, batch))
    scaled = {**batch, **{k: 7 * batch[k] + 3 for k in ("chosen_reward", "rejected_reward")}}
    torch.testing.assert_close(method.loss(rows_of(method, scaled)), told)
    flat = made(FlowRWR, 0.1, beta=1e9)
    torch.testing.assert_close(flat.loss(rows_of(flat, batch)), rows_of(flat, batch).error.mean())
    raw = made(FlowRWR, 0.1, raw=True)
    rows = rows_of(raw, batch)
    torch.testing.assert_close(raw.loss(rows), (rows.reward * rows.error).mean())
    equal = {**batch, "chosen_reward": torch.ones(6), "rejected_reward": torch.ones(6)}
    torch.testing.assert_close(method.loss(rows_of(method, equal)), rows_of(method, equal).error.mean())  # no NaN


def test_the_velocity_kl_is_zero_at_the_start():
    assert made(FlowRWR, velocity_kl=1.0).penalty(rows_of(made(FlowRWR, velocity_kl=1.0), pairs())).item() == 0
    method = made(FlowRWR, 0.1, velocity_kl=2.0)
    rows = rows_of(method, pairs())
    apart = (rows.v - method.reference(rows.x_t, rows.t, rows.condition)).square().mean()
    torch.testing.assert_close(method.penalty(rows), 2 * apart)


def test_pairs_are_the_starts_own_samples_and_winners_have_the_larger_proxy():
    world = Plane(Plane.Config(start="none", pairs=512, batch_size=64, label_temperature=1e-4))
    method = made(FlowSFT)
    stream = world.stream(method, "preferred", 0)
    batch = stream.next()
    assert batch["chosen"].shape == (64, 2) and (batch["chosen_reward"] >= batch["rejected_reward"]).all()
    torch.testing.assert_close(world.reward(batch["chosen"], batch["condition"]), batch["chosen_reward"])
    noisy = Plane(Plane.Config(start="none", pairs=512, label_temperature=1e6)).stream(method, "preferred", 0)
    noisy.ready(1)
    first = (noisy.pairs["chosen_reward"] >= noisy.pairs["rejected_reward"]).float().mean()
    assert 0.4 < first < 0.6
    again = world.stream(made(FlowSFT, moved=9.0), "preferred", 0)  # a resumed run has other weights by then
    again.load_state_dict(stream.state_dict())
    ours, theirs = stream.next(), again.next()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
