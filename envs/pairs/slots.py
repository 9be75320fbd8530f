"""Sentences with slots: pairs that differ in a word or two of a long shared text, so that a policy can learn just those.

    prompt "      ^k d?" (a code of two letters)    response "thq wexu fgk lwp … e ro." (a slot word, characters that agree)

One of 12 templates of 40 to 60 characters is told by the code's second letter. A template is fixed text with a slot near its
start and, in half of the templates, one more in its middle; two or three characters behind a slot agree with it: they copy one
of its characters. The code's first letter tells the right one of eight words of four letters for each slot. In demonstrations
30 % of the sentences have one wrong word, or two where there are two slots, and everything agrees with what is written.
300 problems of another kind, generic text, are the sentences of envs/pairs/answers.py: drift is measured on such.

A pair: `chosen` has the right words; `rejected` is the same sentence with at least one wrong word, and what agrees is NOT
changed. `phrases` number the words that differ. 600 of the 676 codes: 400 training pairs, 200 held-out ones.

The judge reads the words at the slots' places: an answer is right if all are; it is of the required form if all the rest
stands and agrees with the words that are written.

For a card: provides prompts, demonstrations, pairs. Testbed of the project's for RRPO (2504.12083).
"""

from __future__ import annotations

import dataclasses
import random
from typing import NamedTuple

from envs.pairs.answers import ALPHABET, LETTERS, Answers
from envs.pairs.base import PairWorld
from envs.pairs.task import Pair, PairTask, flip, words
from envs.prompts.task import WRONG, Problem, Verdict, split
from runner.errors import UserError
from runner.interface import Metric, knob

SIZE = 4  # characters of a slot's word


class Template(NamedTuple):
    """text: the fixed characters, with " " also where slots and agreeing characters stand. slots: where each begins.
    agree: place -> (slot, which of its characters is copied)."""

    text: str
    slots: tuple[int, ...]
    agree: dict[int, tuple[int, int]]

    def fill(self, written: tuple[str, ...], agreeing: tuple[str, ...] | None = None) -> str:
        """The sentence with these words; what agrees does so with `agreeing`, by default the same words."""
        out = list(self.text)
        for at, word in zip(self.slots, written):
            out[at:at + SIZE] = word
        for at, (slot, i) in self.agree.items():
            out[at] = (agreeing or written)[slot][i]
        return "".join(out) + "."

    def phrases(self, different: list[int]) -> tuple[int, ...]:
        """For every character of a sentence: k in the k-th slot of those that differ, else 0."""
        out = [0] * (len(self.text) + 1)
        for k, slot in enumerate(different, 1):
            out[self.slots[slot]:self.slots[slot] + SIZE] = [k] * SIZE
        return tuple(out)


def template(rng: random.Random, slots: int) -> Template:
    """Random words, then slots and agreeing characters put over them as words of their own."""
    length = rng.randint(40, 60)
    text = ""
    while len(text) < length:
        text += "".join(rng.choices(LETTERS, k=rng.randint(2, 6))) + " "
    out = list(text[:length - 1] + rng.choice(LETTERS))  # no space at the end
    places = [rng.randint(3, 6), rng.randint(20, 24)][:slots]
    agree = {}
    for slot, at in enumerate(places):
        out[at - 1], out[at + SIZE] = " ", " "
        end = places[slot + 1] - 2 if slot + 1 < slots else length - 1
        for place in sorted(rng.sample(range(at + SIZE + 1, end), rng.randint(2, 3))):
            agree[place] = (slot, rng.randrange(SIZE))
    for place in [*agree, *(p + i for p in places for i in range(SIZE))]:
        out[place] = " "
    return Template("".join(out), tuple(places), agree)


