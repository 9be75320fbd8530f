"""KTO on responses that are labelled each for itself: where they come from, the loss by hand, balance, and who is refused."""

from __future__ import annotations

import json

import pytest
import torch
from pair_methods import TEXTS, gradient, tabular, word_pairs, words

from envs.pairs.task import Pair
from envs.pairs.textlabels import TextLabels, row_of
from envs.pairs.textpairs import END, Bad, TextPairs
from envs.pairs.unpaired import Row, split
from methods.preference.kto import KTO
from runner.catalogue import Catalogue
from runner.compose import compose
from runner.errors import UserError
from runner.run import assemble

BOOK = Catalogue()


def made(method, env, *more):
    return assemble(compose([f"method={method}", f"env={env}", "size=smoke", "logger=none", "hardware=cpu", *more], BOOK))


def apart(batch) -> dict[str, torch.Tensor]:
    """A batch of pairs as rows: the chosen ones, then the rejected ones."""
    rows = {"prompt": batch["prompt"].repeat(2, 1), "prompt_mask": batch["prompt_mask"].repeat(2, 1)}
    for name, end in (("response", ""), ("mask", "_mask"), ("reference", "_reference")):
        rows[name] = torch.cat([batch[f"chosen{end}"], batch[f"rejected{end}"]])
    return {**rows, "label": torch.cat([batch["label"], 1 - batch["label"]])}


@pytest.mark.parametrize("point", ["mismatched", "zero"])
def test_pairs_taken_apart_are_the_same_rows(point):
    method = words(KTO, beta=0.5, point=point, desirable=1.2, undesirable=0.7)
    batch = word_pairs(method, TEXTS)
    torch.testing.assert_close(gradient(method, apart(batch)), gradient(method, batch))


def test_the_loss_of_five_good_rows_and_one_bad_by_hand_and_in_balance():
    base = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([0, 1, 2, 0, 2, 1])
    good = torch.tensor([1.0, 1, 1, 1, 1, 0])
    ones = torch.ones(6, 1)
    data = {"prompt": x[:, None] + 4, "prompt_mask": ones.bool(), "response": y[:, None] + 1, "mask": ones, "label": good}
    theta = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    for balance, weights in ((0.0, (1.2, 0.7)), (4 / 3, (1.2, 1.2 * 5 / (4 / 3))), (20.0, (20 * 0.7 / 5, 0.7))):
        method = tabular(KTO, base, beta=0.5, desirable=1.2, undesirable=0.7, balance=balance)
        batch = method.prepare(data)
        with torch.no_grad():
            method.policy.theta.copy_(theta)
        torch.testing.assert_close(batch["reference"][:, 0], base.log_softmax(-1)[x, y])
        assert method.lambdas() == pytest.approx(weights)
        if balance:
            assert weights[0] * 5 / (weights[1] * 1) == pytest.approx(balance)
        rho = (base + theta).log_softmax(-1) - base.log_softmax(-1)
        z0 = rho[x, y.roll(-1)].mean().clamp(min=0)
        gain = 0.5 * (rho[x, y] - z0)
        expected = torch.where(good > 0, weights[0] * (1 - gain.sigmoid()), weights[1] * (1 - (-gain).sigmoid())).mean()
        told = method.update(batch)
        torch.testing.assert_close(told["loss"], expected)
        torch.testing.assert_close(told["chosen"], rho[x, y][:5].mean())
        torch.testing.assert_close(told["rejected"], rho[x, y][5])
    with pytest.raises(UserError, match="nothing to balance"):
        tabular(KTO, base, balance=1.0).prepare({**data, "label": torch.ones(6)})
    with pytest.raises(UserError, match="needs pairs"):
        tabular(KTO, base, compared="pairs").prepare(data)


def test_pairs_are_split_into_the_share_that_is_asked_for():
    pairs = [Pair("p", f"w{i}", f"l{i}") for i in range(100)]
    rows = split(pairs, 0.1, False, "s")
    assert sum(r.label for r in rows) == 10 and len(rows) == 110 and split(pairs, 0.1, False, "s") == rows
    assert {r.response[0] for r in rows if r.label} == {"w"} and len({r.response for r in rows}) == 110
    one = split(pairs, 1.0, True, "s")
    assert len({r.response[1:] for r in one}) == 100 == len(one) and 30 < sum(r.label for r in one) < 70


def test_a_bandit_shows_rows_to_kto_and_whole_pairs_to_dpo():
    method, world, stream = made("kto", "bandit_unpaired", "env.keep_desirable=0.25", "env.batch_size=0")
    assert world.provenance()["responses"] == 50 and world.provenance()["desirable"] == 10
    assert method.counts == (10, 40) and len(stream.next()["label"]) == 50
    assert "chosen" in made("dpo", "bandit_unpaired")[2].next() and "chosen" in made("kto", "bandit")[2].next()
    with pytest.raises(UserError, match="(?s)'dpo' does not fit env 'textlabels': it needs pairs.*provides unpaired"):
        BOOK.check_pairing(BOOK.methods("dpo"), BOOK.get("env", "textlabels"))


def said(role, content):
    return {"role": role, "content": content}


def test_both_layouts_mean_the_same_and_bad_rows_say_why():
    same = Row("Name a river.", "The Nile.", 1.0)
    assert row_of({"prompt": same.prompt, "completion": same.response, "label": True}) == same
    assert row_of({"prompt": [said("user", same.prompt)], "completion": [said("assistant", same.response)], "label": 1}) == same
    for row, why in (({"prompt": "a", "completion": "b"}, "no label"),
                     ({"prompt": "a", "chosen": "b", "rejected": "c"}, "no completion.*pairs are read by env=textpairs"),
                     ({"prompt": "a", "completion": "b", "label": 0.5}, "label is 0.5, not true or false"),
                     ({"prompt": "a", "completion": "b", "label": None}, "label is None"),
                     ({"prompt": "a", "completion": ["b"], "label": 1}, "both be texts"),
                     ({"prompt": [said("user", "a")], "completion": ["b"], "label": 1}, "role and content"),
                     ({"prompt": [said("user", "a")], "completion": [], "label": 1}, "one message"),
                     ({"prompt": "a", "completion": " ", "label": 1}, "empty completion")):
        with pytest.raises(Bad, match=why):
            row_of(row)


def test_files_of_labelled_responses(tmp_path):
    rows = [{"prompt": f"question {i // 3}", "completion": f"answer {i}", "label": i % 3 == 0} for i in range(90)]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    task = TextLabels(str(file))
    train, held = task.pairs(), task.held_out_pairs()
    assert len(train) + len(held) == 90 and held and not {r.prompt for r in train} & {r.prompt for r in held}
    assert all(r.response.endswith(END) for r in train)
    with pytest.raises(UserError, match="(?s)90 rows cannot be used.*read by env=textlabels, for method=kto"):
        TextPairs(str(file))
    method, world, stream = made("kto", f"textlabels:{file}", f"env.file={file}", "env.response_length=12",
                                 "method.learning_rate=0.003", "env.batch_size=16")
    told = world.provenance()
    assert told["responses"] == len(train) and told["desirable"] == sum(r.label for r in train) and told["bad"] == 0
    first = method.update(stream.next())
    for _ in range(60):
        last = method.update(stream.next())
        method.updates += 1
    assert last["margin"] > first["margin"] == 0 and last["chosen"] > last["rejected"]
    figures = world.evaluate(method, 0)
    assert 0 <= figures["accuracy"] <= 1 and {"chosen", "rejected", "kl", "length"} <= figures.keys()
    assert not {"reward", "win_rate"} & figures.keys()
