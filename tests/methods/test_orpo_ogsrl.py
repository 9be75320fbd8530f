"""ORPO (deep and exact), action KL, the guardian and OGSRL: enumerated occupancies, plain loops, and what the theory says."""

from __future__ import annotations

import math

import pytest
import torch

from envs.control.proxy_grid import Draw, ProxyGrid
from envs.control.proxy_grid import occupancy as exact_occupancy
from methods.control.action_kl import ActionKL
from methods.control.guardian import Guardian
from methods.control.ogsrl import OGSRL
from methods.control.orpo_exact import ORPOExact, divergence
from methods.control.orpo_occupancy import ORPOOccupancy, auc, penalties, trimmed_mean
from methods.control.tabular import occupancy
from runner.errors import UserError
from runner.interface import Spec


def close(actual, expected, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


# -- the exact version -------------------------------------------------------------------------------------------------
def distributions(seed=0, size=6):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=g, dtype=torch.float64).softmax(0) for _ in range(2))


def test_divergences_by_enumeration():
    p, q = distributions()
    chi2 = sum((a - b) ** 2 / b for a, b in zip(p.tolist(), q.tolist()))
    close(divergence(p, q, "chi2"), chi2)
    close(divergence(p, q, "sqrt_chi2"), math.sqrt(chi2))
    close(divergence(p, q, "kl"), sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist())))
    close(divergence(p, q, "tv"), 0.5 * sum(abs(a - b) for a, b in zip(p.tolist(), q.tolist())))
    for kind in ("chi2", "sqrt_chi2", "kl", "tv"):
        assert divergence(q, q, kind).item() == pytest.approx(0, abs=2e-6)


def tables(seed=0):
    return ProxyGrid(ProxyGrid.Config()).stream(None, "tables", seed).next()


@pytest.mark.parametrize(("over", "kind"), [(o, k) for o in ("state_action", "state", "action")
                                            for k in ("sqrt_chi2", "chi2", "kl", "tv")])
def test_penalty_is_strength_sigma_and_the_divergence(over, kind):
    batch, draw = tables(), Draw(0, 0.7)
    method = ORPOExact(ORPOExact.Config(strength=0.7, over=over, divergence=kind))
    policy = torch.randn(25, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
    mu = occupancy(policy, batch)
    close(mu, exact_occupancy(policy))
    if over == "action":
        wanted = sum(mu[s].sum() * divergence(policy[s], draw.reference[s], kind) for s in range(25))
    elif over == "state":
        wanted = divergence(mu.sum(1), draw.occupancy.sum(1), kind)
    else:
        wanted = divergence(mu.flatten(), draw.occupancy.flatten(), kind)
    close(method.penalty(batch, policy, mu), 0.7 * draw.deviation(draw.proxy) * wanted, rtol=1e-8)


def trained(seed, **values):
    """(draw, figures at every iterate)"""
    world = ProxyGrid(ProxyGrid.Config())
    method = ORPOExact(ORPOExact.Config(**values))
    method.setup(world.spec())
    method.make_optimizers()
    stream = world.stream(method, "tables", seed)
    method.prepare(stream.data())
    figures = [world.evaluate(method, seed)]
    for _ in range(60):
        method.update(stream.next())
        figures.append(world.evaluate(method, seed))
    return figures


@pytest.mark.parametrize("values", [{"strength": 0.0}, {"strength": 0.3}, {"strength": 1.0, "divergence": "kl"},
                                    {"strength": 1.0, "over": "action", "divergence": "kl"}], ids=str)
def test_the_papers_inequality_holds_at_every_iterate(values):
    for seed in range(2):
        figures = trained(seed, **values)
        assert min(f["theorem_slack"] for f in figures) >= -1e-6
        assert figures[0]["gain"] == pytest.approx(0, abs=1e-9)  # training starts at the reference
        assert figures[-1]["proxy_return"] > figures[0]["proxy_return"]


def test_a_strong_penalty_keeps_the_occupancy_near_the_reference():
    chi2 = [trained(0, strength=s)[-1]["chi2"] for s in (0.0, 1.0, 30.0)]
    assert chi2[0] > chi2[1] > chi2[2] and chi2[2] < 0.01


# -- the deep version --------------------------------------------------------------------------------------------------
def test_penalties_of_the_true_log_ratio_are_the_divergences():
    """With d = log(mu / mu_ref) the mean of each penalty over mu is the divergence (kl, chi2), or sqrt(chi2)."""
    mu, reference = distributions()
    counts = torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.float64)
    mu = counts / counts.sum()
    d = (mu / reference).log()
    rows = d.repeat_interleave(counts.long())  # 21 rows, visited as often as mu says; fewer than 100: nothing is trimmed
    chi2 = (mu * mu / reference).sum() - 1
    close(penalties(rows, "kl").mean(), (mu * d).sum())
    close(penalties(rows, "chi2").mean(), chi2)
    close(penalties(rows, "chi2", minus_one=False).mean(), chi2 + 1)
    close(penalties(rows, "sqrt_chi2").mean(), chi2.sqrt())
    close(penalties(rows, "tv").mean(), (mu * d.sign()).sum())


