"""What a task of preferences is: a task of prompts (envs/prompts/task.py) that also stores pairs of responses.

Pairs are a function of the task's arguments alone. What is clean (the judge, which labels were flipped) is there for gold
metrics and never reaches a loss.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from envs.prompts.task import Problem, Task


class Pair(NamedTuple):
    """label: probability that `chosen` beats `rejected`. phrases: for each side, the number of the differing phrase that a
    character of the response belongs to, 0 for what both sides share. scores: graded quality of each side, if it is told."""

    prompt: str
    chosen: str
    rejected: str
    label: float = 1.0
    phrases: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    scores: tuple[float, float] | None = None


class PairTask(Task):
    def pairs(self) -> list[Pair]:
        """Those to train on; their prompts are of train()."""
        raise NotImplementedError

    def held_out_pairs(self) -> list[Pair]:
        """Pairs of the same kind with clean labels; their prompts are of held_out()."""
        return []

    def old(self) -> list[tuple[str, str]]:
        """Held-out (prompt, response) as the policy saw them before it learned preferences: drift is measured on them."""
        return []

    def classes(self, problem: Problem) -> dict[str, str]:
        """Classes of responses: name -> the characters that their responses begin with; empty if they are not told so."""
        return {}


def flip(pairs: list[Pair], share: float, seed: str) -> tuple[list[Pair], tuple[int, ...]]:
    """The pairs with the two sides of a random `share` of them exchanged, and the ascending numbers of those."""
    flipped = sorted(random.Random(seed).sample(range(len(pairs)), round(share * len(pairs))))
    out = list(pairs)
    for i in flipped:
        p = pairs[i]
        out[i] = p._replace(chosen=p.rejected, rejected=p.chosen, phrases=p.phrases and p.phrases[::-1],
                            scores=p.scores and p.scores[::-1])
    return out, tuple(flipped)


def words(number: int, rng: random.Random, length: int = 4, firsts: bool = False) -> list[str]:
    """Different random lower-case strings; `firsts`: that begin with different letters."""
    found: dict[str, str] = {}
    while len(found) < number:
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))
        found.setdefault(word[0] if firsts else word, word)
    return list(found.values())
