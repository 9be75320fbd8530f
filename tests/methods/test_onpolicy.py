"""The on-policy base and its optimisers, against plain loops, closed forms and brute force. In float64 where it is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Normal, kl_divergence

from envs.control.rollouts import Rollouts
from methods.control.a2c import A2C
from methods.control.cpo import CPO, dual
from methods.control.onpolicy import gae, running_sum
from methods.control.ppo import PPO
from methods.control.ppo_lagrangian import PPOLagrangian
from methods.control.stochastic import Categorical, Gaussian, Running
from methods.control.trpo import TRPO, conjugate_gradients, flat
from runner.interface import Spec

S, A, T, N = 3, 2, 12, 4


def close(actual, expected, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def build(cls=PPO, spec=None, seed=0, **values):
    """A method as the loop makes it, small and in float64."""
    torch.manual_seed(seed)
    method = cls(cls.Config(**{"hidden": (7, 6), "minibatches": 2, "epochs": 2, **values}))
    method.setup(spec or Spec(observation_size=S, action_size=A, costs=1))
    method.double()
    method.make_optimizers()
    return method


def rollout(method=None, steps=T, copies=N, seed=1, ends=0.2, actions=None):
    g = torch.Generator().manual_seed(seed)
    real = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    ended = (torch.rand(steps, copies, generator=g) < ends).double()
    terminated = ended * (torch.rand(steps, copies, generator=g) < 0.5)
    action = torch.randint(actions, (steps, copies), generator=g) if actions else real(steps, copies, A)
    return {"observation": real(steps, copies, S), "next_observation": real(steps, copies, S), "action": action,
            "reward": real(steps, copies), "cost": real(steps, copies, 1).abs(), "terminated": terminated, "ended": ended}


# -- advantages --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("channels", [(), (3,)])
def test_gae_is_the_sum_over_the_rest_of_the_episode(channels):
    """A_t = sum_k (gamma lambda)^k delta_{t+k} up to the episode's end, written out for every copy on its own."""
    g, gamma, trace = torch.Generator().manual_seed(0), 0.9, 0.7
    batch = rollout()
    reward, value, after = (torch.randn(T, N, *channels, generator=g, dtype=torch.float64) for _ in range(3))
    ends = [batch[k].reshape(T, N, *[1] * len(channels)) for k in ("terminated", "ended")]
    found = gae(reward, value, after, *ends, gamma, trace)
    for i in range(N):
        for t in range(T):
            total, factor = 0.0, 1.0
            for k in range(t, T):
                total = total + factor * (reward[k, i] + gamma * (1 - batch["terminated"][k, i]) * after[k, i] - value[k, i])
                factor *= gamma * trace
                if batch["ended"][k, i]:
                    break
            close(found[t, i], total)


def test_an_episode_cut_by_time_goes_on_in_the_value_of_its_last_observation():
    one = torch.ones(1, 1, dtype=torch.float64)
    cut = gae(2 * one, 3 * one, 5 * one, 0 * one, one, 0.9, 0.95)
    over = gae(2 * one, 3 * one, 5 * one, one, one, 0.9, 0.95)
    close(cut, [[2 + 0.9 * 5 - 3]])
    close(over, [[2.0 - 3]])


def test_running_sums_start_anew_after_an_end_and_carry_over():
    g = torch.Generator().manual_seed(0)
    x, ended = torch.randn(20, 2, generator=g), (torch.rand(20, 2, generator=g) < 0.3).float()
    whole, last = running_sum(x, ended, torch.zeros(2), 0.9)
    first, carried = running_sum(x[:7], ended[:7], torch.zeros(2), 0.9)
    second, again = running_sum(x[7:], ended[7:], carried, 0.9)
    assert torch.equal(whole, torch.cat([first, second])) and torch.equal(last, again)
    for i in range(2):
        total = 0.0
        for t in range(20):
            total = x[t, i].item() + 0.9 * total
            assert whole[t, i].item() == pytest.approx(total, abs=1e-5)
            total *= 1 - ended[t, i].item()