def test_sqrt_chi2_falls_back_where_the_mean_is_not_positive():
    d = torch.tensor([-1.0, -2.0])
    close(penalties(d, "sqrt_chi2"), d.exp() - 1)


@pytest.mark.parametrize("rows", [1, 5, 99, 100, 1000])
def test_the_trimmed_mean_of_few_rows_is_the_mean(rows):
    x = torch.randn(rows, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    cut = rows // 100
    kept = sorted(x.tolist())[cut:rows - cut]
    assert trimmed_mean(x).item() == pytest.approx(sum(kept) / len(kept))


def test_the_official_trimmed_mean_loses_the_penalty_of_few_rows():
    d = torch.linspace(-1, 2, 99)
    assert penalties(d, "sqrt_chi2", official=True).isnan().all() and penalties(d, "sqrt_chi2").isfinite().all()
    many = torch.linspace(-1, 2, 300)
    assert torch.equal(penalties(many, "sqrt_chi2", official=True), penalties(many, "sqrt_chi2"))
    method, batch = deep(strength=1.0, official_trimmed_mean=True), deep_batch(t=40)  # 80 rows
    with torch.no_grad():
        assert torch.equal(method.reward_transform(batch), batch["reward"])


def test_auc_by_counting():
    a, b = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 0.0])
    assert auc(a, b).item() == pytest.approx((2 + 1 + 1.5) / 6)
    assert auc(a + 10, b) == 1 and auc(a - 10, b) == 0


def deep(cls=ORPOOccupancy, **values):
    torch.manual_seed(0)
    method = cls(cls.Config(**{"hidden": (8,), "minibatches": 2, "epochs": 1, **values}))
    method.setup(Spec(observation_size=5, actions=3))
    method.make_optimizers()
    return method


