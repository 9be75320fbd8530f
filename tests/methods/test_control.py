"""The control family: critics, TD3 and DDPG, exports and teachers, against separate networks, hand-computed values and
autograd. In float64 unless float32 is the point."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import nn

from envs.control.teacher import Teacher
from methods.common.networks import Critics, EnsembleLinear, frozen, mlp, polyak
from methods.control.base import Sample
from methods.control.ddpg import DDPG
from methods.control.td3 import TD3
from runner.errors import UserError
from runner.interface import Spec

S, A = 3, 2  # observation and action sizes
ROOT = Path(__file__).resolve().parents[2]


def close(actual, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def build(cls=TD3, seed=0, dtype=torch.float64, spec=None, **values):
    """A method as the loop makes it, small and in float64."""
    torch.manual_seed(seed)
    method = cls(cls.Config(**{"hidden": (7, 6), **values}))
    method.setup(spec or Spec(observation_size=S, action_size=A))
    method.to(dtype)
    method.make_optimizers()
    return method


def make_batch(rows=10, seed=1, dtype=torch.float64, sizes=(S, A)):
    g = torch.Generator().manual_seed(seed)
    return {"observation": torch.randn(rows, sizes[0], generator=g, dtype=dtype),
            "action": torch.rand(rows, sizes[1], generator=g, dtype=dtype) * 2 - 1,
            "reward": torch.randn(rows, generator=g, dtype=dtype),
            "terminated": (torch.rand(rows, generator=g) < 0.3).to(dtype),
            "next_observation": torch.randn(rows, sizes[0], generator=g, dtype=dtype)}


def step(method, batch):
    metrics = method.update(batch)
    method.updates += 1
    return metrics


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def separate(critics: Critics, index: int) -> nn.Sequential:
    """Member `index` as an ordinary network."""
    layers = []
    for layer in critics.layers:
        linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[2], dtype=layer.weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(layer.weight[index].T)
            linear.bias.copy_(layer.bias[index, 0])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# -- networks ----------------------------------------------------------------------------------------------------------
def test_ensemble_linear_is_separate_linear_layers():
    torch.manual_seed(0)
    layer, x = EnsembleLinear(3, 5, 4).double(), torch.randn(3, 8, 5, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (3, 8, 4)
    for k in range(3):
        wanted = F.linear(x[k], layer.weight[k].T, layer.bias[k, 0])
        close(y[k], wanted)
        close(layer.member(x[k], k), wanted)


def test_ensemble_linear_starts_like_linear_and_its_members_differ():
    torch.manual_seed(0)
    layer, plain = EnsembleLinear(2, 100, 300), nn.Linear(100, 300)
    assert layer.weight.abs().max() <= 0.1 and plain.weight.abs().max() <= 0.1
    for ours, linears in ((layer.weight, plain.weight), (layer.bias, plain.bias)):
        assert abs(ours.std().item() / linears.std().item() - 1) < 0.1
    assert not torch.equal(layer.weight[0], layer.weight[1])


@pytest.mark.parametrize("members", [1, 2, 5])
def test_critics_are_separate_networks(members):
    torch.manual_seed(0)
    critics, batch = Critics(members, S, A, (7, 6)).double(), make_batch()
    values, features = critics(batch["observation"], batch["action"])
    assert values.shape == (members, 10) and features.shape == (members, 10, 6)
    x = torch.cat([batch["observation"], batch["action"]], 1)
    total = 0
    for k in range(members):
        net = separate(critics, k)
        close(values[k], net(x).squeeze(1))
        close(features[k], net[:-1](x))  # penultimate, after its ReLU
        total += net(x).sum() * (k + 1)
    first = critics.first(batch["observation"], batch["action"])
    close(first, values[0])
    # gradients stay with their member
    grads = torch.autograd.grad((values.sum(1) * torch.arange(1, members + 1)).sum(), critics.layers[0].weight)[0]
    for k in range(members):
        net = separate(critics, k)
        wanted, = torch.autograd.grad((k + 1) * net(x).sum(), net[0].weight)
        close(grads[k], wanted.T)


def test_frozen_parameters_pass_gradients_on_but_take_none():
    net = mlp(2, (4,), 1)
    x = torch.randn(3, 2, requires_grad=True)
    with frozen(list(net.parameters())):
        net(x).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("rate", [0.0, 0.005, 0.3, 1.0])
def test_polyak(rate):
    torch.manual_seed(0)
    target, online = ([torch.randn(n, dtype=torch.float64) for n in (3, 5)] for _ in range(2))
    wanted = [(1 - rate) * t + rate * o for t, o in zip(target, online, strict=True)]
    polyak(target, online, rate)
    for t, w in zip(target, wanted, strict=True):
        close(t, w, rtol=1e-14, atol=1e-15)
    if rate == 1:
        assert same(target, online)


# -- the target --------------------------------------------------------------------------------------------------------
def by_hand(cls=TD3, **values):
    """Sizes 1 and 1; pi'(s) = 0.5; Q1'(s, a) = 2 relu(s) + relu(a) - 1, Q2'(s, a) = relu(s) + 3 relu(a)."""
    m = build(cls, spec=Spec(observation_size=1, action_size=1), hidden=(2,), **values)
    with torch.no_grad():
        for p in [*m.target_actor.parameters(), *m.target_critics.parameters()]:
            p.zero_()
        m.target_actor[-2].bias.fill_(math.atanh(0.5))
        m.target_critics.layers[0].weight.copy_(torch.eye(2))
        m.target_critics.layers[1].weight[0] = torch.tensor([[2.0], [1.0]])
        m.target_critics.layers[1].bias[0] = -1.0
        if m.target_critics.members > 1:
            m.target_critics.layers[1].weight[1] = torch.tensor([[1.0], [3.0]])
    column = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    return m, {"observation": torch.zeros(4, 1, dtype=torch.float64), "action": torch.zeros(4, 1, dtype=torch.float64),
               "next_observation": column(1, 3, 3, -2).unsqueeze(1), "reward": column(10, 20, 30, 40),
               "terminated": column(0, 0, 1, 0)}


