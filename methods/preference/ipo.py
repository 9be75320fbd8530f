"""IPO: identity preference optimisation (Azar et al. 2023, arXiv 2310.12036).

    L = (Delta - 1 / (2 beta))^2,   Delta = rho(y_w) - rho(y_l)

The margin in log-ratios is drawn to 1 / (2 beta) (the paper calls beta tau), not beyond: a pair that always wins cannot pull
the policy away from the reference without end, as DPO's logistic link lets it. A pair with P(y_w beats y_l) = p has
p (Delta - t)^2 + (1 - p) (Delta + t)^2, t = 1 / (2 beta): its mean over labels, at its optimum where Delta = (2 p - 1) t.

Two conventions: Delta of sums (the paper's text), or of means over tokens (`per_token`; the published figures, common
libraries). With responses of one token they are the same. Where other methods add a margin g, Delta is less by g / beta.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from methods.preference.pairs import PairPolicy
from runner.interface import knob


class IPO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        beta: float = knob(0.1, "the margin's target is 1 / (2 beta); the paper's tau", low=1e-6, source="paper")
        shape: str = knob("square", "of the loss: to the target, or DPO's", choices=["square", "logistic"])
        per_token: bool = knob(False, "log-ratios are means over a response's tokens, not sums")

    def worth(self, pairs):
        s = super().worth(pairs)
        return s / pairs.length.clamp(min=1) if self.config.per_token else s

    def link(self, z, pairs):
        c = self.config
        return square(z / c.beta, 0.5 / c.beta, pairs.label) if c.shape == "square" else super().link(z, pairs)


def square(delta: Tensor, target: float, p: Tensor) -> Tensor:
    """p (Delta - t)^2 + (1 - p) (Delta + t)^2, elementwise."""
    return p * (delta - target).square() + (1 - p) * (delta + target).square()
