"""Preference pairs from files: layouts, what is left out, and a checkpoint in Hugging Face's layout that learns from them."""

from __future__ import annotations

import gzip
import importlib.util
import json

import pytest
import torch

from envs.pairs.task import Pair
from envs.pairs.textpairs import END, Bad, TextPairs, pair_of
from runner.catalogue import Catalogue
from runner.compose import compose
from runner.errors import UserError
from runner.run import assemble

BOOK = Catalogue()
SAME = Pair("Name a river.", "The Nile.", "The Moon.")


def said(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("row", [
    {"prompt": SAME.prompt, "chosen": SAME.chosen, "rejected": SAME.rejected},
    {"prompt": [said("user", SAME.prompt)], "chosen": [said("assistant", SAME.chosen)],
     "rejected": [said("assistant", SAME.rejected)]},
    {"chosen": [said("user", SAME.prompt), said("assistant", SAME.chosen)],
     "rejected": [said("user", SAME.prompt), said("assistant", SAME.rejected)]},
    {"prompt": SAME.prompt, "chosen": [said("user", SAME.prompt), said("assistant", SAME.chosen)],
     "rejected": [said("user", SAME.prompt), said("assistant", SAME.rejected)]},
], ids=["explicit", "conversational", "implicit", "ultrafeedback"])
def test_layouts_mean_the_same(row):
    assert pair_of(row) == SAME


def test_dialogues_of_hh():
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name a river.\n\nAssistant:"
    found = pair_of({"chosen": start + " The Nile.", "rejected": start + " The Moon.\n\n"})
    assert found == (start.strip(), "The Nile.", "The Moon.", 1.0, None, None)
    # a rejected answer that goes on to a turn of its own is one response
    longer = pair_of({"chosen": start + " The Nile.", "rejected": start + " The Nile is one.\n\nHuman: ok\n\nAssistant: Yes."})
    assert longer.rejected.endswith("Assistant: Yes.") and longer.prompt == start.strip()


def test_several_turns_are_written_out_and_scores_are_kept():
    turns = [said("system", "Be brief."), said("user", "Hi"), said("assistant", "Hello"), said("user", "A river?")]
    row = {"chosen": [*turns, said("assistant", "Nile")], "rejected": [*turns, said("assistant", "Moon")], "score_chosen": 8,
           "score_rejected": 2.5}
    found = pair_of(row)
    assert found.prompt == "System: Be brief.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A river?\n\nAssistant:"
    assert found.scores == (8.0, 2.5) and pair_of({**row, "probability": 0.7}).label == 0.7


@pytest.mark.parametrize(("row", "why"), [
    ({"prompt": "a", "chosen": "b"}, "no rejected .its columns: prompt, chosen"),
    ({"prompt": "a", "chosen": "b", "rejected": ["c"]}, "both be texts"),
    ({"prompt": "a", "chosen": " ", "rejected": "c"}, "empty chosen"),
    ({"chosen": "b", "rejected": "c"}, "no common beginning"), ({"chosen": ["b"], "rejected": ["c"]}, "role and content"),
    ({"chosen": [], "rejected": []}, "empty conversation"),
    ({"chosen": [said("user", "a"), said("assistant", "b")], "rejected": [said("user", "x"), said("assistant", "c")]},
     "differ before"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": "high", "score_rejected": 1}, "must be numbers"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "probability": 1.2}, "not a number between 0 and 1"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": float("nan"), "score_rejected": 1}, "not finite"),
])
def test_bad_rows_say_why(row, why):
    with pytest.raises(Bad, match=why):
        pair_of(row)


def write(path, rows):
    text = "\n".join(json.dumps(r) for r in rows)
    path.write_bytes(gzip.compress(text.encode())) if path.suffix == ".gz" else path.write_text(text)
    return str(path)


def plain(number, **more):
    return [{"prompt": f"question {i}", "chosen": f"right {i}", "rejected": f"wrong {i}", **more} for i in range(number)]


