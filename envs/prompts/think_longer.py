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

from envs.prompts.countdown import Countdown
from runner.errors import UserError

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