def test_running_statistics_are_those_of_all_rows():
    torch.manual_seed(0)
    running, rows = Running(3).double(), torch.randn(600, 3, dtype=torch.float64) * 3 + 2
    running.count.zero_()  # it starts with a thousandth of a row, at mean 0 and variance 1
    for part in rows.split([1, 100, 499]):
        running.see(part)
    close(running.mean, rows.mean(0))
    close(running.var, rows.var(0, correction=0))
    close(running(rows), ((rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-8).sqrt()).clamp(-10, 10))
    assert running(torch.full((1, 3), 1e6, dtype=torch.float64)).max() == 10


# -- policies ----------------------------------------------------------------------------------------------------------
def test_gaussian_policy_against_torch():
    torch.manual_seed(0)
    p, q = Gaussian(S, (5,), A, -0.3).double(), Gaussian(S, (5,), A, 0.4).double()
    seen, action = torch.randn(9, S, dtype=torch.float64), torch.randn(9, A, dtype=torch.float64)
    dp, dq = p(seen), q(seen)
    tp, tq = (Normal(m, s.exp()) for m, s in (dp, dq))
    close(p.log_prob(dp, action), tp.log_prob(action).sum(-1))
    close(p.entropy(dp), tp.entropy().sum(-1))
    close(p.kl(dp, dq), kl_divergence(tp, tq).sum(-1))
    assert torch.equal(p.mode(dp), dp[0])
    assert dp[1].untyped_storage().data_ptr() != p.log_std.untyped_storage().data_ptr()  # fsdp frees the parameter
    draws = p.sample(tuple(x[:1].expand(40_000, -1) for x in dp))
    assert (draws.mean(0) - dp[0][0]).abs().max() < 0.03 and (draws.std(0) / math.exp(-0.3) - 1).abs().max() < 0.03


def test_categorical_policy_against_torch():
    torch.manual_seed(0)
    p, q = Categorical(S, (5,), 4).double(), Categorical(S, (5,), 4).double()
    for net in (p.net, q.net):
        torch.nn.init.normal_(net[-1].weight)
    seen, action = torch.randn(9, S, dtype=torch.float64), torch.randint(4, (9,))
    dp, dq = p(seen), q(seen)
    tp, tq = (TorchCategorical(logits=d[0]) for d in (dp, dq))
    close(p.log_prob(dp, action), tp.log_prob(action))
    close(p.entropy(dp), tp.entropy())
    close(p.kl(dp, dq), kl_divergence(tp, tq))
    draws = p.sample((dp[0][:1].expand(40_000, -1),))
    assert (torch.bincount(draws, minlength=4) / 40_000 - dp[0][0].exp()).abs().max() < 0.01
    assert torch.equal(p.mode(dp), dp[0].argmax(-1))


def test_networks_start_orthogonal_with_the_usual_gains():
    method = build(hidden=(64, 64))
    for net, last in ((method.policy.net, 0.01), (method.value, 1.0)):
        layers = [m for m in net if isinstance(m, torch.nn.Linear)]
        for layer, gain in zip(layers, (2 ** 0.5, 2 ** 0.5, last)):
            assert torch.linalg.svdvals(layer.weight.float()).sub(gain).abs().max() < 1e-5 * max(1, gain)
            assert not layer.bias.any()


# -- losses ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [0.1, 0.3])
def test_ppo_losses_by_hand(clip):
    method = build(clip=clip)
    mini = {"advantage": torch.tensor([2.0, 2.0, -1.0, -1.0]), "value": torch.zeros(4),
            "return": torch.tensor([1.0, -1.0, 0.05, 2.0])}
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5])
    # positive advantages: a large ratio is cut, a small one is not; negative ones the other way round
    wanted = -(2 * (1 + clip) + 2 * 0.5 - 1.5 - (1 - clip)) / 4
    assert method.policy_loss(mini, ratio).item() == pytest.approx(wanted)
    value = torch.tensor([0.8, 0.8, 0.0, -0.5])
    wanted = 0.0
    for v, r in zip(value.tolist(), mini["return"].tolist()):
        near = max(-clip, min(clip, v))
        wanted += 0.5 * max((v - r) ** 2, (near - r) ** 2) / 4
    assert method.value_loss(mini, value).item() == pytest.approx(wanted, rel=1e-6)
    assert build(clip=0.0).policy_loss(mini, ratio).item() == pytest.approx(-(2 * 1.5 + 2 * 0.5 - 1.5 - 0.5) / 4)


