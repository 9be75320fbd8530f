"""InfAlign and its base: the quantile line's closed forms, decodings by enumeration, calibration, convergence to the optimum."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from token_methods import bare

from envs.pairs import decoding
from envs.pairs.bandit import optimum
from methods.preference.infalign import InfAlign
from runner.draws import Draws

_spec = importlib.util.spec_from_file_location("lab", Path(__file__).parents[1] / "conformance" / "lab.py")
lab = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)

LINE = torch.linspace(0, 1, 4001, dtype=torch.float64)[None, :-1] + 1 / 8000  # midpoints


def tilted(phi, kl: float):
    """The density of the line that is nearest to uniform among those of its kind, by bisection on beta."""
    low, high = 1e-5, 1e5
    for _ in range(200):
        beta = (low * high) ** 0.5
        f = (phi / beta).softmax(-1)
        here = (f * (f * f.shape[-1]).clamp(min=1e-300).log()).sum()
        low, high = (beta, high) if here > kl else (low, beta)
    return f


@pytest.mark.parametrize(("kl", "values"), [(0.5, (0.800, 0.768, 0.857, 0.872)), (1.0, (0.877, 0.863, 0.919, 0.935))])
def test_best_of_four_on_the_quantile_line(kl, values):
    """The sheet's figures: identity, log u, exp 5u, exp 10u."""
    base = torch.full_like(LINE, 1 / 4000)
    for settings, expected in zip(({"transform": "identity"}, {"transform": "log"}, {"t": 5.0}, {}), values):
        phi = bare(InfAlign, reference_samples=0, **settings).signal(LINE, base.log())
        f = tilted(phi, kl)
        won = decoding.wins(decoding.best_of(f, LINE, 4), decoding.best_of(base, LINE, 4), LINE)
        assert won.item() == pytest.approx(expected, abs=1e-3)


def test_worst_of_four_on_the_quantile_line():
    base = torch.full_like(LINE, 1 / 4000)
    for settings, expected in (({"transform": "identity"}, 0.886), ({"t": 5.0}, 0.944), ({}, 0.948)):
        phi = bare(InfAlign, reference_samples=0, **{"transform": "worst_of", **settings}).signal(LINE, base.log())
        f = tilted(phi, 0.5)
        won = decoding.wins(decoding.worst_of(f, LINE, 4), decoding.worst_of(base, LINE, 4), LINE)
        assert won.item() == pytest.approx(expected, abs=1e-3)


def test_what_best_of_n_gains_plain_samples_lose():
    base = torch.full_like(LINE, 1 / 4000)
    plain = [decoding.wins(tilted(bare(InfAlign, reference_samples=0, transform=t).signal(LINE, base.log()), 0.5), base, LINE)
             for t in ("identity", "best_of")]
    assert plain[0].item() == pytest.approx(0.774, abs=1e-3) and plain[1].item() == pytest.approx(0.712, abs=1e-3)


def test_decodings_are_what_enumeration_says_with_ties_too():
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    r = torch.tensor([[1.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    for how, pick in ((decoding.best_of, max), (decoding.worst_of, min)):
        expected = torch.zeros(4, dtype=torch.float64)
        for draws in itertools.product(range(4), repeat=3):
            chance = p[0, list(draws)].prod()
            value = pick(r[0, i].item() for i in draws)
            inside = [i for i in draws if r[0, i] == value]
            for i in inside:
                expected[i] += chance / len(inside)
        torch.testing.assert_close(how(p, r, 3)[0], expected)
    q = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    by_hand = sum(p[0, i] * q[0, j] * (1.0 if r[0, i] > r[0, j] else 0.5 if r[0, i] == r[0, j] else 0.0)
                  for i in range(4) for j in range(4))
    assert decoding.wins(p, q, r).item() == pytest.approx(by_hand.item())
    assert decoding.best_of(p, r, 1)[0].tolist() == pytest.approx(p[0].tolist())
    many = torch.rand(1, 500, dtype=torch.float64).softmax(-1)  # N / (N + 1) against one draw, but for ties with itself
    ranks = torch.randperm(500)[None].double()
    assert decoding.wins(decoding.best_of(many, ranks, 4), many, ranks).item() == pytest.approx(0.8, abs=2e-3)


def test_calibration_by_samples_comes_to_the_exact_one_and_halves_ties():
    torch.manual_seed(0)
    reward, logits = torch.randn(3, 6), torch.randn(3, 6).log_softmax(-1)
    reward[:, 1] = reward[:, 0]
    exact = bare(InfAlign, reference_samples=0, transform="identity").signal(reward, logits)
    p = logits.exp()
    by_hand = (p[:, None] * (torch.sign(reward[:, :, None] - reward[:, None]) + 1) / 2).sum(-1)
    torch.testing.assert_close(exact, by_hand)
    method = bare(InfAlign, reference_samples=40_000, transform="identity")
    method.draws = Draws(0, "cpu")
    assert (method.signal(reward, logits) - exact).abs().max() < 0.01
    torch.testing.assert_close(exact[:, 0], exact[:, 1])


def test_rewards_of_any_scale_are_calibrated_alike():
    reward, logits = torch.randn(2, 6), torch.zeros(2, 6).log_softmax(-1)
    method = bare(InfAlign, reference_samples=0)
    torch.testing.assert_close(method.signal(reward, logits), method.signal(100 * reward.exp() + 3, logits))


def test_training_ends_at_the_optimum_of_its_beta_and_at_the_kl_that_is_asked_for():
    words = "method.kl_target=0.3", "method.learning_rate=0.1", "method.gradient_norm=0.0", "method.transform=\"identity\""
    method, world, stream = lab.assembled("infalign", *words, env="bandit")
    lab.train(method, stream, 800)
    log_p = world.table(method).detach()
    told = world.exact(log_p, method)
    assert told["kl"] == pytest.approx(0.3, abs=3e-3)
    best = optimum(world.task.base, stream.columns["signal"], method.log_beta.exp().item())
    assert (log_p.exp() - best.exp()).abs().sum(-1).max() / 2 < 5e-3


def test_contexts_may_go_in_parts():
    ends = []
    for micro in (0, 3):
        method, _, stream = lab.assembled("kl_rl", f"method.micro_rows={micro}")
        lab.train(method, stream, 20)
        ends.append(method.policy.theta.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)
