"""DFT, ASFT and f-SFT by hand: gradients in probabilities, weights without gradient, both directions of the exact KL, conjugates
of f-divergences, optima, reductions."""

from __future__ import annotations

import math

import pytest
import torch
from token_methods import assembled, bare

from methods.preference.asft import ASFT
from methods.preference.dft import DFT
from methods.preference.f_sft import FSFT, phi
from methods.tokens.demonstrated import Demonstrated, Given
from runner.interface import make_config
from runner.knobs import knobs_of

DOUBLE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tokens(z: torch.Tensor, target: torch.Tensor, mask, **columns) -> Given:
    """A batch whose tokens have the logits z (b, T, V)."""
    log_p = z.log_softmax(-1)
    now = {"log_prob": log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1), "entropy": -(log_p.exp() * log_p).sum(-1)}
    mask = torch.tensor(mask, dtype=z.dtype)
    return Given(now=now, log_prob=now["log_prob"], mask=mask, tokens=mask.sum(), told={}, **columns)


def objective(method, rows: Given) -> torch.Tensor:
    """The loss, as update() puts it together."""
    with torch.no_grad():
        rows.weight = method.weigh_tokens(rows)
    penalty = method.penalty(rows)
    value = method.mean(method.value(rows), rows)
    return value if penalty is None else value + penalty


def bare_config(*classes, **values):
    """Settings of a composed method."""
    defaults = {k.name: k.default for cls in classes for k in knobs_of(cls.Config)}
    return make_config([cls.Config for cls in classes], {**defaults, **values})


def case(scale=1.0):
    z = (scale * torch.randn(3, 4, 7, dtype=torch.float64)).requires_grad_()
    return z, torch.randint(7, (3, 4)), [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]


def gradient(loss, z):
    return torch.autograd.grad(loss, z, retain_graph=True)[0]


# ---- DFT


def test_the_gradient_of_dft_is_that_of_the_probability():
    z, target, mask = case()
    ours = gradient(objective(bare(DFT), tokens(z, target, mask)), z)
    p = z.softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(ours, gradient(-(p * torch.tensor(mask)).sum() / 7, z), **DOUBLE)


def test_with_a_gradient_in_the_weight_rare_tokens_would_be_pushed_down():
    """-p log p rises in p below 1/e; ours falls everywhere."""
    z = torch.tensor([[[0.0, math.log(9)]]], dtype=torch.float64, requires_grad=True)  # p = 0.1
    rows = tokens(z, torch.tensor([[0]]), [[1]])
    assert gradient(objective(bare(DFT), rows), z)[0, 0, 0] < 0
    p = z.softmax(-1)[0, 0, 0]
    assert gradient(-p * p.log(), z)[0, 0, 0] > 0


def test_what_has_next_to_no_probability_is_not_learned_unless_sft_is_mixed_in():
    z = torch.tensor([[[0.0, 12.0]]], dtype=torch.float64, requires_grad=True)
    pulls = [gradient(objective(bare(DFT, weigh=w), tokens(z, torch.tensor([[0]]), [[1]])), z)[0, 0, 0].item()
             for w in (1.0, 0.75, 0.0)]
    assert pulls[0] > -1e-5 and pulls[1] == pytest.approx(-0.25, rel=1e-3) and pulls[2] == pytest.approx(-1, rel=1e-3)


def test_weights_by_hand():
    z = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0]]], dtype=torch.float64)
    rows = tokens(z, torch.tensor([[0, 0]]), [[1, 1]])  # p = 1/4 and 4/5
    assert bare(DFT).weigh_tokens(rows)[0].tolist() == pytest.approx([0.25, 0.8])
    assert rows.told["weight"].item() == pytest.approx(0.525)
    assert bare(DFT, weigh=0.5).weigh_tokens(rows)[0].tolist() == pytest.approx([0.625, 0.9])
    assert bare(DFT, weigh=0.0).weigh_tokens(rows).eq(1).all()


def test_the_mean_is_over_tokens_not_over_responses():
    z = torch.zeros(2, 3, 4, dtype=torch.float64)
    z[0, 0, 0] = 2.0
    rows = tokens(z, torch.zeros(2, 3, dtype=torch.long), [[1, 0, 0], [1, 1, 1]])
    p = [math.exp(2) / (math.exp(2) + 3), 0.25]
    expected = -(p[0] * math.log(p[0]) + 3 * p[1] * math.log(p[1])) / 4
    assert objective(bare(DFT), rows).item() == pytest.approx(expected)


# ---- ASFT


