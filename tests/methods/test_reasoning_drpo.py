"""DisCO and DRPO by hand: coefficients, value, gradient, trust region, group sizes; rewards for short responses."""

from __future__ import annotations

import math

import pytest
import torch

from methods.reasoning.base import Rows
from methods.reasoning.disco import DisCO
from methods.reasoning.drpo import DRPO
from methods.reasoning.length_penalty import LengthPenalty
from runner.errors import UserError
from runner.interface import make_config
from runner.knobs import knobs_of

LONGEST = 10


def bare(cls, **values):
    """A method without a policy, for its parts; at most 10 tokens a response."""
    values = {"aggregation": "seq_mean_token_mean", **values}
    method = cls(make_config([cls.Config], {**{k.name: k.default for k in knobs_of(cls.Config)}, **values}))
    method.response_length = lambda: LONGEST
    return method


def rows_of(correct, lengths, group, log_prob=None, padding=0) -> Rows:
    width, length = LONGEST + padding, torch.tensor(lengths)
    mask = (torch.arange(width) < length[:, None]).float()
    log_prob = torch.randn(len(lengths), width) if log_prob is None else log_prob
    return Rows(correct=torch.tensor(correct).float(), length=length.float(), group=torch.tensor(group), mask=mask,
                log_prob=(log_prob * mask).requires_grad_(), weight=torch.ones_like(mask), tokens=mask.sum(), count=len(lengths),
                told={}, number=0)


def objective(rows, tau, lam):
    """-(1/Q) sum_g J_g as the paper writes it, with loops."""
    total, groups = 0.0, sorted(set(rows.group.tolist()))
    score = [(rows.log_prob[i] * rows.mask[i]).sum() / rows.mask[i].sum() for i in range(rows.count)]
    for g in groups:
        right = [i for i in range(rows.count) if rows.group[i] == g and rows.correct[i] > 0]
        wrong = [i for i in range(rows.count) if rows.group[i] == g and rows.correct[i] == 0]
        if not right or not wrong:
            continue
        om = [math.exp((1 - rows.length[i].item() / LONGEST) / lam) if lam else 1.0 for i in right]
        total += sum(o * score[i] for o, i in zip(om, right)) / sum(om)
        total -= tau * torch.stack([(score[i] / tau).exp() for i in wrong]).mean().log()
    return -total / len(groups)


CASE = ([1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1], [3, 8, 5, 10, 2, 9, 4, 7, 1, 2, 3, 4], [0] * 4 + [1] * 4 + [2] * 4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("tau", [10.0, 0.3])
@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5])
def test_value_and_gradient_are_the_paper_s(tau, lam):
    """Group 2 is all right: it counts in Q, and nothing of it moves."""
    rows, method = rows_of(*CASE), bare(DRPO, tau=tau, length_temperature=lam)
    method.weigh(rows)
    ours = method.aggregate(method.surrogate(rows), rows)
    expected = objective(rows, tau, lam)
    torch.testing.assert_close(ours, expected)
    gradient, = torch.autograd.grad(ours, rows.log_prob)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, rows.log_prob)[0], rtol=1e-4, atol=1e-6)
    assert gradient[:8].abs().sum() > 0 and gradient[8:].eq(0).all()


@pytest.mark.parametrize("lam", [0.0, 0.05, 0.5])
def test_every_right_response_is_pushed_up_and_every_wrong_one_down(lam):
    rows, method = rows_of(*CASE), bare(DRPO, length_temperature=lam)
    method.weigh(rows)
    a, right = rows.advantage[:8, 0], rows.correct[:8] > 0
    assert (a[right] > 0).all() and (a[~right] < 0).all() and rows.told["right_pushed_down"] == 0
    for g in (0, 1):  # as much up as down
        assert a[4 * g:4 * g + 4].sum().item() == pytest.approx(0, abs=1e-6)


def test_short_right_responses_weigh_more_and_infinite_lambda_is_disco():
    rows = rows_of(*CASE)
    bare(DRPO, length_temperature=0.1).weigh(rows)
    assert (rows.advantage[0, 0] / rows.advantage[1, 0]).item() == pytest.approx(math.exp(5 / LONGEST / 0.1))
    rows, disco = (rows_of(*CASE, log_prob=rows.log_prob.detach()) for _ in range(2))
    bare(DRPO, length_temperature=0.0).weigh(rows)
    bare(DisCO).weigh(disco)
    assert torch.equal(rows.advantage, disco.advantage) and rows.advantage[0, 0] == rows.advantage[1, 0] == 4 / 2