def test_the_discriminator_finds_the_log_ratio():
    """Five one-hot states, three actions: after training, d is near log(mu / mu_ref) of the counts."""
    method = deep(discriminator_hidden=(32,), discriminator_rate=0.01, discriminator_epochs=60, normalise_observations=False)
    g = torch.Generator().manual_seed(0)
    mu, reference = (torch.randn(15, generator=g).softmax(0) for _ in range(2))
    draws = [torch.multinomial(p, 4000, replacement=True, generator=g) for p in (mu, reference)]
    visited, other = (method.pairs(torch.eye(5)[k // 3], k % 3) for k in draws)
    assert visited.shape == (4000, 8)
    before = method.discriminator(visited).detach().clone()
    method.discriminate(visited, other)
    counts = [torch.bincount(k, minlength=15).float() for k in draws]
    every = method.pairs(torch.eye(5).repeat_interleave(3, 0), torch.arange(15) % 3)
    found = method.discriminator(every).squeeze(1).detach()
    assert (found - (counts[0] / counts[1]).log()).abs().max() < 0.5
    assert (before - method.discriminator(visited)).abs().max() > 0.3


def test_state_only_occupancy_does_not_see_actions():
    method = deep(over="state")
    observation = torch.eye(5)
    assert torch.equal(method.pairs(observation, torch.zeros(5, dtype=torch.long)),
                       method.pairs(observation, torch.ones(5, dtype=torch.long)))


def deep_batch(t=60, n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    state = torch.randint(5, (t + 1, n), generator=g)
    one_hot = torch.eye(5)
    rows = torch.randint(5, (t * n,), generator=g)
    return {"observation": one_hot[state[:-1]], "next_observation": one_hot[state[1:]],
            "action": torch.randint(3, (t, n), generator=g), "reward": torch.randn(t, n, generator=g),
            "terminated": torch.zeros(t, n), "ended": torch.zeros(t, n), "reference_observation": one_hot[rows],
            "reference_action": torch.randint(3, (t * n,), generator=g), "reference_reward": torch.randn(t * n, generator=g),
            "reference_probability": torch.full((t, n, 3), 1 / 3)}


def test_the_reward_is_lowered_where_the_reference_does_not_go():
    """The sign, the unit sigma, the bound."""
    method, batch = deep(strength=0.5, divergence="kl", discriminator_epochs=40, discriminator_rate=0.01), deep_batch()
    batch["reference_observation"] = torch.eye(5)[torch.randint(0, 3, (120,), generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        changed = method.reward_transform(batch)
    lowered = (batch["reward"] - changed).flatten()
    state = batch["observation"].argmax(-1).flatten()
    assert lowered[state >= 3].mean() > 0.5 > lowered[state < 3].mean()
    sigma = batch["reference_reward"].std(correction=0)
    d = method.discriminator(method.pairs(batch["observation"], batch["action"])).squeeze(-1).detach()
    torch.testing.assert_close(batch["reward"] - changed, 0.5 * sigma * d, rtol=1e-3, atol=1e-4)
    bounded = deep(strength=0.5, divergence="kl", bound=0.01)
    with torch.no_grad():
        assert (batch["reward"] - bounded.reward_transform(batch)).abs().max() <= 0.01 + 1e-6


def test_an_infinite_penalty_counts_as_none():
    method, batch = deep(strength=1.0, divergence="chi2", discriminator_rate=0.0), deep_batch()
    with torch.no_grad():
        method.discriminator[-1].bias.fill_(1e4)  # e^d overflows
        assert torch.equal(method.reward_transform(batch), batch["reward"])


def test_action_kl_by_hand():
    method, batch = deep(ActionKL, strength=0.01, discount=0.9), deep_batch()
    batch["reference_probability"] = torch.tensor([0.5, 0.3, 0.2]).expand(60, 2, 3)
    data = method.assess(batch)
    distribution = method.policy(data["seen"])
    p = distribution[0].exp()
    wanted = (p * (p.log() - torch.tensor([0.5, 0.3, 0.2]).log())).sum(1).mean() * 0.01 / 0.1
    torch.testing.assert_close(method.penalty(data, distribution), wanted, rtol=1e-4, atol=1e-7)


def test_action_kl_pulls_the_policy_to_the_reference():
    kl = {}
    for strength in (0.0, 10.0):
        method = deep(ActionKL, strength=strength, learning_rate=0.02, epochs=4)
        for k in range(30):
            batch = deep_batch(seed=k)
            batch["reward"] = (batch["action"] == 0).float()
            batch["reference_probability"] = torch.tensor([0.1, 0.1, 0.8]).expand(60, 2, 3)
            method.update(batch)
        p = method.policy(method.seen(torch.eye(5)))[0].exp().mean(0)
        kl[strength] = p[2].item()
    assert kl[0.0] < 0.3 and kl[10.0] > 0.6


def test_action_kl_refuses_vector_actions():
    method = ActionKL(ActionKL.Config())
    with pytest.raises(UserError, match="numbered actions"):
        method.setup(Spec(observation_size=3, action_size=2))


# -- OGSRL -------------------------------------------------------------------------------------------------------------
def log(rows=1500, seed=0):
    g = torch.Generator().manual_seed(seed)
    observation = torch.rand(rows, 2, generator=g) * 3
    return {"observation": observation, "action": (0.5 * torch.randn(rows, 1, generator=g)).clamp(-1, 1)}


def test_the_guardian_is_a_quantile_of_kernel_densities():
    data = log()
    guardian = Guardian(0.05, 0.2)
    guardian.fit(**data)
    rows = torch.cat([data["observation"], data["action"]], 1)
    low, high = rows.amin(0), rows.amax(0)
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(1))
    points = points * torch.tensor([4.0, 4.0, 2.0]) - torch.tensor([0.5, 0.5, 1.0])
    scaled = (points - low) / (high - low) * 2 - 1
    density = [sum(math.exp(-((x - key) ** 2).sum().item() / (2 * 0.2 ** 2)) for key in guardian.keys) / len(guardian.keys)
               for x in scaled]
    assert len(guardian.keys) == 1200
    found = guardian.outside(points[:, :2], points[:, 2:])
    wanted = torch.tensor([float(d < guardian.threshold.item()) for d in density])
    assert torch.equal(found, wanted) and 0 < wanted.sum() < 50
    own = guardian.keys[:1000, None].sub(guardian.keys[None]).square().sum(2).mul(-0.5 / 0.04).exp().mean(1)
    assert abs((own < guardian.threshold).float().mean().item() - 0.05) < 0.005
    wide = guardian.outside(points[:, :2].reshape(5, 10, 2), points[:, 2:].reshape(5, 10, 1))
    assert torch.equal(wide, wanted.reshape(5, 10))
    one = torch.ones(50, 1)
    assert torch.equal(guardian.outside(points[:, :2], 5 * one), guardian.outside(points[:, :2], one))


def test_the_fitted_bandwidth_keeps_held_out_rows_inside():
    guardian, data = Guardian(0.05, 0.0), log()
    guardian.fit(**data)
    fresh = log(seed=5)
    share = guardian.outside(**fresh).mean().item()
    assert 0.01 < guardian.bandwidth < 1 and 0.02 < share < 0.1
    sharp = Guardian(0.05, guardian.bandwidth.item() / 4)
    sharp.fit(**data)
    assert sharp.outside(**fresh).mean() > 2 * share


def guarded(**values):
    torch.manual_seed(0)
    method = OGSRL(OGSRL.Config(**{"hidden": (8,), "minibatches": 2, "epochs": 1, "cost_limit": 2.0, **values}))
    method.setup(Spec(observation_size=2, action_size=1, costs=1))
    method.make_optimizers()
    method.prepare(log())
    return method


def guarded_batch():
    """One copy, six steps: inside, outside, inside, end; inside, inside."""
    observation = torch.full((6, 1, 2), 1.5)
    observation[1] = 30.0
    return {"observation": observation, "next_observation": observation, "action": torch.zeros(6, 1, 1),
            "reward": torch.ones(6, 1), "cost": torch.full((6, 1, 1), 0.25), "terminated": torch.zeros(6, 1),
            "ended": torch.tensor([0, 0, 0, 1, 0, 0.0]).unsqueeze(1)}


def seen_by(method, monkeypatch):
    """What reward_transform and costs give within an update."""
    found = {}
    def spied(name):
        original = getattr(method, name)

        def spy(batch):
            found[name] = original(batch)
            return found[name]
        return spy

    for name in ("reward_transform", "costs"):
        monkeypatch.setattr(method, name, spied(name))
    method.update(guarded_batch())
    return {k: v.flatten(0, 1).tolist() for k, v in found.items()}


def test_the_guardian_is_one_more_cost(monkeypatch):
    method = guarded(guardian_limit=0.7)
    assert method.limit.tolist() == pytest.approx([2.0, 0.7])
    found = seen_by(method, monkeypatch)
    assert found["reward_transform"] == [1] * 6
    assert found["costs"] == [[0.25, float(t == 1)] for t in range(6)]
    assert method.cost_return.tolist() == [1.0, 1.0] and method.told["outside"].item() == pytest.approx(1 / 6)


def test_the_guardian_alone(monkeypatch):
    method = guarded(cost_limit=-1.0)
    assert seen_by(method, monkeypatch)["costs"] == [[float(t == 1)] for t in range(6)]


def test_the_penalty_lasts_to_the_end_of_the_episode(monkeypatch):
    method = guarded(guardian="penalty")
    found = seen_by(method, monkeypatch)
    assert found["reward_transform"] == [1, -25, -25, -25, 1, 1]
    assert found["costs"] == [[0.25], [1], [1], [1], [0.25], [0.25]]
    assert guarded(guardian="penalty", cost_limit=-1.0).constrained is False


def test_official_costs_never_bind():
    """Costs of -1 keep the cost return below any limit: the step is TRPO's, whatever is violated."""
    for official, binds in ((False, True), (True, False)):
        method = guarded(official_costs=official, cost_limit=0.1, guardian_limit=0.1)
        method.update(guarded_batch())
        assert (method.told["surplus"] > 0).item() is binds
