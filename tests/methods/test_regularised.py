"""td3_bc, prdc, a2pr, beer, dr3, infer, ten_percent_bc, dice: formulas against plain computation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from methods.control.a2pr import A2PR
from methods.control.base import Sample
from methods.control.bc import BC
from methods.control.beer import BEER
from methods.control.dr3 import DR3
from methods.control.infer import InFeR
from methods.control.neighbours import Neighbours
from methods.control.odice import ODice
from methods.control.prdc import PRDC
from methods.control.sdice import SDice
from methods.control.td3_bc import TD3BC
from methods.control.ten_percent_bc import TenPercentBC, best_episodes
from runner.interface import Spec

S, A, B = 4, 2, 12


def build(cls, seed=0, **knobs):
    torch.manual_seed(seed)
    method = cls(cls.Config(**{"hidden": (8, 7), **knobs}))
    method.setup(Spec(observation_size=S, action_size=A))
    method.double()
    method.make_optimizers()
    return method


def make_batch(seed=1, rows=B):
    g = torch.Generator().manual_seed(seed)
    n = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {"observation": n(rows, S), "action": n(rows, A).tanh(), "reward": n(rows), "next_observation": n(rows, S),
            "terminated": (n(rows) > 1).double()}


def flat(method, name):
    return torch.cat([p.grad.flatten() for p in method.optimizers[name].param_groups[0]["params"]])


# -- TD3+BC ---------------------------------------------------------------------------------------------------------------
def test_td3_bc_scales_the_value_and_adds_the_distance():
    m, batch = build(TD3BC, alpha=2.0, anchor_weight=3.0), make_batch()
    action = m.actor(batch["observation"])
    q = m.critics.first(batch["observation"], action)
    expected = -2.0 / q.detach().abs().mean() * q.mean()
    assert m.actor_loss(batch, Sample(action)).item() == pytest.approx(expected.item(), rel=1e-12)
    assert m.actor_penalty(batch, Sample(action)).item() == pytest.approx(
        3.0 * nn.functional.mse_loss(action, batch["action"]).item(), rel=1e-12)
    gradient = torch.autograd.grad(m.actor_loss(batch, Sample(action)), action, retain_graph=True)[0]
    plain = torch.autograd.grad(-q.mean(), action)[0]
    torch.testing.assert_close(gradient, plain * 2.0 / q.detach().abs().mean())  # none through lambda


def test_a_policy_with_no_value_does_not_divide_by_zero():
    m, batch = build(TD3BC), make_batch()
    for p in m.critics.parameters():
        nn.init.zeros_(p)
    assert math.isfinite(m.actor_loss(batch, Sample(m.actor(batch["observation"]))).item())


# -- PRDC -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_are_those_of_exhaustive_search(k):
    g = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(5000, 9, generator=g), torch.randn(40, 9, generator=g)
    rows[2500] = rows[7]
    queries[0] = rows[7]
    found = Neighbours(rows).nearest(queries, k)
    exact = ((queries[:, None].double() - rows[None].double()) ** 2).sum(-1)
    assert torch.equal(exact.gather(1, found).sort(1).values, exact.topk(k, largest=False).values)
    assert found[0, 0] == 7 and found.shape == (40, k)


def test_neighbours_across_chunks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(1000, 3, generator=g), torch.randn(3_000, 3, generator=g)  # 666 rows a chunk
    exact = torch.cdist(queries.double(), rows.double())
    assert torch.equal(Neighbours(rows).nearest(queries, 4), exact.topk(4, largest=False).indices)


def test_prdc_anchors_at_the_nearest_pairs_action():
    data, batch = make_batch(seed=5, rows=300), make_batch()
    m = build(PRDC, beta=0.7, normalise_observations=False)
    m.prepare(data)
    action = m.actor(batch["observation"])
    anchor, weight = m.anchor(batch, Sample(action))
    assert weight is None and not anchor.requires_grad
    for i in range(B):
        distance = (0.7 * (data["observation"] - batch["observation"][i])).square().sum(1) + \
            (data["action"] - action[i]).square().sum(1)
        assert torch.equal(anchor[i], data["action"][distance.argmin()])


def test_prdc_with_a_heavy_state_is_td3_bc():
    """Queries at the data's own states: a large beta finds the state itself, and so the logged action."""
    data = make_batch(seed=5, rows=300)
    m = build(PRDC, beta=1e4, normalise_observations=False)
    m.prepare(data)
    batch = {k: v[:B] for k, v in data.items()}
    assert torch.equal(m.anchor(batch, Sample(m.actor(batch["observation"])))[0], batch["action"])


