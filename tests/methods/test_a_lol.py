"""A-LoL by hand: advantages, how rows are drawn, every variant's loss and gradient, and its traps."""

from __future__ import annotations

import importlib.util
import math
import types
from pathlib import Path

import pytest
import torch
from token_methods import bare

from methods.preference.a_lol import ALoL
from methods.preference.value_head import ValueHead, fitted_values
from methods.reasoning.sft import SFT
from methods.tokens.demonstrated import Given
from runner.errors import UserError

_spec = importlib.util.spec_from_file_location("lab", Path(__file__).parents[1] / "conformance" / "lab.py")
lab = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)

DOUBLE = {"rtol": 1e-10, "atol": 1e-12}
MASK = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
CREDIT = [0.5, 0.25, 1.0]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batch(spread=1.0):
    log_prob = (-torch.rand(3, 4, dtype=torch.float64) * 2).requires_grad_()
    mask = torch.tensor(MASK, dtype=torch.float64)
    first = log_prob.detach() - spread * torch.randn(3, 4, dtype=torch.float64)
    return Given(log_prob=log_prob, now={"log_prob": log_prob}, mask=mask, tokens=mask.sum(), told={}, first_log_prob=first,
                 credit=torch.tensor(CREDIT, dtype=torch.float64))


def made(variant, **values):
    method = bare(ALoL, variant=variant, **values)
    method.kept = torch.tensor(1.0)
    return method


def objective(method, rows):
    with torch.no_grad():
        rows.weight = method.weigh_tokens(rows)
    penalty = method.penalty(rows)
    value = method.mean(method.value(rows), rows)
    return value if penalty is None else value + penalty


def by_loops(rows, variant, e=0.9, b=0.1, floor=0.1):
    total = 0.0
    for i in range(3):
        lp = [rows.log_prob[i, t] for t in range(4) if MASK[i][t]]
        first = [rows.first_log_prob[i, t] for t in range(4) if MASK[i][t]]
        ratio = (sum(lp) - sum(first)).detach().exp()
        if variant in ("a_lol", "r_lol"):
            own = ratio.clamp(1 - e, 1 + e) * -sum(lp)
        elif variant == "seq":
            own = sum((p - q).detach().exp().clamp(1 - e, 1 + e) * -p for p, q in zip(lp, first))
        elif variant == "r_gold":
            own = sum(max(math.exp(p.item()), floor) * -p for p in lp)
        else:
            own = -sum(lp)
        total = total + CREDIT[i] * own + (b * (sum(lp) - sum(first)) if variant == "kl" else 0.0)
    return total / 3


@pytest.mark.parametrize("variant", ["a_lol", "seq", "ref_free", "kl", "r_lol", "weighted_bc", "r_gold"])
@pytest.mark.parametrize("values", [{}, {"clip": 0.2, "kl_weight": 0.7, "floor": 0.5}])
def test_every_variant_by_loops(variant, values):
    rows = batch()
    loss, expected = objective(made(variant, **values), rows), by_loops(rows, variant, *values.values())
    torch.testing.assert_close(loss, expected, **DOUBLE)
    ours, theirs = (torch.autograd.grad(v, rows.log_prob)[0] for v in (loss, expected))
    torch.testing.assert_close(ours, theirs, **DOUBLE)


def test_the_gradient_goes_on_where_the_ratio_is_clipped():
    """c clip(r) grad l: PPO's clip would give none there."""
    rows = batch(spread=0.0)
    rows.first_log_prob[:, 0] += torch.tensor([3.0, -3.0, 3.0])
    ratio = ((rows.log_prob - rows.first_log_prob) * rows.mask).sum(1).exp()
    assert ((ratio < 0.1) | (ratio > 1.9)).all()
    gradient, = torch.autograd.grad(objective(made("a_lol"), rows), rows.log_prob)
    for i in range(3):
        kept = 0.1 if ratio[i] < 1 else 1.9
        assert gradient[i, 0].item() == pytest.approx(-CREDIT[i] * kept / 3)
    assert rows.told["clipped"] == 1


def test_padding_weighs_nothing_although_a_clamp_would_make_something_of_it():
    one, two = batch(), batch()
    two.log_prob = torch.cat([one.log_prob.detach(), torch.full((3, 3), -9.0, dtype=torch.float64)], 1).requires_grad_()
    two.first_log_prob = torch.cat([one.first_log_prob, torch.full((3, 3), 9.0, dtype=torch.float64)], 1)
    two.mask = torch.cat([one.mask, torch.zeros(3, 3, dtype=torch.float64)], 1)
    for variant in ("a_lol", "seq", "r_gold"):
        losses = [objective(made(variant), rows) for rows in (one, two)]
        torch.testing.assert_close(*losses, **DOUBLE)
        assert torch.autograd.grad(losses[1], two.log_prob)[0][two.mask == 0].eq(0).all()


def test_the_kl_variant_is_the_advantage_less_its_weight():
    rows = batch()
    with_kl, = torch.autograd.grad(objective(made("kl", kl_weight=0.3), rows), rows.log_prob)
    shifted = batch()
    shifted.log_prob, shifted.credit = rows.log_prob, rows.credit - 0.3
    without, = torch.autograd.grad(objective(made("ref_free"), shifted), rows.log_prob)
    torch.testing.assert_close(with_kl, without, **DOUBLE)


