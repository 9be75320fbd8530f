"""Preference pairs from a file on this machine, in the layouts in which such sets are published: jsonl (also gzipped) or parquet,
each row a prompt with a chosen and a rejected response.

| layout | prompt | chosen, rejected |
|---|---|---|
| explicit (TRL) | a text | a text each |
| conversational (TRL) | a list of messages {role, content} | a list with the last message each |
| implicit, conversational | - (or the first message, as UltraFeedback binarized) | conversations with the same beginning |
| HH-RLHF (arXiv 2204.05862) | - | whole texts "\\n\\nHuman: … \\n\\nAssistant: …" with the same beginning |

A response is the last message, or what stands behind the last common "Assistant:"; everything before it is the prompt. A
prompt of one user's message is that message, which a checkpoint's chat template then wraps; one of several is written out with
"Human:" and "Assistant:". score_chosen and score_rejected (or chosen_score, rejected_score) are kept as rewards; a column
probability, between 0 and 1, is that of chosen beating rejected (1 without it).

What is too long: a response is cut at `response_length` tokens, as everywhere; a prompt of more tokens than the policy's
context leaves is dropped with its pair, or, with long=cut, loses its beginning. Pairs whose sides are the same are left out. A
run's record counts all of these. A row that cannot be used is an error that names its line, unless `skip_bad`.

Held-out pairs come from `held_out_file`, else they are the `share` of the prompts with the lowest checksums. There is no judge:
gold metrics are those of pairs (accuracy, changes of log-probability) and of samples (KL, length, entropy).

For a card: provides pairs. Data: HH-RLHF (MIT licence), UltraFeedback binarized (MIT), or any file of these layouts; nothing is
downloaded. For pretrained models.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

from envs.pairs.base import PairWorld
from envs.pairs.task import Pair, PairTask
from envs.prompts.task import Problem, Verdict
from envs.prompts.textfile import END, PRINTABLE, parquet
from runner.errors import UserError
from runner.interface import data_root, knob

SHIPPED = Path(__file__).with_name("pairs.jsonl")
TURNS = {"user": "Human", "human": "Human", "assistant": "Assistant", "gpt": "Assistant", "system": "System"}
MARK = "\n\nAssistant:"
NAMED = 5  # so many bad rows are named


class Bad(Exception):
    """Why a row cannot be used."""


class TextPairs(PairTask):
    """dropped: the number of bad rows that were left out."""

    eos = END

    def __init__(self, file: str, held_out_file: str = "", response_length: int = 0, skip_bad: bool = False, share: float = 0.1,
                 most: int = 0):
        self.bad: list[str] = []
        rows = self.read(file, most)
        held = self.read(held_out_file, most) if held_out_file else []
        if self.bad and not skip_bad:
            named = self.bad[:NAMED] + ["…"] * (len(self.bad) > NAMED)
            raise UserError("\n".join([f"{len(self.bad)} rows cannot be used:", *named,
                                       "mend them, or leave them out by env.skip_bad=true"]))
        if not held_out_file:
            held = [p for p in rows if zlib.crc32(p.prompt.encode()) / 2 ** 32 < share]
        known = {p.prompt for p in held}
        self.rows = [p for p in rows if p.prompt not in known], held
        if not all(self.rows):
            raise UserError(f"{file}: no {self.kept} are left to {'learn from' if self.rows[1] else 'hold out'}\n"
                            "give a longer file, a held_out_file, or another env.share")
        both = [*self.rows[0], *self.rows[1]]
        self.dropped = len(self.bad)
        self.prompt_length = max(len(p.prompt) for p in both)
        self.response_length = response_length or 1 + max(len(t) for p in both for t in self.responses(p))
        found = {c for p in both for t in (p.prompt, *self.responses(p)) for c in t}
        self.alphabet = PRINTABLE + END + "".join(sorted(found - set(PRINTABLE + END)))

    kept, shipped = "pairs", SHIPPED  # what rows are, and the project's own few
    parse = staticmethod(lambda row: pair_of(row))

    @staticmethod
    def responses(pair: Pair) -> tuple[str, ...]:
        return pair.chosen, pair.rejected

    def read(self, file: str, most: int) -> list[Pair]:
        path, found = located(file, self.shipped), []
        for where, row in parquet(path) if path.suffix == ".parquet" else lines(path):
            if most and len(found) == most:
                break
            try:
                if isinstance(row, str):
                    raise Bad(row)
                found.append(self.parse(row))
            except Bad as why:
                self.bad.append(f"{path.name}, {where}: {why}")
        return found

    def train(self):
        return [Problem(p.prompt) for p in self.rows[0]]

    def held_out(self):
        return [Problem(p.prompt) for p in self.rows[1]]

    def verify(self, problem, response):
        return Verdict(0.0, response or None, float(response.endswith(END)))

    def demonstrate(self, problem, rng):
        raise NotImplementedError("pairs have no demonstrations")

    def pairs(self):
        return [closed(p) for p in self.rows[0]]

    def held_out_pairs(self):
        return [closed(p) for p in self.rows[1]]


def closed(pair: Pair) -> Pair:
    """With the end of responses; a pretrained tokeniser has its own."""
    return pair._replace(chosen=pair.chosen + END, rejected=pair.rejected + END)


def pair_of(row: dict) -> Pair:
    """A row in any of the layouts. Bad: what is wrong with it."""
    for name in ("chosen", "rejected"):
        if name not in row:
            more = "; single responses with labels are read by env=textlabels, for method=kto" if "completion" in row else ""
            raise Bad(f"no {name} (its columns: {', '.join(map(str, row))}){more}")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not isinstance(prompt, str):
            prompt, chosen, rejected = parted(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = conversed(prompt, chosen, rejected)
    else:
        raise Bad("chosen and rejected must both be texts, or both lists of messages")
    for name, text in (("prompt", prompt), ("chosen response", chosen), ("rejected response", rejected)):
        if not text.strip():
            raise Bad(f"an empty {name}")
    return Pair(prompt, chosen, rejected, probability_of(row), scores=scores_of(row))


def probability_of(row: dict) -> float:
    found = row.get("probability", 1.0)
    if not isinstance(found, int | float) or not 0 <= found <= 1:
        raise Bad(f"probability is {found!r}, not a number between 0 and 1")
    return float(found)


def scores_of(row: dict) -> tuple[float, float] | None:
    for names in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        if all(name in row for name in names):
            try:
                scores = tuple(float(row[name]) for name in names)
            except (TypeError, ValueError):
                raise Bad(f"{names[0]} and {names[1]} must be numbers") from None
            if not all(map(math.isfinite, scores)):
                raise Bad(f"{names[0]} or {names[1]} is not finite")
            return scores
    return None


def parted(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two dialogues of HH-RLHF -> what both begin with, and what the assistant says last in each."""
    cut = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    at = chosen.rfind(MARK, 0, cut + len(MARK))
    if at < 0 or rejected[:at + len(MARK)] != chosen[:at + len(MARK)]:
        raise Bad("no prompt, and no common beginning that ends in 'Assistant:'")
    at += len(MARK)
    return chosen[:at].strip("\n"), chosen[at:].strip(), rejected[at:].strip()


