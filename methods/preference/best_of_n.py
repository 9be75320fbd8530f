"""Best-of-n: n draws of the policy at its start, of which a fitted reward model chooses (Stiennon et al. 2020, arXiv 2009.01325).

Training is the reward model's (methods/preference/reward_model.py); the policy is never changed. Over arms, where alone it runs,
nothing is sampled: with F the distribution of the model's rewards under pi_ref,

    P(chosen reward = r) = F(r)^n - F(r-)^n,   shared among arms of equal reward in proportion to pi_ref,

so that gold metrics are exact. KL(best of n || pi_ref) <= log n - (n - 1)/n (`kl_bound`; equal but for ties), and with the true
judge, which every bandit tells as the reference row `best of N`, n draws win n / (n + 1) of the time against one.
"""

from __future__ import annotations

import dataclasses
import math

from methods.preference.reward_model import RewardModel
from runner.errors import UserError
from runner.interface import knob


class BestOfN(RewardModel):
    @dataclasses.dataclass(frozen=True)
    class Config(RewardModel.Config):
        n: int = knob(16, "draws, of which one is chosen", low=1, source="project's choice")

    def setup(self, spec):
        if not spec.arms:
            raise UserError("best_of_n chooses among arms, exactly: env=bandit, or another of its kind")
        super().setup(spec)
        self.draws_of_one = self.config.n

    def update(self, batch):
        n = self.config.n
        return {**super().update(batch), "kl_bound": batch["label"].new_full((), math.log(n) - (n - 1) / n)}
