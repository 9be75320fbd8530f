"""The algorithm on preference pairs, which is DPO: gradient by hand, fixed point, invariances, pairs that say nothing."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from pair_methods import TEXTS, arm_pairs, gradient, seen, swapped, tabular, value, word_pairs, words
from token_methods import bare, composed

from envs.pairs.bandit import optimum
from envs.pairs.base import PairWorld
from envs.pairs.task import Pair
from methods.preference.dpo import DPO
from runner.errors import UserError
from runner.run import assemble

TRIPLES = [(0, 0, 1), (0, 2, 3), (1, 3, 0), (1, 1, 2), (0, 3, 1)]


def close(actual, expected, rtol=1e-5, atol=1e-7):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def off_reference(method, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in method.policy.parameters():
            p.add_(torch.randn_like(p))
    return method


def test_the_gradient_of_a_table_is_the_one_derived_by_hand():
    """d/d theta[x, a] of -log sigma(z): -beta sigma(-z) (1[a = w] - 1[a = l]); the normaliser cancels."""
    torch.manual_seed(0)
    base, beta = torch.randn(2, 4), 0.7
    method = off_reference(tabular(DPO, base, beta=beta))
    theta, expected, losses = method.policy.theta.detach().double(), torch.zeros(2, 4, dtype=torch.double), []
    for x, w, l in TRIPLES:
        z = beta * (theta[x, w] - theta[x, l])
        losses.append(math.log1p(math.exp(-z)))
        pull = beta / (1 + math.exp(z)) / len(TRIPLES)
        expected[x, w] -= pull
        expected[x, l] += pull
    loss, slope = gradient(method, arm_pairs(method, TRIPLES))
    close(loss, sum(losses) / len(losses))
    close(slope.view(2, 4), expected)
    again = method.policy.theta.detach().clone().requires_grad_()
    rho = (base + again).log_softmax(-1) - base.log_softmax(-1)
    x, w, l = torch.tensor(TRIPLES).T
    torch.nn.functional.softplus(-beta * (rho[x, w] - rho[x, l])).mean().backward()
    close(slope.view(2, 4), again.grad)


def test_soft_labels_over_all_pairs_lead_to_the_tilted_reference():
    torch.manual_seed(1)
    base, reward, beta = 0.5 * torch.randn(3, 6), torch.randn(3, 6), 0.8
    method = tabular(DPO, base, beta=beta)
    every = [(x, i, j) for x in range(3) for i in range(6) for j in range(i)]
    x, i, j = torch.tensor(every).T
    batch = arm_pairs(method, every, torch.sigmoid(reward[x, i] - reward[x, j]))
    for step in range(600):
        method.config = bare(DPO, beta=beta, gradient_norm=0.0, learning_rate=0.1 * 0.99 ** step).config
        method.update(batch)
    mine = (base + method.policy.theta.detach()).softmax(-1)
    assert (mine - optimum(base, reward, beta).exp()).abs().sum(-1).max() / 2 < 1e-3
    assert (mine - base.softmax(-1)).abs().sum(-1).min() / 2 > 0.1  # it had somewhere to go


def test_padding_order_and_parts_of_a_batch_change_nothing():
    method = words(DPO, beta=0.5)
    label = torch.tensor([1.0, 0.8, 0.3, 1.0, 0.6])
    loss, slope = gradient(method, word_pairs(method, TEXTS, label))
    assert slope.abs().max() > 1e-4
    order = [3, 0, 4, 2, 1]
    for batch in (word_pairs(method, TEXTS, label, padding=3),
                  word_pairs(method, [TEXTS[i] for i in order], label[order]),
                  swapped(word_pairs(method, TEXTS, label))):
        other, turned = gradient(method, batch)
        close(other, loss)
        close(turned, slope, rtol=1e-4, atol=1e-6)
    batch = word_pairs(method, TEXTS, label)
    for rows in (1, 3, 4):
        method.config = bare(DPO, beta=0.5, gradient_norm=0.0, learning_rate=0.01, micro_rows=rows).config
        other, parts = gradient(method, batch)
        close(other, loss)
        close(parts, slope, rtol=1e-4, atol=1e-6)


def test_a_response_is_its_sum_of_tokens_without_the_prompt():
    """Both by the transformer's own full forward, a row at a time."""
    method = words(DPO)
    batch = word_pairs(method, TEXTS)
    pairs = method.pairs(batch)
    with torch.no_grad():
        method.see(pairs, method.score(method.rows(batch)))
    for n, (prompt, *sides) in enumerate(TEXTS):
        for s, text in enumerate(sides):
            ids = torch.tensor(method.tokenizer.encode(prompt + text)).unsqueeze(0)
            total = 0.0
            for policy, sign in ((method.policy, 1), (method.reference, -1)):
                log_p = policy.logits(ids)[0].detach().log_softmax(-1)
                total += sign * sum(log_p[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1]))
            close(pairs.rho[s, n], total, rtol=1e-4, atol=1e-5)
            assert pairs.length[s, n] == len(text)


