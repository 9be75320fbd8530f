"""CPL: contrastive preference learning (Hejna et al., ICLR 2024, arXiv 2310.13639).

People prefer the segment of less regret, that is of the larger sum of optimal advantages; with maximum entropy an optimal
advantage is alpha log pi*. So log pi takes the advantage's place in a Bradley-Terry loss: no reward model, no bootstrap.

    S(sigma) = alpha sum_t log pi(a_t | s_t)                                           (no discount)
    L = mean[ y softplus(-(S_2 - lambda S_1)) + (1 - y) softplus(-(S_1 - lambda S_2)) ] + c_bc ( - mean log pi over both )

| symbol | name |
|---|---|
| alpha | temperature |
| lambda | bias: below 1 the loser counts less, so that both log-probabilities cannot fall together |
| c_bc | bc_weight |
| pi_ref (CPL-KL) | anchored: S = alpha sum_t (log pi - log pi_ref), pi_ref the policy as imitation left it |

The paper's variants: CPL (0.1, 0.5), CPL-BC (alpha .1, lambda 1, c_bc 1), CPL-KL (anchored, alpha .2, lambda .75, rate_factor
.1). alpha multiplies a sum over k steps: keep alpha k when k changes (6.4 in the paper, k = 64).

Differences from the official code (jhejna/cpl): segments are drawn as pairs (there, dense comparisons use every pair
within a batch of segments). Imitation comes first and a new Adam follows, as there.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from methods.control.segment_bc import SegmentBC
from runner.interface import knob


class CPL(SegmentBC):
    @dataclasses.dataclass(frozen=True)
    class Config(SegmentBC.Config):
        objective: str = knob("contrastive", "second phase: the contrast of two segments, or imitation of the preferred one "
                              "(segment_bc)", choices=["contrastive", "imitation"])
        temperature: float = knob(0.1, "alpha: factor on summed log-probabilities", low=0.0, source="paper, app. D",
                                  when={"objective": "contrastive"})
        bias: float = knob(0.5, "lambda: weight of the loser's score", low=0.0, high=1.0, source="paper, app. D",
                           when={"objective": "contrastive"})
        bc_weight: float = knob(0.0, "weight of imitation beside the contrast (1: CPL-BC)", low=0.0, source="paper, sec. 3.2")
        anchored: bool = knob(False, "scores are log-ratios to the policy that imitation left (CPL-KL)",
                              source="paper, app. B", when={"objective": "contrastive"})
        rate_factor: float = knob(1.0, "second phase's learning rate, as a factor (0.1: CPL-KL)", low=0.0, source="official code")

    def rate(self):
        return self.config.learning_rate * self.config.rate_factor

    def preference_loss(self, batch, log_prob):
        c = self.config
        if c.objective == "imitation":
            return super().preference_loss(batch, log_prob)
        if c.anchored:
            with torch.no_grad():
                log_prob_reference = self.log_prob(batch["observation"], batch["action"], net=self.reference)
            log_prob = log_prob - log_prob_reference
        first, second = (c.temperature * log_prob.sum(-1)).unbind(-1)  # (…, B)
        y = batch["preferred"]
        return (y * F.softplus(-(second - c.bias * first)) + (1 - y) * F.softplus(-(first - c.bias * second))).mean(-1)

    def preference_penalty(self, batch, log_prob):
        penalty = super().preference_penalty(batch, log_prob)
        if self.config.bc_weight == 0:
            return penalty
        own = self.config.bc_weight * self.imitation_loss(batch, log_prob)
        return own if penalty is None else penalty + own
