"""Behaviour cloning, weighted or not: the base of methods that train a policy on the data set's own actions.

    1. log_prob     log pi(a|s) of the logged actions
    2. weight       w(s, a) >= 0; 1 here
    3. actor_loss   L = - mean_B w log pi(a|s)

The policy is a Gaussian around tanh(f(s)) with a state-independent standard deviation, or (`deterministic`) a = tanh(f(s)) with
the mean squared error over batch and action dimensions.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.common.networks import adam
from methods.common.policies import FreeGaussian
from methods.control.base import ActorCritic, export_policy
from runner.interface import Method, Spec, knob


class Imitation(Method):
    @dataclasses.dataclass(frozen=True)
    class Config:
        hidden: tuple[int, ...] = knob((256, 256), "widths of the policy's hidden layers", low=1)
        learning_rate: float = knob(3e-4, "Adam's", low=0.0)
        deterministic: bool = knob(False, "squared error of a deterministic policy instead of a Gaussian's log-likelihood")
        normalise_observations: bool = knob(False, "see (s - mean) / (std + 1e-3) of the data set")

    PARTS = ("log_prob", "weight", "actor_loss")
    ADDITIVE = ()
    batchable = capturable = True

    def setup(self, spec: Spec):
        self.actor = self.make_actor(spec)
        if self.config.normalise_observations:
            self.register_buffer("offset", torch.zeros(spec.observation_size))
            self.register_buffer("scale", torch.ones(spec.observation_size))

    def make_actor(self, spec: Spec) -> FreeGaussian:
        return FreeGaussian(spec.observation_size, spec.action_size, self.config.hidden, seeds=spec.seeds)

    def make_optimizers(self):
        self.optimizers = {"actor": adam(self.actor.parameters(), self.config.learning_rate)}

    prepare, observe = ActorCritic.prepare, ActorCritic.observe

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = self.actor_loss(batch)
        self.minimise(loss, "actor")
        self.actor.keep_in_bounds()
        return {"actor_loss": loss.detach()}

    # -- parts
    def log_prob(self, batch) -> Tensor:
        """(…, B); up to a constant and a factor for a deterministic policy"""
        if self.config.deterministic:
            return -(self.actor.mode(batch["observation"]) - batch["action"]).square().mean(-1)
        return self.actor.log_prob(batch["observation"], batch["action"])

    def weight(self, batch) -> Tensor | float:
        """(…, B), without gradient"""
        return 1.0

    def actor_loss(self, batch) -> Tensor:
        return -(self.weight(batch) * self.log_prob(batch)).mean(-1)

    # -- what a world asks for
    @torch.no_grad()
    def act(self, observation: Tensor, explore: bool) -> Tensor:
        mode = self.actor.mode(self.observe(observation))
        if explore and not self.config.deterministic:
            mode = mode + self.actor.log_std.exp() * torch.randn_like(mode)
        return mode.clamp(-1, 1)

    def export(self):
        return export_policy(self, self.actor.net)