def test_files_and_their_errors(tmp_path):
    rows = plain(40)
    for name in ("a.jsonl", "a.jsonl.gz"):
        task = TextPairs(write(tmp_path / name, rows))
        assert len(task.pairs()) + len(task.held_out_pairs()) == 40 and task.held_out_pairs()
        assert not {p.prompt for p in task.pairs()} & {p.prompt for p in task.held_out_pairs()}
        assert all(p.chosen.endswith(END) for p in task.pairs())
    broken = write(tmp_path / "b.jsonl", [*rows, {"prompt": "x"}, "text"])
    with pytest.raises(UserError, match="(?s)2 rows cannot be used.*line 41: no chosen.*line 42: no object"):
        TextPairs(broken)
    assert TextPairs(broken, skip_bad=True).dropped == 2
    with pytest.raises(UserError, match="(?s)no file .*hh-rlhf"):
        TextPairs(str(tmp_path / "c.jsonl"))
    with pytest.raises(UserError, match="not a .jsonl"):
        TextPairs(str(tmp_path / "a.csv"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 500)[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        TextPairs(str(tmp_path / "cut.jsonl.gz"))
    with pytest.raises(UserError, match="no pairs are left to learn from"):
        TextPairs(write(tmp_path / "d.jsonl", plain(1)), share=1.0)
    own = TextPairs(write(tmp_path / "e.jsonl", rows), held_out_file=write(tmp_path / "f.jsonl", rows[:10]))
    assert len(own.pairs()) == 30 and len(own.held_out_pairs()) == 10


def test_parquet(tmp_path):
    store = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    messages = [{"chosen": [said("user", r["prompt"]), said("assistant", r["chosen"])],
                 "rejected": [said("user", r["prompt"]), said("assistant", r["rejected"])], "prompt": r["prompt"]}
                for r in plain(40)]
    store.write_table(pyarrow.Table.from_pylist(messages), tmp_path / "a.parquet")
    task, same = TextPairs(str(tmp_path / "a.parquet")), TextPairs(write(tmp_path / "a.jsonl", plain(40)))
    assert task.pairs() == same.pairs()


def test_what_is_left_out_is_counted(tmp_path):
    """Of 30 pairs one has equal sides, two have prompts without room; cut instead, they lose their beginning."""
    rows = [*plain(30, score_chosen=2, score_rejected=1)]
    rows[3]["rejected"] = rows[3]["chosen"]
    for i in (4, 5):
        rows[i]["prompt"] = "x" * 40 + f" end {i}"
    file = write(tmp_path / "a.jsonl", rows)
    held = write(tmp_path / "b.jsonl", [{**r, "prompt": "h" + r["prompt"]} for r in plain(5)])
    words = ["method=dpo", f"env=textpairs:{file}", f"env.held_out_file={held}", "size=smoke", "logger=none", "hardware=cpu",
             "env.response_length=10", "policy.context=40"]
    counts = {}
    for long in ("drop", "cut"):
        method, world, stream = assemble(compose([*words, f"env.file={file}", f"env.long={long}"], BOOK))
        told = world.provenance()
        counts[long] = {k: told[k] for k in ("pairs", "identical", "too_long", "cut", "bad")}
        assert torch.isfinite(method.update(stream.next())["loss"])
        assert {"chosen_score", "chosen_reference"} <= stream.columns.keys()
        assert world.evaluate(method, 0)["accuracy"] >= 0
    assert counts == {"drop": {"pairs": 27, "identical": 1, "too_long": 2, "cut": 0, "bad": 0},
                      "cut": {"pairs": 29, "identical": 1, "too_long": 0, "cut": 2, "bad": 0}}
    ends = [method.tokenizer.decode(row[m]) for row, m in zip(stream.columns["prompt"], stream.columns["prompt_mask"])]
    assert sum(t.endswith("x end 4") or t.endswith("x end 5") for t in ends) == 2


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny random Llama with a tokenizer of words and a chat template, as a checkpoint's folder."""
    for name in ("transformers", "tokenizers"):
        if importlib.util.find_spec(name) is None:
            print(f"skipped: {name} is not installed (pip install -e '.[lm]')")
            pytest.skip(f"{name} is not installed")
    import transformers as hub
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<end>", "<unk>", "user", "question", "right", "wrong", *map(str, range(40))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hub.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}user {{ m.content }} {% endfor %}"
    torch.manual_seed(0)
    model = hub.LlamaForCausalLM(hub.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0))
    folder = tmp_path / "llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [0, 4])
def test_a_checkpoint_learns_from_a_file(tmp_path, checkpoint, lora):
    if lora:
        pytest.importorskip("peft")
    file = write(tmp_path / "a.jsonl", plain(40))
    words = ["method=dpo", f"env=textpairs:{file}", f"env.file={file}", "env.response_length=6", "env.batch_size=8", "policy=hf",
             f"policy.path={checkpoint}", f"policy.lora_rank={lora}", "method.learning_rate=0.01", "env.eval_prompts=4",
             "logger=none", "hardware=cpu"]
    method, world, stream = assemble(compose(words, BOOK))
    first = stream.columns["chosen"][0]
    assert first[:3].tolist()[0] == 5 and first[2] == 1 and stream.columns["chosen_mask"][0].sum() == 3  # right, number, <end>
    assert stream.columns["prompt"][0, -3:].tolist()[:2] == [3, 4]  # user question: through the template
    for _ in range(30):
        told = method.update(stream.next())
        method.updates += 1
    assert told["accuracy"] == 1 and told["margin"] > 0.5
    figures = world.evaluate(method, 0)
    assert figures["accuracy"] == 1 and figures["chosen"] > figures["rejected"] and figures["kl"] > 0
    assert "reward" not in figures and "win_rate" not in figures
