"""DFT and ASFT by hand: gradients in probabilities, weights without gradient, both directions of the exact KL, reductions."""

from __future__ import annotations

import math

import pytest
import torch
from token_methods import assembled, bare

from methods.preference.asft import ASFT
from methods.preference.dft import DFT
from methods.tokens.demonstrated import Demonstrated, Given

DOUBLE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tokens(z: torch.Tensor, target: torch.Tensor, mask, **columns) -> Given:
    """A batch whose tokens have the logits z (b, T, V)."""
    log_p = z.log_softmax(-1)
    now = {"log_prob": log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1), "entropy": -(log_p.exp() * log_p).sum(-1)}
    mask = torch.tensor(mask, dtype=z.dtype)
    return Given(now=now, log_prob=now["log_prob"], mask=mask, tokens=mask.sum(), told={}, **columns)


def objective(method, rows: Given) -> torch.Tensor:
    """The loss, as update() puts it together."""
    with torch.no_grad():
        rows.weight = method.weigh_tokens(rows)
    penalty = method.penalty(rows)
    value = method.mean(method.value(rows), rows)
    return value if penalty is None else value + penalty


def case(scale=1.0):
    z = (scale * torch.randn(3, 4, 7, dtype=torch.float64)).requires_grad_()
    return z, torch.randint(7, (3, 4)), [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]


def gradient(loss, z):
    return torch.autograd.grad(loss, z)[0]


# ---- DFT


def test_the_gradient_of_dft_is_that_of_the_probability():
    z, target, mask = case()
    ours = gradient(objective(bare(DFT), tokens(z, target, mask)), z)
    p = z.softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(ours, gradient(-(p * torch.tensor(mask)).sum() / 7, z), **DOUBLE)


def test_with_a_gradient_in_the_weight_rare_tokens_would_be_pushed_down():
    """-p log p rises in p below 1/e; ours falls everywhere."""
    z = torch.tensor([[[0.0, math.log(9)]]], dtype=torch.float64, requires_grad=True)  # p = 0.1
    rows = tokens(z, torch.tensor([[0]]), [[1]])
    assert gradient(objective(bare(DFT), rows), z)[0, 0, 0] < 0
    p = z.softmax(-1)[0, 0, 0]
    assert gradient(-p * p.log(), z)[0, 0, 0] > 0


def test_what_has_next_to_no_probability_is_not_learned_unless_sft_is_mixed_in():
    z = torch.tensor([[[0.0, 12.0]]], dtype=torch.float64, requires_grad=True)
    pulls = [gradient(objective(bare(DFT, weigh=w), tokens(z, torch.tensor([[0]]), [[1]])), z)[0, 0, 0].item()
             for w in (1.0, 0.75, 0.0)]
    assert pulls[0] > -1e-5 and pulls[1] == pytest.approx(-0.25, rel=1e-3) and pulls[2] == pytest.approx(-1, rel=1e-3)


def test_weights_by_hand():
    z = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0]]], dtype=torch.float64)
    rows = tokens(z, torch.tensor([[0, 0]]), [[1, 1]])  # p = 1/4 and 4/5
    assert bare(DFT).weigh_tokens(rows)[0].tolist() == pytest.approx([0.25, 0.8])
    assert rows.told["weight"].item() == pytest.approx(0.525)
    assert bare(DFT, weigh=0.5).weigh_tokens(rows)[0].tolist() == pytest.approx([0.625, 0.9])
    assert bare(DFT, weigh=0.0).weigh_tokens(rows).eq(1).all()


def test_the_mean_is_over_tokens_not_over_responses():
    z = torch.zeros(2, 3, 4, dtype=torch.float64)
    z[0, 0, 0] = 2.0
    rows = tokens(z, torch.zeros(2, 3, dtype=torch.long), [[1, 0, 0], [1, 1, 1]])
    p = [math.exp(2) / (math.exp(2) + 3), 0.25]
    expected = -(p[0] * math.log(p[0]) + 3 * p[1] * math.log(p[1])) / 4
    assert objective(bare(DFT), rows).item() == pytest.approx(expected)


