"""Distillation by matching distributions: EDM's preconditioning, what trains what, the direction of a KL in closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from token_methods import bare

from envs.generation.exact import Mixture
from envs.generation.plane import ring
from methods.diffusion import edm, flow
from methods.diffusion.diff_instruct_star import DiffInstructStar
from methods.diffusion.dmd import DMD
from methods.diffusion.dmd2 import DMD2
from methods.diffusion.mlp import MLP
from methods.diffusion.r0 import R0
from runner.errors import UserError
from runner.interface import Spec

SPEC = Spec(sample_shape=(2,), classes=2, exact=ring(0.12, 2))


def made(cls, spec=SPEC, start=None, **values):
    torch.manual_seed(0)
    method = bare(cls, **values)
    method.blueprint = MLP(MLP.Config(width=16, depth=2))
    method.setup(spec)
    method.make_optimizers()
    method.prepare(start or {})
    return method


def batch(number=32):
    g = torch.Generator().manual_seed(1)
    condition = torch.arange(number) % 2
    real = SPEC.exact.sample(condition, torch.rand(number, generator=g), torch.randn(number, 2, generator=g))
    return {"x": real, "condition": condition}


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_preconditioning_is_edms():
    """D = c_skip x + c_out F(c_in x) in the variance-exploding scale."""
    torch.manual_seed(0)
    x, sigma, sd = torch.randn(6, 3), torch.tensor([0.02, 0.1, 0.5, 1.0, 7.0, 80.0]), 0.5
    t, s = edm.to_time(sigma), sigma[:, None]

    def network(seen):
        return torch.sin(3 * seen) + seen.square()

    expected = sd ** 2 / (s ** 2 + sd ** 2) * x + s * sd / (s ** 2 + sd ** 2).sqrt() * network(x / (s ** 2 + sd ** 2).sqrt())
    x_t = x * (1 - t)[:, None]
    torch.testing.assert_close(edm.to_data(x_t, network(edm.scaled(x_t, t, sd)), t, sd), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(edm.loss_weight(t, sd), (sigma ** 2 + sd ** 2) / (sigma * sd) ** 2, rtol=1e-4, atol=1e-5)
    last = torch.ones(6)  # at pure noise
    torch.testing.assert_close(edm.to_data(x, network(x), last, sd), sd * network(x))


def test_levels_are_karras():
    u = torch.linspace(0, 1, 5)
    sigma = edm.karras(u, 0.002, 80.0)
    assert sigma[0].item() == pytest.approx(80, rel=1e-4) and sigma[-1].item() == pytest.approx(0.002, rel=1e-3)
    assert sigma[2].item() == pytest.approx(((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, rel=1e-4)


def test_the_gradient_in_x_is_the_weighted_difference_of_denoisers():
    for normaliser in ("dmd", "none"):
        method, rows = made(DMD, normaliser=normaliser), SimpleNamespace(**batch())
        rows.x = rows.x.clone().requires_grad_()
        gradient, = torch.autograd.grad(method.match(rows).sum(), rows.x)
        apart = method.denoise(method.fake, rows.x_t, rows.t, rows.condition) - rows.data
        w = 1 / (rows.x - rows.data).abs().mean(1, keepdim=True) if normaliser == "dmd" else 1.0
        torch.testing.assert_close(gradient, w * apart / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rows.data, SPEC.exact.denoise(rows.x_t, rows.t, rows.condition), rtol=1e-4, atol=1e-5)


def test_a_perfect_fake_score_of_a_perfect_generator_moves_nothing():
    method, rows = made(DMD), SimpleNamespace(**batch())
    method.denoise = lambda network, x, t, condition: method.teach(x, t, condition)
    assert method.match(rows).abs().max() == 0


def test_the_direction_is_the_gradient_of_the_kl_at_each_level():
    """Normal teacher and student in one dimension: E[(s_fake - s_real) dG/dtheta] against autograd of the KL in closed form.
    s_fake - s_real = (D_fake - D_real) (1 - t) / t^2 at x_t."""
    mean, std = torch.tensor(0.4, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    teacher = Mixture(torch.tensor([[-0.3]]), 0.5, torch.ones(2, 1))
    student = Mixture(mean.detach().view(1, 1), std.item(), torch.ones(2, 1))
    n, g = 400_000, torch.Generator().manual_seed(0)
    z, e, condition = torch.randn(n, 1, generator=g), torch.randn(n, 1, generator=g), torch.zeros(n, dtype=torch.int64)
    for level in (0.2, 0.5, 0.8):
        t = torch.full((n,), level)
        x = mean + std * z
        x_t = (1 - level) * x.detach() + level * e
        apart = (student.denoise(x_t, t, condition) - teacher.denoise(x_t, t, condition)) * (1 - level) / level ** 2
        found = torch.autograd.grad((apart * (1 - level) * x).mean(), (mean, std))
        v = ((1 - level) * std) ** 2 + level ** 2
        u = ((1 - level) * 0.5) ** 2 + level ** 2
        kl = 0.5 * ((v + ((1 - level) * (mean + 0.3)) ** 2) / u - 1 - (v / u).log())
        expected = torch.autograd.grad(kl, (mean, std))
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("cls", [DMD, DMD2])
def test_the_generator_moves_at_every_fifth_update_and_the_fake_score_at_all(cls):
    method = made(cls, ratio=5)
    moved, followed = [], []
    for _ in range(7):
        before = weights(method.network), weights(method.fake)
        method.update(batch())
        method.updates += 1
        moved.append(not torch.equal(before[0], weights(method.network)))
        followed.append(not torch.equal(before[1], weights(method.fake)))
    assert moved == [True] + [False] * 4 + [True, False] and all(followed)
    assert all(p.requires_grad for p in method.followers())


def test_the_generators_step_leaves_fake_score_and_head_alone():
    method = made(DMD2, gan_weight=1.0)
    rows = SimpleNamespace(real=batch()["x"], condition=batch()["condition"])
    rows.x = method.generate(rows)
    before = weights(method.fake), weights(method.head), weights(method.network)
    method.improve(rows)
    assert torch.equal(before[0], weights(method.fake)) and torch.equal(before[1], weights(method.head))
    assert all(p.grad is None for p in method.followers()) and not torch.equal(before[2], weights(method.network))


def test_the_classifier_learns_which_samples_are_real():
    """Samples apart from the data: its logit is above 0 on data and below on samples at low noise; the fake score alone trains
    no classifier."""
    method = made(DMD2, gan_weight=1.0, head_weight=1.0, fake_learning_rate=1e-2)
    rows = SimpleNamespace(real=batch(128)["x"], condition=batch(128)["condition"])
    rows.x = rows.real + 3
    for _ in range(60):
        method.minimise(method.fake_loss(rows), "fake")
        method.updates += 1
    t = torch.full((128,), 0.05)
    assert method.logit(rows.real, t, rows.condition).mean() > 1 and method.logit(rows.x, t, rows.condition).mean() < -1


def test_backward_simulation_trains_the_states_that_generation_passes():
    """With the same noise, a sample's training state is that of the predict-and-renoise loop; one step has a gradient."""
    method, data = made(DMD2, sampler_steps=3, gan_weight=0.0), batch()
    rows = SimpleNamespace(real=data["x"], condition=data["condition"])
    x = method.generate(rows)
    times, n = method.grid(), len(rows.real)
    step = (method.noise("step", (n,), "uniform") * 3).long()
    states = [method.noise("start", (n, 2))]
    for j in (1, 2):
        at = flow.step("cps", states[-1], method.velocity(method.network, states[-1], times[j - 1].expand(n), rows.condition),
                       times[j - 1], times[j], 1.0)
        states.append((at.mean + at.std * method.noise(f"state{j}", (n, 2))).detach())
    for j in range(3):
        expected = method.denoise(method.network, states[j], times[j].expand(n), rows.condition)
        torch.testing.assert_close(x[step == j], expected[step == j], rtol=1e-4, atol=1e-5)
    assert {*step.tolist()} == {0, 1, 2} and x.requires_grad
    noised = made(DMD2, sampler_steps=3, gan_weight=0.0, simulate="data").generate(rows)
    first = step == 0
    torch.testing.assert_close(noised[first], x[first])
    assert not torch.equal(noised[~first], x[~first])