@pytest.mark.parametrize("direction", ["start_policy", "policy_start"])
@pytest.mark.parametrize("weigh", [0.0, 1.0])
def test_asft_by_enumeration_in_all_its_modes(direction, weigh):
    z, target, mask = case()
    first = torch.randn_like(z).detach()
    method = bare(ASFT, kl_direction=direction, weigh=weigh, kl_weight=0.3)
    rows = tokens(z, target, mask)
    rows.now |= {"kl": method.measure(z.flatten(0, 1), target.flatten(), first.flatten(0, 1))["kl"].view(3, 4)}
    loss, total = objective(method, rows), 0.0
    p, q = z.softmax(-1), first.softmax(-1)
    for i in range(3):
        for t in range(4):
            if mask[i][t]:
                a, b = (q, p) if direction == "start_policy" else (p, q)
                kl = sum(a[i, t, v] * (a[i, t, v] / b[i, t, v]).log() for v in range(7))
                at = p[i, t, target[i, t]]
                total += -(at.detach() if weigh else 1.0) * at.log() + 0.3 * kl
    torch.testing.assert_close(loss, total / 7, **DOUBLE)
    torch.testing.assert_close(gradient(loss, z), gradient(total / 7, z), **DOUBLE)


def test_the_start_policy_kl_pulls_by_the_difference_of_probabilities():
    """d KL(pi_0 || pi) / dz = pi - pi_0."""
    z, target, _ = case()
    first = torch.randn_like(z).detach()
    kl = bare(ASFT).measure(z.flatten(0, 1), target.flatten(), first.flatten(0, 1))["kl"]
    torch.testing.assert_close(gradient(kl.sum(), z), z.softmax(-1) - first.softmax(-1), **DOUBLE)


def test_without_its_weight_no_reference_is_kept_and_nothing_more_measured():
    for weight, expected in ((0.0, False), (0.05, True)):
        method = bare(ASFT, kl_weight=weight)
        assert method.needs_reference() == method.compares() == method.measures_more() == expected
    logits, target = torch.randn(5, 7), torch.randint(7, (5,))
    assert bare(ASFT, kl_weight=0.0).measure(logits, target).keys() == bare(DFT).measure(logits, target).keys()


def test_the_kl_is_nothing_at_the_start_and_holds_the_policy_there():
    drift = {}
    for weight in (0.0, 0.05, 5.0):
        method, _, stream = assembled("method=asft", "method.kl_weight=0.05")
        if not weight:
            method.config = type(method.config)(**{**vars(method.config), "kl_weight": 0.0})
        else:
            method.config = type(method.config)(**{**vars(method.config), "kl_weight": weight})
        batch = stream.next()
        told = method.update(batch)
        assert not weight or told["kl"].abs() < 1e-6
        for _ in range(8):
            method.updates += 1
            method.update(stream.next())
        method.config = type(method.config)(**{**vars(method.config), "kl_weight": 1.0})
        with torch.no_grad():
            kl = method.score(batch, method.measure, beside=method.start_policy())["kl"]
        drift[weight] = (kl.sum() / batch["mask"].sum()).item()
    assert drift[0.0] > drift[0.05] > drift[5.0] > 0


@pytest.mark.parametrize("name", ["dft", "asft"])
def test_micro_batches_give_the_whole_batch_s_gradient(name):
    gradients = []
    for micro in (0, 3):
        method, _, stream = assembled(f"method={name}", f"method.micro_rows={micro}", "method.gradient_norm=0")
        batch = stream.next()
        batch["mask"][::2, 6:] = 0
        method.update(batch)
        method.update(batch)
        gradients.append({k: p.grad.clone() for k, p in method.policy.named_parameters()})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-2, atol=2e-5)
    assert max(g.abs().max() for g in gradients[0].values()) > 1e-3


def test_they_change_one_algorithm():
    assert issubclass(ASFT, DFT) and issubclass(DFT, Demonstrated)


# ---- f-SFT

GRID = torch.linspace(-0.85, 6.0, 400, dtype=torch.float64)


@pytest.mark.parametrize(("divergence", "conjugate", "slope"), [
    ("tv", lambda t: t, lambda z: torch.ones_like(z)),
    ("pearson", lambda t: t + t ** 2 / 4, lambda z: 1 - z / 2),
    ("hellinger", lambda t: t / (1 - t), lambda z: (1 + z) ** -2),
    ("kl", lambda t: (t - 1).exp(), lambda z: (-z - 1).exp())])
def test_phi_is_the_mirrored_conjugate_and_its_slope_the_weight(divergence, conjugate, slope):
    z = GRID.clone().requires_grad_()
    torch.testing.assert_close(phi(z, divergence), -conjugate(-z), **DOUBLE)
    torch.testing.assert_close(gradient(phi(z, divergence).sum(), z), slope(GRID), **DOUBLE)
    assert (slope(GRID).diff() <= 0).all()  # concave: the likelier a demonstration, the less it pulls


@pytest.mark.parametrize(("divergence", "f", "low", "high"), [
    ("pearson", lambda u: (u - 1) ** 2, 0.0, 50.0),
    ("hellinger", lambda u: (u.sqrt() - 1) ** 2, 0.0, 2000.0),
    ("kl", lambda u: torch.where(u > 0, u * u.clamp(min=1e-300).log(), torch.zeros_like(u)), 0.0, 50.0)])
