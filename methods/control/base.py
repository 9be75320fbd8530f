"""Deterministic actor-critic: the algorithm that the control family's methods change.

One update, by its parts (a method overrides one to three of them):

    1. next_action     a' = pi'(s')
    2. target          y  = r + discount (1 - d) min_i Q_i'(s', a')
    3. critic_loss     L_Q = sum_i mean_B (Q_i(s, a) - y)^2
    4. critic_penalty  added to L_Q; zero here                        (additive)
       every `actor_delay`-th update:
    5. actor_loss      L_pi = - mean_B Q_1(s, pi(s))
    6. actor_penalty   added to L_pi; zero here                       (additive)
    7. update_targets  pi', Q' <- Polyak average with rate `target_rate`

d is 1 for a true termination only, never for a time limit. Actions lie in [-1, 1]; the world scales them.
Sources: Silver et al. 2014 (deterministic policy gradient), Lillicrap et al. 2016 (target networks).
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor

from methods.common.networks import Critics, describe_mlp, frozen, mlp, polyak
from runner.interface import Method, Spec, knob


class ActorCritic(Method):
    @dataclasses.dataclass(frozen=True)
    class Config:
        hidden: tuple[int, ...] = knob((256, 256), "widths of the hidden layers of actor and critics", low=1)
        critics: int = knob(1, "number of critics; the target takes their minimum", low=1)
        learning_rate: float = knob(3e-4, "Adam's, for actor and critics", low=0.0)
        discount: float = knob(0.99, "gamma", low=0.0, high=1.0)
        target_rate: float = knob(0.005, "Polyak rate of the target networks", low=0.0, high=1.0)
        exploration_noise: float = knob(0.1, "standard deviation of the noise on actions that are played", low=0.0)
        actor_delay: int = knob(1, "critic updates per actor (and target) update", low=1)

    PARTS = ("next_action", "target", "critic_loss", "critic_penalty", "actor_loss", "actor_penalty", "update_targets")
    ADDITIVE = ("critic_penalty", "actor_penalty")

    def setup(self, spec: Spec):
        c = self.config
        self.actor = mlp(spec.observation_size, c.hidden, spec.action_size, squash=True)
        self.critics = Critics(c.critics, spec.observation_size, spec.action_size, c.hidden)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)

    def make_optimizers(self):
        adam = {"lr": self.config.learning_rate, "fused": True}
        self.optimizers = {
            "actor": torch.optim.Adam(self.actor.parameters(), **adam),
            "critics": torch.optim.Adam(self.critics.parameters(), **adam),
        }
        self._critics = list(self.critics.parameters())
        self._online = [*self.actor.parameters(), *self._critics]
        self._targets = [*self.target_actor.parameters(), *self.target_critics.parameters()]

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: observation, next_observation (B, S), action (B, A), reward, terminated (B,)."""
        with torch.no_grad():
            target = self.target(batch)
        values, features = self.critics(batch["observation"], batch["action"])
        loss = self.critic_loss(values, target)
        penalty = self.critic_penalty(batch, values, features)
        self.minimise(loss if penalty is None else loss + penalty, "critics")
        metrics = {"critic_loss": loss.detach(), "value": values.detach().mean()}
        if (self.updates + 1) % self.config.actor_delay == 0:
            with frozen(self._critics):
                action = self.actor(batch["observation"])
                actor_loss = self.actor_loss(batch, action)
                penalty = self.actor_penalty(batch, action)
                self.minimise(actor_loss if penalty is None else actor_loss + penalty, "actor")
            self.update_targets()
            metrics["actor_loss"] = actor_loss.detach()
        return metrics

    # -- parts
    def next_action(self, batch) -> Tensor:
        """a' (B, A), the action that the target values."""
        return self.target_actor(batch["next_observation"])

    def target(self, batch) -> Tensor:
        """y (B,), without gradient."""
        values, _ = self.target_critics(batch["next_observation"], self.next_action(batch))
        return batch["reward"] + self.config.discount * (1 - batch["terminated"]) * values.amin(0)

    def critic_loss(self, values: Tensor, target: Tensor) -> Tensor:
        """values (critics, B), target (B,) -> scalar: the sum over critics of mean squared errors."""
        return (values - target).square().mean(1).sum()

    def critic_penalty(self, batch, values: Tensor, features: Tensor) -> Tensor | None:
        """Added to the critic loss; overriders add to super()'s (None counts as zero)."""
        return None

    def actor_loss(self, batch, action: Tensor) -> Tensor:
        """action (B, A) = pi(s), with gradient -> scalar."""
        return -self.critics.first(batch["observation"], action).mean()

    def actor_penalty(self, batch, action: Tensor) -> Tensor | None:
        """Added to the actor loss; overriders add to super()'s (None counts as zero)."""
        return None

    def update_targets(self):
        polyak(self._targets, self._online, self.config.target_rate)

    # -- what a world asks for
    @torch.no_grad()
    def act(self, observation: Tensor, explore: bool) -> Tensor:
        action = self.actor(observation)
        if explore and self.config.exploration_noise > 0:
            noise = torch.randn_like(action).mul_(self.config.exploration_noise)
            action = action.add_(noise).clamp_(-1, 1)
        return action

    def export(self):
        return dict(self.actor.state_dict()), describe_mlp(self.actor)
