"""PPO as reinforcement from human feedback uses it (Ziegler et al. 2019, arXiv 1909.08593; Ouyang et al. 2022, arXiv 2203.02155):
token_ppo with the KL to the start in every token's reward, several epochs over a batch, and a bound on the judge's reward.

    R_t = -beta (lp_old - lp_ref)_t + 1[t = T_i] clip(r_i, -reward_clip, reward_clip)

| symbol | name |
|---|---|
| beta | reward_kl: fixed, or where it starts |
| epochs | passes: times through a batch, in `minibatches` optimiser steps each |
| target, horizon | kl_target (0: beta is fixed), horizon: beta <- beta (1 + clip(KL / target - 1, -.2, .2) n / horizon) |

KL: the mean over the n responses of the batch of sum_t (lp_old - lp_ref)_t. A fixed beta is what curves should be compared at.
r is what the env rewards: its verifier, a graded score, or a fitted reward model (worlds of pairs: env.judge_run=FOLDER).
The rest is token_ppo's: GAE with gamma 1 and lambda .95, whitened advantages, clipped values, a critic apart from the policy
(there is no joint loss, hence no weight of the value's). A reward that holds KL is part of what the critic predicts.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.reasoning.token_ppo import TokenPPO
from runner.interface import knob


class PPORLHF(TokenPPO):
    @dataclasses.dataclass(frozen=True)
    class Config(TokenPPO.Config):
        reward_kl: float = knob(0.1, "beta: of the KL to the start in the reward; with a target: at the start", low=0.0,
                                source="paper", when={"critic": True})
        passes: int = knob(4, "times an update goes through its batch", low=1, source="paper")
        reward_clip: float = knob(10.0, "bound of the judge's reward; 0: none", low=0.0, source="common code")
        kl_target: float = knob(0.0, "KL of a response that beta is adapted to; 0: beta stays", low=0.0,
                                source="Ziegler et al.: 6", when={"critic": True})
        horizon: float = knob(10_000.0, "responses over which beta may change by a fifth", low=1.0, source="Ziegler et al.",
                              when={"kl_target": 6.0})

    def setup(self, spec):
        super().setup(spec)
        self.register_buffer("beta", torch.tensor(self.config.reward_kl))

    def passes(self):
        return self.config.passes

    def kl_cost(self):
        return self.beta

    def reward(self, batch):
        reward, bound = super().reward(batch), self.config.reward_clip
        return reward.clamp(-bound, bound) if bound else reward

    def advantage(self, batch, old):
        if self.config.critic and self.config.reward_kl:
            distance = ((old["log_prob"] - old["reference_log_prob"]) * batch["mask"]).sum(1)
            batch["distance"] = distance
            self.told |= {"beta": self.beta.clone(), "kl_of_response": distance.mean()}
        return super().advantage(batch, old)

    def after_update(self, batch):
        super().after_update(batch)
        c = self.config
        if c.kl_target and "distance" in batch:
            number = len(batch["distance"]) * self.processes[1]
            error = self.engine.mean(batch["distance"].mean()) / c.kl_target - 1
            self.beta *= 1 + error.clamp(-0.2, 0.2) * number / c.horizon