def test_a_drawn_sample_is_one_prediction():
    method, noise = made(DMD), torch.randn(5, 2)
    condition = torch.zeros(5, dtype=torch.int64)
    drawn = method.draw(noise, condition)
    torch.testing.assert_close(drawn.x, method.denoise(method.network, noise, torch.ones(5), condition))
    assert drawn.calls.tolist() == [1] * 5


def test_the_worlds_start_as_teacher_and_as_first_weights():
    network = MLP(MLP.Config(width=16, depth=2)).build(SPEC)
    start = {f"start/{k}": v for k, v in network.state_dict().items()}
    x, t, condition = torch.randn(4, 2), torch.rand(4), torch.zeros(4, dtype=torch.int64)
    taught = made(DMD, teacher="start", start=start)
    torch.testing.assert_close(taught.teach(x, t, condition), flow.to_data(x, network(x, t, condition), t))
    assert not torch.equal(weights(taught.network), weights(network))
    begun = made(DMD, initial="start", start=start)
    for own in (begun.network, begun.fake):
        assert torch.equal(weights(own), weights(network))
    torch.testing.assert_close(begun.denoise(begun.fake, x, t, condition), flow.to_data(x, network(x, t, condition), t))


def test_teacher_guidance_is_linear_in_its_scale():
    x, t, condition = torch.randn(4, 2), torch.rand(4), torch.zeros(4, dtype=torch.int64)
    plain, twice = (made(DMD, teacher_guidance=w).teach(x, t, condition) for w in (1.0, 2.0))
    none = SPEC.exact.denoise(x, t, torch.full((4,), 2))
    torch.testing.assert_close(twice, 2 * plain - none, rtol=1e-4, atol=1e-4)


