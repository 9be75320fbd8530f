"""OGSRL on PPO-Lagrangian in place of CPO (arXiv 2505.16242, where "other constrained optimisers are allowed").

    max V_r(pi)   s.t.   V_c(pi) <= d_c  (the costs),   V_g(pi) <= d_g,   g(s, a) = 1[(s, a) outside the support]

Formulation, symbols, options and differences from the released code as in methods/control/ogsrl.py; each limit has its own
multiplier (methods/control/ppo_lagrangian.py). `guardian: none` is PPO-Lagrangian.

| symbol | name |
|---|---|
| d_c, d_g | cost_limit, guardian_limit |
"""

from __future__ import annotations

import dataclasses

import torch

from methods.control.guardian import Guardian, guarded_costs, guarded_limits, guarded_reward
from methods.control.ppo_lagrangian import PPOLagrangian
from runner.interface import knob


class OGSRLLagrangian(PPOLagrangian):
    @dataclasses.dataclass(frozen=True)
    class Config(PPOLagrangian.Config):
        guardian: str = knob("constraint", "how the support is kept to", choices=["constraint", "penalty", "none"])
        guardian_limit: float = knob(1.0, "d_g: unsupported steps allowed per episode", low=0.0,
                                     source="project's choice: the log's own share of 20 steps", when={"guardian": "constraint"})
        penalty: float = knob(-25.0, "reward of every step once the support is left", source="released code",
                              when={"guardian": "penalty"})
        support_share: float = knob(0.05, "share of the log below the threshold", low=0.0, high=0.5, source="paper")
        bandwidth: float = knob(0.0, "h of the kernel, features in [-1, 1]; 0: fitted to the log", low=0.0,
                                source="released code: 0.535")
        official_costs: bool = knob(False, "costs with the released code's sign: the constraint never binds")

    def limits(self, spec):
        return guarded_limits(super().limits(spec), self.config)

    def setup(self, spec):
        super().setup(spec)
        self.guardian = Guardian(self.config.support_share, self.config.bandwidth)

    def prepare(self, data):
        """data: the log, observation (N, S) and action (N, A)."""
        super().prepare(data)
        if self.config.guardian != "none":
            self.guardian.fit(data["observation"], data["action"])

    @torch.no_grad()
    def assess(self, batch):
        if self.config.guardian == "none":
            return super().assess(batch)
        batch = self.guardian.watch(batch, self.carried)
        self.told["outside"] = batch["outside"].mean()
        return super().assess(batch)

    def reward_transform(self, batch):
        return guarded_reward(super().reward_transform(batch), batch, self.config)

    def costs(self, batch):
        return guarded_costs(super().costs(batch), batch, self.config)
