"""Value-based distribution correction: V from the dual of chi-square-regularised offline RL, the policy by weighted cloning.

    1. residuals       e_f = r + gamma (1-d) sg V'(s') - V(s)     (forward: gradient through V(s))
                       e_b = r + gamma (1-d) V(s') - sg V'(s)     (backward: gradient through V(s'))
    2. value_gradient  of (1 - Lambda) mean V(s) + Lambda mean f*(residual); here the semi-gradient, through e_f alone
    3. weight          max(e_f, 0) up to 100, or theory's max(e_f / 2 + 1, 0); then the base's L_pi = - mean w log pi(a|s)

f*(y) = y w - (w - 1)^2 with w = max(y/2 + 1, 0) (Pearson chi^2, truncated), or exp(y - 1) (KL). Twin V: both are trained, both
residuals weigh the same log-probability, V' takes the minimum.

Sources: Mao et al. 2024 (arXiv 2402.00348); the dual is Sikchi et al.'s V-DICE.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor

from methods.common.networks import Ensemble, adam, polyak
from methods.common.policies import FreeGaussian
from methods.control.imitation import Imitation
from runner.interface import Spec, knob


class ValueDice(Imitation):
    @dataclasses.dataclass(frozen=True)
    class Config(Imitation.Config):
        hidden: tuple[int, ...] = knob((1024, 1024), "widths of the policy's hidden layers", low=1, source="official code")
        learning_rate: float = knob(2e-4, "Adam's, for V and the policy", low=0.0, source="paper, table 5")
        weight_decay: float = knob(1e-4, "AdamW's, on the policy", low=0.0, source="official code")
        value_hidden: tuple[int, ...] = knob((256, 256), "widths of V's hidden layers", low=1, source="official code")
        layer_norm: bool = knob(True, "layer norms in V", source="official code, locomotion")
        values: int = knob(2, "number of V networks; V' takes their minimum", low=1, source="official code")
        discount: float = knob(0.99, "gamma", low=0.0, high=1.0)
        target_rate: float = knob(0.005, "Polyak rate of V'", low=0.0, high=1.0)
        conservatism: float = knob(0.6, "Lambda: weight of the residual term beside that of V's mean", low=0.0, high=1.0,
                                   source="paper, 0.6 for RL, 0.4 for imitation")
        divergence: str = knob("chi2", "f of the dual", choices=["chi2", "kl"], source="paper, sec. 3")
        policy_weight: str = knob("residual", "max(e, 0), or theory's max(e/2 + 1, 0)", choices=["residual", "theory"],
                                  source="official code")
        return_range: float = knob(1000.0, "rewards are scaled so that episode returns span this; 0: not scaled", low=0.0,
                                   source="official code, locomotion")
        imitate: bool = knob(False, "rewards count as zero: imitation of an expert's data")

    PARTS = (*Imitation.PARTS, "value_gradient")

    def setup(self, spec: Spec):
        c = self.config
        super().setup(spec)
        self.value = Ensemble(c.values, spec.observation_size, c.value_hidden, spec.seeds, c.layer_norm)
        self.target_value = copy.deepcopy(self.value).requires_grad_(False)

    def make_actor(self, spec: Spec):
        return FreeGaussian(spec.observation_size, spec.action_size, self.config.hidden, squash=False, seeds=spec.seeds)

    def make_optimizers(self):
        c = self.config
        self.optimizers = {"actor": adam(self.actor.parameters(), c.learning_rate, weight_decay=c.weight_decay),
                           "value": adam(self.value.parameters(), c.learning_rate)}
        self._value, self._target = list(self.value.parameters()), list(self.target_value.parameters())

    def prepare(self, data):
        c, reward = self.config, data["reward"]
        if c.imitate:
            reward = torch.zeros_like(reward)
        elif c.return_range > 0:
            episode = data["start"].long().cumsum(0) - 1
            returns = torch.zeros(int(episode[-1]) + 1, device=episode.device).index_add_(0, episode, reward)
            reward = reward * (c.return_range / (returns.max() - returns.min()).clamp(min=1e-6))
        data = {**data, "reward": reward}
        return super().prepare(data) or data

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        gradients, told = self.value_gradient(batch)
        self.descend(gradients, "value")
        polyak(self._target, self._value, self.config.target_rate)
        return {**told, **super().update(batch)}

    # -- parts
    def forward_residual(self, batch, target: bool = True) -> tuple[Tensor, Tensor]:
        """e_f (…, values, B) and V(s) (…, values, B); `target` False differentiates V(s'), too, and needs no V'."""
        value, _ = self.value(batch["observation"])
        if target:
            with torch.no_grad():
                after = self.target_value(batch["next_observation"])[0].amin(-2, keepdim=True)
        else:
            after = self.value(batch["next_observation"])[0]
        return self._backup(batch, after) - value, value

    def backward_residual(self, batch) -> Tensor:
        """e_b (…, values, B)"""
        with torch.no_grad():
            value = self.target_value(batch["observation"])[0].amin(-2, keepdim=True)
        return self._backup(batch, self.value(batch["next_observation"])[0]) - value

    def _backup(self, batch, after: Tensor) -> Tensor:
        going = self.config.discount * (1 - batch["terminated"])
        return batch["reward"].unsqueeze(-2) + going.unsqueeze(-2) * after

    def conjugate(self, y: Tensor) -> Tensor:
        """f*(y)"""
        if self.config.divergence == "kl":
            return (y - 1).clamp(max=20).exp()
        w = (y / 2 + 1).clamp(min=0)
        return y * w - (w - 1).square()

    def value_gradient(self, batch) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The gradient for every parameter of V, and metrics; leaves e_f in the batch."""
        c = self.config
        residual, value = self.forward_residual(batch)
        batch["residual"] = residual.detach()
        loss = (1 - c.conservatism) * value.mean((-2, -1)) + c.conservatism * self.conjugate(residual).mean((-2, -1))
        told = {"value_loss": loss.detach(), "value": value.detach().mean((-2, -1))}
        return list(torch.autograd.grad(loss.sum(), self._value)), told

    def weight(self, batch) -> Tensor:
        residual = batch["residual"]
        if self.config.policy_weight == "theory":
            residual = residual / 2 + 1
        return residual.clamp(0, 100).mean(-2)
