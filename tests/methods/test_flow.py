"""Rectified flow: samplers on an exact velocity, densities of steps, Flow-GRPO's parts, and the identities of GRPO-Guard."""

from __future__ import annotations

import math

import pytest
import torch
from token_methods import bare

from envs.generation import metrics
from envs.generation.exact import Mixture
from envs.generation.metrics import energy_distance, frechet, mmd
from envs.generation.plane import checkerboard, ring
from methods.diffusion import flow
from methods.diffusion.flow_grpo import FlowGRPO
from methods.diffusion.grpo_guard import GRPOGuard
from methods.diffusion.mlp import MLP
from runner.catalogue import Catalogue
from runner.compose import compose
from runner.errors import UserError
from runner.interface import Spec
from runner.run import build


@pytest.mark.parametrize(("kind", "amount"), [("ode", 0.0), ("flow", 0.7), ("flow", 0.3), ("dance", 0.3), ("cps", 0.8),
                                              ("ddim", 1.0), ("ddim", 0.5), ("ddim", 0.0)])
def test_samplers_share_their_marginals(kind, amount):
    """Two samples of 2,000 points, generated and true: the energy distance of equal distributions stays below 0.012 in
    199 of 200 trials at this size; Euler's error at 150 steps is a tenth of that."""
    mixture, g, n = ring(0.25, 2), torch.Generator().manual_seed(0), 2000
    condition = torch.zeros(n, dtype=torch.int64)
    true = mixture.sample(condition, torch.rand(n, generator=g), torch.randn(n, 2, generator=g))
    times, x = flow.grid(150), torch.randn(n, 2, generator=g)
    for t, to in zip(times[:-1], times[1:]):
        at = flow.step(kind, x, mixture.velocity(x, t.expand(n), condition), t, to, amount, times[1])
        x = at.mean + at.std * torch.randn(n, 2, generator=g)
    assert energy_distance(x, true) < 0.012
    wrong = mixture.sample(1 - condition, torch.rand(n, generator=g), torch.randn(n, 2, generator=g))
    assert energy_distance(x, wrong) > 1  # the test can fail


@pytest.mark.parametrize("kind", ["flow", "dance", "cps", "ddim"])
def test_a_steps_density_is_the_normal_one(kind):
    torch.manual_seed(0)
    x, v, times = torch.randn(5, 3, 2), torch.randn(5, 3, 2), flow.grid(10, 3.0)
    for j in (0, 4, 8):
        at = flow.step(kind, x, v, times[j], times[j + 1], 0.7, times[1])
        to = at.mean + at.std * torch.randn_like(x)
        expected = torch.distributions.Normal(at.mean, at.std.expand_as(x)).log_prob(to).flatten(1).mean(1)
        torch.testing.assert_close(flow.log_prob(to, at), expected)


@pytest.mark.parametrize("kind", flow.STEPS)
def test_the_factor_is_the_gradient_of_the_mean(kind):
    torch.manual_seed(0)
    times = flow.grid(10, 3.0)
    for j in range(9):
        x, v = torch.randn(4, 2), torch.randn(4, 2, requires_grad=True)
        at = flow.step(kind, x, v, times[j], times[j + 1], 0.7, times[1])
        gradient, = torch.autograd.grad(at.mean.sum(), v)
        torch.testing.assert_close(gradient, (-(times[j] - times[j + 1]) * at.factor).expand(4, 2), rtol=1e-4, atol=1e-5)
        if kind == "flow":  # 1 + a^2 / 2 below t = 1, and 1 there
            assert at.factor.item() == pytest.approx(1.245 if j else 1.0, rel=1e-5)


