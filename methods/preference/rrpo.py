"""RRPO: refined regularised preference optimisation (Sarkar & Etemad 2025, arXiv 2504.12083).

Only the phrases in which the two responses differ are rewarded, and the chosen one is held to the reference token by token:

    u = sum_k [ S_k(y_w) - S_k(y_l) ],   S_k(y) = sum_{t in phrase k} [ log pi(y_t) - log pi_ref(y_t) ]
    D = sum_{t in y_w} KL( pi_ref(.) || pi(.) )      all tokens of the chosen response, the whole vocabulary, exact
    L = mean_b[ -log sigma(beta u) + alpha D ]

| symbol | name |
|---|---|
| S_k | worth: the sum over all phrases; `phrases` false: over whole responses, which is DPO with that KL |
| alpha | alpha; 0: DPO on phrases alone. D is a sum over tokens: the longer responses are, the smaller it must be |

Tokens before the first difference cancel in DPO anyway: they have the same context on both sides. What RRPO leaves out are shared
tokens behind it. Phrases are the data's (columns chosen_phrase, rejected_phrase), or found by common beginnings and ends
(phrases.py); a side without a phrase gives the token next to the place.

Metrics: kl = D; shared, shared_rejected: sums of log-ratios over what both sides share.

Differences: the official code drops the phrase of the smallest number in a batch, since it takes that for 0, what is shared; here
0 alone is shared. It takes logarithms of a softmax, which are -inf for what has no probability. Not reproduced: videos.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.preference.pairs import SIDES, PairPolicy, plus
from methods.preference.phrases import differing
from methods.tokens.scoring import whole_kl
from runner.interface import knob


class RRPO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        alpha: float = knob(0.01, "weight of the KL to the reference", low=0.0, source="paper")
        phrases: bool = knob(True, "only the phrases that differ are rewarded; otherwise whole responses")

    def compares(self):
        return self.config.alpha > 0 or super().compares()

    def measures_more(self):
        return self.config.alpha > 0 or super().measures_more()

    def measure(self, logits, target, first=None):
        told = super().measure(logits, target, first)
        return {**told, "kl": whole_kl(logits, first)} if self.config.alpha else told

    def worth(self, pairs):
        if not self.config.phrases:
            return super().worth(pairs)
        differ = differing(pairs.batch)
        for side, shared in zip(("shared", "shared_rejected"), (pairs.ratio.detach() * ~differ).sum(-1)):
            pairs.told[side] = shared.mean()
        return torch.where(differ, pairs.ratio, 0.0).sum(-1)

    def penalty(self, pairs):
        c, penalty = self.config, super().penalty(pairs)
        if not c.alpha:
            return penalty
        kl = pairs.now["kl"][SIDES.index("chosen")].sum(-1).mean()
        pairs.told["kl"] = kl.detach()
        return plus(penalty, c.alpha * kl)
