"""Learning from compared segments: losses against their formulas, phases, the data's labels and yardsticks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from envs.control.segments import Preferences, Segments
from methods.control.cpl import CPL
from methods.control.p_iql import PIQL
from methods.control.segment_bc import SegmentBC
from runner.draws import Draws
from runner.errors import UserError
from runner.interface import Spec, make_config
from runner.seeds import Stack

S, A, K, B = 5, 2, 4, 6
SPEC = Spec(observation_size=S, action_size=A)


def make(cls=CPL, spec=SPEC, seed=0, **values):
    torch.manual_seed(seed)
    method = cls(cls.Config(**{"hidden": (16,), "bc_steps": 0, "warmup": 0, "dropout": 0.0, "learning_rate": 0.01, **values}))
    method.setup(spec)
    method.make_optimizers()
    method.draws = Draws(seed)
    return method


def make_batch(seed=0, lead=()):
    g = torch.Generator().manual_seed(seed)
    return {"observation": torch.randn(*lead, B, 2, K, S, generator=g),
            "action": torch.rand(*lead, B, 2, K, A, generator=g) * 2 - 1,
            "preferred": torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5, 1.0]).expand(*lead, B)}


def log_probs(method, batch):
    """-|a - mu|^2 of each step (B, 2, K), written out anew."""
    mean = method.policy(batch["observation"].reshape(-1, S)).view(B, 2, K, A)
    return -((batch["action"].clamp(-1 + 1e-5, 1 - 1e-5) - mean) ** 2).sum(-1)


# ---- losses ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.1, 1.7])
def test_the_contrast_pair_by_pair(bias, alpha):
    method, batch = make(bias=bias, temperature=alpha), make_batch()
    log_prob = log_probs(method, batch)
    expected = 0.0
    for pair, y in zip(log_prob, batch["preferred"]):
        s1, s2 = alpha * pair[0].sum(), alpha * pair[1].sum()
        for won, lost, share in ((s2, s1, y), (s1, s2, 1 - y)):
            expected += share * -torch.log(torch.exp(won) / (torch.exp(won) + torch.exp(bias * lost))) / B
    assert method.preference_loss(batch, log_prob).item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_bias_it_is_the_logistic_loss_of_preferences():
    method, batch = make(bias=1.0), make_batch()
    log_prob = log_probs(method, batch)
    first, second = (0.1 * log_prob.sum(-1)).unbind(-1)
    expected = F.binary_cross_entropy_with_logits(second - first, batch["preferred"])
    torch.testing.assert_close(method.preference_loss(batch, log_prob), expected)


def test_a_common_shift_of_log_probabilities_is_free_without_bias_and_costs_with_it():
    batch = make_batch()
    for bias, free in ((1.0, True), (0.5, False)):
        method = make(bias=bias)
        log_prob = log_probs(method, batch)
        moved = method.preference_loss(batch, log_prob - 3.0) - method.preference_loss(batch, log_prob)
        assert (abs(moved) < 1e-6) if free else moved > 0.05


def test_anchored_scores_are_log_ratios_to_the_reference():
    method, batch = make(anchored=True, temperature=0.2, bias=0.75), make_batch()
    with torch.no_grad():
        for p in method.policy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    log_prob = log_probs(method, batch)
    mean = method.reference(batch["observation"].reshape(-1, S)).view(B, 2, K, A)
    ratio = log_prob + ((batch["action"].clamp(-1 + 1e-5, 1 - 1e-5) - mean) ** 2).sum(-1)
    first, second = (0.2 * ratio.sum(-1)).unbind(-1)
    y = batch["preferred"]
    expected = (y * F.softplus(0.75 * first - second) + (1 - y) * F.softplus(0.75 * second - first)).mean()
    torch.testing.assert_close(method.preference_loss(batch, log_prob), expected)
    same = make(anchored=True)
    assert same.preference_loss(batch, log_probs(same, batch)).item() == pytest.approx(math.log(2))  # still the reference


def test_imitation_and_its_weight_beside_the_contrast():
    method, batch = make(bc_weight=0.7), make_batch()
    log_prob = log_probs(method, batch)
    torch.testing.assert_close(method.imitation_loss(batch, log_prob), -log_prob.mean())
    torch.testing.assert_close(method.preference_penalty(batch, log_prob), -0.7 * log_prob.mean())
    assert make().preference_penalty(batch, log_prob) is None


def test_fine_tuning_looks_at_preferred_segments_alone():
    method, batch = make(SegmentBC), make_batch()
    log_prob = log_probs(method, batch)
    chosen = [pair[int(y)].mean() if y != 0.5 else pair.mean() for pair, y in zip(log_prob, batch["preferred"])]
    torch.testing.assert_close(method.preference_loss(batch, log_prob), -torch.stack(chosen).mean())


def test_gradient_on_the_winner_and_loser_has_the_papers_weights():
    """dL/dS_win = -sigma(lambda S_lose - S_win), dL/dS_lose = lambda times its negative."""
    method = make(bias=0.5, temperature=1.0)
    log_prob = torch.tensor([[[-1.0, -0.5], [-0.2, -0.1]]], requires_grad=True)
    method.preference_loss({"preferred": torch.ones(1)}, log_prob).backward()
    weight = torch.sigmoid(torch.tensor(0.5 * -1.5 + 0.3))
    torch.testing.assert_close(log_prob.grad, torch.stack([0.5 * weight.expand(2), -weight.expand(2)])[None])


# ---- phases ------------------------------------------------------------------------------------------------------------
def train(method, batch, updates):
    out = []
    for _ in range(updates):
        out.append({k: v.item() for k, v in method.update(batch).items()})
        method.updates += 1
    return out


def test_imitation_comes_first_and_then_a_new_adam():
    method, batch = make(bc_steps=5), make_batch()
    plain = make(SegmentBC, bc_steps=5)
    assert train(method, batch, 5) == train(plain, batch, 5)
    assert not method.optimizers["preference"].state and len(method.optimizers["imitation"].state) == 4
    before = {k: v.clone() for k, v in method.policy.state_dict().items()}
    train(method, batch, 1)
    assert all(torch.equal(v, method.reference.state_dict()[k]) for k, v in before.items())
    assert {s["step"].item() for s in method.optimizers["preference"].state.values()} == {1.0}
    train(method, batch, 3)
    assert all(torch.equal(v, method.reference.state_dict()[k]) for k, v in before.items())  # taken once
    assert {s["step"].item() for s in method.optimizers["imitation"].state.values()} == {5.0}


def test_the_learning_rate_rises_over_the_warm_up():
    method, batch, rates = make(bc_steps=2, warmup=4, learning_rate=0.008, rate_factor=0.5), make_batch(), []
    for _ in range(8):
        train(method, batch, 1)
        rates.append(method.optimizers["preference"].param_groups[0]["lr"])
    assert rates[2:] == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004, 0.004])
    assert method.optimizers["imitation"].param_groups[0]["lr"] == 0.008


def test_dropout_is_for_updates_only_and_scales():
    method, batch = make(dropout=0.5, hidden=(2000,)), make_batch()
    plain = method.log_prob(batch["observation"], batch["action"])
    torch.testing.assert_close(plain, log_probs(method, batch))
    dropped = method._mean(batch["observation"], "dropout", method.policy)
    kept = method.policy[:-1](batch["observation"])  # up to tanh
    assert not torch.allclose(dropped, torch.tanh(kept))
    method.train()
    seen = torch.randn(3, S)
    assert torch.equal(method.act(seen, explore=True), method.policy(seen))
    means = []
    for update in range(400):
        method.updates = update
        means.append(torch.atanh(method._mean(batch["observation"], "dropout", method.policy)))
    torch.testing.assert_close(torch.stack(means).mean(0), kept, atol=0.15, rtol=0.2)


def test_several_seeds_at_once_are_what_each_is_alone():
    batches = [make_batch(i) for i in range(3)]
    values = {"bc_steps": 3, "warmup": 2, "dropout": 0.25, "anchored": True, "bc_weight": 0.1}
    stack = Stack(lambda: CPL(CPL.Config(hidden=(16,), learning_rate=0.01, **values)), SPEC, [0, 1, 2])
    together = stack.method
    together.make_optimizers()
    together.draws = Draws([0, 1, 2])
    joined = {k: torch.stack([b[k] for b in batches]) for k in batches[0]}
    for _ in range(6):
        told = together.update(joined)
        together.updates += 1
    for i, batch in enumerate(batches):
        single = make(seed=i, **values)
        single.draws = Draws(i)
        last = train(single, batch, 6)[-1]
        assert {k: v[i].item() for k, v in told.items()} == pytest.approx(last, rel=1e-4, abs=1e-6)
        for k, v in single.policy.state_dict().items():
            torch.testing.assert_close(together.policy.state_dict()[k][i], v, rtol=1e-4, atol=1e-6)


# ---- P-IQL -------------------------------------------------------------------------------------------------------------
def make_p_iql(seed=0, **values):
    torch.manual_seed(seed)
    method = PIQL(PIQL.Config(**{"hidden": (16,), "reward_steps": 2, "learning_rate": 0.01, **values}))
    method.setup(SPEC)
    method.make_optimizers()
    method.draws = Draws(seed)
    return method


def test_the_reward_model_is_bradley_terry_on_sums():
    method, batch = make_p_iql(), make_batch()
    sums = torch.stack([torch.stack([method.reward(torch.cat([o, a], -1)).sum() for o, a in zip(obs, act)])
                        for obs, act in zip(batch["observation"], batch["action"])])
    expected = F.binary_cross_entropy_with_logits(sums[:, 1] - sums[:, 0], batch["preferred"])
    torch.testing.assert_close(method.score_segments(batch["observation"][:, 0], batch["action"][:, 0]), sums[:, 0].detach())
    assert method.update(batch)["reward_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_transitions_are_steps_of_the_segments_with_the_learned_reward():
    method, batch, times = make_p_iql(), make_batch(), set()
    for update in range(20):
        method.updates = update
        out = method.transitions(batch)
        assert {k: tuple(v.shape) for k, v in out.items()} == {
            "observation": (2 * B, S), "action": (2 * B, A), "next_observation": (2 * B, S), "reward": (2 * B,),
            "terminated": (2 * B,)}
        for row in range(2 * B):
            obs, act = batch["observation"][row // 2, row % 2], batch["action"][row // 2, row % 2]
            t = int((obs == out["observation"][row]).all(-1).nonzero())
            times.add(t)
            assert torch.equal(out["action"][row], act[t]) and torch.equal(out["next_observation"][row], obs[t + 1])
            assert out["reward"][row].item() == pytest.approx(method.reward(torch.cat([obs[t], act[t]])).item(), rel=1e-4)
        assert not out["terminated"].any()
    assert times == set(range(K - 1))


def test_the_reward_model_stands_still_once_iql_begins():
    method, batch = make_p_iql(), make_batch()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    train(method, batch, 2)
    changed = {k.split(".")[0] for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"reward"} and method.stage() == 1
    before = {k: v.clone() for k, v in method.state_dict().items()}
    train(method, batch, 2)
    changed = {k.split(".")[0] for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert {"critics", "value", "actor"} <= changed and "reward" not in changed


def test_p_iql_with_several_seeds_at_once():
    batches = [make_batch(i) for i in range(2)]
    stack = Stack(lambda: PIQL(PIQL.Config(hidden=(16,), reward_steps=2, learning_rate=0.01)), SPEC, [0, 1])
    together = stack.method
    together.make_optimizers()
    together.draws = Draws([0, 1])
    joined = {k: torch.stack([b[k] for b in batches]) for k in batches[0]}
    for _ in range(5):
        told = together.update(joined)
        together.updates += 1
    for i, batch in enumerate(batches):
        last = train(make_p_iql(seed=i), batch, 5)[-1]
        assert {k: v[i].item() for k, v in told.items()} == pytest.approx(last, rel=1e-3, abs=1e-5)


# ---- the data ----------------------------------------------------------------------------------------------------------
def world(**values):
    values = {"gravity": 0.0, "drag": 0.5, "segments": 40, "held_out_segments": 30, "roll_outs": 64, **values}
    return Segments(make_config([Segments.Config], values))


def test_segments_are_pieces_of_episodes():
    w = world(length=7)
    data, copies = w.learned(), w.copies(1)
    assert data["observation"].shape == (40, 7, 6) and data["action"].shape == (40, 7, 3)
    after, _ = copies.dynamics(data["observation"].double().numpy(), data["action"].double().numpy())
    np.testing.assert_allclose(after[:, :-1], data["observation"][:, 1:].numpy(), rtol=1e-4, atol=1e-5)
    assert data["action"].abs().max() <= 1
    assert w.held_out()["observation"].shape == (30, 7, 6)
    assert not torch.equal(w.held_out()["observation"][:20], data["observation"][:20])


def test_partial_return_is_the_sum_of_rewards():
    w = world(labels="partial_return")
    data = w.learned()
    _, reward = w.copies(1).dynamics(data["observation"].double().numpy(), data["action"].double().numpy())
    np.testing.assert_allclose(data["label_score"].numpy(), reward.sum(1), rtol=1e-4)


def test_regret_is_rewards_and_the_difference_of_values():
    """Against roll-outs of the teacher drawn apart; and the teacher's own action at a state has advantage 0 on average."""
    w = world(roll_outs=512, segments=10, held_out_segments=2)
    data = w.learned()
    observation, action = data["observation"].double().numpy(), data["action"].double().numpy()
    _, reward = w.copies(1).dynamics(observation, action)
    values = w.values(np.concatenate([observation[:, 0], observation[:, -1]]), np.random.default_rng(99))
    expected = reward[:, :-1].sum(1) + values[10:] - values[:10]
    np.testing.assert_allclose(data["label_score"].numpy(), expected, atol=0.6)
    assert np.corrcoef(data["label_score"].numpy(), expected)[0, 1] > 0.98


