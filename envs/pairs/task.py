"""What a task of preferences is: a task of prompts (envs/prompts/task.py) with pairs of responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from envs.prompts.task import Problem, Task


class Pair(NamedTuple):
    """label: the probability that `chosen` beats `rejected`. phrases: for both sides the number of the phrase that each
    character belongs to, 0 for what the sides share. scores: a further reward of both sides."""

    prompt: str
    chosen: str
    rejected: str
    label: float = 1.0
    phrases: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    scores: tuple[float, float] | None = None


class PairTask(Task):
    def pairs(self) -> Sequence[Pair]:
        """To train on; they may be noisy."""
        raise NotImplementedError

    def held_out_pairs(self) -> Sequence[Pair]:
        """Clean ones, for gold metrics."""
        return []

    def old(self) -> Sequence[tuple[str, str]]:
        """(prompt, response) of what the policy could do before, and should not forget."""
        return []

    def classes(self, problem: Problem) -> dict[str, str]:
        """{class of answers: the characters that begin one}."""
        return {}
