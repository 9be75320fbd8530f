"""TD3+BC: a minimalist approach to offline reinforcement learning (Fujimoto & Gu 2021, arXiv 2106.06860).

TD3 on a data set, with one more term in the actor's loss and the value rescaled so that the two are commensurate:

    L_pi = - lambda mean_B Q_1(s, pi(s)) + w mse(pi(s), a*),   lambda = alpha / mean_B |Q_1(s, pi(s))|, no gradient

a* is the logged action here; a method that regularises towards another action overrides `anchor` (prdc, a2pr). mse is
the mean over batch and action dimensions. Observations are normalised over the data set.

| symbol | name |
|---|---|
| alpha | alpha; null leaves Q unscaled, as in TD3 |
| w | anchor_weight (1 in the paper) |

The official code (sfujim/TD3_BC) agrees.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from methods.common.parts import add
from methods.control.base import Sample
from methods.control.td3 import TD3
from runner.interface import knob


class TD3BC(TD3):
    @dataclasses.dataclass(frozen=True)
    class Config(TD3.Config):
        alpha: float | None = knob(2.5, "weight of the value beside the anchor, after rescaling; null: unscaled, as in TD3",
                                   low=0.0, source="paper, eq. 5")
        anchor_weight: float = knob(1.0, "weight of the distance to the anchor action; 0: none", low=0.0, source="paper, eq. 5")
        normalise_observations: bool = knob(True, "see (s - mean) / (std + 1e-3) of the data set", source="paper, eq. 6")

    PARTS = (*TD3.PARTS, "anchor")

    # -- parts
    def anchor(self, batch, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """a* (…, B, A), what the policy is pulled to, and the weight of each state (…, B), None for 1; without gradient."""
        return batch["action"], None

    def actor_loss(self, batch, sample: Sample):
        values = self.critics.first(batch["observation"], sample.action)
        loss = -values.mean(-1)
        if self.config.alpha is None:
            return loss
        return self.config.alpha / values.detach().abs().mean(-1).clamp(min=1e-8) * loss

    def actor_penalty(self, batch, sample: Sample):
        penalty = super().actor_penalty(batch, sample)
        if self.config.anchor_weight == 0:
            return penalty
        action, weight = self.anchor(batch, sample)
        distance = (sample.action - action).square().mean(-1)
        return add(penalty, self.config.anchor_weight * (distance if weight is None else weight * distance).mean(-1))
