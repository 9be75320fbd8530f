"""How alike the two sides of a pair are: CHES and its filter, gradient entanglement, steps on single pairs."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from pair_methods import TEXTS, arm_pairs, gradient, swapped, tabular, word_pairs, words
from token_methods import assembled

from methods.preference.ches import CHES, SCORES, correlation, edit_distance, ranks
from methods.preference.dpo import DPO
from methods.preference.gradient_entanglement import TOLD, GradientEntanglement
from methods.preference.single import Singles, by_side, condition_ratio, inner, pull
from runner.errors import UserError

SGD = {"optimizer": "sgd", "gradient_norm": 0.0}


class Squared(DPO):
    """Another loss than DPO's."""

    def link(self, z, pairs):
        return (z - 1).square()


def named(method):
    return [k for k, _ in method.policy.named_parameters()]


def likelihood_gradients(method, batch):
    """[(g_w, g_l)] of every pair, flat, by plain automatic differentiation."""
    told = method.score(method.rows(batch))["log_prob"].sum(1).view(2, -1)
    def flat(value):
        found = torch.autograd.grad(value, list(method.policy.parameters()), retain_graph=True)
        return torch.cat([g.flatten() for g in found])
    return [(flat(told[0, i]), flat(told[1, i])) for i in range(told.shape[1])]


