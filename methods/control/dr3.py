"""DR3: explicit regularisation of the critic's features (Kumar et al., ICLR 2022, arXiv 2112.04716).

The dot product of the features of consecutive state-action pairs is kept small:

    L_Q + c mean_B phi(s, a) . phi(s', a'),   a' as the target takes it

phi is the penultimate activation. By default both sides carry gradient, as in the paper's equation; `detach_next` stops the
second one. Summed over critics.

| symbol | name |
|---|---|
| c | feature_weight (0.03 in the paper's offline experiments) |
"""

from __future__ import annotations

import dataclasses

from methods.common.parts import add
from methods.control.ddpg import DDPG
from runner.interface import knob


class DR3(DDPG):
    @dataclasses.dataclass(frozen=True)
    class Config(DDPG.Config):
        feature_weight: float = knob(0.01, "weight of the dot product of consecutive features; 0: none", low=0.0,
                                     source="paper, eq. 6; range 0.001 to 0.03")
        detach_next: bool = knob(False, "no gradient through phi(s', a')")

    def critic_penalty(self, batch, values, features):
        penalty = super().critic_penalty(batch, values, features)
        if self.config.feature_weight == 0:
            return penalty
        after = self.critics(batch["next_observation"], self.next_action(batch).action)[1]
        if self.config.detach_next:
            after = after.detach()
        return add(penalty, self.config.feature_weight * (features * after).sum(-1).mean(-1).sum(-1))
