"""Methods that look at the tokens of a pair: what its sides share, RRPO's phrases and its exact KL to the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from pair_methods import TEXTS, gradient, tabular, word_pairs, words

from methods.preference.dpo import DPO
from methods.preference.phrases import differing
from methods.preference.rrpo import RRPO
from methods.tokens.scoring import score


def sides(one: str, other: str, width=9, phrases=None):
    """A batch of one pair of texts."""
    out = {}
    for name, text in (("chosen", one), ("rejected", other)):
        out[name] = torch.tensor([[ord(c) for c in text] + [0] * (width - len(text))])
        out[f"{name}_mask"] = torch.tensor([[1.0] * len(text) + [0.0] * (width - len(text))])
    if phrases is not None:
        for name, row in zip(("chosen", "rejected"), phrases):
            out[f"{name}_phrase"] = torch.tensor([list(row) + [0] * (width - len(row))])
    return out


@pytest.mark.parametrize(("one", "other", "told"), [
    ("abc.", "axc.", ("b", "x")),             # one token exchanged
    ("abcd.", "xyzw.", ("abcd", "xyzw")),     # nothing shared but the end
    ("N.", "NM.", ("N", "M")),                # inserted: the shorter side gives the token before the place
    ("NM.", "N.", ("M", "N")),
    ("b.", "ab.", ("b", "a")),                # inserted at the very beginning: the first token
    ("aa.", "aaa.", ("a", "a")),              # repeated letters are not counted twice
    ("abxcd.", "abyyycd.", ("x", "yyy")),
    ("same.", "same.", ("", "")),
])
def test_what_two_responses_do_not_share(one, other, told):
    found = differing(sides(one, other))
    assert tuple("".join(c for c, k in zip(text, row[0]) if k) for text, row in zip((one, other), found)) == told
    assert not found[..., max(len(one), len(other)):].any(), "padding is no difference"


def test_phrases_of_the_data_come_first():
    found = differing(sides("abcde.", "xbyde.", phrases=((1, 0, 2, 0, 0, 0), (1, 0, 2, 0, 0, 0))))
    assert found[:, 0].nonzero().tolist() == [[0, 0], [0, 2], [1, 0], [1, 2]]
    found = differing(sides("abde.", "abcde.", phrases=((0, 0, 0, 0, 0), (0, 0, 1, 0, 0, 0))))
    assert found[:, 0].nonzero().tolist() == [[0, 1], [1, 2]], "no phrase on one side: the token before that of the other"


def test_one_phrase_over_all_tokens_without_kl_is_dpo():
    plain, ours = words(DPO), words(RRPO, alpha=0.0)
    batch = word_pairs(plain, TEXTS)
    batch |= {f"{s}_phrase": batch[f"{s}_mask"].long() for s in ("chosen", "rejected")}
    (loss, slope), (mine, own) = gradient(plain, batch), gradient(ours, batch)
    assert torch.equal(loss, mine) and torch.equal(slope, own)


def test_tokens_before_the_first_difference_change_nothing_and_those_behind_it_do():
    """Their context is the same on both sides, so DPO on phrases and DPO differ by the shared tokens behind alone."""
    def gap(texts):
        plain, ours = words(DPO), words(RRPO, alpha=0.0)
        batch = word_pairs(plain, texts)
        return (gradient(plain, batch)[1] - gradient(ours, batch)[1]).abs().max()

    assert gap([("ab", "ghijka", "ghijkb")]) < 1e-6  # cut at the difference: nothing stands behind it
    assert gap([("ab", "aghiz", "bghiz")]) > 1e-3


def test_the_kl_is_exact_summed_over_the_chosen_response_and_over_nothing_else():
    plain, ours = words(RRPO, alpha=0.0), words(RRPO, alpha=0.3)
    batch = word_pairs(plain, TEXTS)

    def exact(method):
        prompt, mask = batch["prompt"], batch["prompt_mask"]
        ids, whole = torch.cat([prompt, batch["chosen"]], 1), torch.cat([mask, batch["chosen_mask"].bool()], 1)
        log_p, log_q = ((m.hidden(ids, whole) @ m.head.T)[:, prompt.shape[1] - 1:-1].log_softmax(-1)
                        for m in (method.policy, method.reference))
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        return (kl * batch["chosen_mask"]).sum(-1).mean()

    truth = exact(ours)
    own = torch.cat([g.flatten() for g in torch.autograd.grad(truth, list(ours.policy.parameters()))])
    (loss, slope), (more, steeper) = gradient(plain, batch), gradient(ours, batch)
    torch.testing.assert_close(more - loss, 0.3 * truth.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(steeper - slope, 0.3 * own, atol=1e-5, rtol=1e-3)
    assert truth > 0.01


@pytest.mark.parametrize("phrases", [True, False])
def test_rows_in_parts_have_the_same_loss_and_gradient(phrases):
    at_once, in_parts = (words(RRPO, alpha=0.3, phrases=phrases, micro_rows=n) for n in (0, 3))
    batch = word_pairs(at_once, TEXTS)
    (loss, slope), (mine, own) = gradient(at_once, batch), gradient(in_parts, batch)
    torch.testing.assert_close(mine, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own, slope, atol=1e-5, rtol=1e-3)


def test_a_response_without_probability_under_the_reference_is_finite():
    method = tabular(RRPO, [[0.0, 0.0, -2000.0]], alpha=1.0)
    batch = {"prompt": torch.tensor([[4]]), "prompt_mask": torch.ones(1, 1).bool(), "chosen": torch.tensor([[3]]),
             "rejected": torch.tensor([[1]]), "chosen_mask": torch.ones(1, 1), "rejected_mask": torch.ones(1, 1),
             "label": torch.ones(1)}
    method.update(method.prepare(batch))
    assert all(p.isfinite().all() for p in method.policy.parameters())


def test_scores_beside_pass_through_the_pairs_own_way_of_scoring():
    """A policy that is large enough to share prompts does so where it is compared, too."""
    method = words(RRPO, alpha=0.3)
    batch = word_pairs(method, TEXTS)
    rows = method.rows(batch)
    known = score(method.policy, rows["prompt"], rows["prompt_mask"], rows["response"], rows["mask"].bool(), method.measure,
                  beside=copy.deepcopy(method.reference))
    method._large = True
    shared = method.rows(batch)
    assert len(shared["prompt"]) == len(TEXTS)
    told = method.score(shared, method.measure, beside=method.start_policy())
    torch.testing.assert_close(told["kl"], known["kl"], atol=1e-5, rtol=1e-4)
    assert told["kl"].max() > 0