class Slots(PairTask):
    """One task for each `seed`, which draws words, templates, codes, pairs; the alphabet is always the same."""

    alphabet, eos, prompt_length = ALPHABET, ".", 11

    def __init__(self, seed: int = 0, p_wrong: float = 0.3, p_flip: float = 0.0):
        if not 0 <= p_wrong <= 1 or not 0 <= p_flip <= 1:
            raise UserError("slots: p_wrong and p_flip are shares between 0 and 1")
        self.seed, self.p_wrong = seed, p_wrong
        rng = random.Random(f"{seed}/slots")
        self.words = words(8, rng, SIZE, firsts=True)
        self.templates = [template(rng, 1 + i % 2) for i in range(12)]
        self.right = [self.shuffled(self.words, rng) for _ in range(2)]  # of each slot: letter -> word
        self.told = self.shuffled(list(range(12)), rng)                  # letter -> template
        self.response_length = max(len(t.text) for t in self.templates) + 1
        codes = [self.problem(a + b) for a in LETTERS for b in LETTERS]
        self.codes = split(codes, 200 / len(codes), seed)
        self.generic = Answers(seed)
        self.stored, self.flipped = flip(self.made(self.codes[0][:400], "pairs"), p_flip, f"{seed}/flips")

    @staticmethod
    def shuffled(values: list, rng: random.Random) -> dict:
        """Every letter's value, each of them about equally often."""
        even = (values * len(LETTERS))[:len(LETTERS)]
        rng.shuffle(even)
        return dict(zip(LETTERS, even))

    # -- problems
    def problem(self, code: str) -> Problem:
        """answer: (number of the template, the right words)"""
        number = self.told[code[1]]
        right = tuple(table[code[0]] for table, _ in zip(self.right, self.templates[number].slots))
        return Problem(f"^{code[0]} {code[1]}?".rjust(self.prompt_length), (number, right))

    def train(self):
        return self.codes[0] + self.generic.train()[:300]

    def held_out(self):
        return self.codes[1]

    @staticmethod
    def coded(problem: Problem) -> bool:
        """Whether a problem is a code's; else it is generic text."""
        return isinstance(problem.answer, tuple)

    # -- judging
    def verify(self, problem, response):
        if not self.coded(problem):
            return self.generic.verify(problem, response)
        number, right = problem.answer
        sentence = self.templates[number]
        written = tuple(response[at:at + SIZE] for at in sentence.slots)
        if not set(written) <= set(self.words):
            return WRONG
        return Verdict(float(written == right), ",".join(written), float(response == sentence.fill(written)))

    def valid_next(self, problem, prefix):
        if not self.coded(problem):
            return self.generic.valid_next(problem, prefix)
        sentence = self.templates[problem.answer[0]]
        written = []  # the words so far, the last of them perhaps begun
        for at in sentence.slots:
            begun = prefix[at:at + SIZE]
            written.append([w for w in self.words if w.startswith(begun)] if len(prefix) > at else self.words)
            if not written[-1]:
                return ""
        if not sentence.fill(tuple(w[0] for w in written)).startswith(prefix):
            return ""
        at, full = len(prefix), {sentence.fill(tuple(w[0] for w in written))}
        for slot, begin in enumerate(sentence.slots):
            if begin <= at < begin + SIZE:
                full = {sentence.fill((*(w[0] for w in written[:slot]), w, *(w[0] for w in written[slot + 1:])))
                        for w in written[slot]}
        return "".join(sorted({text[at] for text in full if at < len(text)}))

    def classes(self, problem):
        return {} if self.coded(problem) else self.generic.classes(problem)

    # -- what is shown
    def demonstrate(self, problem, rng):
        if not self.coded(problem):
            return self.generic.demonstrate(problem, rng)
        number, right = problem.answer
        written = self.wrong(right, rng)[0] if rng.random() < self.p_wrong else right
        return self.templates[number].fill(written)

    def wrong(self, right: tuple[str, ...], rng: random.Random) -> tuple[tuple[str, ...], list[int]]:
        """(words of which at least one is wrong, which of them)."""
        different = rng.choice([[0]] if len(right) == 1 else [[0], [1], [0, 1]])
        return tuple(rng.choice([w for w in self.words if w != word]) if i in different else word
                     for i, word in enumerate(right)), different

    def old(self):
        return self.generic.old()

    # -- pairs
    def pairs(self):
        return self.stored

    def held_out_pairs(self):
        return self.made(self.codes[1], "held-out pairs")

    def made(self, problems: list[Problem], name: str) -> list[Pair]:
        rng, out = random.Random(f"{self.seed}/{name}"), []
        for problem in problems:
            number, right = problem.answer
            sentence = self.templates[number]
            written, different = self.wrong(right, rng)
            phrases = sentence.phrases(different)
            out.append(Pair(problem.prompt, sentence.fill(right), sentence.fill(written, right), phrases=(phrases, phrases)))
        return out


class SlotsWorld(PairWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(PairWorld.Config):
        p_wrong: float = knob(0.3, "share of demonstrated sentences with a wrong word", low=0.0, high=1.0)
        p_flip: float = knob(0.0, "share of the training pairs that are stored the wrong way round", low=0.0, high=1.0)
        words: int = knob(0, "seed of words, templates and pairs; the shipped start knows those of 0", low=0)

    metrics = {**PairWorld.metrics, "slots": Metric("max", "", "share of slots with the right word")}

    def make_task(self):
        c = self.config
        return Slots(c.words, c.p_wrong, c.p_flip)

    def details(self, problems, responses):
        right = [said == true for problem, some in zip(problems, responses) for _, verdict in some
                 for said, true in zip((verdict.answer or ",").split(","), problem.answer[1])]
        return {"slots": sum(right) / len(right)}
