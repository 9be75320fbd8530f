"""Labelled responses from a file on this machine, in TRL's unpaired layout: jsonl (also gzipped) or parquet, each row

| layout | prompt | completion | label |
|---|---|---|---|
| standard | a text | a text | true, false, 1 or 0: whether it is desirable |
| conversational | a list of messages {role, content} | a list with one message | the same |

What is read how, what is too long, what is held out and which rows are errors: envs/pairs/textpairs.py; prompts of several
messages are written out as there. Responses to one prompt stand in rows of their own, all learned from or all held out. Methods
that compare the two sides of a pair cannot learn from such rows and are refused; pairs from files: env=textpairs.

Gold metrics are those of samples (KL, length, entropy) and of held-out rows: changes of log-probability of desirable ones
(`chosen`) and of undesirable ones (`rejected`), and how often one of the former has gained more than one of the latter
(`accuracy`).

For a card: provides unpaired. Data: any file of this layout, kto-mix-14k for one; nothing is downloaded. For pretrained models.
"""

from __future__ import annotations

from pathlib import Path

import torch

from envs.pairs import unpaired
from envs.pairs.base import in_parts
from envs.pairs.textpairs import END, Bad, TextPairs, TextPairsWorld, check_messages, written
from envs.pairs.unpaired import Row, encode_rows


class TextLabels(TextPairs):
    kept, shipped = "labelled responses", Path(__file__).with_name("labels.jsonl")
    parse = staticmethod(lambda row: row_of(row))

    @staticmethod
    def responses(row: Row) -> tuple[str, ...]:
        return (row.response,)

    def pairs(self):
        return [r._replace(response=r.response + END) for r in self.rows[0]]

    def held_out_pairs(self):
        return [r._replace(response=r.response + END) for r in self.rows[1]]


def row_of(row: dict) -> Row:
    """A row in either layout. Bad: what is wrong with it."""
    for name in ("prompt", "completion", "label"):
        if name not in row:
            more = "; pairs are read by env=textpairs" if "chosen" in row else ""
            raise Bad(f"no {name} (its columns: {', '.join(map(str, row))}){more}")
    prompt, response, label = row["prompt"], row["completion"], row["label"]
    if label not in (0, 1):
        raise Bad(f"label is {label!r}, not true or false")
    if isinstance(prompt, list) and isinstance(response, list):
        check_messages(*prompt, *response)
        if not prompt or len(response) != 1:
            raise Bad("a prompt has messages, and a completion is one message")
        prompt, response = written(prompt), response[0]["content"]
    elif not isinstance(prompt, str) or not isinstance(response, str):
        raise Bad("prompt and completion must both be texts, or both lists of messages")
    for name, text in (("prompt", prompt), ("completion", response)):
        if not text.strip():
            raise Bad(f"an empty {name}")
    return Row(prompt, response, float(label))


class TextLabelsWorld(TextPairsWorld):
    def make_task(self):
        c = self.config
        return TextLabels(c.file, c.held_out_file, c.response_length, c.skip_bad, c.share, c.most)

    def stream(self, method, kind, seed):
        self.method = method
        rows = self.task.pairs()
        kept, cut = self.fitting(method, rows)
        stream = unpaired.stored(self, method, kept)
        self.told |= {"bad": self.task.dropped, "too_long": len(rows) - len(kept), "cut": cut}
        return stream

    def on_pairs(self, method, reference):
        rows = self.judged_pairs(method)
        if not rows or reference is None:
            return {}
        columns = encode_rows(method, rows)
        change = (in_parts(method, columns)["log_prob"] - in_parts(reference, columns)["log_prob"]).sum(1)
        good, bad = change[columns["label"] > 0.5], change[columns["label"] <= 0.5]
        out = {"chosen": good.mean().item()} if len(good) else {}
        out |= {"rejected": bad.mean().item()} if len(bad) else {}
        gap = good[:, None] - bad
        return out | ({"accuracy": (torch.sign(gap) / 2 + 0.5).mean().item()} if gap.numel() else {})

    def judged_problems(self, method):
        """Each prompt once."""
        return list({p.prompt: p for p in super().judged_problems(method)}.values())
