"""Countdown: reach a target from small numbers, each used once. Several derivations are right, so that a policy can keep or
lose its diversity; which number and operator come next are forks, "=" and results follow.

    prompt "1:3:4|01=" (numbers ascending, the target in as many digits as the greatest has)    response "1*4=4,4-3=1."

With the defaults (countdown-3): all triples of 1 to 9 and every target up to 99 that a derivation reaches, 1963 problems,
split 1767 / 196 at random. A derivation combines two of the numbers that are left by +, - or *, with no negative value and
nothing above the greatest target; + and * are written once (running result first, else the smaller number first), - in the
order that is not negative. One drawn at random reaches a problem's target with probability 165 / 1963 = 8.4 %. numbers=4 is
countdown-4: targets up to 999, three steps, some 30 characters.

Demonstrations: with probability `correct_share` a random derivation that reaches the target, else a random one of the same
numbers. Variants: `extra_tokens` characters that never occur (a large vocabulary for entropy bonuses to leak into);
`wrapper`: the response is "<1*4=4,4-3=1>." and Verdict.format tells whether the brackets stand, apart from correctness.

For a card: provides prompts, demonstrations. Testbed of the project's for SIREN (2509.25133), Lp-Reg (2510.03222), AEPO,
STEER, HAPO, GTPO (2508.03772), DPH-RL and COPO; the task is Countdown of TinyZero (2025) in characters. Gold metrics: pass@1,
pass@16 and coverage (distinct correct derivations among the samples) on held-out problems.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

from envs.prompts.base import PromptWorld
from envs.prompts.task import WRONG, Problem, Task, Verdict, split
from runner.errors import UserError
from runner.interface import knob

STEP = re.compile(r"(0|[1-9][0-9]{0,3})([-+*])(0|[1-9][0-9]{0,3})=(0|[1-9][0-9]{0,3})")
PLAIN = re.compile(r"[-+*=,0-9]*")
APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
DUMMIES = 0x4E00  # dummy tokens are characters from here on


@functools.cache
def derivations(numbers: tuple[int, ...], most: int) -> dict[str, int]:
    """All derivations of ascending `numbers` as text without an ending, each with the value that it reaches."""
    found = {}

    def go(pool, steps):
        if len(pool) == 1:
            found[",".join(steps)] = pool[0]
        for i, j in itertools.combinations(range(len(pool)), 2):
            rest = [x for k, x in enumerate(pool) if k not in (i, j)]
            u, v = pool[i], pool[j]
            for a, op, b in ((u, "+", v), (u, "*", v), (u, "-", v), (v, "-", u)):
                if 0 <= (result := APPLY[op](a, b)) <= most:
                    go([result, *rest], [*steps, f"{a}{op}{b}={result}"])

    go(list(numbers), [])
    return found


def value(numbers: tuple[int, ...], text: str) -> tuple[int, str] | None:
    """(value, canonical spelling) of a derivation that uses each of `numbers` once and is right in every step, else None."""
    pool, written = list(numbers), []
    for step in text.split(",", len(numbers)):
        if not (match := STEP.fullmatch(step)):
            return None
        a, op, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
        if a not in pool:
            return None
        at = pool.index(a)
        rest = pool[:at] + pool[at + 1:]
        if b not in rest or APPLY[op](a, b) != result:
            return None
        rest.remove(b)
        swap = op != "-" and pool.index(b) < at  # + and * are written in the order of the pool
        written.append(f"{b}{op}{a}={result}" if swap else f"{a}{op}{b}={result}")
        pool = [result, *rest]
    return (pool[0], ",".join(written)) if len(pool) == 1 else None


def shape(text: str) -> str:
    """A derivation with its digits and operators made alike: "d" a number's digit, "z" the number 0, "o" an operator."""
    if not PLAIN.fullmatch(text):
        return "?"
    text = re.sub("[1-9][0-9]*", lambda m: "d" * len(m[0]), text)
    return re.sub("[-+*]", "o", text.replace("0", "z"))