def test_labels_by_regret_do_not_pay_for_starting_near_the_goal():
    both = {labels: world(labels=labels, segments=400).learned() for labels in ("regret", "partial_return")}
    start = -both["regret"]["observation"][:, 0].square().sum(-1)
    r = {k: torch.corrcoef(torch.stack([start, v["label_score"]]))[0, 1].item() for k, v in both.items()}
    assert r["partial_return"] > 0.8 and abs(r["regret"]) < 0.5 and r["regret"] < r["partial_return"] - 0.4


def test_batches_of_comparisons():
    segments = {"observation": torch.arange(6.0).view(6, 1, 1), "action": torch.arange(6.0).view(6, 1, 1),
                "label_score": torch.tensor([0.0, 1, 2, 2, 4, 5])}
    stream = Preferences(segments, None, 4000, 0, "cpu")
    batch = stream.next()
    assert batch["observation"].shape == (4000, 2, 1, 1) and torch.equal(batch["observation"], batch["action"])
    first, second = batch["observation"][:, :, 0, 0].long().unbind(1)
    score = segments["label_score"]
    expected = torch.where(score[second] == score[first], 0.5, (score[second] > score[first]).float())
    assert torch.equal(batch["preferred"], expected)
    counts = torch.zeros(6, 6).index_put((first, second), torch.ones(4000), accumulate=True)
    assert (counts.diagonal() == 0).all() and counts[~torch.eye(6, dtype=bool)].min() > 80
    assert "label_score" not in stream.data()
    state = stream.state_dict()
    following = stream.next()
    again = Preferences(segments, None, 4000, 0, "cpu")
    again.load_state_dict(state)
    assert torch.equal(again.next()["observation"], following["observation"])
    assert Preferences(segments, None, 8, [0, 1], "cpu").next()["observation"].shape == (2, 8, 2, 1, 1)


