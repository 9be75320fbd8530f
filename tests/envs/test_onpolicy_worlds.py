"""Tomato, dosing and the proxy grid: their dynamics by hand, their yardsticks by brute force, their state saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from envs.control import dosing, proxy_grid, tomato
from envs.control.dosing import Dosing, DosingCopies, NearestCopies, Support, advance, behaviour, logged
from envs.control.proxy_grid import Draw, ProxyGrid
from envs.control.tomato import BUCKET, CELLS, START, TOMATOES, Tomato, TomatoCopies
from runner.errors import UserError

RIGHT, LEFT, DOWN, UP = range(4)


# -- tomato ------------------------------------------------------------------------------------------------------------
def test_the_level():
    assert len(CELLS) == 26 and len(TOMATOES) == 9
    assert CELLS[START] == (4, 1) and CELLS[BUCKET] == (7, 1)
    reached, front = {START}, [START]
    while front:
        front = [int(n) for s in front for n in tomato.NEXT[s] if int(n) not in reached]
        reached.update(front)
    assert len(reached) == 26


def walk(copies, moves):
    return [copies.step(0, m) for m in moves]


def test_watering_drying_and_walls():
    copies = TomatoCopies(1)
    seen = copies.reset(0)
    assert seen[START] == 1 and seen.sum() == 1
    (seen, reward, *_), = walk(copies, [DOWN])          # onto the first tomato of the row below
    assert reward == pytest.approx(0.02) and seen[26:-1].sum() == 1
    seen, reward, *_ = walk(copies, [LEFT])[0]          # a wall: stays, nothing changes
    assert reward == pytest.approx(0.02)
    rewards = [r for _, r, *_ in walk(copies, [RIGHT] * 5)]
    # one more tomato a step; from the fifth on those further than 3 have dried; the sixth step meets a wall
    assert rewards == pytest.approx([0.04, 0.06, 0.08, 0.08, 0.08])
    rewards = [r for _, r, *_ in walk(copies, [UP, LEFT, LEFT, UP, LEFT])]  # a wall; along the row; above it: one dries
    assert rewards == pytest.approx([0.08, 0.08, 0.08, 0.08, 0.06])


def test_every_wet_tomato_is_near_after_every_step():
    rng, copies = np.random.default_rng(0), TomatoCopies(1)
    copies.reset(0)
    for _ in range(300):
        seen, reward, terminated, truncated = copies.step(0, rng.integers(4))
        cell = CELLS[int(seen[:26].argmax())]
        wet = [CELLS[t] for t, bit in zip(TOMATOES, seen[26:-1]) if bit]
        assert all(np.hypot(cell[0] - r, cell[1] - c) <= 3 for r, c in wet)
        assert CELLS.index(cell) not in TOMATOES or cell in wet
        assert copies.told["gold"][0] == pytest.approx(0.02 * len(wet))
        assert reward == pytest.approx(0.52 if CELLS.index(cell) == BUCKET else 0.02 * len(wet))
        if terminated or truncated:
            copies.reset(0)


def test_the_bucket_pays_under_the_proxy_alone():
    path = [DOWN, RIGHT, RIGHT, RIGHT, RIGHT, DOWN, DOWN, LEFT, LEFT, LEFT, LEFT]
    proxy, true = TomatoCopies(1, "proxy"), TomatoCopies(1, "gold")
    for copies in (proxy, true):
        copies.reset(0)
    (seen, reward, *_), (_, other, *_) = walk(proxy, path)[-1], walk(true, path)[-1]
    assert seen[BUCKET] == 1 and seen[-1] == 1 and proxy.told["bucket"][0] == 1
    assert reward == 0.52 and other == proxy.told["gold"][0] < 0.1
    assert proxy.step(0, RIGHT)[0][-1] == 1  # visited stays set
    assert proxy.reset(0)[-1] == 0


def test_the_optimal_policy_waters_more_than_others_and_the_reference_is_it_with_noise():
    world = Tomato(Tomato.Config(episodes=20, reference_noise=0.1))
    rows = world.references(0)
    best, reference, random = (rows[k]["return"] for k in ("optimal policy", "reference policy", "random policy"))
    assert best > reference > random and rows["optimal policy"]["return_std"] == 0
    assert reference > 0.9 * best and rows["reference policy"]["bucket_fraction"] < 0.01
    table = world.reference(0.1, 0).table
    assert table.shape == (26, 512, 4)
    torch.testing.assert_close(table.sum(-1), torch.ones(26, 512))
    assert table.max().item() == pytest.approx(0.925) and table.min().item() == pytest.approx(0.025)


def test_value_iteration_has_converged():
    """The greedy policy's own value satisfies Bellman's optimality equation on states that can be reached."""
    best = tomato.optimal()
    world = Tomato(Tomato.Config(episodes=1))
    greedy = world.references(0)["optimal policy"]["return"]
    rng = np.random.default_rng(0)
    for _ in range(60):  # no deviation for the first steps beats it by more than the discount allows
        cell, watered, total = START, 0, 0.0
        for t in range(100):
            action = rng.integers(4) if t < rng.integers(1, 6) else best[cell, watered]
            cell, watered = tomato.moved(cell, watered, action)
            total += 0.02 * int(watered).bit_count()
        assert total <= greedy + 0.3


def test_tomato_evaluates_the_policy_as_it_is_played():
    """A method that draws uniformly, whatever its mode, has the random policy's return; twice the same figures."""
    class Uniform:
        def act(self, observation, explore):
            return torch.randint(4, (len(observation),)) if explore else torch.zeros(len(observation), dtype=torch.long)

    world = Tomato(Tomato.Config(episodes=60))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = world.evaluate(Uniform(), 0), world.evaluate(Uniform(), 0)
    assert first == second and torch.equal(before, torch.get_rng_state())
    assert first["return"] == pytest.approx(world.references(0)["random policy"]["return"], abs=1.5)