@pytest.mark.parametrize("label", [1.0, 0.5])
def test_identical_responses_give_no_gradient_and_no_nan(label):
    method = words(DPO)
    same = [(p, w, w) for p, w, _ in TEXTS]
    loss, slope = gradient(method, word_pairs(method, same, torch.full((5,), label)))
    close(loss, math.log(2))
    assert slope.abs().max() < 1e-6


def test_labels_of_one_half_give_no_gradient_at_the_reference_and_none_of_them_is_nan():
    method = tabular(DPO, torch.randn(2, 4))
    half = torch.full((5,), 0.5)
    loss, slope = gradient(method, arm_pairs(method, TRIPLES, half))
    close(loss, math.log(2))
    assert slope.abs().max() < 1e-7
    for far in (-1e4, 1e4):  # saturated either way
        log_prob = torch.tensor([[far], [0.0]], requires_grad=True)
        out = value(bare(DPO), log_prob, label=[0.5])
        out.backward()
        assert torch.isfinite(out) and torch.isfinite(log_prob.grad).all()


def test_parts_meet_what_they_are_promised():
    pairs = seen(bare(DPO), torch.tensor([[[-1.0, -2.0]], [[-3.0, -4.0]]]),
                 reference=torch.tensor([[[-2.0, -1.5]], [[-1.0, 9.0]]]), mask=torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]]]))
    close(pairs.rho, [[0.5], [-2.0]])
    assert pairs.length.tolist() == [[2.0], [1.0]]


# -- pairs that say nothing

class Given(PairWorld):
    """A world with the pairs that it is given."""

    def make_task(self):
        return None

    def _start(self):
        return {}


def given(pairs):
    world = Given(Given.Config(batch_size=1))
    world.task = SimpleNamespace(pairs=lambda: pairs)
    return world


def test_pairs_of_identical_responses_are_dropped_and_told():
    method = words(DPO, width=3)
    world = given([Pair("a", "bz", "cz"), Pair("a", "dz", "dz"), Pair("a", "eeez", "eeef"), Pair("b", "fz", "ffz", 0.5)])
    data = world.stream(method, "pairs", 0).data()
    assert data["label"].tolist() == [1.0, 0.5] and data["pair"].tolist() == [0, 3]
    assert world.provenance() == {"pairs": 2, "identical": 2, "digest": world.provenance()["digest"]}
    with pytest.raises(UserError, match="none of the 1 pairs has two different responses"):
        given([Pair("a", "eeez", "eeef")]).stream(method, "pairs", 0)
    with pytest.raises(UserError, match="no training pairs"):
        given([]).stream(method, "pairs", 0)


def test_the_record_names_a_bandits_pairs():
    method, world, stream = assemble(composed("method=dpo", "env=bandit"))
    assert world.provenance()["pairs"] == 40 and world.provenance()["identical"] == 0
    other = copy.copy(world)
    method.seed = 1
    other.stream(method, "pairs", 1)
    assert other.provenance()["digest"] != world.provenance()["digest"]