def test_a_tiny_lambda_takes_the_shortest_without_overflow():
    rows = rows_of(*CASE)
    bare(DRPO, length_temperature=1e-4).weigh(rows)
    assert rows.advantage[:2, 0].tolist() == pytest.approx([4, 0])


def test_weights_do_not_change_with_the_padding():
    one = rows_of(*CASE)
    log_prob = torch.cat([one.log_prob.detach(), torch.zeros(12, 7)], 1)
    two = rows_of(*CASE, log_prob=log_prob, padding=7)
    for rows in (one, two):
        bare(DRPO).weigh(rows)
    torch.testing.assert_close(one.advantage[:, 0], two.advantage[:, 0])


def test_a_small_tau_pushes_down_the_likeliest_wrong_response():
    log_prob = torch.tensor([-1.0, -1, -0.1, -2])[:, None].expand(4, LONGEST)
    rows = rows_of([1, 0, 0, 0], [4, 4, 4, 4], [0] * 4, log_prob)
    bare(DisCO, tau=0.01).weigh(rows)
    assert rows.advantage[:, 0].tolist() == pytest.approx([4, 0, -4, 0])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_bound_is_a_hinge_on_the_mean_over_tokens(estimator):
    method = bare(DisCO, constraint=100.0, radius=0.1, constraint_kl=estimator)
    rows = rows_of([1, 0], [1, 3], [0, 0], torch.zeros(2, LONGEST))
    for step, over in ((-0.5, True), (-0.01, False)):
        rows.log_ratio = (rows.log_prob + step) * rows.mask
        rows.ratio = rows.log_ratio.exp()
        k = -step if estimator == "k1" else math.exp(step) - step - 1
        value = method.penalty(rows)
        assert value.item() == pytest.approx(100 * max(k - 0.1, 0) * k)
        gradient, = torch.autograd.grad(value, rows.log_prob)
        slope = -1 if estimator == "k1" else math.exp(step) - 1
        assert gradient[1, 2].item() == pytest.approx(100 * max(k - 0.1, 0) * slope / 4) and (gradient.any() == over)


def test_groups_of_unequal_size_are_refused():
    batch = {"reward": torch.zeros(5), "group": torch.tensor([0, 0, 1, 1, 1])}
    for cls in (DisCO, DRPO):
        with pytest.raises(UserError, match="one size"):
            bare(cls).reward(batch)
        assert len(bare(cls).reward({**batch, "group": torch.tensor([0, 0, 0, 0, 0])})) == 5
        bare(cls, discriminative=False).reward(batch)


# ---- rewards for short responses

BATCH = {"reward": torch.tensor([1.0, 1, 0, 0, 1, 0]), "correct": torch.tensor([1.0, 1, 0, 0, 1, 0]),
         "length": torch.tensor([2.0, 6, 4, 10, 7, 3]), "group": torch.tensor([0, 0, 0, 0, 1, 1])}


def test_forms_of_the_length_penalty():
    down, up = 1 / (1 + math.e), 1 / (1 + 1 / math.e)
    for form, expected in (("linear", [0.9, 0.7, 0, 0, 0.65, 0]),
                           ("normalised", [1 - 0.5 * down, 1 - 0.5 * up, 0, 0, 0.75, 0]),  # mean 4, deviation 2; alone: 1/2
                           ("adaptive", [0.95, 0.85, -0.1, -0.25, 0.825, -0.075])):
        ours = bare(LengthPenalty, length_alpha=0.5, length_form=form).reward(BATCH)
        assert ours.tolist() == pytest.approx(expected, abs=1e-6), form


def test_a_length_reward_pushes_long_right_responses_down_which_drpo_never_does():
    """Two right responses of 2 and 10 tokens among three wrong ones: 10 gets 0.1 of a mean of 0.18."""
    correct, length, group = torch.tensor([1.0, 1, 0, 0, 0]), torch.tensor([2.0, 10, 5, 5, 5]), torch.zeros(5, dtype=torch.long)
    method = bare(LengthPenalty, length_alpha=0.9, length_form="linear", scale="none")
    batch = {"reward": correct, "correct": correct, "length": length, "group": group, "mask": torch.ones(5, LONGEST)}
    batch["reward"] = method.reward(batch)
    a = method.advantage(batch, {})
    batch["advantage"] = a[:, None].expand(5, LONGEST)
    method.told = {}
    method.observe(batch, {})
    assert a[1] < 0 < a[0] and method.told["right_pushed_down"] == 0.5
    rows = rows_of([1, 1, 0, 0, 0], [2, 10, 5, 5, 5], [0] * 5)
    bare(DRPO).weigh(rows)
    assert rows.advantage[1, 0] > 0
