"""OGSRL: offline guarded safe reinforcement learning for treatment policies (arXiv 2505.16242).

CPO inside a simulator made of a log, held to the part of (s, a) that the log supports (methods/control/guardian.py):

    max V_r(pi)   s.t.   V_c(pi) <= d_c  (the costs),   V_g(pi) <= d_g,   g(s, a) = 1[(s, a) outside the support]

| symbol | name |
|---|---|
| d_c | cost_limit |
| d_g | guardian_limit: unsupported steps allowed per episode |
| threshold, h | support_share, bandwidth |

The guardian is one more cost channel (part costs). `guardian: penalty` is the released roll-out instead: from the step on at
which an episode leaves the support its reward is `penalty` and its cost 1, to its end. `guardian: none` is CPO. With
cost_limit < 0 the guardian alone is a constraint; with the penalty that leaves TRPO. ogsrl_lagrangian is the same on
PPO-Lagrangian.

Differences from the released code (Runz96/SafeRL-OGSRL): costs are positive and the constraint is in the unit of returns.
There they are stored as -1 per violation against the limit +0.5 (and standardised), so that the constraint never binds:
`official_costs`. There the state freezes where the support is left; here the episode plays on, at the same reward and cost,
which is the same problem unless the simulator ends the episode. The bandwidth is fitted (there 0.535, in 15 dimensions), rows
of the simulator are not misaligned, and values are trained on raw advantages.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.control.cpo import CPO
from methods.control.guardian import Guardian, guarded_costs, guarded_limits, guarded_reward
from runner.interface import knob


class OGSRL(CPO):
    @dataclasses.dataclass(frozen=True)
    class Config(CPO.Config):
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
