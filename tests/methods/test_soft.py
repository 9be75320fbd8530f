"""SAC, REDQ, CQL, Cal-QL, IQL and what pre-trains and goes online: each part against hand-computed values, enumeration or an
independent reading of the formula. In float64 unless float32 is the point."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from methods.control.cal_ql import CalQL, returns_to_go
from methods.control.cql import CQL
from methods.control.finetune import FineTune
from methods.control.iql import IQL, expectile_loss
from methods.control.redq import REDQ, subset_minimum
from methods.control.rlpd import RLPD
from methods.control.sac import SAC
from methods.control.wsrl import WSRL
from runner.draws import BLOCK, Draws
from runner.errors import UserError
from runner.interface import Feed, Spec

S, A, B = 3, 2, 10


def close(actual, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def build(cls, seed=0, dtype=torch.float64, **values):
    torch.manual_seed(seed)
    method = cls(cls.Config(**{"hidden": (7, 6), **values}))
    method.setup(Spec(observation_size=S, action_size=A))
    method.to(dtype)
    method.make_optimizers()
    method.draws = Draws(seed)
    return method


def make_batch(rows=B, seed=1, dtype=torch.float64, **more):
    g = torch.Generator().manual_seed(seed)
    return {"observation": torch.randn(rows, S, generator=g, dtype=dtype),
            "action": torch.rand(rows, A, generator=g, dtype=dtype) * 1.8 - 0.9,
            "reward": torch.randn(rows, generator=g, dtype=dtype),
            "terminated": (torch.rand(rows, generator=g) < 0.3).to(dtype),
            "next_observation": torch.randn(rows, S, generator=g, dtype=dtype), **more}


def parameters(*modules):
    return [p.detach().clone() for m in modules for p in m.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- SAC ---------------------------------------------------------------------------------------------------------------
def gaussian_log_prob(actor, observation, action):
    """log pi(a|s) by torch.distributions: another way than the policy's own."""
    from torch.distributions import Independent, Normal, TransformedDistribution
    from torch.distributions.transforms import TanhTransform

    mean, log_std = actor(observation)
    return TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform()]).log_prob(action)


@pytest.mark.parametrize("entropy", [True, False])
def test_sac_target(entropy):
    m, batch = build(SAC, backup_entropy=entropy, temperature=0.3, discount=0.9), make_batch()
    y = m.target(batch)
    action = m.next_action(batch).action
    assert action.abs().max() < 1
    x = (batch["next_observation"], action)
    wanted = torch.stack([m.target_critics(*x)[0][i] for i in range(2)]).min(0).values
    if entropy:
        wanted = wanted - 0.3 * gaussian_log_prob(m.actor, *x)
    close(y, batch["reward"] + 0.9 * (1 - batch["terminated"]) * wanted, rtol=1e-6, atol=1e-6)
    with torch.no_grad():  # there is no target actor: the online one is asked
        m.actor.net[0].weight.add_(1)
    assert not torch.equal(m.target(batch), y)