def test_at_the_start_the_ratio_changes_nothing():
    rows = batch(spread=0.0)
    losses = [objective(made(v), rows).item() for v in ("a_lol", "seq", "ref_free", "kl", "r_lol", "weighted_bc")]
    assert losses == pytest.approx([losses[0]] * 6)


def test_nll_is_sft():
    rows = batch()
    ours = objective(made("nll"), rows)
    rows.weight = torch.ones_like(rows.mask)
    assert torch.equal(ours, bare(SFT).mean(bare(SFT).value(rows), rows))


# ---- what prepare makes of the rewards

DATA = {"reward": torch.tensor([0.9, 0.2, 0.5, 0.0]), "value": torch.tensor([0.4, 0.4, 0.5, 0.1])}


def prepared(variant, **values):
    method = bare(ALoL, variant=variant, **values)
    method.load_start = lambda start: None
    return method, method.prepare(dict(DATA))


@pytest.mark.parametrize("variant", ["a_lol", "seq", "ref_free", "kl"])
def test_advantages_and_drawing_by_them(variant):
    method, data = prepared(variant)
    assert data["credit"].tolist() == pytest.approx([0.5, 0, 0, 0]) and torch.equal(data["draw"], data["credit"])
    assert method.kept == 0.25 and prepared(variant, draw="filter")[1]["draw"].tolist() == [1, 0, 0, 0]
    assert "draw" not in prepared(variant, draw="all")[1]


@pytest.mark.parametrize("variant", ["r_lol", "weighted_bc", "r_gold"])
def test_rewards_are_not_filtered_unless_asked(variant):
    method, data = prepared(variant)
    assert torch.equal(data["credit"], DATA["reward"]) and "draw" not in data and method.kept == 0.75
    assert torch.equal(prepared(variant, draw="priority")[1]["draw"], DATA["reward"])


def test_nothing_better_than_the_policy_itself_is_refused():
    method = bare(ALoL)
    method.load_start = lambda start: None
    with pytest.raises(UserError, match="nothing to learn.*\n.*r_lol"):
        method.prepare({"reward": torch.tensor([0.1, 0.2]), "value": torch.tensor([0.4, 0.4])})
    assert prepared("nll")[1] is None


def test_references_are_kept_only_where_they_are_asked():
    assert {v: bare(ALoL, variant=v).needs_reference() for v in
            ("a_lol", "seq", "ref_free", "kl", "r_lol", "weighted_bc", "r_gold", "nll")} == \
        {"a_lol": True, "seq": True, "ref_free": False, "kl": True, "r_lol": True, "weighted_bc": False, "r_gold": False,
         "nll": False}


def test_a_value_head_pools_with_a_query_a_head_and_sees_no_padding():
    head = ValueHead(16)
    assert head.heads == 8 and ValueHead(21).heads == 1
    hidden, mask = torch.randn(2, 3, 16), torch.tensor([[True, True, True], [False, True, True]])
    with torch.no_grad():
        assert head(hidden, mask).tolist() == [0.5, 0.5]
        for p in head.parameters():
            p.normal_()
        for i in range(2):
            pooled = []
            for k in range(8):
                states = hidden[i, :, 2 * k:2 * k + 2][mask[i]]
                attention = (states @ head.query[k] / math.sqrt(2)).softmax(0)
                pooled.append(attention @ states)
            expected = torch.sigmoid(torch.cat(pooled) @ head.weight + head.bias)
            torch.testing.assert_close(head(hidden, mask)[i], expected)
        changed = hidden.clone()
        changed[1, 0] += 100
        assert torch.equal(head(changed, mask), head(hidden, mask))


class Trunk:
    """A policy whose hidden states are what its prompts say."""

    shape = types.SimpleNamespace(width=8)

    def hidden(self, ids, mask):
        return torch.nn.functional.one_hot(ids, 8).float()


def test_the_head_is_fitted_to_the_values_of_prompts_and_smooths_what_it_cannot_tell_apart():
    prompt = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 1]])
    mask = torch.tensor([[False, True]] * 4)
    value = torch.tensor([0.2, 0.9, 0.6, 0.2])
    told = fitted_values(Trunk(), prompt, mask, value, 500, 0.05)
    torch.testing.assert_close(told, value, atol=0.02, rtol=0)
    assert fitted_values(Trunk(), prompt, mask, value, 1, 0.05).tolist() == [0.5] * 4  # as it begins
    alike = Trunk()
    alike.hidden = lambda ids, mask: torch.ones(*ids.shape, 8)
    torch.testing.assert_close(fitted_values(alike, prompt, mask, value, 500, 0.05), torch.full((4,), (0.2 + 0.9 + 0.6) / 3),
                               atol=0.01, rtol=0)


def test_advantages_may_be_of_the_head():
    method, _, stream = lab.assembled("a_lol", 'method.critic="head"', "method.value_steps=20", env="bandit")
    columns = stream.columns
    value = fitted_values(method.policy, columns["prompt"], columns["prompt_mask"], columns["value"], 20, 0.01)
    torch.testing.assert_close(columns["credit"], (columns["reward"] - value).clamp(min=0))
    assert (value != columns["value"]).all() and torch.isfinite(value).all()