# -- A2PR -------------------------------------------------------------------------------------------------------------------
def test_a2pr_takes_the_better_action_where_one_is_advantageous():
    m, batch = build(A2PR, vae_hidden=(6,)), make_batch()
    m.draws.device = torch.device("cpu")
    action = m.actor(batch["observation"])
    with torch.no_grad():
        batch["q"] = m.critics.first(batch["observation"], batch["action"])
        batch["v"] = batch["q"].median().expand(B).clone()
        noise = m.noise("anchor", (B, 2 * A)).double()
        made, _ = m.vae(batch["observation"], action, noise)
        q_made = m.critics.first(batch["observation"], made)
    anchor, weight = m.anchor(batch, Sample(action))
    for i in range(B):
        assert torch.allclose(anchor[i], made[i] if q_made[i] >= batch["q"][i] else batch["action"][i])
        assert weight[i] == float(q_made[i] >= batch["v"][i] or batch["q"][i] > batch["v"][i])
    assert not anchor.requires_grad
    m = build(A2PR, vae_hidden=(6,), detach_anchor=False, masked=False)
    batch["q"] = batch["v"] = torch.zeros(B, dtype=torch.float64)
    assert m.anchor(batch, Sample(m.actor(batch["observation"])))[0].requires_grad


def test_a2pr_trains_its_vae_on_advantageous_actions_only():
    m, batch = build(A2PR, vae_hidden=(6,), vae_learning_rate=0.0), make_batch()
    m.target(batch)
    told = m.update_models(batch)
    kept = (batch["q"] > batch["v"]).double()
    again, divergence = m.vae(batch["observation"], batch["action"], m.noise("vae", (B, 2 * A)).double())
    expected = (kept[:, None] * (again - batch["action"]).square()).mean() + 0.5 * divergence.mean()
    assert told["vae_loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert 0 < kept.mean() < 1


def test_the_vaes_divergence_is_a_gaussians():
    m = build(A2PR, vae_hidden=(6,))
    batch = make_batch()
    mean, log_std = m.vae.encoder(torch.cat([batch["observation"], batch["action"]], -1)).chunk(2, -1)
    _, divergence = m.vae(batch["observation"], batch["action"], torch.zeros(B, 2 * A, dtype=torch.float64))
    p = torch.distributions.Normal(mean, log_std.exp())
    q = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(divergence, torch.distributions.kl_divergence(p, q).mean(-1))


# -- BEER, DR3, InFeR ---------------------------------------------------------------------------------------------------------
def test_beers_bound_holds_with_equality_for_consistent_pairs():
    """If w.phi - gamma w.phi' = r and phi - gamma phi' is parallel to w, the cosine is the bound itself."""
    m = build(BEER, discount=0.9)
    w = m.critics.layers[-1].weight.flatten().detach()
    after = torch.randn(5, w.numel(), dtype=torch.float64)
    step = torch.randn(5, 1, dtype=torch.float64)
    phi = 0.9 * after + step * w
    reward = phi @ w - 0.9 * after @ w
    bound = m.bound(phi[None], after[None], after[None], reward[None])
    torch.testing.assert_close(bound[0], nn.functional.cosine_similarity(phi, after, -1))
    looser = m.bound(phi[None], after[None], after[None], 0.5 * reward[None])
    assert (looser > bound).all()


def test_beer_penalises_the_excess_and_leaves_terminal_pairs_out():
    m, batch = build(BEER, rank_weight=2.0, critics=1), make_batch()
    batch["reward"] = 5 * batch["reward"]
    values, features = m.critics(batch["observation"], batch["action"])
    penalty = m.critic_penalty(batch, values, features)
    after = m.target_critics(batch["next_observation"], m.next_action(batch).action)[1]
    weight, gamma, total = m.critics.layers[-1].weight.square().sum(), 0.99, 0.0
    for i in range(B):
        phi, nxt, r = features[0, i], after[0, i], batch["reward"][i]
        upper = (phi @ phi + gamma ** 2 * nxt @ nxt - r ** 2 / weight) / (2 * gamma * phi.norm() * nxt.norm())
        excess = (phi @ nxt / (phi.norm() * nxt.norm()) - upper).clamp(min=0)
        total += excess * (1 - batch["terminated"][i])
    assert penalty.item() == pytest.approx(2.0 * total.item() / B, rel=1e-9) and total > 0
    assert m.critics.layers[-1].bias.abs().sum() == 0 and not m.critics.layers[-1].bias.requires_grad
    gradient = torch.autograd.grad(penalty, m.critics.layers[-1].weight, allow_unused=True)[0]
    assert gradient is None  # nothing through ||w||


def test_beer_is_inactive_where_rewards_are_small():
    m, batch = build(BEER), make_batch()
    batch["reward"] = 1e-4 * batch["reward"]
    values, features = m.critics(batch["observation"], batch["action"])
    assert m.critic_penalty(batch, values, features).item() == 0 and batch["active"] == 0


def test_beers_last_layer_keeps_no_bias_through_updates():
    m = build(BEER, rank_weight=1.0)
    for i in range(3):
        m.update(make_batch(i))
        m.updates += 1
    assert m.critics.layers[-1].bias.abs().sum() == 0 == m.target_critics.layers[-1].bias.abs().sum()
    assert all(p.requires_grad == (p is not m.critics.layers[-1].bias) for p in m.critics.parameters())


@pytest.mark.parametrize("detach", [False, True])
def test_dr3_adds_the_dot_product(detach):
    m, batch = build(DR3, feature_weight=0.5, detach_next=detach), make_batch()
    values, features = m.critics(batch["observation"], batch["action"])
    after = m.critics(batch["next_observation"], m.target_actor(batch["next_observation"]))[1]
    expected = 0.5 * (features[0] * (after.detach() if detach else after)[0]).sum(-1).mean()
    penalty = m.critic_penalty(batch, values, features)
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)
    layer = m.critics.layers[0].weight
    torch.testing.assert_close(torch.autograd.grad(penalty, layer, retain_graph=True)[0],
                               torch.autograd.grad(expected, layer)[0])