# ---- ASFT


@pytest.mark.parametrize("direction", ["start_policy", "policy_start"])
@pytest.mark.parametrize("weigh", [0.0, 1.0])
def test_asft_by_enumeration_in_all_its_modes(direction, weigh):
    z, target, mask = case()
    first = torch.randn_like(z).detach()
    method = bare(ASFT, kl_direction=direction, weigh=weigh, kl_weight=0.3)
    rows = tokens(z, target, mask)
    rows.now |= {"kl": method.measure(z.flatten(0, 1), target.flatten(), first.flatten(0, 1))["kl"].view(3, 4)}
    loss, total = objective(method, rows), 0.0
    p, q = z.softmax(-1), first.softmax(-1)
    for i in range(3):
        for t in range(4):
            if mask[i][t]:
                a, b = (q, p) if direction == "start_policy" else (p, q)
                kl = sum(a[i, t, v] * (a[i, t, v] / b[i, t, v]).log() for v in range(7))
                at = p[i, t, target[i, t]]
                total += -(at.detach() if weigh else 1.0) * at.log() + 0.3 * kl
    torch.testing.assert_close(loss, total / 7, **DOUBLE)
    torch.testing.assert_close(gradient(loss, z), gradient(total / 7, z), **DOUBLE)


def test_the_start_policy_kl_pulls_by_the_difference_of_probabilities():
    """d KL(pi_0 || pi) / dz = pi - pi_0."""
    z, target, _ = case()
    first = torch.randn_like(z).detach()
    kl = bare(ASFT).measure(z.flatten(0, 1), target.flatten(), first.flatten(0, 1))["kl"]
    torch.testing.assert_close(gradient(kl.sum(), z), z.softmax(-1) - first.softmax(-1), **DOUBLE)


def test_without_its_weight_no_reference_is_kept_and_nothing_more_measured():
    for weight, expected in ((0.0, False), (0.05, True)):
        method = bare(ASFT, kl_weight=weight)
        assert method.needs_reference() == method.compares() == method.measures_more() == expected
    logits, target = torch.randn(5, 7), torch.randint(7, (5,))
    assert bare(ASFT, kl_weight=0.0).measure(logits, target).keys() == bare(DFT).measure(logits, target).keys()


def test_the_kl_is_nothing_at_the_start_and_holds_the_policy_there():
    drift = {}
    for weight in (0.0, 0.05, 5.0):
        method, _, stream = assembled("method=asft", "method.kl_weight=0.05")
        if not weight:
            method.config = type(method.config)(**{**vars(method.config), "kl_weight": 0.0})
        else:
            method.config = type(method.config)(**{**vars(method.config), "kl_weight": weight})
        batch = stream.next()
        told = method.update(batch)
        assert not weight or told["kl"].abs() < 1e-6
        for _ in range(8):
            method.updates += 1
            method.update(stream.next())
        method.config = type(method.config)(**{**vars(method.config), "kl_weight": 1.0})
        with torch.no_grad():
            kl = method.score(batch, method.measure, beside=method.start_policy())["kl"]
        drift[weight] = (kl.sum() / batch["mask"].sum()).item()
    assert drift[0.0] > drift[0.05] > drift[5.0] > 0


@pytest.mark.parametrize("name", ["dft", "asft"])
def test_micro_batches_give_the_whole_batch_s_gradient(name):
    gradients = []
    for micro in (0, 3):
        method, _, stream = assembled(f"method={name}", f"method.micro_rows={micro}", "method.gradient_norm=0")
        batch = stream.next()
        batch["mask"][::2, 6:] = 0
        method.update(batch)
        method.update(batch)
        gradients.append({k: p.grad.clone() for k, p in method.policy.named_parameters()})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-2, atol=2e-5)
    assert max(g.abs().max() for g in gradients[0].values()) > 1e-3


def test_they_change_one_algorithm():
    assert issubclass(ASFT, DFT) and issubclass(DFT, Demonstrated)