# ---- steps on single pairs
def test_every_pair_has_the_gradient_and_the_step_that_it_has_alone():
    method = words(DPO)
    batch = word_pairs(method, TEXTS, padding=2)
    singles = Singles(method.policy, batch, named(method))
    first = singles.log_probs()
    mask = torch.stack([batch["chosen_mask"], batch["rejected_mask"]])
    torch.testing.assert_close(first, method.score(method.rows(batch))["log_prob"].view(first.shape).detach() * mask)
    sides = [singles.gradients(w) for w in by_side(mask)]
    for i, both in enumerate(likelihood_gradients(method, batch)):
        for told, known in zip(sides, both):
            torch.testing.assert_close(torch.cat([told[f"policy.{k}"][i].flatten() for k in named(method)]), known,
                                       atol=1e-5, rtol=1e-4)
    singles.move(sides[0], 0.01)
    for i in range(len(TEXTS)):
        alone = copy.deepcopy(method)
        with torch.no_grad():
            for k, p in alone.policy.named_parameters():
                p.add_(0.01 * sides[0][f"policy.{k}"][i])
        row = {k: v[i:i + 1] for k, v in batch.items()}
        told = alone.score(alone.rows(row))["log_prob"].detach()
        torch.testing.assert_close(singles.log_probs()[:, i], told, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", [DPO, Squared])
def test_what_a_loss_asks_of_a_pair_alone_is_its_gradient_step(cls):
    method = words(cls)
    batch = word_pairs(method, TEXTS)
    singles = Singles(method.policy, batch, named(method))
    step = singles.gradients(pull(method, batch, singles.log_probs()))
    for i in range(len(TEXTS)):
        _, slope = gradient(method, {k: v[i:i + 1] for k, v in batch.items()})
        told = torch.cat([step[f"policy.{k}"][i].flatten() for k in named(method)])
        torch.testing.assert_close(told, -slope, atol=1e-5, rtol=1e-4)


# ---- CHES
def test_hidden_states_are_those_that_predict_the_response_and_padding_is_none_of_them():
    """By hand, pair by pair without any padding; the same on a batch that is padded on both ends."""
    method = words(CHES, score="ches")
    by_hand = {"ches": [], "ches_normalised": [], "last_hidden": []}
    for text in TEXTS:
        sums, last, lengths = [], [], []
        for answer in text[1:]:
            ids = torch.tensor([method.tokenizer.encode(text[0] + answer)])
            hidden = method.reference.hidden(ids)[0]
            sums.append(hidden[len(text[0]) - 1:-1].sum(0))  # from the prompt's last token to the response's last but one
            last.append(hidden[-1])
            lengths.append(len(answer))
        (w, l), (n, m) = sums, lengths
        by_hand["ches"].append(w @ l - w @ w)
        by_hand["ches_normalised"].append(w @ l / (n * m) - w @ w / n ** 2)
        by_hand["last_hidden"].append(last[0] @ last[1])
    batch = word_pairs(words(DPO), TEXTS, padding=3)
    for score, told in by_hand.items():
        method.config = type(method.config)(**{**vars(method.config), "score": score})
        torch.testing.assert_close(method.scores(batch), torch.stack(told), atol=1e-4, rtol=1e-4)


def test_of_equal_responses_ches_is_nothing_and_swapping_changes_it():
    method = words(CHES, score="ches")
    batch = word_pairs(words(DPO), [("ab", "cdz", "cdz"), ("ab", "cdz", "efghz")])
    told, turned = method.scores(batch), method.scores(swapped(batch))
    assert told[0].abs() < 1e-4 and (told[1] - turned[1]).abs() > 1e-2


def test_edit_distance():
    def plain(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            row, before = [i], row
            for j, y in enumerate(b, 1):
                row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
        return row[-1]

    rng, rows = random.Random(0), []
    for _ in range(60):
        rows.append(["".join(rng.choices("ab", k=rng.randint(0, 6))) for _ in range(2)])
    rows += [["abcdef", ""], ["", ""], ["abc", "abc"], ["kitten", "sittin"]]
    ids = [torch.tensor([[ord(c) for c in r[i]] + [-1 - i] * (6 - len(r[i])) for r in rows]) for i in range(2)]
    lengths = [torch.tensor([len(r[i]) for r in rows]) for i in range(2)]
    assert edit_distance(*ids, *lengths).tolist() == [plain(*r) for r in rows]
    method = words(CHES, score="edit_distance")
    assert method.scores(word_pairs(words(DPO), [("ab", "cdz", "cdz"), ("ab", "cdz", "cefz")])).tolist() == [0, -0.5]


def test_the_lowest_are_kept_and_equal_ones_are_drawn():
    texts = [("ab", "cdz", "c" * n + "z") for n in (1, 2, 3, 4, 5)] * 4
    method = words(CHES, score="ches_normalised", low=0.0, high=0.25)
    batch = word_pairs(words(DPO), texts)
    kept = method.select(batch)
    scores = method.scores(batch)
    assert kept.sum() == 5 and scores[kept].max() <= scores[~kept].min()
    same = {k: v[:1].expand(20, *v.shape[1:]) for k, v in batch.items()}
    first = method.select(same)
    method.seed = 1
    assert first.sum() == 5 and not torch.equal(first, method.select(same))
    parts = [words(CHES, low=a, high=b).select(batch) for a, b in ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0))]
    assert torch.equal(sum(p.int() for p in parts), torch.ones(20, dtype=torch.int32)), "every pair is in one window"
    with pytest.raises(UserError, match="none of the 20 pairs"):
        words(CHES, low=0.5, high=0.5).select(batch)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_selects(score):
    method = words(CHES, score=score, high=0.4)
    batch = word_pairs(words(DPO), TEXTS)
    assert method.select(batch).sum() == 2
    assert len(method.prepare({k: v for k, v in batch.items() if "reference" not in k})["chosen_reference"]) == 2


def test_selections_of_combined_methods_are_intersected():
    class First(CHES):
        def select(self, columns):
            rest, kept = super().select(columns), torch.arange(len(columns["chosen"])) < 3
            return kept if rest is None else kept & rest

    batch = word_pairs(words(DPO), TEXTS)
    assert words(First, low=0.0, high=1.0).select(batch).sum() == 3
    half = words(CHES, high=0.6).select(batch)
    assert torch.equal(words(First, high=0.6).select(batch), half & (torch.arange(5) < 3))


def test_the_ratio_of_gradients_and_ranks():
    method = words(CHES, score="gradient_ratio")
    batch = word_pairs(words(DPO), TEXTS)
    at_start = copy.deepcopy(method)
    at_start.policy.load_state_dict(method.reference.state_dict())
    by_hand = [(w @ l) / torch.minimum(w @ w, l @ l) for w, l in likelihood_gradients(at_start, batch)]
    torch.testing.assert_close(method.scores(batch), torch.stack(by_hand), atol=1e-4, rtol=1e-3)
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert correlation(ranks(torch.tensor([1.0, 2.0, 9.0])), ranks(torch.tensor([5.0, 4.0, -3.0]))) == pytest.approx(-1)
    assert correlation(torch.ones(3), torch.arange(3.0)) == 0


