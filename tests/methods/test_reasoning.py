"""The reasoning family's base by hand: advantages, aggregation, KL gradients, clips, micro-batches, groups, SIREN's entropies."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from token_methods import assembled, bare

from methods.reasoning.base import GroupPolicy, Rows, group_statistics, kl
from methods.reasoning.batches import groups_of, join
from methods.reasoning.clip_cov import covariance
from methods.reasoning.reinforce_pp import whiten
from methods.reasoning.siren import mean_at_peaks, nucleus_entropy, peaks


def minibatch(advantage, log_ratio, mask=None, **more) -> Rows:
    a, d = torch.tensor(advantage), torch.tensor(log_ratio, dtype=torch.float32)
    mask = torch.ones_like(d) if mask is None else torch.tensor(mask, dtype=torch.float32)
    a = a[:, None].expand_as(d) if a.dim() == 1 else a
    return Rows(advantage=a, log_ratio=d, ratio=d.exp(), log_prob=d, mask=mask, weight=torch.ones_like(d), low=0.2, high=0.2,
                tokens=mask.sum(), count=len(d), told={}, number=0, **more)


def test_group_statistics():
    values, group = torch.tensor([1.0, 0, 0, 1, 1, 1, 5]), torch.tensor([0, 0, 0, 0, 1, 1, 2])
    mean, deviation, size = group_statistics(values, group)
    assert mean.tolist() == [0.5] * 4 + [1, 1, 0] and size.tolist() == [4, 4, 4, 4, 2, 2, 1]
    assert deviation[:4].tolist() == pytest.approx([math.sqrt(1 / 3)] * 4)
    assert deviation[4:].tolist() == [0, 0, 1]  # equal rewards: exactly none; a group of one: 1


def test_equal_values_have_no_deviation_whatever_they_are():
    values = torch.full((8,), 0.1) * 3
    _, deviation, _ = group_statistics(values, torch.zeros(8, dtype=torch.long))
    assert deviation.eq(0).all()


def test_grpo_advantage_of_binary_rewards():
    """At solve rate x the rare outcome gets sqrt((1-x)/x), by the population deviation."""
    r = torch.tensor([1.0] + [0.0] * 7)
    batch = {"reward": r, "group": torch.zeros(8, dtype=torch.long)}
    a = bare(GroupPolicy).advantage(batch, {})
    x, bessel = 1 / 8, math.sqrt(7 / 8)
    assert a[0].item() == pytest.approx(math.sqrt((1 - x) / x) * bessel, rel=1e-5)
    assert bare(GroupPolicy, scale="none").advantage(batch, {}).tolist() == pytest.approx([7 / 8] + [-1 / 8] * 7)


def test_rloo_is_dr_grpo_times_g_over_g_minus_1():
    from methods.reasoning.rloo import RLOO

    r = torch.rand(8)
    batch = {"reward": r, "group": torch.zeros(8, dtype=torch.long)}
    a = bare(RLOO).advantage(batch, {})
    for i in range(8):
        assert a[i].item() == pytest.approx((r[i] - (r.sum() - r[i]) / 7).item(), abs=1e-6)
    torch.testing.assert_close(a, 8 / 7 * bare(GroupPolicy, scale="none").advantage(batch, {}))
    assert bare(RLOO).advantage({"reward": torch.ones(1), "group": torch.zeros(1, dtype=torch.long)}, {}).tolist() == [0]


@pytest.mark.parametrize(("mode", "expected"), [
    ("token_mean", 6 / 3), ("seq_mean_token_mean", (1.5 + 3) / 2), ("seq_mean_token_sum", 6 / 2),
    ("token_sum_norm", 6 / (2 * 3))])
def test_aggregation(mode, expected):
    rows = minibatch([1.0, 1.0], [[0, 0, 0], [0, 0, 0]], [[1, 1, 0], [1, 0, 0]])
    values = torch.tensor([[1.0, 2, 100], [3, 100, 100]])
    assert bare(GroupPolicy, aggregation=mode).aggregate(values, rows).item() == pytest.approx(expected)


def test_clip_and_dual_clip():
    rows = minibatch([[1.0, 1, -1, -1, -1]], [[math.log(2), math.log(0.5), math.log(2), math.log(0.5), math.log(10)]])
    assert bare(GroupPolicy).surrogate(rows).tolist()[0] == pytest.approx([-1.2, -0.5, 2.0, 0.8, 10.0])
    assert bare(GroupPolicy, dual_clip=3.0).surrogate(rows).tolist()[0] == pytest.approx([-1.2, -0.5, 2.0, 0.8, 3.0])


def test_the_kl_estimators_gradients_by_enumeration():
    """On-policy: E[grad k1] = 0, E[grad k2] = grad KL(pi || ref), E[grad k3] = grad KL(ref || pi)."""
    torch.manual_seed(0)
    z, reference = torch.randn(16, dtype=torch.float64, requires_grad=True), torch.randn(16, dtype=torch.float64).log_softmax(0)

    def gradient(value):
        return torch.autograd.grad(value, z)[0]

    lp = z.log_softmax(0)
    reverse = gradient((lp.exp() * (lp - reference)).sum())
    for estimator, expected in (("k1", torch.zeros(16, dtype=torch.float64)), ("k2", reverse)):
        lp = z.log_softmax(0)
        torch.testing.assert_close(gradient((lp.exp().detach() * kl(lp, reference, estimator)).sum()), expected)
    lp = z.log_softmax(0)
    forward = gradient((reference.exp() * (reference - lp)).sum())
    lp = z.log_softmax(0)
    torch.testing.assert_close(gradient((lp.exp().detach() * kl(lp, reference, "k3")).sum()), forward)


def test_capped_k3_has_no_gradient():
    lp = torch.tensor([-5.0], requires_grad=True)
    kl(lp, torch.tensor([0.0]), "k3", 10.0).sum().backward()
    assert lp.grad.item() == 0


def test_whitening():
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    w = whiten(torch.tensor([[1.0, 2, 9], [3, 9, 9]]), mask)
    kept = w[mask > 0]
    assert kept.mean().abs() < 1e-6 and kept.var().item() == pytest.approx(1.0, rel=1e-4) and w[mask == 0].eq(0).all()


def test_join_and_groups():
    one = {"prompt": torch.ones(4, 2, dtype=torch.long), "prompt_mask": torch.ones(4, 2, dtype=torch.bool),
           "group": torch.tensor([0, 0, 1, 1]), "answer": torch.tensor([0, -1, 1, 1]), "reward": torch.arange(4.0)}
    two = {**one, "prompt": torch.full((4, 3), 2), "prompt_mask": torch.ones(4, 3, dtype=torch.bool)}
    both = join([one, two])
    assert both["group"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and both["answer"].tolist() == [0, -1, 1, 1, 2, -1, 3, 3]
    assert both["prompt"][0].tolist() == [0, 1, 1] and not both["prompt_mask"][0, 0]
    kept = groups_of(both, torch.tensor([False, True, False, True]))
    assert kept["group"].tolist() == [0, 0, 1, 1] and kept["reward"].tolist() == [2, 3, 2, 3]


def test_nucleus_leaves_out_the_token_that_crosses():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.9, 0.05, 0.03, 0.02]]).log().requires_grad_()
    h = nucleus_entropy(logits, 0.8, 10)  # 0.5 and 0.25 stay below 0.8, 0.15 crosses
    p = torch.tensor([2 / 3, 1 / 3])
    assert h[0].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5) and h[1].item() == pytest.approx(0, abs=1e-6)
    h.sum().backward()
    assert logits.grad[0].abs().max() > 0 and logits.grad[1].abs().max() < 1e-6


def test_a_nucleus_of_everything_is_the_entropy():
    logits = torch.randn(5, 19)
    p = logits.softmax(-1)
    torch.testing.assert_close(nucleus_entropy(logits, 1.01, 10000), -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-5)


def test_peaks_are_of_each_response_and_an_empty_row_counts_as_zero():
    entropy = torch.tensor([[0.1, 0.2, 0.3, 0.4, 9.0], [0.0, 0.0, 0.0, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    peak = peaks(entropy, mask, 0.5)
    assert peak.tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    assert mean_at_peaks(entropy, peak).item() == pytest.approx((0.35 + 0) / 2)


def test_covariance_sums_to_zero_for_constant_advantages():
    rows = minibatch([1.0, 1.0], [[0.3, 0.1], [0.2, 0.7]])
    assert covariance(rows).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["grpo", "siren", "kl_cov", "dr_grpo", "entropy_bonus"])
def test_micro_batches_give_the_whole_minibatch_s_gradient(name):
    """Also where the loss looks at quantiles and means of the whole minibatch. (Of gradients: Adam would blow up rounding.)"""
    gradients = []
    for micro in (0, 3):
        method, _, stream = assembled(f"method={name}", f"method.micro_rows={micro}", "method.entropy_weight=0.1"
                                      if name == "entropy_bonus" else "method.kl_weight=0.1")
        method.update(stream.next())
        gradients.append({k: p.grad.clone() for k, p in method.policy.named_parameters()})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-3, atol=1e-6)
    assert max(g.abs().max() for g in gradients[0].values()) > 1e-3


def test_minibatches_keep_groups_whole_and_cover_every_row():
    method, _, stream = assembled("method=grpo", "method.prompts=6", "method.minibatches=4")
    batch = stream.next()
    parts = method.split(batch)
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
    for rows in parts:
        groups = batch["group"][rows]
        assert all((groups == g).sum() == 4 for g in groups.unique())


def test_padding_does_not_change_the_update():
    """The same batch with two more columns of padding on either side: equal gradients."""
    import torch.nn.functional as F

    gradients = []
    for pad in (0, 2):
        method, _, stream = assembled("method=grpo", "method.aggregation=seq_mean_token_mean")
        batch = stream.next()
        for key in ("response", "mask", "log_prob"):
            batch[key] = F.pad(batch[key], (0, pad))
        for key in ("prompt", "prompt_mask"):
            batch[key] = F.pad(batch[key], (pad, 0))
        method.update(batch)
        gradients.append({k: p.grad.clone() for k, p in method.policy.named_parameters()})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-3, atol=1e-6)


def test_groups_without_contrast_change_nothing():
    method, _, stream = assembled("method=grpo")
    batch = stream.next()
    batch["reward"] = torch.ones_like(batch["reward"])
    before = {k: v.clone() for k, v in method.policy.state_dict().items()}
    told = method.update(batch)
    assert all(torch.equal(before[k], v) for k, v in method.policy.state_dict().items())
    assert told["same_reward"] == 1 and all(torch.isfinite(v) for v in told.values())


def test_dapo_keeps_only_groups_with_contrast_and_shapes_long_responses():
    from methods.reasoning.dapo import DAPO

    def rollouts(problems, samples, temperature, name):
        n, rows = len(problems), len(problems) * samples
        correct = torch.tensor([0.0] * (rows - 1) + [1.0])  # one group of n has contrast
        return {"prompt": torch.zeros(rows, 2, dtype=torch.long), "prompt_mask": torch.ones(rows, 2, dtype=torch.bool),
                "group": torch.arange(n).repeat_interleave(samples), "correct": correct, "answer": torch.zeros(rows).long()}

    asked = []
    source = SimpleNamespace(problems=lambda n: asked.append(n) or [0] * n,
                             rollouts=lambda p, s, t, name: rollouts(p, s, t, name))
    out = bare(DAPO, prompts=3, samples=2, most_rounds=5).collect(source)
    assert len(asked) == 3 and len(out["correct"]) == 6 and out["group"].tolist() == [0, 0, 1, 1, 2, 2]
    assert out["correct"].tolist() == [0, 1] * 3
    batch = {"reward": torch.zeros(3), "length": torch.tensor([16.0, 18, 20]), "mask": torch.ones(3, 20)}
    assert bare(DAPO).reward(batch).tolist() == pytest.approx([0, -0.5, -1])
