"""IQL: implicit Q-learning (Kostrikov et al. 2021, arXiv 2110.06169).

The critics learn from a state value V instead of from actions of a policy, V from an expectile of the critics at actions of
the data, and the actor by behaviour cloning weighted by the advantage:

    u    = min_i Q_i'(s, a) - V(s)
    L_V  = mean_B |tau - 1[u < 0]| u^2
    L_Q  = mean_i mean_B (Q_i(s, a) - r - discount (1 - d) V(s'))^2
    L_pi = -mean_B min(exp(beta u), 100) log pi(a|s), u without gradient

V(s') and u are those from before V's own step. pi is a Gaussian with mean tanh f(s), a standard deviation that does not
depend on s, and no squashing; its learning rate falls to 0 by a cosine. At beta = 0 the actor is behaviour cloning.

| symbol | name |
|---|---|
| tau | expectile |
| beta | inverse_temperature |
| 100 | weight_limit |
| T of the cosine | decay_steps |

The official code (ikostrikov/implicit_q_learning) rescales rewards by the data's range of returns, which is left to the env
here (env.reward_scale), and clamps log standard deviations in the forward pass; here the parameter itself is clamped.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.common.networks import CosineRate, adam, mlp
from methods.common.policies import FreeGaussian
from methods.control.base import ActorCritic, Sample, export_policy
from runner.interface import Spec, knob


class IQL(ActorCritic):
    @dataclasses.dataclass(frozen=True)
    class Config(ActorCritic.Config):
        critics: int = knob(2, "number of critics; V is regressed on their minimum", low=1, source="paper, sec. 4.3")
        expectile: float = knob(0.7, "tau: 0.5 is the mean, near 1 the maximum over actions of the data", low=0.01, high=0.99,
                                source="paper, locomotion")
        inverse_temperature: float = knob(3.0, "beta: weight of the advantage in the actor's exponent", low=0.0,
                                          source="paper, locomotion")
        weight_limit: float = knob(100.0, "bound of the actor's weights", low=0.0, source="official code")
        decay_steps: int = knob(1_000_000, "updates over which the actor's learning rate falls to 0; 0: it stays", low=0,
                                source="official code")

    # -- networks
    def make_actor(self, spec: Spec):
        return FreeGaussian(spec.observation_size, spec.action_size, self.config.hidden, seeds=spec.seeds)

    def make_targets(self):
        spec, c = self.spec, self.config
        self.value = mlp(spec.observation_size, c.hidden, 1, seeds=spec.seeds)
        if c.decay_steps:
            self.actor_rate = CosineRate(c.learning_rate, c.decay_steps)

    def make_optimizers(self):
        super().make_optimizers()
        self.optimizers["value"] = adam(self.value.parameters(), self.config.learning_rate)

    # -- parts
    def target(self, batch) -> Tensor:
        after = self.value(batch["next_observation"]).squeeze(-1)
        return batch["reward"] + self.config.discount * (1 - batch["terminated"]) * after

    def critic_loss(self, values: Tensor, target: Tensor) -> Tensor:
        """The mean over critics."""
        return (values - target.unsqueeze(-2)).square().mean((-2, -1))

    def update_models(self, batch):
        """V's step; leaves the advantage u from before it for the actor."""
        metrics = super().update_models(batch) or {}
        with torch.no_grad():
            value = self.pessimism(self.target_critics(batch["observation"], batch["action"])[0])
        u = value - self.value(batch["observation"]).squeeze(-1)
        batch["advantage"] = u.detach()
        loss = expectile_loss(u, self.config.expectile)
        self.minimise(loss, "value")
        return metrics | {"value_loss": loss.detach(), "advantage": u.detach().mean(-1)}

    def actor_sample(self, batch) -> Sample:
        """The action of the data and its log-probability."""
        return Sample(batch["action"], self.actor.log_prob(batch["observation"], batch["action"]))

    def actor_loss(self, batch, sample: Sample) -> Tensor:
        c = self.config
        if c.decay_steps:
            self.actor_rate.drive(self.optimizers["actor"])
        weight = (c.inverse_temperature * batch["advantage"]).exp().clamp(max=c.weight_limit)
        return -(weight * sample.log_prob).mean(-1)

    def after_actor(self, batch, sample: Sample):
        self.actor.keep_in_bounds()
        return super().after_actor(batch, sample)

    def mode(self, observation: Tensor) -> Tensor:
        return self.actor.mode(observation)

    def export(self):
        return export_policy(self, self.actor.net)


def expectile_loss(u: Tensor, expectile: float) -> Tensor:
    """u (…, B) -> (…)"""
    return ((expectile - (u < 0).to(u.dtype)).abs() * u.square()).mean(-1)