class Countdown(Task):
    def __init__(self, numbers: int = 3, largest: int = 9, least_target: int = 0, most_target: int | None = None,
                 correct_share: float = 0.5, wrapper: bool = False, extra_tokens: int = 0, held_out: float = 0.1,
                 seed: int = 0):
        if not 2 <= numbers <= 4 or not 1 <= largest <= 9:
            raise UserError(f"countdown of {numbers} numbers up to {largest}\nthere may be 2 to 4, from 1 to at most 9")
        if not 0 <= extra_tokens <= 2000 or not 0 <= correct_share <= 1 or not 0 < held_out < 1:
            raise UserError("countdown: extra_tokens is 0 to 2000, correct_share 0 to 1, held_out between 0 and 1")
        self.most = most_target if most_target is not None else 999 if numbers == 4 else 99
        self.numbers, self.digits, self.correct_share, self.wrapper = numbers, len(str(self.most)), correct_share, wrapper
        self.eos, self.alphabet = ".", "0123456789+-*=,.:|" + "<>" * wrapper
        self.alphabet += "".join(chr(DUMMIES + i) for i in range(extra_tokens))
        self.groups = list(itertools.combinations_with_replacement(range(1, largest + 1), numbers))
        problems, longest = [], 0
        for group in self.groups:
            known = derivations(group, self.most)
            longest = max(longest, *map(len, known))
            problems += [self.problem(group, t) for t in sorted(set(known.values())) if least_target <= t]
        if len(problems) < 2:
            raise UserError(f"countdown: fewer than two targets lie between {least_target} and {self.most}\n"
                            "widen the range (least_target, most_target)")
        self.prompt_length, self.response_length = len(problems[0].prompt), longest + 1 + 2 * wrapper
        self.problems = split(problems, held_out, seed)

    def problem(self, numbers, target) -> Problem:
        return Problem(f"{':'.join(map(str, numbers))}|{target:0{self.digits}}=", (tuple(numbers), target))

    def train(self):
        return self.problems[0]

    def held_out(self):
        return self.problems[1]

    def inside(self, response: str) -> str | None:
        """The derivation in a response, None if its ending or its brackets are missing."""
        if self.wrapper:
            good = response.startswith("<") and response.endswith(">.") and response.count("<") == response.count(">") == 1
            return response[1:-2] if good else None
        return response[:-1] if response.endswith(".") else None

    def verify(self, problem, response):
        numbers, target = problem.answer
        if (text := self.inside(response)) is None:
            return WRONG
        if (reached := value(numbers, text)) is None:
            return Verdict(0.0, None, 1.0 if self.wrapper or self.ends(shape(text)) else 0.0)
        return Verdict(float(reached[0] == target), str(reached[0]))

    def canonical(self, problem, response):
        text = self.inside(response)
        reached = None if text is None else value(problem.answer[0], text)
        return reached[1] if reached and reached[0] == problem.answer[1] else None

    def all_solutions(self, problem):
        numbers, target = problem.answer
        return [text for text, reached in derivations(numbers, self.most).items() if reached == target]

    def demonstrate(self, problem, rng):
        text = self.derivation(problem, rng.random() < self.correct_share, rng)
        return f"<{text}>." if self.wrapper else text + "."

    def derivation(self, problem, correct: bool, rng) -> str:
        return rng.choice(self.all_solutions(problem) if correct else list(derivations(problem.answer[0], self.most)))

    @functools.cached_property
    def follows(self) -> dict[str, set[str]]:
        """What can follow each beginning of a derivation's shape; "." ends it."""
        found: dict[str, set[str]] = {}
        for text in {shape(t) for group in self.groups for t in derivations(group, self.most)}:
            for i, after in enumerate(text + "."):
                found.setdefault(text[:i], set()).add(after)
        return found

    def ends(self, shaped: str) -> bool:
        return "." in self.follows.get(shaped, ())

    def valid_next(self, problem, prefix):
        """Syntax alone: numbers of a length that occurs, without leading zeros; any digit, any operator."""
        if self.wrapper:
            if not prefix:
                return "<"
            if ">" in prefix:
                return "." if prefix.count(">") == 1 and self.ends(shape(prefix[1:-1])) and prefix[-1] == ">" else ""
            if prefix[0] != "<":
                return ""
            prefix = prefix[1:]
        shaped = shape(prefix)
        after = self.follows.get(shaped, set())
        zeros = "0" if shaped.endswith("d") else ""  # within a number 0 is a digit like any other
        classes = {"d": zeros + "123456789", "z": "0", "o": "+-*", ".": ">" if self.wrapper else "."}
        return "".join(sorted(set("".join(classes.get(c, c) for c in after))))


class CountdownWorld(PromptWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(PromptWorld.Config):
        numbers: int = knob(3, "numbers of a problem", low=2, high=4)
        correct_share: float = knob(0.5, "share of demonstrations that reach the target; the others are any derivation", low=0.0,
                                    high=1.0)
        wrapper: bool = knob(False, "the response stands in brackets, which are rewarded apart from correctness")
        extra_tokens: int = knob(0, "characters of the alphabet that never occur", low=0, high=2000)

    def make_task(self):
        c = self.config
        return Countdown(c.numbers, correct_share=c.correct_share, wrapper=c.wrapper, extra_tokens=c.extra_tokens)

    def reward(self, verdict):
        """1 for a correct response; with brackets, 1 for them and 1 for correctness within them."""
        return verdict.format + verdict.correct if self.config.wrapper else verdict.correct
