"""Listwise DPO: the likelihood of a ranking under implicit rewards (the Plackett-Luce form of DPO: Rafailov et al. 2023, arXiv
2305.18290, app. A.3).

    L = sum_{k < P} [ logsumexp_{j >= k} f_(j) - f_(k) ],   f_i = beta (log pi(y_i) - log pi_ref(y_i)),

candidates sorted by reward, the best first; the reference is the policy as it was at its start. Two candidates are DPO's pair.
`top_k` first positions count, 1: the best against the rest.

It is adpo with form=plackett_luce, anchor=self and tau = 1/beta, to the bit. Equal rewards are ranked in the order of the list.
"""

from __future__ import annotations

import copy
import dataclasses

from methods.preference import forms
from methods.preference.kd import KD
from runner.interface import knob


class ListwiseDPO(KD):
    @dataclasses.dataclass(frozen=True)
    class Config(KD.Config):
        ranked: bool = knob(True, "the likelihood of the ranking; false: the base's cross-entropy")
        beta: float = knob(1.0, "strength of the tie to the reference", low=1e-6, source="project's choice",
                           when={"ranked": True})
        top_k: int = knob(0, "only the first positions count; 0: all", low=0, when={"ranked": True})
        tau: float = knob(1.0, "temperature of the scores", low=1e-6, when={"ranked": False})
        target: str = knob("raw", "rewards over a list are used as they are, as z-scores, as kernel-smoothed ranks "
                           "(two forms), or only the best one counts",
                           choices=["raw", "zscore", "rank_kde", "smoothed_rank", "hard"], when={"ranked": False})
        target_temperature: float = knob(1.0, "temperature of the target distribution", low=1e-6, when={"ranked": False})

    def setup(self, spec):
        super().setup(spec)
        self.anchor = copy.deepcopy(self.policy).requires_grad_(False)

    def prepare(self, data):
        super().prepare(data)
        self.anchor.load_state_dict(self.policy.state_dict())

    def anchor_log_prob(self, batch):
        if not self.config.ranked:
            return super().anchor_log_prob(batch)
        return self.anchor.log_prob(batch["context"], batch["candidates"])

    def score(self, log_prob, anchor, batch):
        if not self.config.ranked:
            return super().score(log_prob, anchor, batch)
        return (log_prob - anchor) / (1 / self.config.beta)

    def loss(self, score, target, batch):
        if not self.config.ranked:
            return super().loss(score, target, batch)
        return forms.plackett_luce(score, batch["reward"], self.config.top_k).mean()
