"""Actor-critic from stored transitions: the algorithm that the control family's off-policy methods change.

One update, by its parts (a method overrides one to three of them):

    1. next_action     a' = pi'(s')
    2. target          y  = r + discount (1 - d) min_i Q_i'(s', a')
       (pessimism      how several critics' values become one: their minimum)
    3. critic_loss     L_Q = sum_i mean_B (Q_i(s, a) - y)^2
    4. critic_penalty  added to L_Q; zero here                                         (additive)
    5. update_models   further networks that take part (V, a VAE, …); none here        (additive)
       every `actor_delay`-th update:
    6. actor_sample    a = pi(s), with gradient
    7. actor_loss      L_pi = - mean_B Q_1(s, a)
    8. actor_penalty   added to L_pi; zero here                                        (additive)
    9. update_targets  pi', Q' <- Polyak average with rate `target_rate`
   before an update, for batches of kind `mixed` alone:
   10. feed            how many environment steps are played, and which share of the batch is stored data

d is 1 for a true termination only, never for a time limit. Actions lie in [-1, 1]; the world scales them. Batches are
(B, …), or (seeds, B, …) when several seeds are trained at once: count axes from the end.
Sources: Silver et al. 2014 (deterministic policy gradient), Lillicrap et al. 2016 (target networks).
"""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from methods.common.networks import Critics, adam, describe_mlp, frozen, mlp, polyak
from runner.interface import Method, Spec, knob