def test_ppo_defaults_are_the_sheets():
    c = PPO.Config()
    assert (c.clip, c.epochs, c.minibatches, c.discount, c.trace, c.learning_rate, c.hidden) == (
        0.2, 10, 32, 0.99, 0.95, 3e-4, (64, 64))
    assert (c.entropy_weight, c.value_weight, c.gradient_norm, c.anneal, c.clip_values) == (0.0, 0.5, 0.5, True, True)
    assert build().optimizers["networks"].defaults["eps"] == 1e-5


def test_a2c_with_one_pass_is_the_policy_gradient():
    """One epoch, one minibatch: the gradient is that of -mean A log pi + c_v 0.5 mean (V - R)^2, by autograd on a copy."""
    method = build(A2C, epochs=1, minibatches=1, gradient_norm=0.0, normalise_advantages=False, scale_rewards=False,
                   normalise_observations=False)
    batch = rollout()
    data = method.assess(batch)
    log_prob = method.policy.log_prob(method.policy(data["seen"]), data["action"])
    value = method.value(data["seen"]).squeeze(-1)
    loss = -(data["advantage"] * log_prob).mean() + 0.25 * (value - data["return"]).square().mean()
    parameters = [*method.policy.parameters(), *method.value.parameters()]
    wanted = torch.autograd.grad(loss, parameters)
    method.update(batch)
    for p, g in zip(parameters, wanted):
        close(p.grad, g)


def test_learning_rate_falls_to_zero_over_the_planned_updates():
    method = build(learning_rate=0.1)
    method.planned = 4
    for k in range(4):
        method.update(rollout(seed=k))
        assert method.optimizers["networks"].param_groups[0]["lr"] == pytest.approx(0.1 * (1 - k / 4))
        method.updates += 1


def test_rewards_are_divided_by_the_deviation_of_their_discounted_sum():
    method = build(normalise_observations=False)
    method.returns.count.zero_()
    batch, other = rollout(seed=1), rollout(seed=2)
    sums, carried = running_sum(batch["reward"], batch["ended"], torch.zeros(N, dtype=torch.float64), 0.99)
    close(method.scaled(batch["reward"], batch["ended"]), batch["reward"] / sums.var(correction=0).add(1e-8).sqrt())
    more, _ = running_sum(other["reward"], other["ended"], carried, 0.99)
    both = torch.cat([sums, more])
    close(method.scaled(other["reward"], other["ended"]), other["reward"] / both.var(correction=0).add(1e-8).sqrt())


def test_observations_are_normalised_by_earlier_rollouts_only():
    method = build()
    method.seen.count.zero_()
    first, second = rollout(seed=1), rollout(seed=2)
    close(method.assess(first)["seen"], first["observation"].flatten(0, 1), rtol=1e-7)
    method.update(first)
    rows = first["observation"].flatten(0, 1)
    wanted = (second["observation"].flatten(0, 1) - rows.mean(0)) / (rows.var(0, correction=0) + 1e-8).sqrt()
    close(method.assess(second)["seen"], wanted, rtol=1e-7)


def test_a_rollout_of_few_rows_is_cut_into_fewer_parts():
    method = build(minibatches=1000)
    sizes = [len(m["value"]) for m in method.minibatches(method.assess(rollout()))]
    assert min(sizes) >= 2 and sum(sizes) == 2 * T * N


# -- TRPO --------------------------------------------------------------------------------------------------------------
def test_conjugate_gradients_solve():
    torch.manual_seed(0)
    m = torch.randn(8, 8, dtype=torch.float64)
    m, b = m @ m.T + torch.eye(8), torch.randn(8, dtype=torch.float64)
    close(conjugate_gradients(lambda v: m @ v, b, 20), torch.linalg.solve(m, b), rtol=1e-7)


