"""Noisy modular arithmetic: one right answer, errors of known frequency, and a systematic error that wins the majority.

modular chain: five digits and four of + - *, evaluated from left to right modulo 10; the response restates every step.

    prompt "3+4*2-7*8="    response "3+4=7;7*2=4;4-7=7;7*8=6."

In demonstrations a result is replaced by a uniform digit with probability `p_err`; later steps go on from the digit that is
shown. Else, in a step "*d" with d >= `biased_from`, it is one too large with probability `biased_p`. With the defaults such
steps are in 37.6 % of the prompts ("biased"); a policy equal to the recipe answers 0.34 of the others and 0.18 of the biased
ones correctly, and its most likely answer is right for all of the others and for 5 % of the biased ones.

benign forks: four digits to be summed modulo 10, any two of those that are left per step; the order is a fork that does no
harm, the result digits err as above, the systematic error in sums with a digit >= 9.

    prompt "3758="    response "3+8=1;1+5=6;6+7=3."

Prompts with a 9 (34.4 %) are biased: 0.18 correct and the most likely answer always wrong, against 0.37 and 0.999.

The verifier reads the response's ending alone: "=", a digit, "."; the digit is the answer (and the vote). For a card:
provides prompts, demonstrations, and a fixed pool of unlabelled prompts for test-time training. Testbed of the project's for
TTRL (2504.16084), SPINE (2511.17938), COPO and APO. Gold metrics: pass@1 on easy and biased prompts, accuracy of the majority.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

from envs.prompts.base import PromptWorld, known, majority, share
from envs.prompts.task import Drawn, Generated, Problem, Verdict
from runner.errors import UserError
from runner.interface import Metric, knob

APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
ENDING, DIGITS = re.compile(r"=([0-9])\.\Z"), "0123456789"


class Modular(Generated):
    """What the two tasks share. `slots` holds the characters that may stand at each place of a response."""

    eos, alphabet = ".", DIGITS + "+-*=;."
    slots: list[str]

    def __init__(self, p_err: float = 0.3, biased_p: float = 0.6, biased_from: int = 7, held_out: int = 256, pool: int = 64,
                 seed: int = 0):
        if not 0 <= p_err <= 1 or not 0 <= biased_p <= 1 or min(held_out, pool) < 1:
            raise UserError("p_err and biased_p lie between 0 and 1; held_out and pool are at least 1")
        self.p_err, self.biased_p, self.biased_from = p_err, biased_p, biased_from
        self.size, self.pool, self.seed, self.response_length = held_out, pool, seed, len(self.slots)

    def train(self):
        return Drawn(self.make, f"{self.seed}/train", accept=lambda p: self.kind(p) > 1)

    def unlabelled(self):
        return Drawn(self.make, f"{self.seed}/unlabelled", self.pool, lambda p: self.kind(p) == 1)

    def verify(self, problem, response):
        if not (ending := ENDING.search(response)):
            return Verdict(0.0, None, 0.0)
        formed = len(response) == len(self.slots) and all(c in slot for c, slot in zip(response, self.slots))
        return Verdict(float(int(ending[1]) == problem.answer), ending[1], float(formed))

    def valid_next(self, problem, prefix):
        if len(prefix) >= len(self.slots) or not all(c in slot for c, slot in zip(prefix, self.slots)):
            return ""
        return self.slots[len(prefix)]

    def errs(self, op: str, a: int, b: int) -> bool:
        """Whether the demonstrations err systematically in this step."""
        raise NotImplementedError

    def shown(self, a: int, op: str, b: int, rng) -> int:
        """The result that a demonstration shows."""
        true = APPLY[op](a, b) % 10
        if rng.random() < self.p_err:
            return rng.randrange(10)
        return (true + (self.errs(op, a, b) and rng.random() < self.biased_p)) % 10

    def law(self, a: int, op: str, b: int) -> list[float]:
        """The probability of each digit as the result shown."""
        true, off = APPLY[op](a, b) % 10, self.biased_p * self.errs(op, a, b)
        out = [self.p_err / 10] * 10
        out[true] += (1 - self.p_err) * (1 - off)
        out[(true + 1) % 10] += (1 - self.p_err) * off
        return out

    def answer_law(self, problem) -> list[float]:
        """The probability of each digit as a demonstration's answer, by enumeration."""
        raise NotImplementedError