def test_steps_of_many_times_are_those_of_each():
    torch.manual_seed(0)
    times, x, v = flow.grid(6, 3.0), torch.randn(6, 4, 2), torch.randn(6, 4, 2)
    for kind in flow.STEPS:
        together = flow.step(kind, x, v, times[:-1], times[1:], 0.7, times[1])
        for j in range(6):
            alone = flow.step(kind, x[j], v[j], times[j], times[j + 1], 0.7, times[1])
            torch.testing.assert_close(together.mean[j], alone.mean)
            torch.testing.assert_close(together.std[j].squeeze(), alone.std)


def test_ddim_is_the_formula_of_variance_preserving_models():
    """x' = sqrt(ab') x0 + sqrt(1 - ab' - var) e + sqrt(var) z with DDIM's variance, in the other scale."""
    torch.manual_seed(0)
    x, v, t, to = torch.randn(3, 2), torch.randn(3, 2), torch.tensor(0.7), torch.tensor(0.5)
    now, then = ((1 - s) ** 2 + s ** 2 for s in (t, to))
    ab, ab_to = (1 - t) ** 2 / now, (1 - to) ** 2 / then
    for eta in (0.0, 0.5, 1.0):
        at = flow.step("ddim", x, v, t, to, eta)
        variance = eta ** 2 * (1 - ab_to) / (1 - ab) * (1 - ab / ab_to)
        noise = (x / now.sqrt() - ab.sqrt() * flow.to_data(x, v, t)) / (1 - ab).sqrt()
        mean = ab_to.sqrt() * flow.to_data(x, v, t) + (1 - ab_to - variance).sqrt() * noise
        torch.testing.assert_close(at.mean / then.sqrt(), mean)
        torch.testing.assert_close(at.std / then.sqrt(), variance.sqrt())


def test_the_grid_is_shifted_toward_noise():
    assert flow.grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    torch.testing.assert_close(flow.grid(4, 3.0), torch.tensor([1, 2.25 / 2.5, 0.75, 0.5, 0]))


def test_the_grid_of_sd3s_scheduler_has_an_empty_last_step():
    end = 3 * 0.001 / (1 + 2 * 0.001)
    known = torch.tensor([1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.009, 0])
    torch.testing.assert_close(flow.grid(10, 3.0, end=end), known, atol=5e-4, rtol=0)
    torch.testing.assert_close(policy(FlowGRPO, grid_end=end, shift=3.0).grid(10), known, atol=5e-4, rtol=0)
    even, empty = (policy(FlowGRPO, **more).table() for more in ({}, {"grid_end": end}))
    assert even.std[-1] == pytest.approx(0.202, abs=1e-3) and empty.std[-1] < 0.007
    weight = (empty.factor * empty.length / empty.std)[[0, 4, 8]]  # of the on-policy gradient, known for this grid
    torch.testing.assert_close(weight, torch.tensor([0.057, 0.264, 1.487]), atol=2e-3, rtol=0)


