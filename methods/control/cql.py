"""CQL(H): conservative Q-learning (Kumar et al. 2020, arXiv 2006.04779), on soft actor-critic.

For every critic values of sampled actions are pushed down and those of the data's actions up:

    lse_i     = log sum exp { Q_i(s, a_u) + A log 2 ;  Q_i(s, a_p) - log pi(a_p|s) ;  Q_i(s, a_n) - log pi(a_n|s') }
    penalty   = w sum_i mean_B ( lse_i - Q_i(s, a) )                                                       (part critic_penalty)
    Lagrange  : w alpha' sum_i ( mean_B(…) - gap ), alpha' >= 0 by dual ascent: rises while the mean is above `gap`
    max target: y = r + discount (1 - d) max_j min_i Q_i'(s', a'_j), a'_j ~ pi(.|s')                       (part target)

with n actions a_u uniform in the box, n a_p ~ pi(.|s), n a_n ~ pi(.|s'), all valued at s and without gradient. Without
importance sampling the densities are left out and the data's own value joins: lse = log mean exp of the 3n + 1 values.

| symbol | name |
|---|---|
| w | conservative_weight |
| n | sampled_actions |
| gap | target_gap |

Official code: aviralkumar2907/CQL sums over two critics, as here; the JAX code of Cal-QL and WSRL takes means of both terms,
which is the same up to a factor that Adam does not see. The entropy term is absent from the target by default (backup_entropy).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from methods.common.networks import adam
from methods.common.parts import add
from methods.control.soft import SoftActorCritic
from runner.interface import knob


class CQL(SoftActorCritic):
    @dataclasses.dataclass(frozen=True)
    class Config(SoftActorCritic.Config):
        hidden: tuple[int, ...] = knob((256, 256, 256), "widths of the hidden layers of actor and critics", low=1,
                                       source="official code")
        actor_learning_rate: float = knob(1e-4, "Adam's, for the actor", low=0.0, source="official code")
        backup_entropy: bool = knob(False, "whether the target holds the entropy term", source="official code")
        conservative_weight: float = knob(5.0, "w: weight of the conservative term; 0: none", low=0.0, source="official code")
        sampled_actions: int = knob(10, "n: actions of each of the three kinds", low=1, source="official code")
        importance_sampling: bool = knob(True, "correct the sampled actions by their densities", source="official code")
        lagrange: bool = knob(False, "learn the term's weight so that it stays near target_gap", source="paper, sec. 4")
        target_gap: float = knob(0.8, "what the Lagrange weight drives the gap to", source="Cal-QL, antmaze",
                                 when={"lagrange": True})
        multiplier_learning_rate: float = knob(3e-4, "Adam's, for the logarithm of the Lagrange weight", low=0.0,
                                               source="official code", when={"lagrange": True})
        max_target: bool = knob(False, "the target takes the best of n actions of the policy", source="official code")

    PARTS = (*SoftActorCritic.PARTS, "sampled_values")

    def make_targets(self):
        super().make_targets()
        if self.config.lagrange:
            self.log_multiplier = nn.Parameter(torch.zeros_like(self.log_temperature))

    def make_optimizers(self):
        super().make_optimizers()
        if self.config.lagrange:
            self.optimizers["multiplier"] = adam([self.log_multiplier], self.config.multiplier_learning_rate)

    # What the coming update does; methods with several phases decide it anew.
    @property
    def conservative(self) -> bool:
        return self.config.conservative_weight > 0

    @property
    def maximises(self) -> bool:
        return self.config.max_target

    # -- parts
    def target(self, batch) -> Tensor:
        if not self.maximises:
            return super().target(batch)
        c, observation = self.config, batch["next_observation"]
        action, log_prob = self._policy_actions(observation, "max_target")
        values = self.pessimism(self.target_critics(*_pairs(observation, action))[0]).unflatten(-1, log_prob.shape[-2:])
        value, best = values.max(-2)
        if c.backup_entropy:
            value = value - self.alpha * log_prob.gather(-2, best.unsqueeze(-2)).squeeze(-2)
        return batch["reward"] + c.discount * (1 - batch["terminated"]) * value

    def critic_penalty(self, batch, values: Tensor, features: Tensor) -> Tensor | None:
        penalty = super().critic_penalty(batch, values, features)
        if not self.conservative:
            return penalty
        c = self.config
        sampled, log_density = self.sampled_values(batch)
        if c.importance_sampling:
            lse = (sampled - log_density.unsqueeze(-3)).logsumexp(-2)
        else:
            lse = torch.cat([sampled, values.unsqueeze(-2)], -2).logsumexp(-2) - math.log(sampled.shape[-2] + 1)
        gap = (lse - values).mean(-1)  # (…, critics)
        batch["gap"] = gap.detach()
        if c.lagrange:
            return add(penalty, c.conservative_weight * self._multiplier().detach() * (gap - c.target_gap).sum(-1))
        return add(penalty, c.conservative_weight * gap.sum(-1))

    def sampled_values(self, batch) -> tuple[Tensor, Tensor]:
        """Q_i(s, .) of the sampled actions (…, critics, 3n, B), uniform ones first, and their log-densities (…, 3n, B)."""
        observation, (rows, size) = batch["observation"], batch["action"].shape[-2:]
        with torch.no_grad():
            uniform = self.noise("uniform_actions", (self.config.sampled_actions, rows, size), "uniform") * 2 - 1
            here, here_density = self._policy_actions(observation, "policy_actions")
            after, after_density = self._policy_actions(batch["next_observation"], "next_policy_actions")
            density = torch.cat([torch.full_like(here_density, -size * math.log(2)), here_density, after_density], -2)
        values, _ = self.critics(*_pairs(observation, torch.cat([uniform, here, after], -3)))
        return values.unflatten(-1, density.shape[-2:]), density

    def update_models(self, batch):
        """The Lagrange weight's step."""
        metrics = super().update_models(batch) or {}
        if "gap" not in batch:
            return metrics
        c, gap = self.config, batch["gap"]
        if c.lagrange:
            multiplier = self._multiplier()
            self.minimise(-multiplier * c.conservative_weight * (gap - c.target_gap).sum(-1), "multiplier")
            metrics |= {"multiplier": multiplier.detach()}
        return metrics | {"gap": gap.mean(-1)}

    # -- helpers
    def _policy_actions(self, observation: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """n actions for every state: (…, n, B, A), log-probabilities (…, n, B)."""
        shape = (self.config.sampled_actions, observation.shape[-2], self.spec.action_size)
        return self.actor.sample(observation.unsqueeze(-3), self.noise(name, shape))

    def _multiplier(self) -> Tensor:
        return self.log_multiplier.exp().clamp(max=1e6)


def _pairs(observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """observation (…, B, S), action (…, n, B, A) -> both as (…, n B, .)"""
    observation = observation.unsqueeze(-3).expand(*action.shape[:-1], observation.shape[-1])
    return observation.flatten(-3, -2), action.flatten(-3, -2)
