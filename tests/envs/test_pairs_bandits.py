"""Bandits with preferences: what the variants promise of their tables and pairs, exact metrics against sums by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from envs.pairs import frontier
from envs.pairs.bandit import ARM, CONTEXT, Bandit, BanditWorld
from envs.pairs.scored import Scored
from runner.catalogue import Catalogue
from runner.compose import compose
from runner.errors import UserError
from runner.run import assemble

BOOK = Catalogue()


def made(env, *words):
    return assemble(compose(["method=dpo", f"env={env}", "size=claim", "logger=none", "hardware=cpu", *words], BOOK))


def numbers(pairs):
    return [(ord(p.prompt) - CONTEXT, ord(p.chosen) - ARM, ord(p.rejected) - ARM) for p in pairs]


def test_spurious_arms_are_bad_and_win_their_only_pair():
    method, world, _ = made("bandit_spurious")
    pairs = numbers(world.task.pairs())
    assert len(pairs) == 205 and world.task.reward[0].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0] + [-1.0] * 5
    shown = Counter(a for _, i, j in pairs for a in (i, j))
    assert all(shown[a] == 1 for a in range(5, 10)) and {i for _, i, _ in pairs} >= set(range(5, 10))
    assert not {j for _, _, j in pairs} & set(range(5, 10))
    gold = world.evaluate(method, 0)
    assert gold["unseen_mass"] == pytest.approx(0.5) and gold["kl"] == pytest.approx(0, abs=1e-6)
    assert gold["reward"] == pytest.approx(-0.25)


def test_unseen_arms_are_in_no_pair_and_share_the_seen_ones_weights():
    method, world, stream = made("bandit_unseen")
    assert max(a for _, i, j in numbers(world.task.pairs()) for a in (i, j)) == 9
    assert (world.task.reward[0, 10:] == -1.5).all()
    e = torch.tensor(-3.0).exp().item()
    assert world.evaluate(method, 0)["unseen_mass"] == pytest.approx(e / (1 + e), rel=1e-4)
    for _ in range(20):
        method.update(stream.next())
    moved = world.table(method).detach()[0] - world.task.base.log_softmax(-1)[0]
    assert (moved[10:] - moved[10]).abs().max() > 0.1  # features move them apart, which no pair did


def test_a_policy_over_features_needs_them():
    with pytest.raises(UserError, match="policy.kind=linear needs features"):
        made("bandit", "policy.kind=linear")


def config(**values):
    from runner.knobs import knobs_of

    return BanditWorld.Config(**{**{k.name: k.default for k in knobs_of(BanditWorld.Config)}, **values})


def test_flips_turn_the_labels_they_say():
    truth = [numbers(Bandit(config(pairs=6000, sharpness=1e6, flips=f, p_flip=0.3), 0).pairs()) for f in
             ("none", "symmetric", "adversarial")]
    reward = Bandit(config(), 0).reward
    right = [sum(reward[x, i] > reward[x, j] for x, i, j in t).item() / 6000 for t in truth]
    assert right[0] > 0.995 and right[1] == pytest.approx(0.7, abs=0.03) and right[2] == pytest.approx(0.7, abs=0.01)
    turned = [abs(reward[x, i] - reward[x, j]) for x, i, j in truth[2] if reward[x, i] < reward[x, j]]
    kept = [abs(reward[x, i] - reward[x, j]) for x, i, j in truth[2] if reward[x, i] > reward[x, j]]
    assert min(turned) >= max(kept) - 1e-6  # the widest margins
    dependent = Bandit(config(pairs=6000, sharpness=1e6, flips="dependent"), 0)
    wrong, seen = Counter(), Counter()
    for x, i, j in numbers(dependent.pairs()):
        seen[x] += 1
        wrong[x] += int(reward[x, i] < reward[x, j])
    share = torch.tensor([wrong[x] / seen[x] for x in range(20)])
    expected = torch.sigmoid(3 * dependent.lean - 2)
    assert (share - expected).abs().max() < 0.12 and expected.std() > 0.05


def test_the_population_has_every_pair_once_with_its_probability():
    task = Bandit(config(soft=True, contexts=3, arms=4, sharpness=2.0), 1)
    pairs = task.pairs()
    assert len({*numbers(pairs)}) == len(pairs) == 3 * 6
    for p, (x, i, j) in zip(pairs, numbers(pairs)):
        assert p.label == pytest.approx(torch.sigmoid(2 * (task.reward[x, i] - task.reward[x, j])).item(), abs=1e-6)


def test_calibration_and_slope_of_the_exact_optimum():
    """At pi_ref exp(r / beta) / Z the implicit reward is the true one; at half the beta it is half of it."""
    method, world, _ = made("bandit", "method.beta=0.5")
    optimum = (world.task.base + world.task.reward / 0.5).log_softmax(-1)
    gold = world.exact(optimum, method)
    assert gold["slope"] == pytest.approx(1, abs=1e-4) and gold["calibration"] == pytest.approx(0, abs=1e-4)
    gold = world.exact((world.task.base + world.task.reward).log_softmax(-1), method)
    assert gold["slope"] == pytest.approx(0.5, abs=1e-4) and gold["calibration"] > 0.05


@pytest.mark.parametrize("reward", [1.5, -0.1, float("nan")])
def test_scored_rows_out_of_range_are_refused(reward):
    with pytest.raises(UserError, match="row 2 of 2 has the reward"):
        Scored(None, [("a", "b", 0.5), ("a", "c", reward)], 1, None, 1)


def test_the_frontier_is_reached_by_the_optima_of_rlhf_alone():
    _, world, _ = made("bandit", "env.contexts=6", "env.pairs=100")
    base, reward = world.task.base, world.task.reward
    for beta in (5.0, 0.5, 0.1):
        log_p = (base + reward / beta).log_softmax(-1)
        assert world.exact(log_p)["frontier"] == pytest.approx(1, abs=1e-4)
        other = (base + (reward + 0.3 * torch.randn(reward.shape, generator=torch.Generator().manual_seed(1))) / beta)
        assert 0 < world.exact(other.log_softmax(-1))["frontier"] < 0.999
    kl = (log_p.exp() * (log_p - base.log_softmax(-1))).sum(-1).mean().item()
    assert frontier.best_reward(base, reward, kl) == pytest.approx((log_p.exp() * reward).sum(-1).mean().item(), abs=1e-5)
    assert frontier.best_reward(base, reward, 1e6) == pytest.approx(reward.amax(-1).mean().item(), abs=1e-4)
    assert world.references(0)["best arm"]["frontier"] == pytest.approx(1, abs=1e-3)
    assert "frontier" not in world.exact(base.log_softmax(-1))  # it gained nothing, at no price


def test_prompts_reward_arms_truly_or_as_the_pairs_say():
    for rewarded in ("exact", "fitted"):
        _, world, stream = made("bandit", "method=grpo", "env.contexts=3", "env.arms=4", "env.pairs=300",
                                f"env.rewarded={rewarded}")
        batch = stream.next()
        x, y = batch["prompt"][:, -1] - world.task.arms - 1, batch["response"][:, 0] - 1
        table = world.task.reward if rewarded == "exact" else world.judgement
        torch.testing.assert_close(batch["reward"], table[x, y])
        assert batch["reward"].unique().numel() > 4
    r = world.judgement.double().requires_grad_()
    x, i, j = torch.tensor(numbers(world.task.pairs())).T
    loss = (-torch.nn.functional.logsigmoid(r[x, i] - r[x, j]) + 0.01 * (r[x, i] + r[x, j]).square()).mean()
    assert torch.autograd.grad(loss, r)[0].abs().max() < 1e-6  # the likelihood's maximum, which is one point
    assert torch.corrcoef(torch.stack([r.detach().flatten(), world.task.reward.flatten().double()]))[0, 1] > 0.7


def test_duels_are_judged_as_pairs_are_labelled():
    _, world, stream = made("bandit", "method=online_dpo", "env.sharpness=2.0", "method.prompts=16")
    batch = stream.next()
    pairs = batch["response"].view(-1, 2) - 1
    x = batch["prompt"][::2, -1] - world.task.arms - 1
    expected = torch.sigmoid(2 * (world.task.reward[x, pairs[:, 0]] - world.task.reward[x, pairs[:, 1]]))
    torch.testing.assert_close(batch["beats"].view(-1, 2, 2)[:, 0, 1], expected)