def test_the_study_trains_each_pair_alone():
    """Its changes are those of plain gradient descent on a batch of that one pair."""
    from methods.preference import ches
    method = words(CHES, **SGD, learning_rate=ches.RATE)
    method.policy.load_state_dict(method.reference.state_dict())
    batch = word_pairs(words(DPO), TEXTS)
    changes = method.alone({k: v for k, v in batch.items() if "reference" not in k})
    for i in (0, 3):
        alone, row = copy.deepcopy(method), {k: v[i:i + 1] for k, v in batch.items()}
        alone.make_optimizers()
        for _ in range(ches.STEPS):
            alone.update(row)
        assert changes[i].item() == pytest.approx(alone.update(row)["chosen"].item(), abs=2e-3)
    told = method.inspect(batch)
    assert told["displaced"] == (changes < 0).float().mean() and -1 <= told["rank_correlation"] <= 1


# ---- gradient entanglement
def test_responses_of_one_token_in_a_table_are_disentangled_and_the_same_pair_twice_is_not():
    method = tabular(GradientEntanglement, torch.zeros(2, 4), mitigation="none")
    singles = Singles(method.policy, batch := arm_pairs(method, [(0, 1, 2), (1, 0, 3)]), named(method))
    mask = torch.ones(2, 2, 1)
    own, other = (singles.gradients(w) for w in by_side(mask))
    # g = onehot - 1/4: |g|^2 = 3/4, <g_w, g_l> = -1/4
    torch.testing.assert_close(condition_ratio(own, other), torch.full((2,), -1 / 3))
    assert torch.allclose(inner(own, own), torch.tensor(0.75))
    told = dict(zip(TOLD, method.entanglement(batch)))
    assert told["ratio"] == pytest.approx(-1 / 3) and told["entangled"] == 0 and told["foretold"] == 1
    assert told["chosen_norm"] == pytest.approx(0.75 ** 0.5) and told["cosine"] == pytest.approx(-1 / 3)


def test_ratio_is_over_the_smaller_of_both_norms():
    """The official aggregate divides by the chosen side's alone."""
    own, other = {"w": torch.tensor([[2.0, 0.0], [1.0, 0.0]])}, {"w": torch.tensor([[1.0, 1.0], [3.0, 4.0]])}
    assert condition_ratio(own, other).tolist() == [1.0, 3.0]


def test_a_shared_tail_entangles_and_the_differing_tokens_do_not():
    """c with and without what is shared: the sum over all tokens is drawn together by the tail."""
    ratios = []
    for tail in ("", "qrstuv"):
        method = words(GradientEntanglement, width=9, mitigation="none")
        ratios.append(method.entanglement(word_pairs(method, [("ab", "c" + tail + "z", "d" + tail + "z")]))[0])
    assert ratios[1] > ratios[0] + 0.1


def test_sparse_is_the_loss_of_phrases_without_its_kl():
    from methods.preference.rrpo import RRPO
    ours, theirs = words(GradientEntanglement, mitigation="sparse", every=0), words(RRPO, alpha=0.0)
    batch = word_pairs(ours, TEXTS)
    (a, b), (c, d) = gradient(ours, batch), gradient(theirs, batch)
    assert torch.equal(a, c) and torch.equal(b, d)


@pytest.mark.parametrize("micro", [0, 2])
def test_normalised_steps_are_the_two_gradients_over_their_norms(micro):
    """theta += rate * mean d (G_w / |G_w| - G_l / |G_l|), G the sum of gradients weighted by d = beta sigma(-z)."""
    method = words(GradientEntanglement, **SGD, mitigation="normalised", every=0, micro_rows=micro, beta=0.5)
    batch = word_pairs(method, TEXTS)
    rho = method.score(method.rows(batch))["log_prob"].sum(1).view(2, -1).detach() - \
        torch.stack([batch["chosen_reference"], batch["rejected_reference"]]).sum(-1)
    d = 0.5 * torch.sigmoid(-0.5 * (rho[0] - rho[1]))
    sides = [sum(x * g for x, g in zip(d, some)) for some in zip(*likelihood_gradients(method, batch))]
    expected = d.mean() * (sides[0] / sides[0].norm() - sides[1] / sides[1].norm())
    loss, slope = gradient(method, batch)
    torch.testing.assert_close(-slope, expected, atol=1e-5, rtol=1e-3)
    assert loss == pytest.approx(gradient(words(DPO, beta=0.5), batch)[0].item())