def test_the_exact_velocity_is_that_of_a_regression():
    """E[e - x0 | x_t], by importance sampling of the posterior over x0."""
    mixture, g, t = ring(0.3, 2), torch.Generator().manual_seed(0), torch.tensor(0.6)
    x, n = torch.tensor([[0.4, 0.7]]), 400_000
    condition = torch.zeros(n, dtype=torch.int64)
    data = mixture.sample(condition, torch.rand(n, generator=g), torch.randn(n, 2, generator=g))
    weight = (-((x - (1 - t) * data) ** 2).sum(1) / (2 * t ** 2)).softmax(0)
    expected = (x - weight @ data) / t
    torch.testing.assert_close(mixture.velocity(x, t[None], condition[:1]), expected, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("t", [0.003, 0.05, 0.4, 0.9, 0.9995, 1.0])
def test_boxes_denoise_by_their_posterior(t):
    """Against sums over 20,000 places along each side of each square; at t = 1 nothing is known but the condition."""
    board, g = checkerboard(), torch.Generator().manual_seed(0)
    condition = torch.tensor([0, 1, 2, 0, 1])
    start = board.low[torch.tensor([0, 5, 2, 3, 7])] + torch.rand(5, 2, generator=g).double()
    x = (1 - t) * start + t * torch.randn(5, 2, generator=g).double()
    places = board.low[:, :, None] + (torch.arange(20_000).double() + 0.5) / 20_000  # (squares, 2, places)
    near = -0.5 * ((x[:, None, :, None] - (1 - t) * places) / t).square()  # separate along the two sides
    share = (board.weight[condition].log() + near.logsumexp(-1).sum(-1)).softmax(1)
    expected = (share[..., None] * (near.softmax(-1) * places).sum(-1)).sum(1)
    found = board.denoise(x, torch.full((5,), t), condition)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    x.requires_grad_()
    board.velocity(x, torch.full((5,), t), condition).square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", ["moons", "checkerboard"])
def test_the_exact_velocity_of_a_plane_leads_to_its_data(name):
    """50 Euler steps from noise under one condition: as near to the world's samples as other ones of them, and to those of the
    other condition not at all."""
    world = build(compose(["method=flow_matching", f"env={name}", "logger=none"], Catalogue()), "cpu")[1]
    g, n = torch.Generator().manual_seed(0), 2000
    condition = torch.zeros(n, dtype=torch.long)

    def fresh(_, shape, kind="normal"):
        return (torch.randn if kind == "normal" else torch.rand)(shape, generator=g)

    true, other = world.sample(condition, fresh), world.sample(1 - condition, fresh)
    x, times = torch.randn(n, 2, generator=g), flow.grid(50, 1.0)
    for now, after in zip(times[:-1], times[1:]):
        x = x + (after - now) * world.teacher.velocity(x, now.expand(n), condition)
    again = world.sample(condition, fresh)
    assert energy_distance(x, true) < energy_distance(again, true) + 0.004 < 0.02 * energy_distance(x, other)
    assert torch.isfinite(world.teacher.log_density(true, condition)).all()


def test_a_tilted_mixture_is_the_density_times_the_exponential():
    mixture = ring(0.25, 2, skewed=True)
    direction, beta, condition = torch.tensor([1.0, -0.5]), 0.7, torch.zeros(6, dtype=torch.int64)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    apart = mixture.tilted(direction, beta).log_density(x, condition) - mixture.log_density(x, condition) - x @ direction / beta
    torch.testing.assert_close(apart, apart[:1].expand(6), rtol=1e-4, atol=1e-4)


def test_distances_of_samples(monkeypatch):
    g = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(2000, 3, generator=g), torch.randn(2000, 3, generator=g), torch.randn(2000, 3, generator=g) + 1
    assert abs(energy_distance(a, b)) < 0.01 < 0.3 < energy_distance(a, c)
    assert abs(mmd(a, b, 1.0)) < 0.002 < 0.05 < mmd(a, c, 1.0)
    whole = energy_distance(a, c), mmd(a, c, 1.0)
    monkeypatch.setattr(metrics, "AT_ONCE", 2 ** 16)  # many samples do not fill the memory: a part at a time
    torch.testing.assert_close((energy_distance(a, c), mmd(a, c, 1.0)), whole, rtol=1e-5, atol=1e-7)
    assert frechet(a, c) == pytest.approx(3.0, abs=0.3)
    scaled = torch.randn(20000, 1, generator=g) * 2
    assert frechet(scaled, scaled / 2) == pytest.approx(1.0, abs=0.1)  # (2 - 1)^2


# ---- reinforcement -----------------------------------------------------------------------------------------------------------

class Line:
    """A stream whose reward is the first coordinate."""

    def conditions(self, number):
        return torch.arange(number) % 2

    def reward(self, x, condition):
        return x.flatten(1)[:, 0]


def policy(cls, points=4, **values):
    torch.manual_seed(0)
    method = bare(cls, **{"prompts": 2, "samples": 8, "minibatches": 2, "passes": 1, "learning_rate": 1e-2, **values})
    method.blueprint = MLP(MLP.Config(width=16, depth=2))
    method.setup(Spec(sample_shape=(2,), classes=2, points=points))
    method.make_optimizers()
    method.prepare({})
    return method


def test_stored_densities_are_those_of_the_same_weights():
    rows = moved(policy(FlowGRPO), 0.0)
    assert policy(FlowGRPO).log_ratio(rows).abs().max() < 1e-5
    assert policy(FlowGRPO).log_ratio(moved(policy(FlowGRPO))).abs().max() > 1e-3


@pytest.mark.parametrize("cls", [FlowGRPO, GRPOGuard])
def test_reward_rises(cls):
    method, rewards = policy(cls, prompts=4, clip=0.05, passes=2), []
    for _ in range(12):
        rewards.append(method.update(method.collect(Line()))["reward"].item())
        method.updates += 1
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.5


def moved(method, size=0.3):
    """A batch of the policy's, and its rows once the weights have moved."""
    batch = method.collect(Line())
    batch["advantage"] = method.advantage(batch)
    with torch.no_grad():
        for p in method.network.parameters():
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * p.abs().mean())
    kept = {}

    def look(rows):
        kept["rows"] = rows
        return type(method).step_weight(method, rows)

    method.step_weight = look
    method.advance = lambda loss, scale: kept.update(loss=loss)
    method.learn(batch, torch.arange(len(batch["reward"])))
    return kept["rows"]