def test_the_conjugates_are_those_of_the_divergences(divergence, f, low, high):
    """-phi(-t) = f*(t) = sup_u t u - f(u), by search."""
    u = torch.linspace(low, high, 2_000_001, dtype=torch.float64)
    for t in (-0.5, 0.0, 0.5, 0.8):
        found = (t * u - f(u)).max().item()
        assert -phi(torch.tensor(-t, dtype=torch.float64), divergence).item() == pytest.approx(found, abs=1e-4)


def test_the_pole_is_kept_off():
    z = torch.tensor([-5.0, -0.9, -0.5], dtype=torch.float64, requires_grad=True)
    flat, tangent = phi(z, "hellinger"), phi(z, "hellinger", tangent=True)
    assert flat.tolist() == pytest.approx([-9, -9, -1]) and tangent.tolist() == pytest.approx([-9 - 410, -9, -1])
    assert gradient(flat.sum(), z).tolist() == pytest.approx([0, 100, 4])
    assert gradient(tangent.sum(), z).tolist() == pytest.approx([100, 100, 4])
    assert phi(torch.tensor(-1e4), "kl").isfinite()


@pytest.mark.parametrize("level", ["response", "token"])
@pytest.mark.parametrize("divergence", ["tv", "pearson", "hellinger", "kl"])
def test_f_sft_by_hand(level, divergence):
    z, target, mask = case()
    first = torch.randn(3, 4, dtype=torch.float64) - 2
    rows = tokens(z, target, mask, first_log_prob=first)
    method = bare(FSFT, divergence=divergence, level=level, beta=0.2)
    loss, terms = objective(method, rows), []
    for i in range(3):
        rho = [rows.log_prob[i, t] - (0 if divergence == "tv" else first[i, t]) for t in range(4) if mask[i][t]]
        terms += [sum(rho)] if level == "response" else rho
    zs = 0.2 * torch.stack(terms)
    expected = -{"tv": zs, "pearson": zs - zs ** 2 / 4, "hellinger": zs / (1 + zs), "kl": -(-zs - 1).exp()}[divergence].mean()
    assert zs.min() > -0.9 or divergence != "hellinger"
    torch.testing.assert_close(loss, expected, **DOUBLE)
    torch.testing.assert_close(gradient(loss, z), gradient(expected, z), **DOUBLE)


def test_tv_by_responses_is_sft_that_weighs_by_length_beta_times_over():
    z, target, mask = case()
    ours = gradient(objective(bare(FSFT, divergence="tv", beta=0.3), tokens(z, target, mask)), z)
    usual = gradient(objective(bare(Demonstrated), tokens(z, target, mask)), z)
    torch.testing.assert_close(ours, 0.3 * 7 / 3 * usual, **DOUBLE)  # 7 tokens in 3 rows: the two means' denominators
    assert not bare(FSFT, divergence="tv").needs_reference() and bare(FSFT).needs_reference()


def test_the_tabular_optimum_of_pearson_is_a_root():
    """One context, demonstrations in shares d of arms, a start p0: at the optimum d_y phi'(z_y) = lambda pi(y) with the sum
    1, so pi(y) solves d (1 - beta/2 ln(pi / p0)) = lambda pi. By bisection, twice nested; and by training."""
    d = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
    p0 = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    beta = 1.0

    def at(multiplier):
        low, high = torch.full_like(p0, 1e-12), torch.full_like(p0, 10.0)
        for _ in range(200):
            middle = (low + high) / 2
            above = d * (1 - beta / 2 * (middle / p0).log()) > multiplier * middle
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return low

    small, large = 1e-6, 100.0
    for _ in range(200):
        middle = (small + large) / 2
        small, large = (middle, large) if at(middle).sum() > 1 else (small, middle)
    solution = at(small)
    z = p0.log().clone().requires_grad_()
    optimiser = torch.optim.Adam([z], lr=0.05)
    for step in range(3000):
        optimiser.param_groups[0]["lr"] = 0.05 * 0.998 ** step
        optimiser.zero_grad()
        (-(d * phi(beta * (z.log_softmax(0) - p0.log()), "pearson")).sum()).backward()
        optimiser.step()
    trained = z.softmax(0).detach()
    torch.testing.assert_close(trained[:3], solution[:3], rtol=0, atol=2e-3)
    assert (trained[:3] - d[:3]).abs().max() > 0.05  # not SFT's optimum, which is d
    assert trained[0] < d[0] and trained[2] > d[2]  # the start, which thinks otherwise, holds


def test_weights_of_another_method_stand_inside_the_sum():
    z, target, mask = case()
    first = torch.zeros(3, 4, dtype=torch.float64)
    rows = tokens(z, target, mask, first_log_prob=first)
    method = type("DFT_FSFT", (DFT, FSFT), {})(bare_config(DFT, FSFT, beta=0.1))
    p = rows.log_prob.exp().detach()
    zs = 0.1 * (p * rows.log_prob * rows.mask).sum(1)
    torch.testing.assert_close(objective(method, rows), -(zs - zs ** 2 / 4).mean(), **DOUBLE)