def test_a_fixed_list_of_comparisons_is_all_that_is_seen():
    w = world(comparisons=3)
    stream = w.stream(None, "preferences", 0)
    assert stream.pairs.shape == (3, 2) and (stream.pairs[:, 0] != stream.pairs[:, 1]).all()
    seen = {tuple(pair[:, 0, 0].tolist()) for pair in stream.next()["observation"]}
    known = {tuple(stream.segments["observation"][pair, 0, 0].tolist()) for pair in stream.pairs}
    assert seen == known


class Knows:
    """Orders segments by their label, or the other way round; acts as logged plus a constant."""

    def __init__(self, w, sign, shift):
        self.w, self.sign, self.shift = w, sign, shift

    def score_segments(self, observation, action):
        return self.sign * self.w.held_out()["label_score"]

    def act(self, observation, explore):
        logged = self.w.learned()["action"].flatten(0, 1)
        return logged + self.shift if len(observation) == len(logged) else torch.zeros(len(observation), 3)


def test_yardsticks_of_preferences():
    w = world(episodes=2)
    right = w.evaluate(Knows(w, 1.0, 0.5), 0)
    assert right["preference_accuracy"] == 1 and right["distance_preferred"] == pytest.approx(0.5 * 3 ** 0.5)
    assert right["distance_dispreferred"] == pytest.approx(0.5 * 3 ** 0.5)
    assert w.evaluate(Knows(w, -1.0, 0.0), 0)["preference_accuracy"] == 0
    assert w.evaluate(Knows(w, 0.0, 0.0), 0)["preference_accuracy"] == 0.5
    rows = w.references(0)
    assert -60 < rows["noisy teacher, the data"]["return"] < -20 and "teacher" in rows


def test_a_wrong_range_of_noise_is_refused():
    with pytest.raises(UserError, match=r"env.noise=\[0.3,1.0\]"):
        world(noise=(1.0, 0.3)).learned()


def test_a_method_that_needs_rewards_is_refused(cli):
    told = cli("method=td3", "env=pointmass_segments", "size=smoke")
    assert told.code == 2 and "preferences" in told.err
    told = cli("method=cpl", "env=pointmass")
    assert told.code == 2 and "pointmass_segments" in told.err


def test_a_run_learns_whom_to_follow(cli):
    told = cli("method=cpl", "env=pointmass_segments", "size=smoke", "loop.steps=300", "method.bc_steps=100", "env.segments=100",
               "method.learning_rate=0.003", "env.batch_size=32", "env.episodes=8", "logger=none", "--quiet", "--json")
    result = json.loads(told.out)
    assert result["metrics"]["score"] > 95 and result["metrics"]["preference_accuracy"] > 0.6
