"""Consistency training and iCT: the boundary, schedules and level densities against tables, what the target is."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from token_methods import bare

from envs.generation.exact import Mixture
from envs.generation.plane import ring
from methods.diffusion import flow
from methods.diffusion.consistency_distillation import ConsistencyDistillation
from methods.diffusion.consistency_training import ConsistencyTraining
from methods.diffusion.ict import ICT
from methods.diffusion.mlp import MLP
from runner.errors import UserError
from runner.interface import Spec

SPEC = Spec(sample_shape=(2,), classes=2, exact=ring(0.12, 2))


def made(cls, planned=1000, **values):
    torch.manual_seed(0)
    method = bare(cls, **values)
    method.blueprint, method.planned = MLP(MLP.Config(width=16, depth=2)), planned
    method.setup(SPEC)
    method.make_optimizers()
    return method


def batch(number=64):
    g = torch.Generator().manual_seed(1)
    condition = torch.arange(number) % 2
    return {"x": SPEC.exact.sample(condition, torch.rand(number, generator=g), torch.randn(number, 2, generator=g)),
            "condition": condition}


@pytest.mark.parametrize("cls", [ConsistencyTraining, ICT])
def test_the_network_is_the_identity_at_the_lowest_level(cls):
    method, x = made(cls), torch.randn(7, 2)
    out = method.consistent(method.network, x, torch.full((7,), method.config.lowest), torch.zeros(7, dtype=torch.int64))
    assert torch.equal(out, x)


def test_the_coefficients_are_the_papers():
    method, x, condition = made(ConsistencyTraining, deviation=0.5), torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)
    s, sd, low = torch.tensor([0.02, 0.3, 1.0, 9.0]), 0.5, 0.01
    inside = method.network(x / (s ** 2 + sd ** 2).sqrt()[:, None], 0.125 * s.log(), condition)
    skip, out = sd ** 2 / ((s - low) ** 2 + sd ** 2), sd * (s - low) / (s ** 2 + sd ** 2).sqrt()
    torch.testing.assert_close(method.consistent(method.network, x, s, condition), skip[:, None] * x + out[:, None] * inside)


def test_levels_are_karras_and_ascend():
    method = made(ConsistencyTraining)
    s = method.sigma(torch.arange(18.0), torch.tensor(18.0))
    expected = [(0.01 ** (1 / 7) + i / 17 * (10 ** (1 / 7) - 0.01 ** (1 / 7))) ** 7 for i in range(18)]
    torch.testing.assert_close(s, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_schedules():
    """CT: from first + ... to last + 1 levels by the root of the squares; iCT: doubled in stages of equal length."""
    method = made(ConsistencyTraining, planned=1000)
    for k in (0, 1, 10, 250, 500, 999):
        method.made.fill_(k)
        expected = max(math.ceil(math.sqrt(k / 1000 * (151 ** 2 - 2 ** 2) + 2 ** 2) - 1), 1) + 1
        assert method.schedule().item() == expected, k
    method.made.fill_(1000)
    assert method.schedule() == 151
    method = made(ICT, planned=4000)  # the sheet: 11, 21, 41, 81, 161 levels, 800 updates each
    for k, expected in ((0, 11), (799, 11), (800, 21), (1600, 41), (2400, 81), (3999, 161), (4000, 161), (9999, 161)):
        method.made.fill_(k)
        assert method.schedule().item() == expected, k


@pytest.mark.parametrize("levels", [11, 161])
def test_pairs_of_levels_have_the_probabilities_of_the_table(levels):
    method, number = made(ICT, planned=10), 200_000
    rows = SimpleNamespace(x=torch.zeros(number, 2), levels=torch.tensor(float(levels)))
    index = method.index(rows)
    found = torch.bincount(index.long(), minlength=levels - 1) / number
    s = method.sigma(torch.arange(float(levels)), rows.levels).log()
    mass = torch.erf((s[1:] + 1.1) / (math.sqrt(2) * 2)) - torch.erf((s[:-1] + 1.1) / (math.sqrt(2) * 2))
    expected = mass / mass.sum()
    assert len(found) == levels - 1
    assert ((found - expected).abs() < 5 * (expected / number).sqrt() + 1e-5).all()


def test_uniform_pairs_reach_both_ends():
    method = made(ConsistencyTraining)
    rows = SimpleNamespace(x=torch.zeros(5000, 2), levels=torch.tensor(6.0))
    counts = torch.bincount(method.index(rows).long())
    assert len(counts) == 5 and (counts > 850).all()


def test_huber_is_of_the_whole_sample():
    method = made(ICT, huber=0.1)
    rows = SimpleNamespace(out=torch.tensor([[3.0, 4.0], [0.0, 0.0]]), aim=torch.zeros(2, 2))
    c = 0.1 * math.sqrt(2)
    torch.testing.assert_close(method.distance(rows), torch.tensor([math.sqrt(25 + c * c) - c, 0.0]))


def test_the_pair_shares_its_noise_and_the_target_takes_no_gradient():
    method, kept = made(ICT), {}
    method.weight = lambda rows: kept.update(rows=rows) or type(method).weight(method, rows)
    method.update(batch())
    rows = kept["rows"]
    torch.testing.assert_close((rows.at_high - rows.x) / rows.high[:, None], (method.partner(rows) - rows.x) / rows.low[:, None],
                               rtol=1e-3, atol=1e-4)
    assert not rows.aim.requires_grad and rows.out.requires_grad and (rows.high > rows.low).all()
    torch.testing.assert_close(method.weight(rows), 1 / (rows.high - rows.low))


def test_the_targets_average_has_the_rate_of_the_schedule():
    method = made(ConsistencyTraining, average=0.0)
    before = [p.clone() for p in method.averaging.parameters()]
    told = method.update(batch())
    rate = math.exp(2 * math.log(0.95) / told["levels"].item())
    for old, kept, now in zip(before, method.averaging.parameters(), method.network.parameters()):
        torch.testing.assert_close(kept, rate * old + (1 - rate) * now)
    assert made(ICT).averaging is None and made(ICT, average_target=True).averaging is not None


def test_generation_is_consistent_calls_with_noise_between():
    """One step: f(highest z, highest). Two: x + middle z, f again."""
    noise, condition = torch.randn(5, 2), torch.zeros(5, dtype=torch.int64)
    one, two = made(ICT), made(ICT, sampler_steps=2)
    top = torch.full((5,), 10.0)
    x = one.consistent(one.averaged, 10 * noise, top, condition)
    torch.testing.assert_close(one.draw(noise, condition).x, x, rtol=1e-3, atol=1e-4)
    more = torch.randn(5, 2, generator=torch.Generator().manual_seed(3))
    again = two.consistent(two.averaged, x + 0.821 * more, torch.full((5,), 0.821), condition)
    drawn = two.draw(noise, condition, torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn.x, again, rtol=1e-3, atol=1e-4)
    assert drawn.calls.tolist() == [2] * 5


def test_levels_of_many_steps_go_from_the_highest_to_the_middle():
    t = made(ICT, sampler_steps=4).grid()
    sigma = (t / (1 - t))[:-1]
    ratio = (10 / 0.821) ** (1 / 3)
    torch.testing.assert_close(sigma, torch.tensor([10, 10 / ratio, 0.821 * ratio, 0.821]), rtol=1e-4, atol=1e-4)
    assert t[-1] == 0


# ---- distillation ------------------------------------------------------------------------------------------------------------

def test_the_partner_lies_on_the_teachers_path():
    """Of a normal the path is known: (x - m) / sqrt(tau^2 + s^2) is constant. Heun's step is nearer to it than Euler's; with
    many levels both are on it."""
    mixture = Mixture(torch.tensor([[0.5, -0.3]]), 0.4, torch.ones(2, 1))
    far = {}
    for solver in ("euler", "heun", "data"):
        for levels in (18, 200):
            torch.manual_seed(0)
            method = bare(ConsistencyDistillation, solver=solver, levels=levels)
            method.blueprint, method.planned = MLP(MLP.Config(width=16, depth=2)), 10
            method.setup(Spec(sample_shape=(2,), classes=1, exact=mixture))
            rows = SimpleNamespace(condition=torch.zeros(64, dtype=torch.int64), x=torch.randn(64, 2), noise=torch.randn(64, 2))
            rows.levels = method.schedule()
            assert rows.levels == levels
            index = method.index(rows)
            rows.low, rows.high = method.sigma(index, rows.levels), method.sigma(index + 1, rows.levels)
            rows.at_high = rows.x + rows.high[:, None] * rows.noise
            shrink = ((0.16 + rows.low ** 2) / (0.16 + rows.high ** 2)).sqrt()[:, None]
            exact = mixture.means + (rows.at_high - mixture.means) * shrink
            far[solver, levels] = (method.partner(rows) - exact).abs().max().item()
    assert far["heun", 18] < 0.3 * far["euler", 18] and far["heun", 200] < 1e-3 and far["euler", 200] < 0.05
    assert far["data", 200] > 10 * far["heun", 200]


def test_the_worlds_start_may_be_the_teacher():
    network = MLP(MLP.Config(width=16, depth=2)).build(SPEC)
    method = made(ConsistencyDistillation, teacher="start")
    with pytest.raises(UserError, match="no weights"):
        method.update(batch())
    own = {k: v.clone() for k, v in method.network.state_dict().items()}
    method.prepare({f"start/{k}": v for k, v in network.state_dict().items()})
    x, t, condition = torch.randn(4, 2), torch.rand(4), torch.zeros(4, dtype=torch.int64)
    torch.testing.assert_close(method.teach(x, t, condition), flow.to_data(x, network(x, t, condition), t))
    assert all(torch.equal(own[k], v) for k, v in method.network.state_dict().items())
    method.update(batch())
