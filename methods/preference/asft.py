"""ASFT: anchored supervised fine-tuning (Zhu et al. 2025, arXiv 2509.23753): DFT held by the KL to the policy at the start.

    L = mean_t [ -w_t lp_t + kl_weight KL_t ],   KL_t = sum_v pi_0(v) (log pi_0(v) - log pi(v))

over the whole vocabulary, exact, the flat mean over all response tokens of the batch; pi_0 is the policy at the start, or, of one
with adapters, itself without them. kl_direction=policy_start is sum_v pi(v) (log pi(v) - log pi_0(v)). DFT (dft.py) alone
drifts and sharpens: its objective is linear in p and ends at 1.

| | weigh | kl_weight |
|---|---|---|
| SFT | 0 | 0 |
| DFT | 1 | 0 |
| SFT + KL | 0 | 0.05 |
| ASFT | 1 | 0.05 |

The official code's documentation has kl_weight 0.05, its scripts 0.1; its direction is the one above, the paper's text was not
read. It keeps both policies' logits whole; here they are made chunk by chunk. Options of its constructor that it does not use
(bounds of a clip, alpha) are left out. Not reproduced: language models on mathematics, medicine and code; reinforcement after it.
"""

from __future__ import annotations

import dataclasses

from methods.preference.dft import DFT
from methods.tokens.scoring import whole_kl
from runner.interface import knob


class ASFT(DFT):
    @dataclasses.dataclass(frozen=True)
    class Config(DFT.Config):
        kl_weight: float = knob(0.05, "lambda: of the KL to the policy at the start", low=0.0, source="official code")
        kl_direction: str = knob("start_policy", "of the KL: of the start from the policy, or of the policy from the start",
                                 choices=["start_policy", "policy_start"], source="official code",
                                 when={"kl_weight": 0.5})

    def needs_reference(self):
        return self.config.kl_weight > 0 or super().needs_reference()

    def compares(self):
        return self.config.kl_weight > 0 or super().compares()

    def measure(self, logits, target, first=None):
        told = super().measure(logits, target, first)
        if self.config.kl_weight:
            told["kl"] = whole_kl(logits, first, reverse=self.config.kl_direction == "policy_start")
        return told

    def penalty(self, rows):
        penalty = super().penalty(rows)
        if not self.config.kl_weight:
            return penalty
        kl = self.mean(rows.now["kl"], rows)
        rows.told["kl"] = kl.detach()
        own = self.config.kl_weight * kl
        return own if penalty is None else penalty + own
