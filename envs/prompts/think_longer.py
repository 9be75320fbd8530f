"""Think longer: countdown whose responses may begin with the filler "w", up to `longest` of them; the verifier skips them.

    prompt "1:3:4|01="    response "ww1*4=4,4-3=1."

The demonstrations draw the number n of fillers uniformly from 0 .. longest, and are correct with a probability that rises
with n from `least_share` to `most_share` (else a random derivation). So accuracy grows with length although the filler says
nothing: a method that rewards correct answers alone lengthens, one that penalises length pays in accuracy. 0.1 to 0.88 is
the first design, under which small policies learned too little of it; hence 0.3 to 0.9.

A policy equal to the recipe is right with probability 0.08 + 0.92 share(n).

For a card: provides prompts, demonstrations. Testbed of the project's for DRPO, APO and DAPO's overlong shaping. Gold
metrics: accuracy, length (of all, correct and wrong responses), accuracy by n.
"""

from __future__ import annotations

import dataclasses

from envs.prompts.base import PromptWorld, known, share
from envs.prompts.countdown import Countdown
from runner.errors import UserError
from runner.interface import Metric, knob

FILLER = "w"


class ThinkLonger(Countdown):
    def __init__(self, longest: int = 6, least_share: float = 0.3, most_share: float = 0.9, **countdown):
        """countdown: further arguments of Countdown, but for correct_share and wrapper."""
        if "wrapper" in countdown or "correct_share" in countdown:
            raise UserError("think_longer: the share of correct demonstrations depends on the length (least_share, "
                            "most_share), and there is no wrapper\nleave out correct_share and wrapper")
        if longest < 0 or not 0 <= least_share <= 1 or not 0 <= most_share <= 1:
            raise UserError("think_longer: longest is at least 0; least_share and most_share lie between 0 and 1")
        super().__init__(**countdown)
        self.longest, self.least_share, self.most_share = longest, least_share, most_share
        self.alphabet += FILLER
        self.response_length += longest

    @staticmethod
    def fillers(response: str) -> int:
        return len(response) - len(response.lstrip(FILLER))

    def share(self, fillers: int) -> float:
        """Probability that a demonstration with so many fillers was drawn among the correct derivations."""
        return self.least_share + (self.most_share - self.least_share) * fillers / max(self.longest, 1)

    def inside(self, response):
        return super().inside(response.lstrip(FILLER)) if self.fillers(response) <= self.longest else None

    def demonstrate(self, problem, rng):
        fillers = rng.randint(0, self.longest)
        correct = rng.random() < self.share(fillers)
        return FILLER * fillers + self.derivation(problem, correct, rng) + "."

    def valid_next(self, problem, prefix):
        rest = prefix.lstrip(FILLER)
        fillers = len(prefix) - len(rest)
        if fillers > self.longest:
            return ""
        return super().valid_next(problem, rest) + FILLER * (not rest and fillers < self.longest)


class ThinkLongerWorld(PromptWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(PromptWorld.Config):
        longest: int = knob(6, "fillers at most", low=0)
        least_share: float = knob(0.3, "share of demonstrations without a filler that reach the target", low=0.0, high=1.0)
        most_share: float = knob(0.9, "share of those with the most fillers", low=0.0, high=1.0)

    metrics = {
        **PromptWorld.metrics,
        "length_correct": Metric("none", "tokens", "of a correct response"),
        "length_wrong": Metric("none", "tokens", "of a wrong response"),
        "fillers": Metric("none", "tokens", "fillers of a response"),
        "pass_1_fillers_0": Metric("max", "", "share of correct ones among the responses without fillers"),
        "pass_1_fillers_3": Metric("max", "", "share of correct ones among those with three"),
        "pass_1_fillers_6": Metric("max", "", "share of correct ones among those with six"),
    }

    def make_task(self):
        c = self.config
        return ThinkLonger(c.longest, c.least_share, c.most_share)

    def details(self, problems, responses):
        told = [(len(text), ThinkLonger.fillers(text), v.correct > 0) for some in responses for text, v in some]
        return known(
            length_correct=share(length for length, _, correct in told if correct),
            length_wrong=share(length for length, _, correct in told if not correct),
            fillers=share(fillers for _, fillers, _ in told),
            **{f"pass_1_fillers_{n}": share(correct for _, fillers, correct in told if fillers == n) for n in (0, 3, 6)})