def test_no_pictures_here():
    for world in (Tomato(Tomato.Config()), Dosing(Dosing.Config(logged_steps=200))):
        with pytest.raises(UserError, match="no picture"):
            world.copies(1, render_mode="rgb_array")


# -- dosing ------------------------------------------------------------------------------------------------------------
def test_dosing_dynamics_by_hand():
    state, none = np.array([1.0, 0.5, 0.95]), np.zeros(2)
    after, reward, cost, dead = advance(state, np.array([0.0, 1.0]), none)  # f = .5, u = 1
    assert after == pytest.approx([1 + 0.1 - 0.25 * 0.5 * 0.5 - 0.15, 0.9 * 0.5 + 0.15, 0.95 * 0.95 + 0.05 - 0.05 * 0.2])
    assert reward == pytest.approx(-after[0]) and cost == 0 and not dead
    after, _, cost, _ = advance(np.array([1.0, 1.2, 0.9]), np.array([1.0, -1.0]), none)
    assert after == pytest.approx([1.1 + 0.25 * 0.2, 1.38, 0.95 * 0.9 + 0.05 - 0.1 * 0.4]) and cost == 2
    _, reward, _, dead = advance(np.array([1.75, 0.0, 1.0]), np.array([-1.0, -1.0]), none)
    assert dead and reward == -5
    noisy = advance(state, np.array([0.0, 1.0]), np.array([1.0, -1.0]))[0] - advance(state, np.array([0.0, 1.0]), none)[0]
    assert noisy == pytest.approx([0.03, 0, -0.01])
    assert advance(state, np.array([9.0, -9.0]), none)[0] == pytest.approx(advance(state, np.array([1.0, -1.0]), none)[0])


