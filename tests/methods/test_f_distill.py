"""f-distill: the weight is f'' r^2, the gradient is that of the divergence; what each divergence makes of two modes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from test_distillation import batch, made

from methods.diffusion.dmd2 import DMD2
from methods.diffusion.f_distill import WEIGHTS, FDistill
from runner.errors import UserError

F = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "hellinger": lambda r: 2 * (1 - r.sqrt()) ** 2,
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r) ** 2 / (2 * r),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_weight_is_the_second_derivative_times_the_squared_ratio(kind):
    r = torch.linspace(0.1, 20, 50, dtype=torch.float64, requires_grad=True)
    first, = torch.autograd.grad(F[kind](r).sum(), r, create_graph=True)
    second, = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(WEIGHTS[kind](r), second * r ** 2)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_gradient_is_that_of_the_divergence(kind):
    """By quadrature on a line: D_f of a mixture and a normal, against -E[h (s_p - s_q) dG/dtheta]."""
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 1.1))
    parts = torch.stack([-0.5 * ((x - m) / 0.9) ** 2 - math.log(0.9 * 2) for m in (-1.0, 1.0)])
    log_p = parts.logsumexp(0) - 0.5 * math.log(2 * math.pi)
    log_q = -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    divergence = torch.trapezoid(log_q.exp() * F[kind]((log_p - log_q).exp()), x)
    expected = torch.autograd.grad(divergence, (mean, std))
    with torch.no_grad():
        inside, = torch.func.jvp(lambda at: torch.stack([-0.5 * ((at - m) / 0.9) ** 2 for m in (-1.0, 1.0)]).logsumexp(0),
                                 (x,), (torch.ones_like(x),))[1:]
        apart = inside + (x - mean) / std ** 2
        each = -log_q.exp() * WEIGHTS[kind]((log_p - log_q).exp()) * apart
        found = torch.trapezoid(each, x), torch.trapezoid(each * (x - mean) / std, x)  # x = mean + std z
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_less_mode_seeking_divergences_make_a_normal_wider():
    """Two modes at -2 and 2 of deviation 0.3, a normal student, exact scores and ratios (w = 1): softened reverse KL drops a
    mode, the others keep both and widen in the order rkl, jeffreys, hellinger, js, kl. With the cut of r, kl ends below the
    matched moments' 2.02."""
    kinds = ("softened", "rkl", "jeffreys", "hellinger", "js", "kl")
    k, g, middle, var = len(kinds), torch.Generator().manual_seed(0), (-2.0, 2.0), 0.09
    mean, std = torch.full((k, 1), 0.5, requires_grad=True), torch.ones(k, 1, requires_grad=True)
    optimizer = torch.optim.Adam([mean, std], lr=1e-2)
    for _ in range(2000):
        z, e, u = torch.randn(1, 512, generator=g), torch.randn(1, 512, generator=g), torch.rand(1, 512, generator=g)
        sigma = 0.02 * 50 ** u
        x = mean + std * z
        with torch.no_grad():
            x_t, of_p, of_q = x + sigma * e, var + sigma ** 2, std ** 2 + sigma ** 2
            parts = torch.stack([-0.5 * (x_t - m) ** 2 / of_p - 0.5 * of_p.log() - math.log(2) for m in middle])
            log_q = -0.5 * (x_t - mean) ** 2 / of_q - 0.5 * of_q.log()
            r = (parts.logsumexp(0) - log_q).exp().clamp(0.1, 20)
            real = sum(s * (m + var / of_p * (x_t - m)) for s, m in zip(parts.softmax(0), middle))
            fake = mean + std ** 2 / of_q * (x_t - mean)
            h = torch.stack([WEIGHTS[kind](ratio) for kind, ratio in zip(kinds, r)])
            push = h / h.mean(1, keepdim=True) * (fake - real)
        optimizer.zero_grad()
        (push * x).mean(1).sum().backward()
        optimizer.step()
    found = dict(zip(kinds, zip(mean.flatten().tolist(), std.flatten().tolist())))
    assert abs(found["softened"][0]) == pytest.approx(2, abs=0.1) and found["softened"][1] == pytest.approx(0.31, abs=0.05)
    widths = [found[kind][1] for kind in kinds[1:]]
    assert all(b > a + 0.01 for a, b in zip(widths, widths[1:])) and all(abs(found[kind][0]) < 0.15 for kind in kinds[1:])
    assert widths[0] == pytest.approx(1.74, abs=0.06) and widths[-1] < 2.02


def rows_of(method, number=64):
    data = batch(number)
    rows = SimpleNamespace(real=data["x"], condition=data["condition"], x=data["x"] + 0.5)
    rows.x_t, rows.t, rows.u = method.noised("match", rows.x, whole=False)
    rows.data = method.teach(rows.x_t, rows.t, rows.condition)
    return rows


def test_normalisations():
    method = made(FDistill, bins=4)
    rows = rows_of(method)
    with torch.no_grad():
        raw = method.logit(rows.x_t, rows.t, rows.condition).exp().clamp(0.1, 20)
        r = method.ratio_of(rows)
        for j in range(4):
            inside = (rows.u * 4).long() == j
            torch.testing.assert_close(r[inside], raw[inside] / raw[inside].mean(), rtol=1e-4, atol=1e-4)
        weight = method.weight(rows) / DMD2.weight(method, rows)
        torch.testing.assert_close(weight, r / (1 + r) / (r / (1 + r)).mean(), rtol=1e-4, atol=1e-4)
        plain = made(FDistill, bins=0, normalise=False, divergence="kl")
        torch.testing.assert_close(plain.weight(rows), DMD2.weight(plain, rows) * raw, rtol=1e-4, atol=1e-4)


def test_empty_parts_of_the_levels_keep_their_mean():
    method = made(FDistill, bins=4, bin_rate=0.5)
    rows = rows_of(method)
    rows.u = torch.full_like(rows.u, 0.1)
    method.level_ratio.fill_(3.0)
    with torch.no_grad():
        raw = method.logit(rows.x_t, rows.t, rows.condition).exp().clamp(0.1, 20)
        method.ratio_of(rows)
    torch.testing.assert_close(method.level_ratio, torch.stack([1.5 + raw.mean() / 2, *[torch.tensor(3.0)] * 3]))


def test_a_ratio_needs_the_classifier():
    with pytest.raises(UserError, match="rkl"):
        made(FDistill, gan_weight=0.0)
    assert made(FDistill, gan_weight=0.0, divergence="rkl").head is None