def test_normalised_steps_move_both_sides_of_a_pair_the_right_way_where_plain_ones_do_not():
    """Two responses that share all but a letter in front, or are of unequal length: a small plain step lowers the chosen one, or
    raises the rejected one."""
    wrong = {"none": 0, "normalised": 0}
    for pair in (("ab", "cqrstuvz", "dqrstuvz"), ("ab", "cz", "ccccccz"), ("ab", "ccccccz", "cz")):
        for kind in wrong:
            method = words(GradientEntanglement, width=9, **SGD, learning_rate=1e-3, mitigation=kind, every=0)
            batch = word_pairs(method, [pair])
            first = method.update(batch)
            second = method.update(batch)
            moves = second["chosen"] - first["chosen"], second["rejected"] - first["rejected"]
            wrong[kind] += bool(moves[0] < -1e-6 or moves[1] > 1e-6)
    assert wrong["normalised"] == 0 and wrong["none"] > 0


def test_first_order_foretells_small_steps_and_not_large_ones():
    small, large = (words(GradientEntanglement, mitigation="none", rate=r, beta=1.0) for r in (1e-3, 300.0))
    batch = word_pairs(small, TEXTS * 2)
    assert dict(zip(TOLD, small.entanglement(batch)))["foretold"] == 1
    assert dict(zip(TOLD, large.entanglement(batch)))["foretold"] < 1


def test_measuring_changes_nothing_and_happens_every_so_many_updates():
    batch, courses = None, []
    for every in (0, 2):
        method = words(GradientEntanglement, every=every, mitigation="none")
        batch, lines = batch or word_pairs(method, TEXTS), []
        for _ in range(4):
            lines.append(method.update(batch))
            method.updates += 1
        courses.append(lines)
    for plain, more in zip(*courses):
        assert {k: v for k, v in more.items() if k in plain} == plain
    measured = [line["ratio"].item() for line in courses[1]]
    assert measured[0] == measured[1] != measured[2] == measured[3] and "ratio" not in courses[0][0]


# ---- what a world asks of it
def test_answers_tell_the_median_ratio_of_held_out_pairs_and_ask_for_pairs_alone():
    from envs.pairs.base import encode_pairs
    method, world, _ = assembled("method=ches", "method.high=0.5", "env=answers", "env.alone=6", "env.preference=multi")
    pairs = world.task.held_out_pairs()[:16]
    batch = encode_pairs(method, pairs)
    singles = Singles(method.policy, batch, named(method))
    known = condition_ratio(*(singles.gradients(w) for w in by_side(torch.stack([batch["chosen_mask"], batch["rejected_mask"]]))))
    assert world.entangled(method)["entanglement"] == pytest.approx(known.median().item(), rel=1e-3)
    asked = []
    method.inspect = lambda columns: asked.append(columns) or {"displaced": torch.tensor(0.5), "other": torch.tensor(1.0)}
    told = [world.each_alone(method)]
    method.seed = 5
    told.append(world.each_alone(method))
    assert told == [{"displaced": 0.5}] * 2 and all(len(a["chosen"]) == 6 for a in asked)
    assert not torch.equal(asked[0]["prompt"], asked[1]["prompt"]), "every seed draws its own"
    plain, world, _ = assembled("method=dpo", "env=answers", "env.alone=6", "env.preference=multi")
    assert world.each_alone(plain) == {}, "a method without a score tells nothing"


def test_what_is_selected_is_handed_out():
    method, _, stream = assembled("method=ches", "env=answers", "env.batch_size=0", "env.limit=0")
    assert len(stream.next()["chosen"]) == round(0.05 * 512 + 0.4) == len(stream.columns["rejected_reference"])
    with pytest.raises(UserError, match="there are 26 rows to train on"):
        assembled("method=ches", "env=answers", "env.batch_size=27", "env.limit=0")
