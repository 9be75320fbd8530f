"""RPO: regularised preference optimisation (Liu et al. 2024, arXiv 2405.16436): imitation as an adversarial regulariser.

The best policy against the worst reward that still explains the data is, after max and min are swapped, DPO with imitation of a
baseline distribution beside it; that of the chosen responses gives

    sum    L = mean_b[ -log sigma(z) - eta beta l(y_w) ]          the main text's; l summed over tokens
    mean   L = mean_b[ -log sigma(z) - eta l(y_w) / n_w ]         recommended later; no factor beta
    z = beta (rho(y_w) - rho(y_l)),   l(y) = log pi(y | x),   n its tokens

Their scales differ: the paper has eta 0.005 with beta 0.01 or 0.05 (sum), 0.2 with beta 0.5 (mean). `imitated` all: the baseline
distribution is that of both responses, l is the mean over both sides. Where a label is a probability p, l(y_w) is p l(y_w) +
(1 - p) l(y_l). A baseline distribution that samples from the reference is not built: it would add a KL and little else.

With much eta this is imitation of y_w whatever was preferred to what. Common libraries have a third weighting: the mean over all
tokens of a batch (simpo.nll).
"""

from __future__ import annotations

import dataclasses

from methods.preference.pairs import PairPolicy, plus, preferred
from runner.interface import knob


class RPO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        eta: float = knob(0.005, "weight of the imitation", low=0.0, source="paper")
        form: str = knob("sum", "log-likelihood of the response times beta, or its mean over tokens", choices=["sum", "mean"],
                         source="paper")
        imitated: str = knob("chosen", "the baseline distribution's responses", choices=["chosen", "all"], source="paper")

    def penalty(self, pairs):
        c, penalty = self.config, super().penalty(pairs)
        if not c.eta:
            return penalty
        likelihood = (pairs.log_prob * pairs.mask).sum(-1)
        likelihood = c.beta * likelihood if c.form == "sum" else likelihood / pairs.length.clamp(min=1)
        imitated = preferred(likelihood, pairs.label) if c.imitated == "chosen" else likelihood.mean(0)
        return plus(penalty, -c.eta * imitated.mean())
