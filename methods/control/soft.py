"""Soft actor-critic: a stochastic actor whose entropy is part of what is maximised. The base of sac and of its variants.

    next_action    a' ~ pi(.|s'), the online policy: there is no target actor
    target         y = r + discount (1 - d) ( min_i Q_i'(s', a') - alpha log pi(a'|s') )
    actor_sample   a = tanh(m(s) + exp(l(s)) eps), reparameterised
    actor_loss     mean( alpha log pi(a|s) - min_i Q_i(s, a) )
    temperature    L_alpha = - alpha mean( log pi + H ), H = `target_entropy` times the number of action dimensions,
                   log pi without gradient; after every actor step

Source: Haarnoja et al. 2018 (arXiv 1812.05905).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from methods.common.networks import Critics, adam, describe_mlp
from methods.common.policies import TanhGaussian
from methods.control.base import ActorCritic, Sample
from runner.interface import Spec, knob


class SoftActorCritic(ActorCritic):
    @dataclasses.dataclass(frozen=True)
    class Config(ActorCritic.Config):
        critics: int = knob(2, "number of critics; the target takes their minimum", low=1, source="SAC")
        exploration_noise: float = knob(1.0, "factor on the policy's own noise when actions are played", low=0.0)
        actor_learning_rate: float = knob(3e-4, "Adam's, for the actor", low=0.0, source="SAC")
        temperature: float = knob(1.0, "alpha at the start, or for good", low=1e-6, source="SAC")
        temperature_learning_rate: float = knob(3e-4, "Adam's, for log alpha; 0: alpha stays", low=0.0, source="SAC")
        target_entropy: float = knob(-1.0, "H per action dimension", source="SAC", when={"temperature_learning_rate": 3e-4})
        backup_entropy: bool = knob(True, "whether the target holds the entropy term")
        layer_norm: str = knob("none", "which networks normalise the outputs of their hidden layers",
                               choices=["none", "critics", "all"])

    def make_actor(self, spec: Spec):
        c = self.config
        return TanhGaussian(spec.observation_size, spec.action_size, c.hidden, seeds=spec.seeds,
                            layer_norm=c.layer_norm == "all")

    def make_critics(self, spec: Spec):
        c = self.config
        return Critics(c.critics, spec.observation_size, spec.action_size, c.hidden, seeds=spec.seeds,
                       layer_norm=c.layer_norm != "none")

    def make_targets(self):
        shape = () if self.spec.seeds is None else (self.spec.seeds,)
        self.log_temperature = nn.Parameter(torch.full(shape, self.config.temperature).log())

    def make_optimizers(self):
        super().make_optimizers()
        c = self.config
        self.optimizers["actor"] = adam(self.actor.parameters(), c.actor_learning_rate)
        self.optimizers["temperature"] = adam([self.log_temperature], c.temperature_learning_rate)

    # -- parts
    def next_action(self, batch) -> Sample:
        observation = batch["next_observation"]
        return Sample(*self.actor.sample(observation, self.noise("next", batch["action"].shape[-2:])))

    def target(self, batch) -> Tensor:
        c, sample = self.config, self.next_action(batch)
        value = self.pessimism(self.target_critics(batch["next_observation"], sample.action)[0])
        if c.backup_entropy:
            value = value - self.alpha * sample.log_prob
        return batch["reward"] + c.discount * (1 - batch["terminated"]) * value

    def actor_sample(self, batch) -> Sample:
        return Sample(*self.actor.sample(batch["observation"], self.noise("actor", batch["action"].shape[-2:])))

    def actor_loss(self, batch, sample: Sample) -> Tensor:
        values, _ = self.critics(batch["observation"], sample.action)
        return (self.alpha.detach() * sample.log_prob - values.amin(-2)).mean(-1)

    # -- the temperature
    def temperature(self) -> Tensor:
        """alpha: () or (seeds,), with gradient"""
        return self.log_temperature.exp()

    @property
    def alpha(self) -> Tensor:
        """… as it multiplies batches: (seeds, 1) or ()"""
        alpha = self.temperature()
        return alpha.unsqueeze(-1) if alpha.dim() else alpha

    def after_actor(self, batch, sample: Sample) -> dict[str, Tensor]:
        metrics = super().after_actor(batch, sample)
        if self.config.temperature_learning_rate > 0:
            size = sample.action.shape[-1]
            surplus = sample.log_prob.detach().mean(-1) + self.config.target_entropy * size
            self.minimise(-self.temperature() * surplus, "temperature")
        return metrics | {"temperature": self.temperature().detach(), "entropy": -sample.log_prob.detach().mean(-1)}

    # -- what a world asks for
    def mode(self, observation: Tensor) -> Tensor:
        return self.actor.mode(observation)

    @torch.no_grad()
    def act(self, observation: Tensor, explore: bool) -> Tensor:
        observation = self.observe(observation)
        if not explore or self.config.exploration_noise == 0:
            return self.mode(observation)
        mean, log_std = self.actor(observation)
        return (mean + self.config.exploration_noise * log_std.exp() * torch.randn_like(mean)).tanh()

    def export(self):
        tensors = {k: v.detach().clone() for k, v in self.actor.net.state_dict().items()}
        size = self.spec.action_size  # the mean alone
        last = max(int(k.split(".")[0]) for k in tensors)
        tensors[f"{last}.weight"], tensors[f"{last}.bias"] = tensors[f"{last}.weight"][:size], tensors[f"{last}.bias"][:size]
        description = describe_mlp(self.actor.net)
        sizes = description["sizes"].split(",")
        return tensors, {**description, "sizes": ",".join([*sizes[:-1], str(size)]), "squash": "true"}