def test_td3_target_by_hand():
    m, batch = by_hand(target_noise=0.0, discount=0.9)
    # Q1' at s' = 1, 3, 3, -2: 1.5, 5.5, 5.5, -0.5;  Q2': 2.5, 4.5, 4.5, 1.5;  the third row is terminal
    close(m.target(batch), torch.tensor([10 + 0.9 * 1.5, 20 + 0.9 * 4.5, 30, 40 - 0.9 * 0.5], dtype=torch.float64))


def test_ddpg_target_by_hand():
    m, batch = by_hand(DDPG, discount=0.9)
    close(m.target(batch), torch.tensor([10 + 0.9 * 1.5, 20 + 0.9 * 5.5, 30, 40 - 0.9 * 0.5], dtype=torch.float64))


def test_target_uses_the_target_networks():
    m, batch = build(target_noise=0.0), make_batch()
    y = m.target(batch)
    with torch.no_grad():
        for p in [*m.actor.parameters(), *m.critics.parameters()]:
            p.add_(1)
    assert torch.equal(m.target(batch), y)
    m.target_actor[0].weight.add_(1)
    assert not torch.equal(m.target(batch), y)


def constant_actor(m, value):
    with torch.no_grad():
        m.target_actor[-2].weight.zero_()
        m.target_actor[-2].bias.fill_(math.atanh(value))


