"""Chains of arithmetic of variable length: one right answer, difficulty that grows with the number of steps.

    prompt "  12+7*3-9=" (spaces up to a fixed width)    response "12+7=19;19*3=57;57-9=48."

The first number is 1 to 99; operators + - with 1 to 9 and * with 2 to 9 are drawn such that every value stays in 0 .. 999;
evaluation is from left to right. The number of steps is uniform in least_steps .. most_steps. In demonstrations a result is
replaced, with probability `p_err`, by another number of as many digits from which the rest of the chain stays in range; the
steps after it go on from the number that is shown. The verifier reads the ending alone: "=", a number, ".".

For a card: provides prompts, demonstrations. The project's own; for methods that weigh problems by difficulty or lengths by
need. Gold metrics: accuracy, accuracy by number of steps.
"""

from __future__ import annotations

import dataclasses
import re

from envs.prompts.base import PromptWorld, known, share
from envs.prompts.task import Generated, Problem, Verdict
from runner.errors import UserError
from runner.interface import Metric, knob

APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
MOST = 999  # the greatest value
NUMBER = "(?:0|[1-9][0-9]{0,2})"
ENDING, STEPS = re.compile(rf"=({NUMBER})\.\Z"), re.compile(rf"{NUMBER}[-+*][1-9]={NUMBER}")
START, PARTS = re.compile("[0-9]+"), re.compile("([-+*])([1-9])")


class Chain(Generated):
    alphabet, eos = "0123456789+-*=;. ", "."

    def __init__(self, least_steps: int = 2, most_steps: int = 5, p_err: float = 0.1, held_out: int = 256, seed: int = 0):
        if not 1 <= least_steps <= most_steps or not 0 <= p_err <= 1 or held_out < 1:
            raise UserError("chain: 1 <= least_steps <= most_steps, p_err between 0 and 1, held_out at least 1")
        self.least, self.most, self.p_err, self.size, self.seed = least_steps, most_steps, p_err, held_out, seed
        self.prompt_length = 2 + 2 * most_steps + 1
        self.response_length = 10 * most_steps  # "999-9=990;"

    def make(self, rng):
        start, number = rng.randint(1, 99), rng.randint(self.least, self.most)
        reached, text = start, str(start)
        for _ in range(number):
            op, d = rng.choice([(op, d) for op in "+-*" for d in range(1 + (op == "*"), 10)
                                if 0 <= APPLY[op](reached, d) <= MOST])
            reached, text = APPLY[op](reached, d), text + f"{op}{d}"
        return Problem((text + "=").rjust(self.prompt_length), reached)

    @staticmethod
    def steps(problem) -> tuple[int, list[tuple[str, int]]]:
        """(the first number, the operators with their numbers)"""
        start = START.search(problem.prompt)
        return int(start[0]), [(op, int(d)) for op, d in PARTS.findall(problem.prompt[start.end():])]

    def verify(self, problem, response):
        if not (ending := ENDING.search(response)):
            return Verdict(0.0, None, 0.0)
        steps = response[:-1].split(";", self.most)
        formed = len(steps) == len(self.steps(problem)[1]) and all(map(STEPS.fullmatch, steps))
        return Verdict(float(int(ending[1]) == problem.answer), ending[1], float(formed))

    def demonstrate(self, problem, rng):
        reached, steps = self.steps(problem)
        written = []
        for i, (op, d) in enumerate(steps):
            result = APPLY[op](reached, d)
            if rng.random() < self.p_err:
                places = len(str(result))
                other = rng.randrange(10 ** (places - 1) if places > 1 else 0, 10 ** places - 1)
                other += other >= result
                result = other if stays(other, steps[i + 1:]) else result
            written.append(f"{reached}{op}{d}={result}")
            reached = result
        return ";".join(written) + "."

    def valid_next(self, problem, prefix):
        """As many steps as the prompt has, numbers up to three digits without leading zeros."""
        *full, last = prefix.split(";")
        number = len(self.steps(problem)[1])
        if len(full) >= number or not all(map(STEPS.fullmatch, full)):
            return ""
        left, equals, right = last.partition("=")
        if equals:
            if not re.fullmatch(f"{NUMBER}[-+*][1-9]", left):
                return ""
            return self.digits(right, ";" if len(full) + 1 < number else ".")
        if re.fullmatch(f"{NUMBER}[-+*]", last):
            return "23456789" if last[-1] == "*" else "123456789"
        return "=" if re.fullmatch(f"{NUMBER}[-+*][1-9]", last) else self.digits(last, "+-*")

    @staticmethod
    def digits(begun: str, then: str) -> str:
        """What can follow within a number, or after it."""
        if not begun:
            return "0123456789"
        if not re.fullmatch(NUMBER, begun):
            return ""
        return then + "0123456789" * (begun != "0" and len(begun) < 3)


def stays(reached: int, steps) -> bool:
    for op, d in steps:
        reached = APPLY[op](reached, d)
        if not 0 <= reached <= MOST:
            return False
    return True


class ChainWorld(PromptWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(PromptWorld.Config):
        least_steps: int = knob(2, "steps of the shortest chains", low=1)
        most_steps: int = knob(5, "steps of the longest", low=1)
        p_err: float = knob(0.1, "probability that a step of a demonstration shows a wrong result", low=0.0, high=1.0)

    metrics = {
        **PromptWorld.metrics,
        "pass_1_short": Metric("max", "", "share of correct responses to the shortest chains"),
        "pass_1_long": Metric("max", "", "share of correct responses to the longest"),
    }

    def make_task(self):
        c = self.config
        return Chain(c.least_steps, c.most_steps, c.p_err)

    def details(self, problems, responses):
        def correct(steps):
            return share(v.correct > 0 for problem, some in zip(problems, responses) for _, v in some
                         if len(Chain.steps(problem)[1]) == steps)

        return known(pass_1_short=correct(self.task.least), pass_1_long=correct(self.task.most))
