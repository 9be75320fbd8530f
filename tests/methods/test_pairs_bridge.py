"""SFT and then DPO in one run: either stage against the method that does it alone, and where the reference stands."""

from __future__ import annotations

import copy

import pytest
import torch
from pair_methods import TEXTS, arm_pairs, tabular, word_pairs, words

from methods.preference.dpo import DPO
from methods.preference.f_sft import phi
from methods.preference.sft_then_dpo import SFTThenDPO
from runner.errors import UserError

BASE = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
TRIPLES = [(0, 0, 1), (0, 2, 1), (1, 3, 0), (1, 1, 2), (0, 3, 2)]


def steps(method, batch, number):
    out = []
    for _ in range(number):
        out.append(method.update(batch))
        method.updates += 1
    return out


def test_imitation_goes_to_the_shares_of_the_preferred_and_dpo_on_from_there():
    method = tabular(SFTThenDPO, BASE, sft_steps=400, sft_rate=0.05, beta=0.3)
    batch = arm_pairs(method, TRIPLES)
    steps(method, batch, 400)
    shares = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]]) / torch.tensor([[3], [2]])
    torch.testing.assert_close((BASE + method.policy.theta.detach()).softmax(-1), shares, atol=0.01, rtol=0)
    torch.testing.assert_close(method.reference.theta, torch.zeros(2, 4))  # of the start, as long as SFT goes on
    told = steps(method, batch, 1)[0]
    torch.testing.assert_close(told["loss"], torch.tensor(2.0).log())  # DPO begins at its reference
    before = method.reference.theta.clone()
    assert (before != 0).any()
    told = steps(method, batch, 3)[-1]
    assert told["margin"] > 0 and torch.equal(method.reference.theta, before)  # and it stays there


def test_the_second_stage_is_dpo_with_the_first_ones_result():
    ours = words(SFTThenDPO, sft_steps=5, sft_rate=0.01, beta=0.4)
    batch = word_pairs(ours, TEXTS)
    steps(ours, batch, 5)
    theirs = words(DPO, beta=0.4)
    theirs.policy.load_state_dict(ours.policy.state_dict())
    theirs.reference.load_state_dict(ours.policy.state_dict())
    again = theirs.prepare({k: v for k, v in batch.items() if not k.endswith("_reference")})
    for mine, other in zip(steps(ours, batch, 4), steps(theirs, again, 4)):
        for name in mine:
            torch.testing.assert_close(mine[name], other[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("imitation", ["sft", "pearson", "hellinger", "kl"])
@pytest.mark.parametrize("micro_rows", [0, 3])
def test_the_objectives_of_imitation_by_hand(imitation, micro_rows):
    label = [1.0, 0.8, 1.0, 1.0, 0.6]
    method = words(SFTThenDPO, imitation=imitation, imitation_beta=0.2, micro_rows=micro_rows)
    batch = word_pairs(method, TEXTS, label)
    losses, tokens = [], 0.0
    for prompt, *sides in zip(*[batch[k] for k in ("prompt", "prompt_mask", "chosen", "chosen_mask", "chosen_reference",
                                                   "rejected", "rejected_mask", "rejected_reference", "label")]):
        mask, p = sides[0], sides[-1]
        for share, (response, inside, reference) in ((p, sides[1:4]), (1 - p, sides[4:7])):
            rows = {"prompt": prompt[None], "prompt_mask": mask[None], "response": response[None], "mask": inside[None]}
            log_prob = (method.score(rows)["log_prob"][0] * inside).sum().detach()
            z = 0.2 * (log_prob - (reference * inside).sum())
            losses.append(share * (-log_prob if imitation == "sft" else -phi(z, imitation)))
            tokens += share * inside.sum()
    expected = sum(losses) / (tokens if imitation == "sft" else 5)
    one = copy.deepcopy(method)
    told = one.update(batch)
    torch.testing.assert_close(told["loss"], expected, rtol=1e-4, atol=1e-6)
    assert any(p.grad.abs().max() > 0 for p in one.policy.parameters())


def test_adapters_are_refused():
    method = words(SFTThenDPO)
    method.needs_reference = lambda: False
    with pytest.raises(UserError, match="adapters cannot keep"):
        method.setup(method.spec)