@pytest.mark.parametrize("sde", ["flow", "dance", "ddim"])
def test_guards_ratio_has_mean_zero_and_no_scale_left(sde):
    """log r^ = s (log r + bias) = z . dmu / D, in value and in gradient; Flow-GRPO's has mean -delta^2 / 2."""
    method = policy(GRPOGuard, points=16, sde=sde, samples=64)
    rows = moved(method)
    s, apart = rows.std[:, None], rows.now.mean - rows.mean
    plain = FlowGRPO.log_ratio(method, rows)
    bias = (apart.square() / (2 * rows.now.std.square())).flatten(2).mean(2)
    ours = method.log_ratio(rows)
    torch.testing.assert_close(ours, s * (plain + bias), rtol=1e-3, atol=1e-6)
    weights = list(method.network.parameters())
    each = [torch.autograd.grad(v.sum(), weights, retain_graph=True) for v in (ours, s * (plain + bias))]
    for a, b in zip(*each):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    z = (rows.next - rows.mean) / rows.now.std
    torch.testing.assert_close(ours, (z * apart).flatten(2).mean(2), rtol=1e-4, atol=1e-7)
    delta = apart.square().flatten(2).mean(2).sqrt() / s  # (steps, n)
    expected = -(delta.square() / 2)
    noise = (delta / math.sqrt(32)).mean(1) / math.sqrt(ours.shape[1])
    assert ((plain - expected).mean(1).abs() < 5 * noise).all()
    assert (ours.mean(1).abs() < 5 * noise * rows.std).all()


@pytest.mark.parametrize(("over", "factor"), [("sum", 32.0), ("root", 32.0 ** 0.5)])
def test_log_probabilities_may_be_summed(over, factor):
    """Of D = 32 numbers: D and sqrt(D) times the mean, in Flow-GRPO's ratio and in Guard's."""
    for cls in (FlowGRPO, GRPOGuard):
        usual, other = (policy(cls, points=16, log_prob_over=o) for o in ("mean", over))
        torch.testing.assert_close(other.log_ratio(moved(other)), factor * usual.log_ratio(moved(usual)), rtol=1e-3, atol=1e-4)