def test_infer_holds_heads_to_their_scaled_beginning():
    m, batch = build(InFeR, feature_weight=0.3, heads=4, head_scale=10.0), make_batch()
    values, features = m.critics(batch["observation"], batch["action"])
    says = m.heads(features)[0]
    expected = 0.3 * ((says - 10.0 * says) ** 2).mean(0).sum()  # nothing has moved yet
    assert m.critic_penalty(batch, values, features).item() == pytest.approx(expected.item(), rel=1e-12)
    before = m.heads.weight.clone(), m.initial_heads.weight.clone()
    m.update(batch)
    assert not torch.equal(m.heads.weight, before[0]) and torch.equal(m.initial_heads.weight, before[1])


# -- behaviour cloning ----------------------------------------------------------------------------------------------------------
def test_bc_is_maximum_likelihood():
    m, batch = build(BC), make_batch()
    with torch.no_grad():
        m.actor.log_std.copy_(torch.tensor([-0.3, 0.2]))
    normal = torch.distributions.Normal(m.actor.mode(batch["observation"]), m.actor.log_std.exp())
    assert m.actor_loss(batch).item() == pytest.approx(-normal.log_prob(batch["action"]).sum(-1).mean().item(), rel=1e-12)
    m = build(BC, deterministic=True)
    assert m.actor_loss(batch).item() == pytest.approx(
        nn.functional.mse_loss(m.actor.mode(batch["observation"]), batch["action"]).item(), rel=1e-12)


def test_the_best_tenth_of_episodes_is_kept():
    lengths, rewards = [3, 1, 4, 2] * 5, []
    start = torch.cat([torch.tensor([1.0] + [0.0] * (n - 1)) for n in lengths])
    for i, n in enumerate(lengths):
        rewards += [float(i)] * n
    data = {"start": start, "reward": torch.tensor(rewards)}
    kept = best_episodes(data, 0.1)
    returns = [i * n for i, n in enumerate(lengths)]
    best = sorted(range(20), key=lambda i: -returns[i])[:2]
    assert sorted(set((torch.cumsum(start, 0) - 1)[kept].long().tolist())) == sorted(best)
    assert best_episodes({"start": torch.tensor([1.0, 0.0]), "reward": torch.zeros(2)}, 0.1).all()  # one at least
    m = build(TenPercentBC, kept=0.1)
    out = m.prepare({**data, "observation": torch.randn(len(start), S), "next_observation": torch.randn(len(start), S)})
    assert len(out["observation"]) == int(kept.sum())


