"""DFT: dynamic fine-tuning (Wu et al. 2025, arXiv 2508.05629), cross-entropy whose tokens weigh by their own probability.

    L = - sum_t m_t w_t lp_t / sum_t m_t,   w_t = (1 - weigh) + weigh sg[p_t],   p_t = exp lp_t

At weigh = 1, the paper's, the gradient of a token is -grad p_t: what is learned is the expected number of right tokens, not
the likelihood, and rare tokens, wrong demonstrations among them, pull little. SFT's gradient -grad p_t / p_t is a policy gradient
whose rewards are divided by p_t; the weight takes the division out.

Two traps. Without the stop of the gradient the loss is -p lp, which pushes tokens of p < 1/e down. And what the policy gives next
to no probability is not learned at all under plain SGD: `weigh` below 1 mixes SFT in. AdamW hides this as long as all tokens of
a batch are rare together. Not reproduced: language models on mathematics.
"""

from __future__ import annotations

import dataclasses

from methods.tokens.demonstrated import Demonstrated
from runner.interface import knob


class DFT(Demonstrated):
    @dataclasses.dataclass(frozen=True)
    class Config(Demonstrated.Config):
        weigh: float = knob(1.0, "how much a token weighs by its own probability; 0: all alike (SFT)", low=0.0, high=1.0,
                            source="paper")

    def weigh_tokens(self, rows):
        weight, weigh = super().weigh_tokens(rows), self.config.weigh
        if not weigh:
            return weight
        weight = weight * ((1 - weigh) + weigh * rows.log_prob.exp())
        rows.told["weight"] = self.mean(weight, rows)
        return weight
