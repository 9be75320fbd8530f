"""Guidance at generation: reductions to each other, closed forms on the exact ring."""

from __future__ import annotations

import pytest
import torch
from token_methods import bare

from envs.generation.images import Images
from envs.generation.metrics import energy_distance
from envs.generation.plane import Plane, ring
from methods.diffusion.adaptive_guidance import AdaptiveGuidance
from methods.diffusion.apg import APG
from methods.diffusion.base import Walk
from methods.diffusion.cfg import CFG
from methods.diffusion.flow_nrg import FlowNRG
from methods.diffusion.mlp import MLP
from methods.diffusion.rlg import RLG
from runner.errors import UserError
from runner.interface import Spec


def exact(cls, world, **values):
    method = bare(cls, **{"model": "exact", "sampler_steps": 20, "shift": 1.0, **values})
    method.blueprint = MLP(MLP.Config(width=8, depth=1))
    method.setup(world.spec())
    method.make_optimizers()
    return method


def plane(**values):
    return Plane(Plane.Config(**{"spread": 0.25, "eval_samples": 1600, **values}))


def drawn(method, number=1000):
    g = torch.Generator().manual_seed(0)
    return method.draw(torch.randn(number, 2, generator=g), torch.arange(number) % method.spec.classes, g)


def test_guidance_of_one_is_the_conditional_model_at_half_the_calls():
    world = plane()
    one, three = drawn(exact(CFG, world, guidance=1.0)), drawn(exact(CFG, world, guidance=3.0))
    assert one.calls.unique().tolist() == [20] and three.calls.unique().tolist() == [40]
    assert (one.x - three.x).abs().max() > 0.1


def test_cfg_is_the_same_in_velocity_data_noise_and_score():
    world, t = plane(), torch.tensor(0.4)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    c, u = torch.zeros(5, dtype=torch.int64), torch.full((5,), 2)
    vc, vu = (world.teacher.velocity(x, t.expand(5), k) for k in (c, u))
    v = vc + 2 * (vc - vu)
    for to, back in ((lambda v: x - t * v, lambda d: (x - d) / t),
                     (lambda v: x + (1 - t) * v, lambda e: (e - x) / (1 - t)),
                     (lambda v: -(x + (1 - t) * v) / t, lambda s: -(x + t * s) / (1 - t))):
        torch.testing.assert_close(back(to(vc) + 2 * (to(vc) - to(vu))), v, rtol=1e-4, atol=1e-5)


def test_apg_without_its_changes_is_cfg():
    """Exactly so where nothing is changed; and to rounding along the way through projections that keep everything."""
    world = plane()
    cfg = drawn(exact(CFG, world, guidance=4.0)).x
    neutral = exact(APG, world, guidance=4.0, parallel=1.0, momentum=0.0, radius=0.0)
    assert torch.equal(drawn(neutral).x, cfg)
    nearly = exact(APG, world, guidance=4.0, parallel=1.0, momentum=0.0, radius=1e6)
    torch.testing.assert_close(drawn(nearly).x, cfg, rtol=1e-4, atol=1e-4)


def test_apgs_difference_is_across_the_prediction_and_bounded():
    world, t = plane(), torch.tensor(0.6)
    method = exact(APG, world, guidance=5.0, radius=0.3, momentum=0.0)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    walk = Walk(x=x, t=t, step=0, steps=1, condition=torch.zeros(50, dtype=torch.int64), memory={}, calls=torch.zeros(50),
                network=None)
    conditional = world.teacher.velocity(x, t.expand(50), walk.condition)
    data, guided = x - t * conditional, x - t * method.guide(walk, conditional)
    moved = guided - data
    assert ((moved * data).sum(1).abs() < 1e-4 * moved.norm(dim=1).clamp(min=1e-3) * data.norm(dim=1) + 1e-5).all()
    assert moved.norm(dim=1).max() <= 4 * 0.3 + 1e-4 and moved.norm(dim=1).max() > 0.5


def test_momentum_starts_anew_with_every_generation():
    method = exact(APG, plane(), guidance=4.0)
    assert torch.equal(drawn(method).x, drawn(method).x)


def test_apg_keeps_the_radius_that_cfg_overshoots():
    """One mode a condition, w = 4 and 8: the sheet's closed-form ring (data 1.5; CFG 2.05 and 2.43)."""
    world = plane(groups=8)
    for w, overshoot in ((4.0, 2.05), (8.0, 2.43)):
        cfg, apg = (drawn(exact(cls, world, guidance=w)).x.norm(dim=1).mean().item() for cls in (CFG, APG))
        assert cfg == pytest.approx(overshoot, abs=0.05) and apg == pytest.approx(1.5, abs=0.05)


def test_adaptive_guidance_never_ends_above_one_and_ends_at_once_below():
    world = plane()
    cfg = drawn(exact(CFG, world, guidance=3.0))
    never = drawn(exact(AdaptiveGuidance, world, guidance=3.0, gamma=1.1))
    assert torch.equal(never.x, cfg.x) and torch.equal(never.calls, cfg.calls)
    once = exact(AdaptiveGuidance, world, guidance=3.0, gamma=-1.1, armed=1.0)
    assert drawn(once).calls.unique().tolist() == [21]  # the first step is guided
    ends = drawn(exact(AdaptiveGuidance, world, guidance=3.0))
    assert 25 < ends.calls.mean() < 33 and energy_distance(ends.x, cfg.x) < 0.005