def test_what_is_missing_is_named():
    blind = Spec(sample_shape=(2,), classes=2)
    for settings, word in (({"teacher": "exact"}, "exact"), ({"reward_weight": 1.0, "teacher": "start"}, "reward")):
        with pytest.raises(UserError, match=word):
            made(DMD, spec=blind, **settings)
    for settings in ({"initial": "start"}, {"teacher": "start"}):
        with pytest.raises(UserError, match="no weights"):
            made(DMD, **settings).update(batch())
    with pytest.raises(UserError, match="nothing is left"):
        made(DMD, match_weight=0.0).update(batch())


def test_rewards_alone_raise_the_reward():
    spec = Spec(sample_shape=(2,), classes=2, exact=SPEC.exact, proxies=(lambda x, c: x[:, 0], lambda x, c: -x[:, 1].abs()))
    method = made(DMD, spec=spec, reward_weight=1.0, match_weight=0.0, learning_rate=1e-2)
    told = []
    for _ in range(20):
        told.append(method.update(batch()))
        method.updates += 1
    assert told[-1]["reward"] < told[0]["reward"] - 0.3 and "fake_loss" not in told[0]
    assert math.isfinite(told[-1]["reward"])


# ---- Diff-Instruct* ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("level", [0.3, 0.6])
def test_the_projected_loss_has_the_gradient_of_the_distance_of_scores(level):
    """Normal teacher and student in the plane: L's gradient in the student's mean and deviation, against that of E d(s_theta -
    s_real) at fixed x_t. s_fake - s_real = k (D_fake - D_real), k = (1 - t) / t^2; c is k times as large in scores."""
    mean = torch.tensor([0.4, -0.2], requires_grad=True)
    std = torch.tensor(0.8, requires_grad=True)
    teacher = Mixture(torch.tensor([[-0.3, 0.1]]), 0.5, torch.ones(2, 1))
    student = Mixture(mean.detach()[None], std.item(), torch.ones(2, 1))
    spec = Spec(sample_shape=(2,), classes=1, exact=teacher)
    method = made(DiffInstructStar, spec=spec, normaliser="none", huber=0.2, reward_weight=0.0)
    method.denoise = lambda network, x, t, condition: student.denoise(x, t, condition)
    n, k = 400_000, (1 - level) / level ** 2
    method.levels = lambda name, number, whole: torch.full((number,), place(level, method))
    rows = SimpleNamespace(condition=torch.zeros(n, dtype=torch.int64))
    rows.x = mean + std * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(method.match(rows).mean(), (mean, std))
    t = rows.t[0]
    assert t.item() == pytest.approx(level, abs=1e-3)
    variance = ((1 - level) * std) ** 2 + level ** 2
    score = -(rows.x_t - (1 - level) * mean) / variance
    real = -(rows.x_t - (1 - level) * teacher.means) / (((1 - level) * 0.5) ** 2 + level ** 2)
    distance = ((score - real).square().sum(1) + 2 * (0.2 * k) ** 2).sqrt()
    expected = torch.autograd.grad(distance.mean() / k, (mean, std))
    torch.testing.assert_close(torch.cat([v.flatten() for v in found]), torch.cat([v.flatten() for v in expected]),
                               rtol=0.02, atol=3e-3)


def place(level, method):
    """Where in the grid of levels the time `level` stands."""
    a, b, s = (v ** (1 / 7) for v in (method.config.highest, method.config.lowest, level / (1 - level)))
    return (s - a) / (b - a)