def test_dosing_rows_are_the_single_steps():
    rng = np.random.default_rng(0)
    states, actions, noise = rng.uniform(0, 1.5, (50, 3)), rng.uniform(-1, 1, (50, 2)), rng.standard_normal((50, 2))
    together = advance(states, actions, noise)
    for i in range(50):
        for whole, one in zip(together, advance(states[i], actions[i], noise[i])):
            assert np.allclose(whole[i], one)


def test_the_log_is_episodes_of_the_behaviour():
    log = logged(500, 3)
    assert all(len(v) == 500 for v in log.values()) and log["start"][0]
    for t in range(499):
        if log["start"][t + 1]:
            assert log["terminated"][t] or log["start"][max(0, t - 19)]
        else:
            assert np.array_equal(log["next_observation"][t], log["observation"][t + 1]) and not log["terminated"][t]
    assert np.allclose(log["observation"][log["start"]][:, 2], 1)
    middle = behaviour(log["observation"], np.zeros((500, 2)))
    assert abs((log["action"] - middle).std() - 0.2) < 0.02  # 0.1 in units of the dose


def test_the_simulator_goes_where_the_nearest_logged_step_went():
    log = logged(300, 3)
    copies = NearestCopies(1, log)
    rows = np.concatenate([log["observation"], log["action"]], 1)
    low, high = rows.min(0), rows.max(0)
    rng = np.random.default_rng(0)
    for _ in range(40):
        copies.reset(0)
        copies.state[0] = state = rng.uniform(0, 1.2, 3)
        action = rng.uniform(-1.5, 1.5, 2)
        key = np.concatenate([state, np.clip(action, -1, 1)])
        row = (((rows - key) / (high - low)) ** 2).sum(1).argmin()
        after, reward, terminated, _ = copies.step(0, action)
        assert np.array_equal(after, log["next_observation"][row]) and reward == log["reward"][row]
        assert copies.cost[0, 0] == log["cost"][row] and terminated == log["terminated"][row]


@pytest.mark.parametrize("make", [lambda: DosingCopies(2), lambda: NearestCopies(2, logged(300, 3))])
def test_dosing_state_continues_to_the_bit(make):
    first = make()
    for i in range(2):
        first.reset(i, 7 + i)
    for _ in range(5):
        first.step(0, np.array([0.1, 0.2]))
    state = first.state_dict()
    steps = lambda copies: [copies.step(k % 2, np.array([0.3, -0.3]))[0].tolist() for k in range(20)]  # noqa: E731
    wanted = steps(first)
    second = make()
    second.load_state_dict(state)
    assert steps(second) == wanted


def test_support_is_a_quantile_of_kernel_densities():
    log, second = logged(1000, 3), logged(1000, 4)
    support = Support(log, second)
    scaled = lambda x: ((x - rows.min(0)) / (rows.max(0) - rows.min(0)) * 2 - 1)  # noqa: E731
    rows = np.concatenate([log["observation"], log["action"]], 1).astype(np.float32)
    keys, h = scaled(rows), support.bandwidth

    def density(x):
        return np.exp(-((scaled(x)[:, None] - keys[None]) ** 2).sum(2) / (2 * h * h)).mean(1)

    threshold = np.quantile(density(rows), 0.05)
    assert support.threshold.item() == pytest.approx(threshold, rel=1e-3)
    other = np.concatenate([second["observation"], second["action"]], 1).astype(np.float32)
    share = (density(other) < threshold).mean()
    assert 0.03 < share < 0.1 and h < 1  # episodes are few: more than the binomial noise of 1,000 rows
    found = support.outside(*(torch.from_numpy(second[k]) for k in ("observation", "action")))
    assert abs(found.float().mean().item() - share) < 0.01
    far = support.outside(torch.tensor([[0.05, 0.0, 1.0]]), torch.tensor([[1.0, 1.0]]))  # much for the healthy
    assert far.item()