def test_linear_ag_regresses_what_is_linear():
    """Where one condition is all there is, v_u = v_c: regressions are exact, and calls are saved in the first half."""
    world = plane(groups=1)
    cfg = drawn(exact(CFG, world, guidance=3.0))
    linear = drawn(exact(AdaptiveGuidance, world, guidance=3.0, linear=True, gamma=1.1))
    torch.testing.assert_close(linear.x, cfg.x, rtol=1e-3, atol=1e-3)
    assert linear.calls.unique().tolist() == [35]
    world = plane()
    cfg, linear = (drawn(exact(cls, world, guidance=3.0, **more)).x for cls, more in
                   ((CFG, {}), (AdaptiveGuidance, {"linear": True, "gamma": 1.1})))
    assert (cfg - linear).square().mean().sqrt() < 0.03


def test_rlg_at_zero_and_one_is_base_and_tuned():
    world = plane()
    base = drawn(exact(CFG, world, guidance=1.0)).x
    torch.testing.assert_close(drawn(exact(RLG, world, weight=0.0)).x, base)
    one, beyond = exact(RLG, world, weight=1.0, sampler_steps=60), exact(RLG, world, weight=2.0, tuned_steps=20)
    tilted = world.teacher.tilted(torch.tensor([1.0, 0.0]), 1.0)
    g = torch.Generator().manual_seed(1)
    true = tilted.sample(torch.arange(1000) % 2, torch.rand(1000, generator=g), torch.randn(1000, 2, generator=g))
    assert energy_distance(drawn(one).x, true) < 0.02
    assert torch.equal(drawn(beyond).x, drawn(exact(RLG, world, weight=1.0)).x)  # all steps are the tuned model's


def test_rlg_of_networks_at_one_asks_the_tuned_one_alone():
    method = bare(RLG, weight=1.0, sampler_steps=4)
    method.blueprint = MLP(MLP.Config(width=8, depth=2))
    method.setup(Spec(sample_shape=(2,), classes=2))
    method.make_optimizers()
    method.prepare({})
    with torch.no_grad():
        for p in method.network.parameters():
            p.add_(0.1)
    one = drawn(method)
    method.network, method.reference = method.reference, method.network
    zero = drawn(method)
    method.network, method.reference = method.reference, method.network
    method.config = type(method.config)(**{**vars(method.config), "weight": 0.0})
    assert one.calls.unique().tolist() == [4] and torch.equal(drawn(method).x, zero.x) and not torch.equal(one.x, zero.x)


def test_the_gradient_of_the_exact_noisy_reward_gives_the_tilted_velocity():
    """v - t / (1 - t) grad log E[exp(r(x0)) | x_t], r = 0.8 x_1, against the mixture's exact tilt."""
    mixture, direction = ring(0.3, 2), torch.tensor([0.8, 0.0])
    tilted = mixture.tilted(direction, 1.0)
    x, t = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double().requires_grad_(), torch.tensor(0.55)
    condition, keep, s2 = torch.zeros(6, dtype=torch.int64), 1 - 0.55, 0.3 ** 2
    variance = (keep ** 2 * s2 + 0.55 ** 2)
    apart = (x[:, None] - keep * mixture.means).square().sum(-1)
    log_g = (mixture.weight[0].log() - apart / (2 * variance)).log_softmax(1)
    centre = mixture.means + keep * s2 / variance * (x[:, None] - keep * mixture.means)  # x0 | mode, x_t ~ N(centre, left)
    left = s2 - keep ** 2 * s2 ** 2 / variance
    reward = (log_g + centre @ direction.double() + 0.5 * left * 0.64).logsumexp(1)
    gradient, = torch.autograd.grad(reward.sum(), x)
    v = mixture.velocity(x.detach().float(), t.expand(6), condition)
    steered = v - (t / (1 - t)) * gradient.float()
    torch.testing.assert_close(steered, tilted.velocity(x.detach().float(), t.expand(6), condition), rtol=1e-3, atol=1e-3)


def test_nrg_follows_its_heads_gradient():
    method = bare(FlowNRG, reward_weight=2.0, most=10.0)
    method.blueprint = MLP(MLP.Config(width=8, depth=2))
    method.setup(Spec(sample_shape=(2,), classes=2))
    x, t, condition = torch.randn(3, 2), torch.tensor(0.5), torch.zeros(3, dtype=torch.int64)
    walk = Walk(x=x, t=t, step=0, steps=1, condition=condition, memory={}, calls=torch.zeros(3), network=method.network)
    step = 1e-3
    with torch.no_grad():
        above, below = ([method.reward(x + sign * step * e, t.expand(3), condition) for e in torch.eye(2)] for sign in (1, -1))
        slope = (torch.stack(above, 1) - torch.stack(below, 1)) / (2 * step)
        v = method.network(x, t.expand(3), condition)
        torch.testing.assert_close(method.follow(walk), v - 2.0 * slope, rtol=1e-2, atol=1e-3)


def test_exact_models_are_refused_where_none_is_known():
    with pytest.raises(UserError, match="knows no exact velocity"):
        exact(CFG, Images(Images.Config()))