def test_trpo_step_on_a_quadratic_is_the_closed_form():
    """min g^T x with x^T H x / 2 <= delta: x = -sqrt(2 delta / g^T H^-1 g) H^-1 g; it lies on the ball."""
    torch.manual_seed(0)
    m = torch.randn(6, 6, dtype=torch.float64)
    h, g, delta = m @ m.T + torch.eye(6), torch.randn(6, dtype=torch.float64), 0.03
    x = build(TRPO, max_kl=delta, cg_steps=20).step(None, g, lambda v: h @ v, None)
    inverse = torch.linalg.solve(h, g)
    close(x, -(2 * delta / (g @ inverse)).sqrt() * inverse, rtol=1e-7)
    assert (0.5 * x @ h @ x).item() == pytest.approx(delta, rel=1e-7)


def test_trpo_curvature_is_the_hessian_of_the_mean_kl(monkeypatch):
    method = build(TRPO, damping=0.0)
    data, seen = method.assess(rollout()), {}

    def spy(self, data, gradient, curvature, ratio):
        seen.update(gradient=gradient, curvature=curvature)
        return torch.zeros_like(gradient)

    monkeypatch.setattr(TRPO, "step", spy)
    method.natural_step(data)
    parameters = list(method.policy.parameters())
    start, old = flat(parameters).detach(), method.policy(data["seen"])
    old = tuple(x.detach() for x in old)

    def kl_at(values):
        pieces = dict(zip([n for n, _ in method.policy.named_parameters()],
                          [v.view_as(p) for p, v in zip(parameters, values.split([p.numel() for p in parameters]))]))
        return method.policy.kl(old, torch.func.functional_call(method.policy, pieces, (data["seen"],))).mean()

    hessian = torch.autograd.functional.hessian(kl_at, start)
    v = torch.randn(len(start), dtype=torch.float64)
    close(seen["curvature"](v), hessian @ v, rtol=1e-6, atol=1e-9)
    loss, _, _ = method.losses(data, old)
    close(seen["gradient"], flat(torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("actions", [None, 4])
def test_trpo_improves_the_surrogate_within_the_ball(actions):
    spec = Spec(observation_size=S, actions=actions) if actions else Spec(observation_size=S, action_size=A)
    method = build(TRPO, spec, hidden=(16,))
    for k in range(5):
        batch = rollout(seed=k, actions=actions)
        data = method.assess(batch)
        old = tuple(data[k] for k in sorted(data) if k.startswith("old_"))
        metrics = method.update(batch)
        kl = method.policy.kl(old, method.policy(data["seen"])).mean()
        assert 0 < kl <= 0.01 + 1e-9 and metrics["kl"].item() == pytest.approx(kl.item(), rel=1e-6)
        assert metrics["policy_loss"] < 0 and metrics["step_size"] > 0  # -mean rho A starts at -mean A = 0
        method.seen = Running(S).double()  # the policy is compared on the same inputs


def test_a_search_that_finds_nothing_leaves_the_policy_alone(monkeypatch):
    method = build(TRPO)
    monkeypatch.setattr(TRPO, "accepted", lambda self, before, now: torch.tensor(False))
    before = [p.clone() for p in method.policy.parameters()]
    metrics = method.update(rollout())
    assert all(torch.equal(a, b) for a, b in zip(before, method.policy.parameters())) and metrics["step_size"] == 0


def test_a_sharded_policy_is_refused():
    from runner.errors import UserError

    method = build(TRPO)
    next(method.policy.parameters()).device_mesh = object()
    with pytest.raises(UserError, match="hardware=ddp"):
        method.make_optimizers()


# -- costs -------------------------------------------------------------------------------------------------------------
def test_cost_return_is_the_mean_cost_of_whole_episodes():
    method = build(CPO, scale_rewards=False)
    zero, one = torch.zeros(4, 1, dtype=torch.float64), torch.ones(4, 1, 1, dtype=torch.float64)
    method.count(one * 2, zero.unsqueeze(-1))  # nothing has ended: what there is so far
    assert method.cost_return.item() == 8 and method.episode_length.item() == 4
    ends = torch.tensor([0, 1, 0, 1.0], dtype=torch.float64).reshape(4, 1, 1)
    method.count(one * 2, ends)  # six steps, begun in the first rollout, then two
    assert method.cost_return.item() == (12 + 4) / 2 and method.episode_length.item() == (6 + 2) / 2
    method.count(one * 9, zero.unsqueeze(-1))
    assert method.cost_return.item() == 8 and method.episode_length.item() == 4


def random_problem(channels, seed, dimension=5):
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(dimension, dimension, generator=g, dtype=torch.float64)
    h = m @ m.T + 0.3 * torch.eye(dimension, dtype=torch.float64)
    vectors = torch.randn(1 + channels, dimension, generator=g, dtype=torch.float64)
    surplus = 0.3 * torch.randn(channels, generator=g, dtype=torch.float64)
    return h, vectors, surplus


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_cpo_dual_against_brute_force(channels):
    """The step of the dual against the best of many feasible points, after a linear map that makes the ball round; and where
    the dual finds nothing feasible, no point is."""
    delta, seen = 0.05, {"active": 0, "idle": 0, "infeasible": 0}
    for seed in range(40):
        h, vectors, surplus = random_problem(channels, seed)
        solved = torch.linalg.solve(h, vectors.T).T
        products = vectors @ solved.T
        weights = dual(products, surplus, delta)
        root = torch.linalg.cholesky(torch.linalg.inv(h))  # x = root z: x^T H x = |z|^2
        g = torch.Generator().manual_seed(1000 + seed)
        z = torch.randn(200_000, 5, generator=g, dtype=torch.float64)
        z = z / z.norm(dim=1, keepdim=True) * (2 * delta) ** 0.5
        z[::2] *= torch.rand(100_000, 1, generator=g, dtype=torch.float64) ** 0.2
        points = z @ root.T
        feasible = points[(points @ vectors[1:].T + surplus <= 0).all(1)]
        if weights is None:
            assert len(feasible) == 0
            seen["infeasible"] += 1
            continue
        x = -(weights @ solved)
        assert (0.5 * x @ h @ x).item() == pytest.approx(delta, rel=1e-6)
        assert (vectors[1:] @ x + surplus <= 1e-6).all() and (weights >= 0).all()
        seen["active" if (weights[1:] > 0).any() else "idle"] += 1
        if len(feasible):
            best = (feasible @ vectors[0]).min().item()
            assert (vectors[0] @ x).item() <= best + 1e-9
    assert all(seen.values()), seen


def test_cpo_dual_without_a_binding_constraint_is_the_trust_region_step():
    h, vectors, _ = random_problem(1, 3)
    solved = torch.linalg.solve(h, vectors.T).T
    weights = dual(vectors @ solved.T, torch.tensor([-1e3], dtype=torch.float64), 0.02)
    assert weights[1] == 0
    close(weights[0], (2 * 0.02 / (vectors[0] @ solved[0])).sqrt(), rtol=1e-9)


def test_cpo_recovers_by_going_down_the_cost(monkeypatch):
    """Far beyond the limit nothing in the ball is feasible: the step is -sqrt(2 delta / b^T H^-1 b) H^-1 b."""
    method = build(CPO, cost_limit=0.0, cg_steps=60, damping=1.0)
    data, seen = method.assess(rollout()), {}
    method.cost_return.fill_(1e6)
    original = CPO.step

    def spy(self, data, gradient, curvature, ratio):
        seen["b"] = flat(torch.autograd.grad(self.rises(data, ratio)[0], list(self.policy.parameters()), retain_graph=True))
        seen["inverse"] = conjugate_gradients(curvature, seen["b"], 60)
        seen["x"] = original(self, data, gradient, curvature, ratio)
        return seen["x"]

    monkeypatch.setattr(CPO, "step", spy)
    method.natural_step(data)
    assert method.told["feasible"] == 0
    inverse = seen["inverse"]
    close(seen["x"], -(2 * 0.01 / (seen["b"] @ inverse)).sqrt() * inverse, rtol=1e-6)
    assert seen["b"] @ seen["x"] < 0


def test_rises_are_in_the_unit_of_returns():
    """An episode of L steps whose every step's cost advantage is 1 under a ratio of 1 + e costs L e more; centred, a constant
    advantage says nothing."""
    method = build(CPO)
    method.episode_length.fill_(20.0)
    advantage = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    ratio = torch.tensor([1.1, 0.9], dtype=torch.float64)
    close(method.rises({"cost_advantage": advantage}, ratio), [20 * 0.1])
    close(method.rises({"cost_advantage": advantage + 5}, ratio), [20 * 0.1])


def test_lagrangian_advantage_and_multiplier_by_hand():
    method = build(PPOLagrangian, cost_limit=3.0, multiplier_rate=0.5, multiplier=1.0)
    method.cost_return.fill_(4.0)
    data = {"advantage": torch.tensor([[2.0]], dtype=torch.float64),
            "cost_advantage": torch.tensor([[[0.4]]], dtype=torch.float64)}
    close(method.objective(data), [[(2 - 1.5 * 0.4) / 2.5]])
    assert method.multipliers.item() == 1.5
    method.cost_return.fill_(-100.0)
    method.objective(data)
    assert method.multipliers.item() == 0.0


# -- learning ----------------------------------------------------------------------------------------------------------
class Bandit:
    """Steps without a course: reward 1 for action 2 of 4, cost 1 for action 2 and 0.1 for action 1, which is worth 0.5.
    Episodes of 5 steps."""

    observation_size, action_size, actions, costs = 2, None, 4, 1

    def __init__(self, number):
        import numpy as np
        self.envs, self.cost, self.steps = range(number), np.zeros((number, 1)), [0] * number

    def reset(self, index, seed=None):
        import numpy as np
        self.steps[index] = 0
        return np.ones(2)

    def step(self, index, action):
        import numpy as np
        self.cost[index] = {1: 0.1, 2: 1.0}.get(int(action), 0.0)
        self.steps[index] += 1
        return np.ones(2), {1: 0.5, 2: 1.0}.get(int(action), 0.0), False, self.steps[index] == 5


@pytest.mark.parametrize(("cls", "values", "best"), [
    (A2C, {}, 2), (PPO, {}, 2), (TRPO, {"max_kl": 0.02}, 2),
    (CPO, {"max_kl": 0.02, "cost_limit": 1.0}, 1), (PPOLagrangian, {"cost_limit": 1.0, "multiplier_rate": 0.2}, 1)])
def test_bandits_are_solved_within_their_limits(cls, values, best):
    """Unconstrained: the best action. Under a limit of 1 per episode (all-best costs 5): mostly the second best, and the limit
    holds, up to the noise of a rollout."""
    import types

    torch.manual_seed(0)
    method = cls(cls.Config(hidden=(8,), learning_rate=0.01, anneal=False, minibatches=2, epochs=4, **values))
    method.setup(Spec(observation_size=2, actions=4, costs=1))
    method.make_optimizers()
    config = types.SimpleNamespace(rollout_steps=20, reward_scale=1.0)
    stream = Rollouts(Bandit(8), method, config, 0, torch.device("cpu"))
    for _ in range(80):
        method.update(stream.next())
        method.updates += 1
    p = method.policy(method.seen(torch.ones(1, 2)))[0].exp()[0]
    assert p.argmax() == best
    if best == 2:
        assert p[2] > 0.95
    else:
        cost = 5 * (0.1 * p[1] + p[2]).item()
        assert 0.4 < cost < 1.4 and p[1] > 0.6


@pytest.mark.parametrize("name", ["ppo", "trpo"])
def test_inverted_pendulum_is_learned(name, tmp_path):
    """Far above the best reference (the all-zero action stands for about 26 steps) after 25,600 steps."""
    from runner.catalogue import Catalogue
    from runner.compose import compose
    from runner.run import execute

    job = compose([f"method={name}", "env=inverted_pendulum", "loop.steps=25", "method.anneal=false", "logger=none",
                   f"runs={tmp_path}"], Catalogue())
    result = execute(job, quiet=True)
    assert result["metrics"]["return"] > 300 > result["references"]["all-zero action"]["return"]