def test_guidance_outside_adds_its_own_push():
    """With y = 0 the distance has no gradient in x but guidance's: (w - 1) (D_u - D_c) w / …"""
    method = made(DiffInstructStar, guided="outside", teacher_guidance=3.0, normaliser="none", reward_weight=0.0)
    rows = SimpleNamespace(**batch())
    method.denoise = lambda network, x, t, condition: method.taught(x, t, condition)
    rows.x = rows.x.clone().requires_grad_()
    pushed, = torch.autograd.grad(method.match(rows).sum(), rows.x)
    none = method.taught(rows.x_t, rows.t, torch.full_like(rows.condition, 2))
    torch.testing.assert_close(pushed, 2 * (none - rows.data), rtol=1e-3, atol=1e-3)


# ---- R0 ----------------------------------------------------------------------------------------------------------------------

def rewarded(*proxies, **values):
    spec = Spec(sample_shape=(2,), classes=2, exact=SPEC.exact, proxies=proxies)
    start = {f"start/{k}": v for k, v in MLP(MLP.Config(width=16, depth=2)).build(SPEC).state_dict().items()}
    return made(R0, spec=spec, start=start, **values)


def test_a_random_share_of_the_noise_between_steps_is_fresh():
    """`passed` at eta is the step `cps` at sin(a pi / 2) = eta."""
    method = rewarded(lambda x, c: x[:, 0])
    x, v, fresh, t, to = torch.randn(6, 2), torch.randn(6, 2), torch.randn(6, 2), torch.tensor(0.8), torch.tensor(0.4)
    eta = torch.linspace(0, 1, 6)
    method.noise = lambda name, shape, kind="normal": eta
    found = method.passed(x, v, t, to, fresh, 0)
    for i in range(6):
        at = flow.step("cps", x[i:i + 1], v[i:i + 1], t, to, 2 / math.pi * math.asin(eta[i]))
        torch.testing.assert_close(found[i:i + 1], at.mean + at.std * fresh[i:i + 1], rtol=1e-4, atol=1e-5)


def test_the_scale_of_a_reward_does_not_matter_to_its_weight():
    gradients = []
    for scale in (1.0, 1000.0):
        method = rewarded(lambda x, c: scale * x[:, 0], lambda x, c: -x.square().sum(1))
        rows = SimpleNamespace(**batch())
        rows.x = rows.x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(method.reward(rows), rows.x)[0])
    torch.testing.assert_close(*gradients)
    inward = -rows.x.detach() / rows.x.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(gradients[0] * -32, inward + torch.tensor([1.0, 0.0]), rtol=1e-4, atol=1e-5)


def test_the_anchor_pulls_to_the_start():
    """Where the reward is flat, only the anchor moves the weights: by learning_rate lambda of the way."""
    method = rewarded(lambda x, c: 0 * x[:, 0], anchor=20.0, learning_rate=1e-2, balance=False)
    with torch.no_grad():
        for p in method.network.parameters():
            p.add_(1.0)
    before, origin = weights(method.network), weights(method.reference)
    method.update(batch())
    torch.testing.assert_close(weights(method.network) - origin, (before - origin) * 0.8, rtol=1e-4, atol=1e-4)


def test_every_step_of_a_few_step_generator_is_trained():
    """The trained step's time, sample by sample, takes all K values; its input is what the current weights pass on."""
    method, seen = rewarded(lambda x, c: x[:, 0], sampler_steps=3), []
    denoise = method.denoise
    method.denoise = lambda network, x, t, c: seen.append((t, torch.is_grad_enabled())) or denoise(network, x, t, c)
    rows = SimpleNamespace(real=batch()["x"], condition=batch()["condition"])
    method.generate(rows)
    assert [graded for _, graded in seen] == [False, False, True]
    assert {round(v, 4) for v in seen[-1][0].tolist()} == {1.0, 0.6667, 0.3333}
    last = rewarded(lambda x, c: x[:, 0], sampler_steps=3, supervise="last")
    last.denoise = lambda network, x, t, condition: seen.append((t, True)) or denoise(network, x, t, condition)
    last.generate(rows)
    assert {round(v, 4) for v in seen[-1][0].tolist()} == {0.3333}


def test_guidance_as_a_reward_leans_towards_the_condition():
    method = rewarded(lambda x, c: 0 * x[:, 0], teacher_guidance=3.0)
    rows = SimpleNamespace(**batch())
    rows.x = rows.x.clone().requires_grad_()
    pushed, = torch.autograd.grad(method.implicit(rows), rows.x)
    x_t, t, _ = method.noised("implicit", rows.x.detach())
    lean = method.taught(x_t, t, rows.condition) - method.taught(x_t, t, torch.full_like(rows.condition, 2))
    torch.testing.assert_close(pushed, -2 * lean * (1 - t)[:, None] / 64, rtol=1e-4, atol=1e-6)