def test_the_ratio_of_sums_is_unbiased_and_that_of_means_is_not():
    """E r = 1 with the sum, exp(-(delta^2 / 2)(1 - 1/D)) with the mean; delta is the same for all samples of a constant move."""
    g, d, n = torch.Generator().manual_seed(0), 8, 200_000
    z, delta = torch.randn(n, d, generator=g), 0.6
    old, new = (flow.Step(torch.full((n, d), mean), torch.ones(()), torch.ones(())) for mean in (0.0, delta))
    ratio = {}
    for over in ("sum", "mean"):
        ratio[over] = (flow.log_prob(z, new, 1, over) - flow.log_prob(z, old, 1, over)).exp().mean().item()
    assert ratio["sum"] == pytest.approx(1, abs=0.05)
    assert ratio["mean"] == pytest.approx(math.exp(-(delta ** 2 / 2) * (1 - 1 / d)), abs=2e-3)


def test_guards_batch_bias_is_one_number_a_step():
    method = policy(GRPOGuard, points=16, bias="batch")
    rows = moved(method)
    bias = ((rows.now.mean - rows.mean).square() / (2 * rows.now.std.square())).flatten(1).mean(1)
    torch.testing.assert_close(method.log_ratio(rows), rows.std[:, None] * (FlowGRPO.log_ratio(method, rows) + bias[:, None]))


