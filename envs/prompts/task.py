"""What a task of token policies is: problems with prompts, a verifier of responses, demonstrations to start a policy from.

A task is plain Python and needs no torch. It is deterministic: problems are a function of its arguments and an index, and
demonstrations draw from the generator that is handed in. Its verifier never raises, whatever a policy writes.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Problem(NamedTuple):
    prompt: str
    answer: Any = None  # whatever verify() needs


class Verdict(NamedTuple):
    """answer: the final answer in one spelling, for votes; None if there is none to be read. Whether an answer is correct
    depends on nothing but the answer. format: share of the required form that the response has. score: graded reward, where
    a task has one besides right and wrong."""

    correct: float
    answer: str | None
    format: float = 1.0
    score: float | None = None


WRONG = Verdict(0.0, None, 0.0)


class Task:
    """One kind of problem.

    alphabet: the characters of prompts and responses, without padding. eos: the character that ends a response, part of it.
    prompt_length, response_length: most characters; prompts of the project's own tasks have exactly prompt_length.
    """

    alphabet: str
    eos: str
    prompt_length: int
    response_length: int

    def train(self) -> Sequence[Problem]:
        raise NotImplementedError

    def held_out(self) -> Sequence[Problem]:
        """No problem of train() is among them."""
        raise NotImplementedError

    def unlabelled(self) -> Sequence[Problem]:
        """The fixed pool that test-time training adapts to and is judged on; no problem of train() is among them."""
        return self.held_out()

    def verify(self, problem: Problem, response: str) -> Verdict:
        """response: up to and including eos, or cut off at response_length. Never raises."""
        raise NotImplementedError

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """A response to learn from before reinforcement, by the task's recipe perhaps a wrong one; ends in eos."""
        raise NotImplementedError

    def valid_next(self, problem: Problem, prefix: str) -> str | None:
        """The characters that can follow `prefix` in a response of the right form ("" if none can); None: not told."""
        return None

    def canonical(self, problem: Problem, response: str) -> str | None:
        """One spelling for responses that are the same solution, None for a wrong one: to count distinct solutions."""
        return response if self.verify(problem, response).correct else None

    def all_solutions(self, problem: Problem) -> list[str] | None:
        """Every solution in its canonical spelling; None: not told."""
        return None

    def biased(self, problem: Problem) -> bool:
        """Whether the demonstrations err systematically on this problem."""
        return False


class Drawn(Sequence):
    """Problems without end, each made when it is asked for: make(rng) with a generator of (name, index) alone.

    `accept` keeps splits apart: a problem that it refuses is drawn again."""

    def __init__(self, make: Callable[[random.Random], Problem], name: str, length: int = 2 ** 31,
                 accept: Callable[[Problem], bool] = lambda problem: True):
        self.make, self.name, self.length, self.accept = make, name, length, accept

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(index)
        rng = random.Random(f"{self.name}/{index % self.length}")  # text seeds are hashed by SHA-512: near ones are unrelated
        while not self.accept(problem := self.make(rng)):
            pass
        return problem


KINDS = 20  # problems are told apart by a checksum: 0 held out, else training (or a further pool)


def kind(seed: int, text: str) -> int:
    return zlib.crc32(f"{seed}/{text}".encode()) % KINDS


class Generated(Task):
    """A task whose problems are drawn without end by make(rng); `size` of them are held out."""

    seed: int
    size: int

    def make(self, rng: random.Random) -> Problem:
        raise NotImplementedError

    def train(self):
        return Drawn(self.make, f"{self.seed}/train", accept=lambda p: self.kind(p) > 0)

    def held_out(self):
        return Drawn(self.make, f"{self.seed}/held out", self.size, lambda p: self.kind(p) == 0)

    def kind(self, problem) -> int:
        return kind(self.seed, problem.prompt)


def split(problems: Sequence[Problem], share: float, seed: int) -> tuple[list[Problem], list[Problem]]:
    """A random split: (train, held out), the latter a `share` of the problems."""
    problems = list(problems)
    random.Random(f"split/{seed}").shuffle(problems)
    cut = round(len(problems) * (1 - share))
    return problems[:cut], problems[cut:]