def test_sac_actor_loss():
    m, batch = build(SAC, temperature=0.5), make_batch()
    sample = m.actor_sample(batch)
    values = m.critics(batch["observation"], sample.action)[0]
    log_prob = gaussian_log_prob(m.actor, batch["observation"], sample.action)
    close(m.actor_loss(batch, sample), (0.5 * log_prob - torch.minimum(values[0], values[1])).mean(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("log_prob", "rises"), [(5.0, True), (-5.0, False)])
def test_temperature_rises_while_entropy_is_below_its_target(log_prob, rises):
    """Target entropy -A: with log pi = 5 the entropy is -5 < -2."""
    from methods.control.base import Sample

    m = build(SAC, temperature_learning_rate=1e-2)
    before = m.temperature().item()
    m.after_actor(make_batch(), Sample(torch.zeros(B, A, dtype=torch.float64), torch.full((B,), log_prob, dtype=torch.float64)))
    assert (m.temperature().item() > before) == rises
    fixed = build(SAC, temperature_learning_rate=0.0)
    fixed.update(make_batch())
    assert fixed.temperature().item() == 1


# -- REDQ --------------------------------------------------------------------------------------------------------------
def shares(number, replacement, critics=4, draws=600):
    """How often each minimum occurs, critic i having value i everywhere."""
    m, values, found = build(REDQ), torch.arange(critics, dtype=torch.float64).unsqueeze(1).expand(critics, B), []
    for m.updates in range(draws):
        least = subset_minimum(m, values, number, replacement)
        assert least.shape == (B,) and (least == least[0]).all()  # one subset for the whole batch
        found.append(int(least[0]))
    return torch.bincount(torch.tensor(found), minlength=critics).double() / draws


@pytest.mark.parametrize("replacement", [False, True])
def test_random_subsets_are_uniform(replacement):
    """Against the enumeration of all pairs, within five standard errors."""
    pairs = list(itertools.product(range(4), repeat=2)) if replacement else list(itertools.permutations(range(4), 2))
    wanted = torch.bincount(torch.tensor([min(p) for p in pairs]), minlength=4).double() / len(pairs)
    assert ((shares(2, replacement) - wanted).abs() <= 5 * (wanted * (1 - wanted) / 600).sqrt()).all()
    assert (wanted[3] > 0) == replacement  # only with replacement can the highest critic be the minimum of two


def test_all_critics_without_a_subset():
    m, values = build(REDQ), torch.randn(5, B)
    for number in (0, 5, 9):
        assert torch.equal(subset_minimum(m, values, number, False), values.amin(0))
    assert not m.draws.held, "nothing needs to be drawn"


def test_redq_is_sac_with_neutral_knobs():
    sac, redq = build(SAC, dtype=torch.float32), build(REDQ, dtype=torch.float32, critics=2, subset=0, critic_steps=1,
                                                       actor_value="min")
    for k in range(15):
        batch = make_batch(32, k, torch.float32)
        for m in (sac, redq):
            m.update(batch)
            m.updates += 1
    assert same(parameters(sac), parameters(redq))


def test_redq_makes_its_critic_steps_one_after_the_other_and_one_actor_step():
    """Three critic steps on thirds of a batch are three updates of SAC's critics with the actor left alone, in order."""
    batch = make_batch(30)
    m, plain = build(REDQ, critics=3, subset=0, critic_steps=3), build(REDQ, critics=3, subset=0, critic_steps=1)
    assert m.batches == 3
    actor = parameters(m.actor)
    for i in range(3):
        plain.part = i  # the numbers that are drawn go by it
        plain.update_critics({k: v[10 * i:10 * i + 10] for k, v in batch.items()})
        plain.update_targets()
    plain.part = 0
    plain.update_actor({k: v[20:] for k, v in batch.items()})  # the last batch
    m.update(batch)
    assert m.part == 0 and same(parameters(m), parameters(plain)) and not same(actor, parameters(m.actor))


def test_redq_actor_takes_the_mean_over_critics():
    m, batch = build(REDQ, critics=5, temperature=0.5), make_batch()
    sample = m.actor_sample(batch)
    values = torch.stack([m.critics(batch["observation"], sample.action)[0][i] for i in range(5)]).mean(0)
    close(m.actor_loss(batch, sample), (0.5 * sample.log_prob - values).mean(), rtol=1e-6)


# -- CQL ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("correct", [True, False])
def test_conservative_term_against_enumeration(correct):
    """Every sampled action valued one by one; densities by torch.distributions."""
    n = 3
    m, batch = build(CQL, sampled_actions=n, conservative_weight=2.0, importance_sampling=correct), make_batch()
    values, features = m.critics(batch["observation"], batch["action"])
    penalty = m.critic_penalty(batch, values, features)
    uniform = m.noise("uniform_actions", (n, B, A), "uniform") * 2 - 1
    total = 0.0
    for critic in range(2):
        for b in range(B):
            terms = []
            s, after = batch["observation"][b:b + 1], batch["next_observation"][b:b + 1]
            for kind, at in (("uniform", None), ("policy_actions", s), ("next_policy_actions", after)):
                for j in range(n):
                    if at is None:
                        action, density = uniform[j, b:b + 1].double(), A * math.log(0.5)
                    else:
                        mean, log_std = m.actor(at)
                        action = torch.tanh(mean + log_std.exp() * m.noise(kind, (n, B, A))[j, b:b + 1])
                        density = gaussian_log_prob(m.actor, at, action).item()
                    value = m.critics(s, action)[0][critic, 0].item()
                    terms.append(value - density if correct else value)
            data = values[critic, b].item()
            if not correct:
                terms.append(data)
            lse = math.log(sum(math.exp(t) for t in terms)) - (0 if correct else math.log(len(terms)))
            total += 2.0 * (lse - data) / B
    assert penalty.item() == pytest.approx(total, rel=1e-6)
    actor_gradient = torch.autograd.grad(penalty, list(m.actor.parameters()), allow_unused=True, retain_graph=True)
    assert all(g is None for g in actor_gradient), "the sampled actions are constants"
    assert torch.autograd.grad(penalty, m.critics.layers[0].weight)[0].abs().sum() > 0


@pytest.mark.parametrize(("gap", "rises"), [(-50.0, True), (50.0, False)])
def test_lagrange_weight_rises_while_the_gap_is_too_large(gap, rises):
    m, batch = build(CQL, lagrange=True, target_gap=gap, multiplier_learning_rate=1e-2, sampled_actions=3), make_batch()
    metrics = m.update(batch)
    assert metrics["multiplier"].item() == 1  # as it was used
    assert (m.log_multiplier.item() > 0) == rises
    held = build(CQL, lagrange=False, sampled_actions=3)
    assert "multiplier" not in held.update(make_batch())


def test_lagrange_penalty_is_measured_from_the_target_gap():
    weights = dict(sampled_actions=3, conservative_weight=2.0)
    plain, bound = build(CQL, **weights), build(CQL, lagrange=True, target_gap=0.7, **weights)
    batch = make_batch()
    values, features = plain.critics(batch["observation"], batch["action"])
    with torch.no_grad():
        bound.log_multiplier.fill_(math.log(3))
    wanted = 3 * (plain.critic_penalty(dict(batch), values, features) - 2.0 * 0.7 * 2)  # two critics
    close(bound.critic_penalty(batch, values, features), wanted)


@pytest.mark.parametrize("entropy", [False, True])
def test_max_target_takes_the_best_of_n_actions_of_the_minimum_of_critics(entropy):
    n = 4
    m = build(CQL, max_target=True, sampled_actions=n, discount=0.9, backup_entropy=entropy, temperature=0.2)
    batch = make_batch()
    y, noise = m.target(batch), m.noise("max_target", (n, B, A))
    for b in range(B):
        s, best = batch["next_observation"][b:b + 1], None
        for j in range(n):
            mean, log_std = m.actor(s)
            action = torch.tanh(mean + log_std.exp() * noise[j, b:b + 1])
            value = m.target_critics(s, action)[0].min().item()
            if best is None or value > best[0]:
                best = value, gaussian_log_prob(m.actor, s, action).item()
        after = best[0] - (0.2 * best[1] if entropy else 0)
        wanted = batch["reward"][b].item() + 0.9 * (1 - batch["terminated"][b].item()) * after
        assert y[b].item() == pytest.approx(wanted, rel=1e-6)


# -- Cal-QL ------------------------------------------------------------------------------------------------------------
def test_returns_to_go_by_hand():
    reward = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    start = torch.tensor([1, 0, 0, 1, 0, 1])           # episodes of 3, 2 and 1 steps
    terminated = torch.tensor([0.0, 0, 0, 0, 1, 0])
    close(returns_to_go(reward, terminated, start, 0.5), [1 + 1 + 1, 2 + 2, 4, 8 + 8, 16, 32])
    inside = torch.tensor([0.0, 1, 0, 0, 0, 0])        # a termination ends an episode also where none begins
    close(returns_to_go(reward, inside, start, 0.5), [1 + 1, 2, 4, 8 + 8, 16, 32])


def test_returns_to_go_against_a_loop():
    g = torch.Generator().manual_seed(0)
    reward, start = torch.randn(777, generator=g), torch.rand(777, generator=g) < 0.02
    start[0] = True
    found, wanted = returns_to_go(reward, torch.zeros(777), start, 0.97), [0.0] * 777
    for t in range(776, -1, -1):
        ends = t == 776 or bool(start[t + 1])
        wanted[t] = reward[t].double().item() + (0 if ends else 0.97 * wanted[t + 1])
    close(found, wanted, rtol=1e-9, atol=1e-9)


def test_calibration_bounds_the_policys_actions_and_not_the_uniform_ones():
    n = 3
    cql, cal = build(CQL, sampled_actions=n), build(CalQL, sampled_actions=n)
    batch = make_batch()
    plain, density = cql.sampled_values(batch)
    returns = plain.detach()[0, n:].mean(0)  # between the values, so that some are bound
    bound, same_density = cal.sampled_values({**batch, "return_to_go": returns})
    assert torch.equal(density, same_density) and torch.equal(bound[:, :n], plain[:, :n])
    wanted = torch.where(plain[:, n:] < returns, returns.expand_as(plain[:, n:]), plain[:, n:])
    assert torch.equal(bound[:, n:], wanted) and 0 < (plain[:, n:] < returns).double().mean() < 1
    gradient, = torch.autograd.grad(bound[:, n:].sum(), cal.critics.layers[-1].bias)
    close(gradient.flatten(), (plain[:, n:] >= returns).double().sum((1, 2)))  # a bound value passes none


def test_cal_ql_needs_to_know_where_episodes_begin():
    with pytest.raises(UserError, match="start"):
        build(CalQL).prepare(make_batch())
    data = {**make_batch(), "start": torch.ones(B)}
    assert torch.equal(build(CalQL).prepare(data)["return_to_go"], data["reward"])  # one-step episodes
    assert build(CalQL, calibrated=False).prepare(make_batch()) is None


# -- IQL ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_expectile_loss_is_least_at_the_expectile(tau):
    """In closed form for two values 0 and 1 of equal weight: (1 - tau) e = tau (1 - e), so e = tau."""
    e = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    data = torch.tensor([0.0, 1.0], dtype=torch.float64)
    gradient = lambda at: torch.autograd.grad(expectile_loss(data - at, tau), at)[0].item()  # noqa: E731
    assert abs(gradient(torch.tensor(tau, dtype=torch.float64, requires_grad=True))) < 1e-12
    assert (gradient(e) < 0) == (tau > 0.3)
    close(expectile_loss(data - e.detach(), 0.5), 0.5 * (data - 0.3).square().mean())


def test_iql_losses_by_hand():
    m, batch = build(IQL, expectile=0.7, inverse_temperature=2.0, weight_limit=1.5, discount=0.9), make_batch()
    s, a = batch["observation"], batch["action"]
    v, after = m.value(s).squeeze(-1).tolist(), m.value(batch["next_observation"]).squeeze(-1).tolist()
    q, q_target = m.critics(s, a)[0].tolist(), m.target_critics(s, a)[0].tolist()
    mean, log_std = m.actor.mode(s), m.actor.log_std
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(a).sum(-1).tolist()
    l_v = l_q = l_pi = 0.0
    for b in range(B):
        u = min(q_target[0][b], q_target[1][b]) - v[b]
        l_v += (0.7 if u > 0 else 0.3) * u * u / B
        y = batch["reward"][b].item() + 0.9 * (1 - batch["terminated"][b].item()) * after[b]  # V from before its step
        l_q += ((q[0][b] - y) ** 2 + (q[1][b] - y) ** 2) / 2 / B
        l_pi -= min(math.exp(2 * u), 1.5) * log_prob[b] / B
    metrics = m.update(batch)
    assert metrics["value_loss"].item() == pytest.approx(l_v, rel=1e-9)
    assert metrics["critic_loss"].item() == pytest.approx(l_q, rel=1e-9)
    assert metrics["actor_loss"].item() == pytest.approx(l_pi, rel=1e-9)


def test_the_actors_rate_falls_by_a_cosine_and_stays_at_nothing():
    m, seen = build(IQL, decay_steps=8, learning_rate=1e-2), []
    for k in range(10):
        m.update(make_batch(seed=k))
        seen.append(float(m.optimizers["actor"].param_groups[0]["lr"]))
    assert seen == pytest.approx([0.005 * (1 + math.cos(math.pi * min(k, 8) / 8)) for k in range(10)], abs=1e-9)
    assert m.optimizers["critics"].param_groups[0]["lr"] == 1e-2
    before = parameters(m.actor)
    m.update(make_batch())
    assert same(before, parameters(m.actor))


def test_the_actors_rate_survives_loading_an_optimisers_state():
    m, other = build(IQL, decay_steps=8), build(IQL, decay_steps=8)
    for k in range(3):
        m.update(make_batch(seed=k))
    other.load_state_dict(m.state_dict())
    for name, optimizer in other.optimizers.items():
        optimizer.load_state_dict(copy.deepcopy(m.optimizers[name].state_dict()))
    for one in (m, other):
        one.update(make_batch(seed=9))
    assert same(parameters(m), parameters(other)) and m.actor_rate.rate == other.actor_rate.rate


# -- pre-training, then online -----------------------------------------------------------------------------------------
SMALL = {"sampled_actions": 3, "critics": 4, "critic_steps": 2, "offline_updates": 3}


def test_phases():
    m = build(WSRL, warmup=50, retained=0.25, **SMALL)
    feeds = []
    for m.updates in range(6):
        feeds.append((m.stage(), m.batches, m.feed()))
    offline, online = (0, 1, Feed()), (1, 2, Feed(steps=1, stored=0.25))
    assert feeds == [offline] * 3 + [(1, 2, Feed(steps=50, stored=0.25))] + [online] * 2
    m = build(WSRL, warmup=50, warmup_source="stored", **SMALL)
    m.updates = 3
    assert m.feed() == Feed(steps=1, stored=0.0, copied=50)
    m = build(FineTune, **SMALL)
    m.updates = 3
    assert m.feed() == build(WSRL, warmup=0, **SMALL).feed()._replace(steps=1, stored=0.0)
    m = build(RLPD, offline_ratio=0.4)
    assert m.feed() == Feed(steps=1, stored=0.4, start=True)
    m.updates = 1
    assert m.feed() == Feed(steps=1, stored=0.4)


def test_the_switch_keeps_networks_temperature_and_adams_moments():
    """The first online update goes on from the last offline one: Adam's step counts and moments carry over."""
    m = build(FineTune, **SMALL)
    for k in range(3):
        m.update(make_batch(seed=k))
        m.updates += 1
    saved = {n: {k: v.clone() for k, v in next(iter(o.state.values())).items()} for n, o in m.optimizers.items()}
    before = parameters(m.actor, m.critics, m.target_critics)
    m.update(make_batch(20, seed=3))
    steps = {n: float(next(iter(o.state.values()))["step"]) for n, o in m.optimizers.items()}
    assert {n: float(s["step"]) for n, s in saved.items()} == {n: 3.0 for n in steps}
    assert steps == {"actor": 4.0, "critics": 5.0, "temperature": 4.0}  # two critic steps, one of actor and temperature
    moments = next(iter(m.optimizers["actor"].state.values()))["exp_avg"]
    own = next(iter(m.actor.parameters())).grad
    close(moments, 0.9 * saved["actor"]["exp_avg"] + 0.1 * own)
    moved = [(a - b).abs().max().item() for a, b in zip(before, parameters(m.actor, m.critics, m.target_critics), strict=True)]
    assert max(moved) < 0.1  # nothing was drawn anew


def test_online_updates_have_no_conservative_term_no_entropy_in_the_target_and_one_actor_step_on_all_batches():
    m = build(FineTune, temperature=0.3, discount=0.9, subset=0, **SMALL)
    m.updates = 3
    batch = make_batch(20)
    values, features = m.critics(batch["observation"], batch["action"])
    assert m.critic_penalty(batch, values, features) is None
    action = m.next_action(batch).action
    after = m.target_critics(batch["next_observation"], action)[0].amin(0)
    close(m.target(batch), batch["reward"] + 0.9 * (1 - batch["terminated"]) * after)
    seen = []
    loss = m.actor_loss
    m.actor_loss = lambda b, sample: (seen.append((len(b["reward"]), sample)), loss(b, sample))[1]
    m.update(batch)
    assert [rows for rows, _ in seen] == [20]
    sample = m.actor_sample(batch)
    least = m.critics(batch["observation"], sample.action)[0].amin(0)
    close(loss(batch, sample), (m.temperature() * sample.log_prob - least).mean())  # the minimum over all four
    kept = build(FineTune, online_loss="cql", **SMALL)
    kept.updates = 3
    assert kept.critic_penalty(batch, values, features) is not None
    offline = build(FineTune, **SMALL)
    assert offline.critic_penalty(batch, values, features) is not None and offline.maximises


@pytest.mark.parametrize("form", ["softplus", "exp"])
def test_temperature_forms(form):
    m = build(FineTune, temperature=0.7, temperature_form=form, **SMALL)
    assert m.temperature().item() == pytest.approx(0.7, rel=1e-6)
    with torch.no_grad():
        m.log_temperature.add_(1)
    moved = m.log_temperature.detach()
    close(m.temperature(), F.softplus(moved) if form == "softplus" else moved.exp())


def test_online_critic_steps_draw_numbers_of_their_own():
    m = build(FineTune, **SMALL)
    m.updates = 3
    drawn = {}
    for part in range(2):
        m.part = part
        drawn[part] = m.noise("next", (B, A)).clone()
    m.part = 0
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(m.noise("next", (B, A)), drawn[0]) and m.updates < BLOCK