def conversed(prompt, chosen: list, rejected: list) -> tuple[str, str, str]:
    """Lists of messages -> prompt, the two last messages."""
    before = prompt if isinstance(prompt, list) else []
    check_messages(*before, *chosen, *rejected)
    if not chosen or not rejected:
        raise Bad("an empty conversation")
    if chosen[:-1] != rejected[:-1]:
        raise Bad("chosen and rejected differ before their last message")
    turns = [*before, *chosen[:-1]]
    text = prompt if not turns and isinstance(prompt, str) else written(turns)
    return text, chosen[-1]["content"], rejected[-1]["content"]


def check_messages(*messages):
    for m in messages:
        if not isinstance(m, dict) or not isinstance(m.get("content"), str) or "role" not in m:
            raise Bad("a message is an object with role and content")


def written(turns: list) -> str:
    """The messages before a response as one text."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{TURNS.get(m['role'], m['role'])}: {m['content']}" for m in turns) + MARK


def located(file: str, shipped: Path = SHIPPED) -> Path:
    path = shipped if file == "shipped" else data_root() / Path(file).expanduser()
    if not path.name.endswith((".jsonl", ".json", ".jsonl.gz", ".parquet")):
        raise UserError(f"{path}: not a .jsonl, .jsonl.gz or .parquet file\ngive rows with chosen and rejected in such a form")
    if not path.is_file():
        raise UserError(f"no file {path}\nput a file with chosen and rejected responses there; the published HH-RLHF, say:\n"
                        f"huggingface-cli download --repo-type dataset Anthropic/hh-rlhf --local-dir {path.parent}\n"
                        f"then env.file={path.parent}/harmless-base/train.jsonl.gz and env.held_out_file the one called test…")
    return path


def lines(path: Path) -> Iterator[tuple[str, dict | str]]:
    """(where, row, or what is wrong with it)"""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}\nfetch it again") from None
    for i, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                yield f"line {i}", row if isinstance(row, dict) else "no object with chosen and rejected"
            except (ValueError, RecursionError) as error:
                yield f"line {i}", f"no JSON ({error})"


class TextPairsWorld(PairWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(PairWorld.Config):
        file: str = knob("shipped", "rows to learn from; a relative path lies in the project's data folder; shipped: the "
                         "project's own few")
        held_out_file: str = knob("", "rows to judge by; empty: a share of the others")
        share: float = knob(0.1, "of the prompts that is held out then", low=0.0, high=1.0)
        most: int = knob(0, "rows that are read of a file at most; 0: all", low=0)
        long: str = knob("drop", "prompts that the policy's context has no room for: their pairs are dropped, or their "
                         "beginning is", choices=["drop", "cut"])
        skip_bad: bool = knob(False, "leave out rows that cannot be used instead of naming them")

    def make_task(self):
        c = self.config
        return TextPairs(c.file, c.held_out_file, c.response_length, c.skip_bad, c.share, c.most)

    held: list[Pair] | None = None

    def stored(self, method, pairs):
        pairs = pairs[:self.config.limit or None]
        kept, cut = self.fitting(method, pairs)
        stream = super().stored(method, kept)
        self.told |= {"bad": self.task.dropped, "too_long": len(pairs) - len(kept), "cut": cut}
        return stream

    def fitting(self, method, pairs) -> tuple[list[Pair], int]:
        """Pairs whose prompts leave room for a response, and how many of these had to be cut for it."""
        limit, out, cut = method.policy.shape.context - method.response_length(), [], 0
        for p in pairs:
            tokens = len(method.tokenizer.encode(p.prompt))
            if tokens > limit and self.config.long == "cut":
                cut += 1
                text = p.prompt
                while tokens > limit and text:  # characters, since a template may stand around them
                    text = text[max(1, (tokens - limit) * len(text) // (2 * tokens)):]
                    tokens = len(method.tokenizer.encode(text))
                p = p._replace(prompt=text)
            if tokens <= limit and p.prompt:
                out.append(p)
        if pairs and not out:
            raise UserError(f"none of the {len(pairs)} prompts leaves room for a response of {method.response_length()} tokens "
                            f"in the policy's context of {method.policy.shape.context}\nallow shorter responses "
                            "(env.response_length), or cut prompts (env.long=cut)")
        return out, cut

    def evaluate(self, method, seed):
        told = super().evaluate(method, seed)
        return {k: v for k, v in told.items() if k not in ("reward", "win_rate")}  # there is no judge

    def judged_pairs(self, method):
        if self.held is None:  # one world serves one run: the policy's context and tokeniser stay what they are
            self.held = self.fitting(method, self.task.held_out_pairs())[0]
        return self.held

    def judged_problems(self, method):
        return [Problem(p.prompt) for p in self.judged_pairs(method)]