class Sample(NamedTuple):
    """Actions of a policy: action (…, B, A); log_prob (…, B), None for a deterministic policy."""

    action: Tensor
    log_prob: Tensor | None = None


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

    PARTS = ("next_action", "target", "pessimism", "critic_loss", "critic_penalty", "update_models", "actor_sample",
             "actor_loss", "actor_penalty", "update_targets", "feed")
    ADDITIVE = ("update_models", "critic_penalty", "actor_penalty")
    batchable = capturable = True
    part = 0  # which of an update's batches is at work; each draws numbers of its own

    @property
    def period(self):
        return self.config.actor_delay

    # -- networks
    def setup(self, spec: Spec):
        c, self.spec = self.config, spec
        self.actor = self.make_actor(spec)
        self.critics = self.make_critics(spec)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.make_targets()
        if getattr(c, "normalise_observations", False):
            self.register_buffer("offset", torch.zeros(spec.observation_size))
            self.register_buffer("scale", torch.ones(spec.observation_size))

    def make_actor(self, spec: Spec) -> nn.Module:
        return mlp(spec.observation_size, self.config.hidden, spec.action_size, squash=True, seeds=spec.seeds)

    def make_critics(self, spec: Spec) -> Critics:
        c = self.config
        return Critics(c.critics, spec.observation_size, spec.action_size, c.hidden, seeds=spec.seeds)

    def make_targets(self):
        """Target networks besides the critics'."""
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)

    def make_optimizers(self):
        rate = self.config.learning_rate
        self.optimizers = {"actor": adam(self.actor.parameters(), rate), "critics": adam(self.critics.parameters(), rate)}
        self._critics = list(self.critics.parameters())
        self._online, self._targets = self._critics, list(self.target_critics.parameters())
        if hasattr(self, "target_actor"):
            self._online = [*self.actor.parameters(), *self._online]
            self._targets = [*self.target_actor.parameters(), *self._targets]

    # -- a data set's observations
    def prepare(self, data: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Methods with a knob `normalise_observations` see (s - mean) / (std + 1e-3) of the whole data set."""
        if not getattr(self.config, "normalise_observations", False):
            return None
        observation = data["observation"].double()
        self.offset.copy_(observation.mean(0))
        self.scale.copy_(observation.std(0, correction=0) + 1e-3)
        return {**data, **{k: (data[k] - self.offset) / self.scale for k in ("observation", "next_observation")}}

    def observe(self, observation: Tensor) -> Tensor:
        """A world's observation as the networks know it."""
        return (observation - self.offset) / self.scale if hasattr(self, "offset") else observation

    # -- the algorithm
    def noise(self, name, shape, kind="normal"):
        return super().noise(f"{name}/{self.part}" if self.part else name, shape, kind)

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: observation, next_observation (B, S), action (B, A), reward, terminated (B,)."""
        metrics = self.update_critics(batch)
        if (self.updates + 1) % self.config.actor_delay == 0:
            metrics |= self.update_actor(batch)
            self.update_targets()
        return metrics

    def update_critics(self, batch) -> dict[str, Tensor]:
        with torch.no_grad():
            target = self.target(batch)
        values, features = self.critics(batch["observation"], batch["action"])
        loss = self.critic_loss(values, target)
        penalty = self.critic_penalty(batch, values, features)
        self.minimise(loss if penalty is None else loss + penalty, "critics")
        metrics = {"critic_loss": loss.detach(), "value": values.detach().mean((-2, -1))}
        return metrics | (self.update_models(batch) or {})

    def update_actor(self, batch) -> dict[str, Tensor]:
        with frozen(self._critics):
            sample = self.actor_sample(batch)
            loss = self.actor_loss(batch, sample)
            penalty = self.actor_penalty(batch, sample)
            self.minimise(loss if penalty is None else loss + penalty, "actor")
        return {"actor_loss": loss.detach(), **self.after_actor(batch, sample)}

    def after_actor(self, batch, sample: Sample) -> dict[str, Tensor]:
        """What follows every actor step, such as a temperature's; returns metrics."""
        return {}

    # -- parts
    def next_action(self, batch) -> Sample:
        """a', the action that the target values."""
        return Sample(self.target_actor(batch["next_observation"]))

    def target(self, batch) -> Tensor:
        """y (…, B), without gradient."""
        values, _ = self.target_critics(batch["next_observation"], self.next_action(batch).action)
        return batch["reward"] + self.config.discount * (1 - batch["terminated"]) * self.pessimism(values)

    def pessimism(self, values: Tensor) -> Tensor:
        """values (…, critics, B) -> (…, B)"""
        return values.amin(-2)

    def critic_loss(self, values: Tensor, target: Tensor) -> Tensor:
        """values (…, critics, B), target (…, B) -> (…): the sum over critics of mean squared errors."""
        return (values - target.unsqueeze(-2)).square().mean(-1).sum(-1)

    def critic_penalty(self, batch, values: Tensor, features: Tensor) -> Tensor | None:
        """Added to the critic loss; overriders add to super()'s (None counts as zero). features (…, critics, B, width)"""
        return None

    def update_models(self, batch) -> dict[str, Tensor] | None:
        """Steps of other networks, after the critics'; returns metrics, merged with super()'s. Like every part it may leave
        tensors in `batch` for later parts."""
        return None

    def actor_sample(self, batch) -> Sample:
        """pi(s), with gradient."""
        return Sample(self.actor(batch["observation"]))

    def actor_loss(self, batch, sample: Sample) -> Tensor:
        """-> (…)"""
        return -self.critics.first(batch["observation"], sample.action).mean(-1)

    def actor_penalty(self, batch, sample: Sample) -> Tensor | None:
        """Added to the actor loss; overriders add to super()'s (None counts as zero)."""
        return None

    def update_targets(self):
        polyak(self._targets, self._online, self.config.target_rate)

    # -- what a world asks for
    @torch.no_grad()
    def inspect(self, batch) -> dict[str, Tensor]:
        """Mean value, and mean squared error to a target at the policy's mode that draws nothing."""
        action = self.mode(batch["next_observation"])
        after = self.target_critics(batch["next_observation"], action)[0].amin(-2)
        target = batch["reward"] + self.config.discount * (1 - batch["terminated"]) * after
        values = self.critics(batch["observation"], batch["action"])[0]
        return {"value": values.mean((-2, -1)), "td_error": (values - target.unsqueeze(-2)).square().mean((-2, -1))}

    def mode(self, observation: Tensor) -> Tensor:
        """The deterministic policy, of observations as the networks know them."""
        return self.actor(observation)

    @torch.no_grad()
    def act(self, observation: Tensor, explore: bool) -> Tensor:
        action = self.mode(self.observe(observation))
        if explore and self.config.exploration_noise > 0:
            noise = torch.randn_like(action).mul_(self.config.exploration_noise)
            action = action.add(noise).clamp_(-1, 1)
        return action

    @torch.no_grad()
    def assess(self, observation: Tensor, action: Tensor):
        return self.critics(self.observe(observation), action)

    def export(self):
        return export_policy(self, self.actor)


def export_policy(method: Method, net: nn.Sequential) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of an MLP policy with the normalisation of observations folded into its first layer."""
    tensors = {k: v.detach().clone() for k, v in net.state_dict().items()}
    if hasattr(method, "offset"):
        tensors["0.weight"] = tensors["0.weight"] / method.scale
        tensors["0.bias"] = tensors["0.bias"] - tensors["0.weight"] @ method.offset
    return tensors, describe_mlp(net)
