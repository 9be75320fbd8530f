"""BEER: Bellman-equation-based automatic rank regulariser (He et al., ICLR 2024, arXiv 2404.12754).

With Q = w . phi, a Bellman-consistent pair obeys |r| <= ||w|| ||phi - gamma phi'||, and hence

    cos(phi, phi') <= U = ( ||phi||^2 + gamma^2 ||phi'||^2 - r^2 / ||w||^2 ) / ( 2 gamma ||phi|| ||phi'|| )

The cosine of consecutive features is pushed down only where it exceeds that bound:

    L_Q + beta mean_B relu( cos(phi, phi') - U ),   phi = phi(s, a), phi' = target critic's features at (s', a')

Gradient flows only through phi inside the cosine. Pairs with d = 1 have no next features and are left out; the last layer
has no bias (`bias` false), since a bias b would make the effective reward r - (1 - gamma) b.

| symbol | name |
|---|---|
| beta | rank_weight |
| U | bound |

`active` (share of pairs above the bound) and `excess` (mean of relu) are logged: where rewards are small the penalty is
never active and BEER is its baseline.

Differences from the official code (sweetice/BEER-ICLR2024), under `official_mix`: its numerator takes phi' from the ONLINE
critic at (s', pi(s')) while its denominator takes the target critic's, so that it bounds no single pair; it penalises
terminal transitions too. It also keeps the last layer's bias (bias: true).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from methods.common.parts import add
from methods.control.ddpg import DDPG
from runner.interface import knob


class BEER(DDPG):
    @dataclasses.dataclass(frozen=True)
    class Config(DDPG.Config):
        rank_weight: float = knob(1e-3, "beta: weight of the excess over the bound; 0: it is only measured", low=0.0,
                                  source="paper, sec. 4.2", when={"env.reward_scale": 10.0})
        official_mix: bool = knob(False, "the official code's mixture of online and target features",
                              when={"env.reward_scale": 10.0})
        bias: bool = knob(False, "a bias in the critic's last layer, which the bound does not allow for")

    def setup(self, spec):
        super().setup(spec)
        if not self.config.bias:
            for critics in (self.critics, self.target_critics):
                critics.layers[-1].bias.requires_grad_(False).zero_()

    def make_optimizers(self):
        super().make_optimizers()
        if not self.config.bias:
            self._critics = [p for p in self._critics if p is not self.critics.layers[-1].bias]

    def critic_penalty(self, batch, values, features):
        penalty, c = super().critic_penalty(batch, values, features), self.config
        with torch.no_grad():
            after = self.target_critics(batch["next_observation"], self.next_action(batch).action)[1]
            numerator = after
            if c.official_mix:
                numerator = self.critics(batch["next_observation"], self.actor(batch["next_observation"]))[1]
            bound = self.bound(features, numerator, after, batch["reward"].unsqueeze(-2))
            counted = torch.ones_like(bound) if c.official_mix else (1 - batch["terminated"]).unsqueeze(-2).expand_as(bound)
        excess = F.relu(F.cosine_similarity(features, after, -1, 1e-6) - bound) * counted
        batch["excess"], batch["active"] = excess.detach().mean((-2, -1)), (excess.detach() > 0).float().mean((-2, -1))
        if c.rank_weight == 0:
            return penalty
        return add(penalty, c.rank_weight * excess.mean(-1).sum(-1))

    def bound(self, features, numerator, denominator, reward):
        """U (…, critics, B) for features (…, critics, B, width) and reward (…, 1, B)."""
        gamma = self.config.discount
        weight = self.critics.layers[-1].weight.square().sum((-2, -1)).unsqueeze(-1)  # ||w||^2 of each critic
        above = features.square().sum(-1) + gamma ** 2 * numerator.square().sum(-1) - reward.square() / weight.clamp(min=1e-12)
        return above / (2 * gamma * (features.norm(dim=-1) * denominator.norm(dim=-1)).clamp(min=1e-6))

    def update_models(self, batch):
        told = super().update_models(batch) or {}
        return {**told, "excess": batch["excess"], "active": batch["active"]}