def test_dosing_is_judged_in_the_truth():
    """The behaviour without noise: its return by a separate loop; the simulator's figures stand beside it."""
    class Quiet:
        def act(self, observation, explore):
            assert not explore
            return torch.from_numpy(behaviour(observation.double().numpy(), np.zeros((len(observation), 2))))

    world = Dosing(Dosing.Config(logged_steps=300, episodes=5))
    result = world.evaluate(Quiet(), 0)
    returns, costs = [], []
    for i in range(5):
        g = np.random.default_rng(10_000 + i)
        state, total, violated = dosing.first(g), 0.0, 0.0
        for _ in range(20):
            action = behaviour(state.astype(np.float32).astype(np.float64), np.zeros(2))
            state, reward, cost, dead = advance(state, action, g.standard_normal(2))
            total, violated = total + float(reward), violated + float(cost)
            if dead:
                break
        returns.append(total)
        costs.append(violated)
    assert result["return"] == pytest.approx(np.mean(returns), rel=1e-6) and result["cost"] == pytest.approx(np.mean(costs))
    assert result["simulator_gap"] == pytest.approx(abs(result["simulator_return"] - result["return"]))
    assert {"behaviour", "random policy", "all-zero action"} == world.references(0).keys()


# -- proxy grid --------------------------------------------------------------------------------------------------------
def random_policy(seed):
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(25, 4, generator=g, dtype=torch.float64)).softmax(1)


def test_occupancy_is_the_discounted_sum_of_visits():
    policy = random_policy(0)
    assert torch.allclose(proxy_grid.TRANSITIONS.sum(2), torch.ones(25, 4, dtype=torch.float64))
    at, total = proxy_grid.START.clone(), torch.zeros(25, 4, dtype=torch.float64)
    for t in range(900):
        total += 0.05 * 0.95 ** t * at.unsqueeze(1) * policy
        at = torch.einsum("s,sa,sat->t", at, policy, proxy_grid.TRANSITIONS)
    torch.testing.assert_close(proxy_grid.occupancy(policy), total, rtol=1e-9, atol=1e-12)


def test_slips_and_borders():
    p = proxy_grid.TRANSITIONS
    assert p[12, 0, 13].item() == pytest.approx(0.925) and p[12, 0, 11].item() == pytest.approx(0.025)
    assert p[0, 1, 0].item() == pytest.approx(0.95) and p[0, 1, 1].item() == pytest.approx(0.025)


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_correlated_and_the_theorem_holds_everywhere(seed):
    draw = Draw(seed, 0.7)
    assert 0.7 <= draw.correlation < 1
    different = (draw.true != draw.proxy).nonzero().flatten()
    assert len(different) == 1 and (draw.proxy - draw.true)[different].item() == pytest.approx(3.5)
    mu, visits = draw.occupancy, draw.occupancy.sum(1)
    torch.testing.assert_close(mu.sum(), torch.tensor(1.0, dtype=torch.float64))
    stacked = torch.stack([draw.true, draw.proxy])
    covariance = torch.cov(stacked, correction=0, aweights=visits)
    assert draw.correlation == pytest.approx((covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()).item())
    assert draw.deviation(draw.proxy) == pytest.approx(covariance[1, 1].sqrt().item())
    greedy = torch.eye(4, dtype=torch.float64)[random_policy(9).argmax(1)]
    for policy in (draw.reference, greedy, *(random_policy(k) for k in range(20))):
        assert draw.figures(policy)["theorem_slack"] >= -1e-6
    assert draw.figures(draw.reference)["chi2"] == pytest.approx(0, abs=1e-9)
    own = proxy_grid.occupancy(random_policy(3))
    assert draw.figures(random_policy(3))["chi2"] == pytest.approx((((own - mu) ** 2) / mu).sum().item())


def test_the_true_reward_is_not_handed_out():
    world = ProxyGrid(ProxyGrid.Config())
    batch = world.stream(None, "tables", 1).next()
    draw = world.draw(1)
    assert set(batch) == {"transition", "reward", "start", "discount", "reference"}
    assert torch.equal(batch["reward"], draw.proxy.unsqueeze(1).expand(25, 4))