def test_target_smoothing_is_clipped_noise_around_the_target_action():
    batch, rows = make_batch(rows=20_000), 20_000
    m = build(target_noise=0.2, target_noise_clip=10.0)
    constant_actor(m, 0.0)
    noise = m.next_action(batch).action
    assert noise.shape == (rows, A)
    assert abs(noise.mean().item()) < 5 * 0.2 / (rows * A) ** 0.5 and abs(noise.std().item() / 0.2 - 1) < 0.03
    assert abs(torch.corrcoef(noise.T)[0, 1].item()) < 0.05  # every component has its own noise

    m = build(target_noise=0.2, target_noise_clip=0.25)
    constant_actor(m, 0.0)
    clipped = m.next_action(batch).action
    assert clipped.abs().max().item() == pytest.approx(0.25, abs=1e-7)  # noise is float32
    outside = math.erfc(1.25 / math.sqrt(2))  # share of |noise| > 0.25
    share = (clipped.abs() > 0.25 - 1e-9).double().mean().item()
    assert abs(share - outside) < 5 * (outside * (1 - outside) / (rows * A)) ** 0.5

    constant_actor(m, 0.9)
    high = m.next_action(batch).action
    assert high.max() == 1 and high.min().item() == pytest.approx(0.65, abs=1e-7)


def test_td3_defaults_are_the_papers():
    c = TD3.Config()
    assert (c.critics, c.actor_delay, c.target_noise, c.target_noise_clip) == (2, 2, 0.2, 0.5)
    assert (c.discount, c.target_rate, c.exploration_noise, c.learning_rate, c.hidden) == (
        0.99, 0.005, 0.1, 3e-4, (256, 256))
    c = DDPG.Config()
    assert (c.critics, c.actor_delay) == (1, 1)


# -- the update --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("members", [1, 2, 3])
def test_critic_loss_is_the_sum_over_critics_of_mean_squares(members):
    m, batch = build(critics=members, target_noise=0.0), make_batch()
    y = m.target(batch).tolist()
    x = torch.cat([batch["observation"], batch["action"]], 1)
    wanted = 0.0
    for k in range(members):
        values = separate(m.critics, k)(x).squeeze(1).tolist()
        wanted += sum((v - t) ** 2 for v, t in zip(values, y, strict=True)) / len(y)
    assert step(m, batch)["critic_loss"].item() == pytest.approx(wanted, rel=1e-12)


def test_actor_and_targets_move_at_every_second_update_only():
    m = build(learning_rate=1e-2)
    for k in range(1, 7):
        before = {name: parameters(getattr(m, name)) for name in ("actor", "critics", "target_actor", "target_critics")}
        metrics = step(m, make_batch(seed=k))
        moved = {name: not any(torch.equal(a, b) for a, b in zip(old, parameters(getattr(m, name)), strict=True))
                 for name, old in before.items()}
        still = {name: same(old, parameters(getattr(m, name))) for name, old in before.items()}
        assert moved["critics"]
        assert ("actor_loss" in metrics) == (k % 2 == 0)
        for name in ("actor", "target_actor", "target_critics"):
            assert moved[name] if k % 2 == 0 else still[name], (name, k)


def test_targets_follow_by_polyak_averaging_after_the_step():
    rate = 0.3
    m = build(learning_rate=1e-2, target_rate=rate, actor_delay=1)
    for k in range(3):
        before = [*parameters(m.target_actor), *parameters(m.target_critics)]
        step(m, make_batch(seed=k))
        online = [*parameters(m.actor), *parameters(m.critics)]
        after = [*parameters(m.target_actor), *parameters(m.target_critics)]
        for b, o, a in zip(before, online, after, strict=True):
            close(a, 0.7 * b + 0.3 * o, rtol=1e-14, atol=1e-15)


def test_targets_start_as_copies_and_are_not_trained():
    m = build()
    assert same(parameters(m.actor), parameters(m.target_actor))
    assert same(parameters(m.critics), parameters(m.target_critics))
    assert not any(p.requires_grad for n in (m.target_actor, m.target_critics) for p in n.parameters())
    for name, net in (("actor", m.actor), ("critics", m.critics)):
        trained = {id(p) for group in m.optimizers[name].param_groups for p in group["params"]}
        assert trained == {id(p) for p in net.parameters()}


