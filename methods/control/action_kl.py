"""Action-distribution regularisation: PPO held to a reference policy state by state, the usual remedy against reward hacking
and the baseline of arXiv 2403.03185 (there "AD").

    penalty   strength / (1 - gamma)  mean KL( pi(.|s) || pi_ref(.|s) )        over the states that pi visits

| symbol | name |
|---|---|
| lambda | strength |
| gamma | discount |

Differences from the official code (cassidylaidlaw/orpo): KL alone (it also has chi^2 forms), numbered actions alone.
strength = 0 is PPO.
"""

from __future__ import annotations

import dataclasses

from methods.control.ppo import PPO
from runner.errors import UserError
from runner.interface import knob


class ActionKL(PPO):
    @dataclasses.dataclass(frozen=True)
    class Config(PPO.Config):
        strength: float = knob(1e-3, "lambda; 0: no penalty", low=0.0, source="paper: a grid from 1e-3 to 20 per unit of reward")

    def setup(self, spec):
        if not spec.actions:
            raise UserError("method action_kl compares distributions over numbered actions; this env's actions are vectors")
        super().setup(spec)

    def assess(self, batch):
        data = super().assess(batch)
        if self.config.strength > 0:
            data["reference"] = batch["reference_probability"].clamp_min(1e-8).log().flatten(0, 1)
        return data

    def penalty(self, mini, distribution):
        penalty, c = super().penalty(mini, distribution), self.config
        if c.strength == 0:
            return penalty
        divergence = self.policy.kl(distribution, (mini["reference"],)).mean()
        self.told["reference_kl"] = divergence.detach()
        own = c.strength / max(1 - c.discount, 1e-6) * divergence
        return own if penalty is None else penalty + own
