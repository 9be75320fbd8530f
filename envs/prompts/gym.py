"""Any task family of Reasoning Gym (2505.24760): procedurally generated problems with verifiers, some hundred families.

Problems are made when asked for, without a network: the package seeds each by (seed, index). Those for training and those
held out have seeds that never meet, and a training problem whose question is among those held out is passed over for the next
one. The prompt is the question, `ask` and a newline. The response's answer is what stands between its last <answer> tags, else
all of it, or, with reads=last_number, the last number in it (a small model that has learned to chat answers in sentences); the
family's own score_answer grades it, above 0.99 counts as correct, and Verdict.score keeps the grade.

Some families evaluate the answer as Python. There, text that could call anything or compute without end scores 0 unread.

For a card: provides prompts, and demonstrations (the stored answer) where the family has one. For pretrained models, and for
character models the families with short prompts: chain_sum, gcd, lcm, number_sequence, simple_equations, count_bits,
spell_backward. Needs the extra `data`. Gold metrics: pass@k, mean score.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import re
import string
import warnings

from envs.prompts.base import PromptWorld, known, share
from envs.prompts.task import WRONG, Problem, Task, Verdict
from runner.errors import UserError, unknown
from runner.interface import Metric, knob

END = "\x03"
PRINTABLE = "".join(c for c in string.printable if c.isprintable()) + "\n"
SPAN, AHEAD = 10_000_000, 1000  # seeds per seed of ours, half of them for what is held out; problems looked at for one
NUMBERS = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
LISTS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")  # score_answer may evaluate a list
FORMULAS = ("countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "intermediate_integration")
KNOWN = {"sin", "cos", "tan", "exp", "log", "sqrt", "sinh", "cosh", "tanh", "asin", "acos", "atan", "pi"}
ENDLESS = re.compile(r"(\*\*|\^)[^-+*/,]*(\*\*|\^)|(\*\*|\^)[-+(]*[0-9]{3}|!|[0-9.][eE][-+]?[0-9]{3}|[_'\"\[\]{}\\:;=]")


class Gym(Task):
    eos = END

    def __init__(self, family: str, prompt_length: int | None = None, response_length: int | None = None,
                 options: dict | None = None, train: int = 20_000, held_out: int = 256, scan: int = 64, seed: int = 0,
                 ask: str = "", reads: str = "whole"):
        """options: of the family's own config. Lengths that are not given are the greatest among the first `scan` problems;
        training problems that are longer are passed over, a given `prompt_length` that is below those is refused."""
        if not (1 <= train <= SPAN // 2 and 1 <= held_out <= SPAN // 2 and scan >= 1):
            raise UserError(f"reasoning_gym:{family}: train and held_out lie between 1 and {SPAN // 2}, scan is at least 1")
        self.family, self.alphabet, self.prompt_length = family, PRINTABLE + END, 0
        self.ask, self.reads = ask and "\n" + ask, reads
        self.grader = dataset(family, options or {}, seed * SPAN, train)
        self.held = Entries(self, dataset(family, options or {}, seed * SPAN + SPAN // 2, held_out))
        self.questions: set[str] | None = None
        seen = [self.held[i] for i in range(min(scan, held_out))]
        seen += [self.made(self.grader, i) for i in range(min(scan, train))]
        longest = max(len(p.prompt) for p in seen)
        if prompt_length is not None and longest > prompt_length:
            raise UserError(f"reasoning_gym:{family}: a prompt has {longest} characters, but prompt_length={prompt_length}\n"
                            f"set prompt_length={longest}, or make the problems smaller by the family's options")
        self.alphabet += "".join(sorted({c for p in seen for c in p.prompt + told(p)} - set(self.alphabet)))
        self.prompt_length = prompt_length or longest
        self.response_length = response_length or 1 + max(len(told(p)) for p in seen)
        self.trained = Entries(self, self.grader, self.fits)

    def made(self, source, index: int) -> Problem:
        with contextlib.redirect_stdout(io.StringIO()):  # some families print while they make a problem
            entry = source[index]
        return Problem(entry["question"] + self.ask + "\n", entry)

    def fits(self, problem) -> bool:
        if self.questions is None:
            self.questions = {p.prompt for p in self.held}
        return len(problem.prompt) <= self.prompt_length and problem.prompt not in self.questions

    def train(self):
        return self.trained

    def held_out(self):
        return self.held

    def verify(self, problem, response):
        text = response.removesuffix(END)
        answer = (text.rpartition("<answer>")[2].partition("</answer>")[0] if "<answer>" in text else text).strip()
        if self.reads == "last_number":
            answer = next(reversed(NUMBERS.findall(answer)), "")
        if not answer:
            return WRONG
        try:
            with warnings.catch_warnings():  # evaluated text may warn
                warnings.simplefilter("ignore")
                harmless = answer == problem.answer["answer"] or self.harmless(answer)
                score = float(self.grader.score_answer(answer, problem.answer)) if harmless else 0.0
        except Exception:  # whatever a family's parser makes of an arbitrary text
            score = 0.0
        return Verdict(float(score > 0.99), answer, 1.0, score)

    def harmless(self, answer: str) -> bool:
        if self.family in LISTS:
            return not any(sign in answer for sign in ("(", "*", "{", "<<", " for "))
        if self.family in FORMULAS:
            words = re.findall("[A-Za-z]{2,}", answer)
            return len(answer) <= 400 and not ENDLESS.search("".join(answer.split())) and KNOWN.issuperset(words)
        return True

    def demonstrate(self, problem, rng):
        if not told(problem):
            raise UserError(f"reasoning_gym:{self.family} stores no answers, so there is nothing to demonstrate\n"
                            "begin from a pretrained model, or choose another family")
        return told(problem) + END


class Entries(collections.abc.Sequence):
    """A family's problems; where one does not fit, the next one that does and that is no other index's own."""

    def __init__(self, task: Gym, source, fits=lambda problem: True):
        self.task, self.source, self.fits, self.kept = task, source, fits, {}

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        if index not in self.kept:
            if len(self.kept) >= 4096:  # some families take a tenth of a second for a problem
                self.kept.pop(next(iter(self.kept)))
            self.kept[index] = self.find(index)
        return self.kept[index]

    def find(self, index) -> Problem:
        for ahead in range(AHEAD):
            found = self.task.made(self.source, (index + ahead) % len(self))
            if self.fits(found):
                return found
        raise UserError(f"reasoning_gym:{self.task.family}: of {AHEAD} problems in a row each is held out or longer than "
                        f"prompt_length={self.task.prompt_length}\nhold out fewer (held_out), widen prompt_length, or make "
                        "the family's problems more various by its options")


def told(problem: Problem) -> str:
    """The stored answer, "" where a family has none."""
    answer = problem.answer["answer"]
    return answer if isinstance(answer, str) else ""


def dataset(family: str, options: dict, seed: int, size: int):
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError("Reasoning Gym's tasks need the package reasoning-gym\npip install -e '.[data]'") from None
    if family not in DATASETS:
        raise unknown("task family of reasoning_gym", family, DATASETS)
    known = [f.name for f in dataclasses.fields(DATASETS[family][1]) if f.name not in ("seed", "size")]
    for name in options:
        if name not in known:
            raise unknown(f"option of reasoning_gym:{family}", name, known)
    try:
        return reasoning_gym.create_dataset(family, seed=seed, size=size, **options)
    except Exception as error:  # each family checks its options in its own way
        raise UserError(f"reasoning_gym:{family} refuses {size} problems with options {options}: {error}\n"
                        f"change their number (train, held_out) or the options: {', '.join(known)}") from None


def option(text: str):
    """"NAME:VALUE" -> (NAME, VALUE as json reads it, else the text)"""
    name, colon, value = text.partition(":")
    if not colon:
        raise UserError(f"env.options: '{text}' is not NAME:VALUE\nfor example env.options=[min_terms:2,max_terms:3]")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


class GymWorld(PromptWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(PromptWorld.Config):
        family: str = knob("chain_sum", "task family; also env=reasoning_gym:FAMILY")
        options: tuple[str, ...] = knob((), "of the family's own settings, each NAME:VALUE")
        prompt_length: int = knob(0, "most characters of a prompt; 0: those of the longest of the first problems", low=0)
        problems: int = knob(20000, "problems for training", low=1)
        ask: str = knob("", "what is asked of the answer, on a line of its own behind the question")
        reads: str = knob("whole", "what of a response is its answer: all of it (or what stands between <answer> tags), or its "
                          "last number", choices=["whole", "last_number"])
        scored: bool = knob(False, "the family's graded score is rewarded instead of right and wrong")

    metrics = {**PromptWorld.metrics, "score": Metric("max", "", "mean of the family's graded score")}

    def make_task(self):
        c = self.config
        return Gym(c.family, c.prompt_length or None, options=dict(map(option, c.options)), train=c.problems, ask=c.ask,
                   reads=c.reads)

    def reward(self, verdict):
        return (verdict.score or 0.0) if self.config.scored else verdict.correct

    def details(self, problems, responses):
        return known(score=share(v.score or 0.0 for some in responses for _, v in some))
