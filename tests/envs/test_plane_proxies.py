"""The plane's proxies as methods get them, the teacher that is another than the truth, and the shares of modes."""

from __future__ import annotations

import pytest
import torch

from envs.generation.plane import Plane, ring
from runner.errors import UserError
from runner.interface import make_config
from runner.knobs import knobs_of


def world(**values):
    return Plane(make_config([Plane.Config], {**{k.name: k.default for k in knobs_of(Plane.Config)}, **values}))


@pytest.mark.parametrize("kind", ["coarse", "ripple", "side", "odds", "density", "odds+density"])
def test_proxies_are_differentiable_and_add_up_to_the_reward(kind):
    w = world(proxy=kind)
    x = (2 * torch.randn(64, 2)).requires_grad_()
    condition = torch.arange(64) % 2
    each = [proxy(x, condition) for proxy in w.spec().proxies]
    assert len(each) == kind.count("+") + 1
    torch.testing.assert_close(sum(each), w.reward(x, condition))
    for values in each:
        slope, = torch.autograd.grad(values.sum(), x)
        assert values.shape == (64,) and slope.isfinite().all() and (slope.norm(dim=1) > 0).float().mean() > 0.9


def test_odds_are_those_of_the_blurred_halves():
    """Up to a constant: two normals' worth of modes above and below, of deviation 0.5."""
    w, x = world(proxy="odds"), torch.randn(50, 2)
    each = torch.distributions.Independent(torch.distributions.Normal(w.mixture.means, 0.5), 1).log_prob(x[:, None])
    expected = each[:, :4].logsumexp(1) - each[:, 4:].logsumexp(1)
    for c, sign in ((0, 1), (1, -1)):
        apart = w.reward(x, torch.full((50,), c)) - sign * expected
        torch.testing.assert_close(apart, apart[:1].expand(50), rtol=1e-4, atol=1e-4)


def test_the_density_is_high_where_the_condition_has_modes():
    w = world(proxy="density")
    zero, one = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    assert (w.reward(w.mixture.means[:4], zero) > w.reward(w.mixture.means[:4], one) + 2).all()


def test_the_teacher_may_be_another_than_the_truth():
    w = world(skewed=True, groups=1, teacher="reversed")
    torch.testing.assert_close(w.spec().exact.weight[0], ring(0.12, 1, skewed=True).weight[0].flip(0))
    torch.testing.assert_close(w.mixture.weight, ring(0.12, 1, skewed=True).weight)
    condition, n = torch.zeros(20000, dtype=torch.int64), 20000
    g = torch.Generator().manual_seed(0)
    true, taught = (m.sample(condition, torch.rand(n, generator=g), torch.randn(n, 2, generator=g))
                    for m in (w.mixture, w.spec().exact))
    told = [w.judge(x, true[:500], condition[:500])["weight_error"] for x in (true[500:1000], taught[:500])]
    expected = 0.5 * (w.mixture.weight[0] - w.mixture.weight[0].flip(0)).abs().sum().item()
    assert told[0] < 0.1 and told[1] == pytest.approx(expected, abs=0.07)


def test_what_does_not_fit_is_refused():
    for values in ({"proxy": "odds", "groups": 1}, {"proxy": "coarse", "shape": "moons"},
                   {"proxy": "odds", "shape": "checkerboard"}):
        with pytest.raises(UserError, match="env.proxy"):
            world(**values)
    assert world(proxy="density", shape="moons").spec().proxies