def test_gradients_of_the_two_steps():
    """Critics: of the critic loss alone. Actor: of -mean Q1(s, pi(s)), Q1 after its own step."""
    m, batch = build(learning_rate=1e-2, actor_delay=1, target_noise=0.0, critics=2), make_batch()
    y = m.target(batch)
    x = torch.cat([batch["observation"], batch["action"]], 1)
    wanted = []
    for k in range(2):
        net = separate(m.critics, k)
        wanted.append(torch.autograd.grad(F.mse_loss(net(x).squeeze(1), y), list(net.parameters())))
    actor = copy.deepcopy(m.actor)

    step(m, batch)
    for k, layer in enumerate(m.critics.layers):
        for member in range(2):
            close(layer.weight.grad[member], wanted[member][2 * k].T)
            close(layer.bias.grad[member, 0], wanted[member][2 * k + 1])
    assert all(p.requires_grad for p in m.critics.parameters())

    q1 = separate(m.critics, 0)
    loss = -q1(torch.cat([batch["observation"], actor(batch["observation"])], 1)).mean()
    for p, g in zip(m.actor.parameters(), torch.autograd.grad(loss, list(actor.parameters())), strict=True):
        close(p.grad, g)
    close(m.actor_loss(batch, Sample(actor(batch["observation"]))), loss)


def test_actor_step_leaves_the_critics_gradients_alone():
    batch = make_batch()
    with_actor, without = build(actor_delay=1), build(actor_delay=2)
    for m in (with_actor, without):
        torch.manual_seed(0)
        step(m, batch)
    assert same([p.grad for p in with_actor.critics.parameters()], [p.grad for p in without.critics.parameters()])
    assert same(parameters(with_actor.critics), parameters(without.critics))
    assert not same(parameters(with_actor.actor), parameters(without.actor))


def test_td3_with_neutral_knobs_is_ddpg_to_the_bit():
    card = yaml.safe_load((ROOT / "conf/method/control/td3.yaml").read_text())["card"]
    assert card["baseline"] == "ddpg"
    shared = {"hidden": (16, 16), "dtype": torch.float32, "learning_rate": 1e-2}
    ddpg, td3 = build(DDPG, **shared), build(TD3, **shared, **card["neutral"])
    other = build(TD3, **{**shared, **card["neutral"], "target_noise": 0.2})  # not neutral: must differ
    for k in range(20):
        batch, metrics = make_batch(rows=32, seed=k, dtype=torch.float32), []
        for m in (ddpg, td3, other):
            torch.manual_seed(k)
            metrics.append(step(m, batch))
            drawn = torch.rand(())
            if m is ddpg:
                wanted = drawn
            assert torch.equal(drawn, wanted) or m is other  # the same random numbers are left
        assert metrics[0].keys() == metrics[1].keys()
        assert all(torch.equal(metrics[0][key], metrics[1][key]) for key in metrics[0])
    state, neutral = ddpg.state_dict(), td3.state_dict()
    assert state.keys() == neutral.keys() and all(torch.equal(state[k], neutral[k]) for k in state)
    assert not torch.equal(state["critics.layers.0.weight"], other.state_dict()["critics.layers.0.weight"])


def test_td3_solves_a_bandit():
    """Reward -|a - a*|^2, every transition terminal: the actor finds a*."""
    best = torch.tensor([0.5, -0.3], dtype=torch.float64)
    m = build(learning_rate=5e-3, hidden=(32, 32))
    for k in range(800):
        batch = make_batch(rows=64, seed=k)
        batch["reward"] = -(batch["action"] - best).square().sum(1)
        batch["terminated"] = torch.ones(64, dtype=torch.float64)
        step(m, batch)
    found = m.act(make_batch(rows=100, seed=10_000)["observation"], explore=False)
    assert (found - best).abs().mean() < 0.1


# -- acting ------------------------------------------------------------------------------------------------------------
def test_acting():
    m = build(exploration_noise=0.2)
    with torch.no_grad():  # actions near 0: no clipping within 4 deviations of the noise
        m.actor[-2].weight.mul_(0.1)
        m.actor[-2].bias.zero_()
    observation = make_batch(rows=20_000)["observation"]
    mean = m.act(observation, explore=False)
    assert mean.shape == (20_000, A) and not mean.requires_grad
    close(mean, m.actor(observation).detach())
    assert torch.equal(m.act(observation, explore=False), mean)
    torch.manual_seed(0)
    noise = m.act(observation, explore=True) - mean
    assert mean.abs().max() < 0.2
    assert abs(noise.mean().item()) < 5 * 0.2 / 40_000 ** 0.5 and abs(noise.std().item() / 0.2 - 1) < 0.03
    m = build(exploration_noise=0.0)
    assert torch.equal(m.act(observation, explore=True), m.act(observation, explore=False))