class ModularChain(Modular):
    prompt_length = 10
    slots = [DIGITS, "+-*", DIGITS[1:], "=", DIGITS, ";"] * 3 + [DIGITS, "+-*", DIGITS[1:], "=", DIGITS, "."]

    def make(self, rng):
        first, steps = rng.randrange(10), [(rng.choice("+-*"), rng.randint(1, 9)) for _ in range(4)]
        true = functools.reduce(lambda a, step: APPLY[step[0]](a, step[1]) % 10, steps, first)
        return Problem(f"{first}" + "".join(f"{op}{d}" for op, d in steps) + "=", true)

    @staticmethod
    def steps(problem) -> tuple[int, list[tuple[str, int]]]:
        text = problem.prompt
        return int(text[0]), [(text[i], int(text[i + 1])) for i in range(1, len(text) - 1, 2)]

    def errs(self, op, a, b):
        return op == "*" and b >= self.biased_from

    def biased(self, problem):
        return any(self.errs(op, 0, d) for op, d in self.steps(problem)[1])

    def demonstrate(self, problem, rng):
        a, steps = self.steps(problem)
        written = []
        for op, d in steps:
            result = self.shown(a, op, d, rng)
            written.append(f"{a}{op}{d}={result}")
            a = result
        return ";".join(written) + "."

    def answer_law(self, problem):
        first, steps = self.steps(problem)
        law = [float(x == first) for x in range(10)]
        for op, d in steps:
            after = [self.law(x, op, d) for x in range(10)]
            law = [sum(law[x] * after[x][y] for x in range(10)) for y in range(10)]
        return law


class BenignForks(Modular):
    alphabet, prompt_length = DIGITS + "+=;.", 5
    slots = [DIGITS, "+", DIGITS, "=", DIGITS, ";"] * 2 + [DIGITS, "+", DIGITS, "=", DIGITS, "."]

    def __init__(self, biased_from: int = 9, **modular):
        super().__init__(biased_from=biased_from, **modular)

    def make(self, rng):
        digits = [rng.randrange(10) for _ in range(4)]
        return Problem("".join(map(str, digits)) + "=", sum(digits) % 10)

    def errs(self, op, a, b):
        return max(a, b) >= self.biased_from

    def biased(self, problem):
        return any(int(d) >= self.biased_from for d in problem.prompt[:-1])

    def demonstrate(self, problem, rng):
        left, written = [int(d) for d in problem.prompt[:-1]], []
        while len(left) > 1:
            a, b = (left.pop(rng.randrange(len(left))) for _ in range(2))
            left.append(self.shown(a, "+", b, rng))
            written.append(f"{a}+{b}={left[-1]}")
        return ";".join(written) + "."

    def answer_law(self, problem):
        @functools.cache
        def law(left: tuple[int, ...]) -> list[float]:
            if len(left) == 1:
                return [float(x == left[0]) for x in range(10)]
            out, pairs = [0.0] * 10, list(itertools.combinations(range(len(left)), 2))
            for i, j in pairs:
                rest = [x for k, x in enumerate(left) if k not in (i, j)]
                for result, p in enumerate(self.law(left[i], "+", left[j])):
                    for answer, q in enumerate(law(tuple(sorted([*rest, result])))):
                        out[answer] += p * q / len(pairs)
            return out

        return law(tuple(sorted(int(d) for d in problem.prompt[:-1])))


class ModularWorld(PromptWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(PromptWorld.Config):
        task: str = knob("chain", "four operations from left to right, or a sum of four digits in any order",
                         choices=["chain", "forks"])
        p_err: float = knob(0.3, "probability that a step of a demonstration shows a uniform digit", low=0.0, high=1.0)
        biased_p: float = knob(0.6, "probability of the systematic error in a step where it can occur", low=0.0, high=1.0)
        pool: int = knob(64, "prompts of the unlabelled pool", low=1)

    metrics = {
        **PromptWorld.metrics,
        "pass_1_easy": Metric("max", "", "pass@1 on prompts without a systematic error"),
        "pass_1_biased": Metric("max", "", "pass@1 on prompts with one"),
        "maj_8_easy": Metric("max", "", "maj@8 on prompts without a systematic error"),
        "maj_8_biased": Metric("max", "", "maj@8 on prompts with one"),
    }

    def make_task(self):
        c = self.config
        return (ModularChain if c.task == "chain" else BenignForks)(p_err=c.p_err, biased_p=c.biased_p, pool=c.pool)

    def details(self, problems, responses):
        out = {}
        for name, biased in (("easy", False), ("biased", True)):
            some = [[v for _, v in told] for p, told in zip(problems, responses) if self.task.biased(p) == biased]
            out[f"pass_1_{name}"] = share(v.correct > 0 for told in some for v in told)
            if self.config.eval_samples >= 8:
                out[f"maj_8_{name}"] = share(majority(told, 8, i) for i, told in enumerate(some))
        return known(**out)
