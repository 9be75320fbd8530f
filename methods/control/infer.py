"""InFeR: understanding and preventing capacity loss (Lyle et al., ICLR 2022, arXiv 2204.09560).

Auxiliary linear heads on the critic's features are held to what they said at the start, scaled up, so that the features
keep the capacity that random targets ask for:

    L_Q + alpha sum_j mean_B ( g_j(phi(s, a)) - delta g_j^0(phi_0(s, a)) )^2,   j = 1..k

phi_0 and g^0 are the networks as they were initialised. Summed over heads and critics.

| symbol | name |
|---|---|
| alpha | feature_weight |
| k | heads |
| delta | head_scale |

The sheet sums over heads, as here; the paper averages over them and uses alpha = 0.1 beside a mean.
"""

from __future__ import annotations

import copy
import dataclasses

import torch

from methods.common.networks import EnsembleLinear, adam
from methods.common.parts import add
from methods.control.ddpg import DDPG
from runner.interface import knob


class InFeR(DDPG):
    @dataclasses.dataclass(frozen=True)
    class Config(DDPG.Config):
        feature_weight: float = knob(0.1, "weight of the heads' squared error; 0: none", low=0.0, source="paper, sec. 5")
        heads: int = knob(10, "auxiliary heads", low=1, source="paper, sec. 5")
        head_scale: float = knob(100.0, "factor on the initial outputs that are the heads' targets", source="paper, sec. 5")

    def setup(self, spec):
        super().setup(spec)
        self.heads = EnsembleLinear(self.config.critics, self.config.hidden[-1], self.config.heads, spec.seeds)
        self.initial_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.initial_heads = copy.deepcopy(self.heads).requires_grad_(False)

    def make_optimizers(self):
        super().make_optimizers()
        if self.config.feature_weight > 0:  # the heads learn together with the critics
            both = [*self.critics.parameters(), *self.heads.parameters()]
            self.optimizers["critics"] = adam(both, self.config.learning_rate)

    def critic_penalty(self, batch, values, features):
        penalty, c = super().critic_penalty(batch, values, features), self.config
        if c.feature_weight == 0:
            return penalty
        with torch.no_grad():
            initial = self.initial_critics(batch["observation"], batch["action"])[1]
            wanted = c.head_scale * self.initial_heads(initial)
        error = (self.heads(features) - wanted).square()  # (…, critics, B, heads)
        return add(penalty, c.feature_weight * error.mean(-2).sum((-2, -1)))