def test_actions_lie_in_the_box():
    m = build(exploration_noise=1.0)
    with torch.no_grad():
        m.actor[-2].weight.mul_(100)
    observation = make_batch(rows=500)["observation"]
    for explore in (True, False):
        action = m.act(observation, explore)
        assert action.min() >= -1 and action.max() <= 1
    assert m.act(observation, True).abs().max() == 1


# -- export and the teacher that reads it ------------------------------------------------------------------------------
def write(path, method):
    tensors, description = method.export()
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path, metadata=description)
    return tensors, description


def test_actor_export_round_trip(tmp_path):
    m = build(dtype=torch.float32)
    tensors, description = write(tmp_path / "actor.safetensors", m)
    assert description == {"kind": "mlp", "sizes": f"{S},7,6,{A}", "activation": "relu", "squash": "true"}
    assert not any("critic" in k or "target" in k for k in tensors)
    teacher = Teacher.load(tmp_path / "actor.safetensors", 0.3, "cpu")
    assert (teacher.observation_size, teacher.action_size, teacher.std) == (S, A, 0.3)
    observation = make_batch(rows=50, dtype=torch.float32)["observation"]
    mean = teacher.mean(observation)
    assert torch.equal(mean, m.act(observation, explore=False)) and not mean.requires_grad


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu", "gelu"])
def test_student_export_round_trip(tmp_path, activation):
    from methods.preference.kd import KD

    torch.manual_seed(0)
    m = KD(KD.Config(hidden=(7,), activation=activation))
    m.setup(Spec(observation_size=S, action_size=A))
    observation = make_batch(rows=50, dtype=torch.float32)["observation"] * 3 + 2
    m.prepare({"context": observation})
    write(tmp_path / "student.safetensors", m)
    teacher = Teacher.load(str(tmp_path / "student.safetensors"), 0.1, "cpu")
    torch.testing.assert_close(teacher.mean(observation), m.act(observation, explore=False), rtol=0, atol=1e-5)


def test_missing_teacher(tmp_path):
    for path in (tmp_path / "nobody.safetensors", tmp_path):
        with pytest.raises(UserError, match=path.name):
            Teacher.load(path, 0.3, "cpu")


def test_corrupt_teacher(tmp_path):
    path = tmp_path / "actor.safetensors"
    write(path, build(dtype=torch.float32))
    whole = path.read_bytes()
    for content in (b"", b"not a network", whole[: len(whole) // 2], whole[:100]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="actor.safetensors"):
            Teacher.load(path, 0.3, "cpu")


@pytest.mark.parametrize("metadata", [None, {"kind": "state_dict"}, {"format": "pt"}])
def test_teacher_of_the_wrong_kind(tmp_path, metadata):
    path = tmp_path / "weights.safetensors"
    save_file({"0.weight": torch.zeros(2, 3)}, path, metadata=metadata)
    with pytest.raises(UserError, match="does not hold an actor"):
        Teacher.load(path, 0.3, "cpu")


@pytest.mark.parametrize("change", [
    {"sizes": None}, {"sizes": "3,seven,2"}, {"sizes": "3,8,6,2"}, {"sizes": "3,7,2"}, {"activation": "cosine"},
    {"activation": None}, {"squash": None}], ids=str)
def test_teacher_whose_description_does_not_fit_its_tensors(tmp_path, change):
    path = tmp_path / "actor.safetensors"
    tensors, description = build(dtype=torch.float32).export()
    description = {k: v for k, v in {**description, **change}.items() if v is not None}
    save_file(tensors, path, metadata=description)
    with pytest.raises(UserError, match="actor.safetensors"):
        Teacher.load(path, 0.3, "cpu")
