"""SimPO: no reference, log-probabilities a token, a margin (Meng et al. 2024, arXiv 2405.14734); CPO and SLiC by its knobs.

    L = -log sigma( beta (l(y_w) / n_w - l(y_l) / n_l) - beta gamma ) + nll NLL(y_w),   l(y) = log pi(y | x), n its tokens

| settings | is |
|---|---|
| as they stand, nll 0 | SimPO; the paper's gamma is our beta gamma, its ratio gamma / beta of 0.3 to 1.6 our gamma |
| per_token false, gamma 0, nll 1, beta 0.1 | CPO (Xu et al. 2024, arXiv 2401.08417); with per_token true CPO-SimPO |
| link hinge, per_token false, gamma 0, beta 1, nll 0.1 | SLiC (Zhao et al. 2023, arXiv 2305.10425): max(0, 1 - z) |
| anchored, per_token false, gamma 0 | DPO; with link hinge its hinge form; with per_token length-normalised DPO |

NLL is the mean over all tokens of the batch's preferred responses: long ones weigh more. Where a label is a probability p, the
margin is (2 p - 1) beta gamma, and NLL that of either side in its measure. SLiC's sampling of responses is not reproduced.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from methods.preference.pairs import PairPolicy, plus, preferred
from runner.interface import knob


class SimPO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        beta: float = knob(2.0, "scale of the score; the paper's 2 to 2.5, up to 10", low=0.0, source="paper")
        gamma: float = knob(0.5, "margin that is asked for, in the score's units", low=0.0, source="paper")
        per_token: bool = knob(True, "the score is a mean over tokens, not a sum", source="paper")
        anchored: bool = knob(False, "the score is of log-ratios to the reference, not of log-probabilities", source="paper")
        nll: float = knob(0.0, "weight of the preferred response's negative log-likelihood", low=0.0)
        shape: str = knob("logistic", "of the loss", choices=["logistic", "hinge"])

    def needs_reference(self):
        return self.config.anchored

    def worth(self, pairs):
        s = super().worth(pairs) if self.config.anchored else log_prob(pairs)
        return s / pairs.length.clamp(min=1) if self.config.per_token else s

    def margin(self, pairs):
        c, margin = self.config, super().margin(pairs)
        return plus(margin, c.beta * c.gamma * (2 * pairs.label - 1)) if c.gamma else margin

    def link(self, z, pairs):
        return hinge(z, pairs.label) if self.config.shape == "hinge" else super().link(z, pairs)

    def penalty(self, pairs):
        penalty = super().penalty(pairs)
        if not self.config.nll:
            return penalty
        tokens = self.engine.mean(preferred(pairs.length, pairs.label).sum())
        return plus(penalty, -self.config.nll * preferred(log_prob(pairs), pairs.label).sum() / tokens)


def log_prob(pairs) -> Tensor:
    """l (2, b): sums over response tokens."""
    return (pairs.log_prob * pairs.mask).sum(-1)


def hinge(z: Tensor, p: Tensor) -> Tensor:
    """p max(0, 1 - z) + (1 - p) max(0, 1 + z), elementwise."""
    return p * (1 - z).clamp(min=0) + (1 - p) * (1 + z).clamp(min=0)