def test_normalisation_is_folded_into_the_export():
    m = build(TD3BC)
    data = {**make_batch(3, 50)}
    out = m.prepare(data)
    torch.testing.assert_close(out["observation"], (data["observation"] - data["observation"].mean(0))
                               / (data["observation"].std(0, correction=0) + 1e-3), rtol=1e-6, atol=1e-6)
    tensors, description = m.export()
    net = nn.Sequential(nn.Linear(S, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, A), nn.Tanh()).double()
    net.load_state_dict(tensors)
    torch.testing.assert_close(net(data["observation"]), m.act(data["observation"], explore=False), rtol=1e-6, atol=1e-7)
    assert description["sizes"] == f"{S},8,7,{A}"


# -- DICE ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("divergence", ["chi2", "kl"])
def test_the_conjugate_is_the_supremum(divergence):
    """f*(y) = sup_{w >= 0} w y - f(w), by a grid over w."""
    m = build(SDice, divergence=divergence, value_hidden=(5,))
    w = torch.linspace(0, 30, 300_001, dtype=torch.float64)
    f = (w - 1).square() if divergence == "chi2" else w * w.clamp(min=1e-300).log()
    for y in (-5.0, -2.0, -0.5, 0.0, 1.0, 3.0):
        assert m.conjugate(torch.tensor(y, dtype=torch.float64)).item() == pytest.approx((w * y - f).max().item(), abs=1e-4)


def test_the_semi_gradient_is_autograds_with_next_values_fixed():
    m, batch = build(SDice, value_hidden=(5,)), make_batch()
    gradients, _ = m.value_gradient(batch)
    c, value = m.config, m.value(batch["observation"])[0]
    after = m.target_value(batch["next_observation"])[0].amin(0).detach()
    residual = batch["reward"] + 0.99 * (1 - batch["terminated"]) * after - value
    w = (residual / 2 + 1).clamp(min=0)
    loss = (1 - c.conservatism) * value.mean() + c.conservatism * (residual * w - (w - 1) ** 2).mean()
    for ours, theirs in zip(gradients, torch.autograd.grad(loss, list(m.value.parameters()))):
        torch.testing.assert_close(ours, theirs)
    weight = m.weight(batch)
    torch.testing.assert_close(weight, residual.detach().clamp(0, 100).mean(0))


def test_the_added_gradient_is_orthogonal_to_the_forward_one():
    m, batch = build(ODice, value_hidden=(5,)), make_batch()
    c = m.config
    g, told = m.value_gradient(batch)
    parameters = list(m.value.parameters())
    residual, value = m.forward_residual(batch)
    forward = torch.autograd.grad(c.conservatism * m.conjugate(residual).mean(), parameters, retain_graph=True)
    plain = torch.autograd.grad((1 - c.conservatism) * value.mean(), parameters)
    added = [a - b - f for a, b, f in zip(g, plain, forward)]
    along = sum((x * f).sum() for x, f in zip(added, forward))
    size = math.sqrt(sum(x.square().sum() for x in added) * sum(f.square().sum() for f in forward))
    assert abs(along) < 1e-10 * size and size > 0
    assert told["cancellation"] >= 1 and -1 <= told["cosine"] <= 1


def test_the_full_gradient_is_the_objectives_own():
    m, batch = build(ODice, value_hidden=(5,), gradient="full"), make_batch()
    g, _ = m.value_gradient(batch)
    c, value = m.config, m.value(batch["observation"])[0]
    residual = batch["reward"] + 0.99 * (1 - batch["terminated"]) * m.value(batch["next_observation"])[0] - value
    loss = (1 - c.conservatism) * value.mean() + c.conservatism * m.conjugate(residual).mean()
    for ours, theirs in zip(g, torch.autograd.grad(loss, list(m.value.parameters()))):
        torch.testing.assert_close(ours, theirs)


def test_returns_are_scaled_to_their_span():
    m = build(SDice, value_hidden=(5,))
    data = {**make_batch(2, 6), "start": torch.tensor([1.0, 0, 0, 1, 0, 0]), "reward": torch.tensor([1.0, 1, 1, 0, 1, 0])}
    assert m.prepare(data)["reward"].tolist() == pytest.approx([500.0, 500, 500, 0, 500, 0])
    assert build(SDice, value_hidden=(5,), imitate=True).prepare(data)["reward"].abs().sum() == 0