def test_guard_trains_the_velocity_alike_at_every_step():
    """On-policy gradient of the surrogate in v, over advantage and noise: k / D at every step (sheet: 1.0, 1.245, 1.245); of
    Flow-GRPO k h / s."""
    out = {}
    for cls in (FlowGRPO, GRPOGuard):
        method = policy(cls, points=4)
        batch = method.collect(Line())
        batch["advantage"] = torch.ones(16)
        kept = {}
        method.advance = lambda loss, scale: kept.update(loss=loss)
        predict = type(method).predict

        def watched(rows, network):
            v, _ = predict(method, rows, network)
            kept["v"] = v.detach().requires_grad_()
            at = flow.move(rows.x, kept["v"], rows.by)
            kept["z"] = (rows.next - at.mean.detach()) / at.std
            return kept["v"], at

        method.predict = watched
        method.learn(batch, torch.arange(16))
        gradient, = torch.autograd.grad(kept["loss"], kept["v"])
        ratio = gradient.flatten(1).norm(dim=1) / kept["z"].flatten(1).norm(dim=1)
        out[cls] = ratio * 9 * 16 * 8  # steps, samples, D
    torch.testing.assert_close(out[GRPOGuard], torch.tensor([1.0] + [1.245] * 8), rtol=1e-3, atol=1e-3)
    times = flow.grid(10, 3.0)
    at = flow.step("flow", torch.zeros(9, 1), torch.zeros(9, 1), times[:9], times[1:10], 0.7, times[1])
    expected = (at.factor * (times[:9] - times[1:10])[:, None] / at.std).flatten()
    torch.testing.assert_close(out[FlowGRPO], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sde", ["dance", "cps", "ddim"])
def test_guards_weight_is_one_over_kh_where_k_is_not_constant(sde):
    method = policy(GRPOGuard, sde=sde, noise_level=0.5)
    rows = moved(method)
    k = rows.by.factor
    assert k.max() > 1.1 * k.min()
    torch.testing.assert_close(method.step_weight(rows) * rows.h * k, torch.ones(9))


def test_guards_batch_bias_takes_gaussian_steps_of_cps_too():
    """There the surrogate of Flow-GRPO has no 1 / 2 s^2; Guard's ratio is z . dmu / D all the same."""
    method = policy(GRPOGuard, points=16, bias="batch", sde="cps", noise_level=0.5)
    rows = moved(method)
    row = GRPOGuard.log_ratio(policy(GRPOGuard, sde="cps", noise_level=0.5), rows)
    torch.testing.assert_close(method.log_ratio(rows).mean(1), row.mean(1), rtol=1e-4, atol=1e-6)
    assert (method.log_ratio(rows) - row).abs().max() < row.abs().max()


@pytest.mark.parametrize(("values", "said"), [
    ({"minibatches": 17}, "a batch has 16 rollouts"), ({"window": 3, "window_start": 7}, "the first 9 can be trained"),
    ({"sde": "cps", "noise_level": 2.5}, "at most 1")])
def test_batches_and_windows_that_are_empty_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        policy(FlowGRPO, **values)
    assert policy(FlowGRPO, window=3, window_start=6).trained() == range(6, 9)


def test_small_clip_ranges_are_exact():
    """A ratio 2e-6 above 1 is clipped at 1e-6 and not at 3e-6."""
    method = policy(FlowGRPO, clip=1e-6)
    rows = type("Rows", (), {"advantage": torch.tensor([1.0, -1.0])})
    log_ratio = torch.tensor([[2e-6, 2e-6]], requires_grad=True)
    gradient, = torch.autograd.grad(method.surrogate(log_ratio, rows).sum(), log_ratio)
    assert gradient.tolist() == [[0.0, pytest.approx(1.0, rel=1e-4)]]
    method = policy(FlowGRPO, clip=3e-6)
    gradient, = torch.autograd.grad(method.surrogate(log_ratio, rows).sum(), log_ratio)
    assert gradient[0, 0].item() == pytest.approx(-1.0, rel=1e-4)


def test_kinds_of_kl():
    """step = flowgrpo / h; x = step 2 s^2; v = x / (k h)^2."""
    values = {}
    for kind in ("step", "flowgrpo", "x", "v"):
        method = policy(FlowGRPO, kl_weight=1.0, kl_kind=kind, window=1, window_start=3)
        with torch.no_grad():
            for p in method.reference.parameters():
                p.mul_(1.3)
        rows = moved(method, 0.0)
        values[kind] = method.penalty(rows).item()
        h, s, k = rows.h.item(), rows.std.item(), rows.now.factor.item()
    assert values["flowgrpo"] == pytest.approx(values["step"] * h, rel=1e-4)
    assert values["x"] == pytest.approx(values["step"] * 2 * s ** 2, rel=1e-4)
    assert values["v"] == pytest.approx(values["x"] / (k * h) ** 2, rel=1e-4)


def test_training_ends_at_the_reward_asked_for():
    method = policy(FlowGRPO, prompts=4, clip=0.05, passes=2, stop_at=0.3)
    told = []
    for _ in range(14):
        before = [p.clone() for p in method.network.parameters()]
        told.append(method.update(method.collect(Line()))["reward"].item())
        method.updates += 1
        same = all(torch.equal(a, b) for a, b in zip(before, method.network.parameters()))
        assert same == (max(told) >= 0.3)
    assert told[0] < 0.3 <= max(told)


def test_with_two_steps_a_batch_the_first_is_on_policy_and_the_world_is_told_of_the_second():
    method, lines = policy(FlowGRPO, points=64), []
    learn = method.learn

    def look(batch, index, pace, telling):
        return lines.append(learn(batch, index, pace, True)) or lines[-1]

    method.learn = look
    for _ in range(3):
        method.update(method.collect(Line()))
        method.updates += 1
    assert len(lines) == 6
    assert all(line["ratio_deviation_last"] < 1e-6 for line in lines[::2])   # r = 1 up to rounding
    assert all(line["ratio_deviation_last"] > 1e-4 for line in lines[1::2])
    told = method.inspect({})
    for name, key in (("ratio_shift_first", "shift_first"), ("ratio_shift_middle", "shift_middle"),
                      ("ratio_shift", "shift_last")):
        assert told[name].item() == pytest.approx(sum(line[key].item() for line in lines[1::2]) / 3, rel=1e-5)
    assert told["ratio_bias"] == told["ratio_shift"].abs() > 0.1


def test_all_equal_rewards_give_no_nan():
    method = policy(FlowGRPO)
    batch = {**method.collect(Line()), "reward": torch.ones(16)}
    assert all(v.isfinite() for v in method.update(batch).values())


def test_mixtures_need_no_network():
    assert isinstance(ring(0.1, 8), Mixture) and ring(0.1, 8).weight.shape == (9, 8)
