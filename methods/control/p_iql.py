"""P-IQL: a reward learned from preferences, then implicit Q-learning on the segments (baseline of Hejna et al. 2024).

    the first `reward_steps` updates: r^(s, a) an MLP, by Bradley-Terry on summed rewards
        L_r = mean[ y softplus(-(R_2 - R_1)) + (1 - y) softplus(-(R_1 - R_2)) ],   R = sum_t r^(s_t, a_t)
    from then on: IQL (methods/control/iql.py) on transitions of the segments, with r^ in the reward's place

Of each segment of a batch one random step is learned from; the last one has no successor. Nothing terminates. Only segments
that are compared are seen, as in the paper (app. D); 50,000 updates of the reward model, expectile 0.7, inverse temperature 3.

Differences from the official code (jhejna/cpl): the reward model's last layer has no bias; batches for IQL are as large as
there are segments in a batch of pairs.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.common.networks import adam, mlp
from methods.control.iql import IQL
from runner.interface import Spec, knob


class PIQL(IQL):
    @dataclasses.dataclass(frozen=True)
    class Config(IQL.Config):
        reward_steps: int = knob(50_000, "updates of the reward model before IQL begins", low=0, source="paper, app. D")

    # -- networks
    def setup(self, spec: Spec):
        super().setup(spec)
        self.reward = mlp(spec.observation_size + spec.action_size, self.config.hidden, 1, seeds=spec.seeds)
        # The loss does not see a constant: with a bias Adam would let it wander on rounding errors.
        self.reward[-1].bias.requires_grad_(False).zero_()

    def make_optimizers(self):
        super().make_optimizers()
        self.optimizers["reward"] = adam([p for p in self.reward.parameters() if p.requires_grad], self.config.learning_rate)

    def stage(self):
        return int(self.updates >= self.config.reward_steps)

    # -- the algorithm
    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: observation (…, B, 2, k, S), action (…, B, 2, k, A), preferred (…, B)."""
        return super().update(self.transitions(batch)) if self.stage() else self.update_reward(batch)

    def update_reward(self, batch) -> dict[str, Tensor]:
        first, second = self.rewards(batch["observation"], batch["action"]).sum(-1).unbind(-1)
        y = batch["preferred"]
        loss = (y * F.softplus(first - second) + (1 - y) * F.softplus(second - first)).mean(-1)
        self.minimise(loss, "reward")
        return {"reward_loss": loss.detach(), "accuracy": (0.5 * (1 + (second - first).detach().sign() * (2 * y - 1))).mean(-1)}

    def rewards(self, observation: Tensor, action: Tensor) -> Tensor:
        """(…, B, 2, k, S), (…, B, 2, k, A) -> (…, B, 2, k)"""
        x = torch.cat([observation, action], -1)
        return self.reward(x).squeeze(-1)

    @torch.no_grad()
    def transitions(self, batch) -> dict[str, Tensor]:
        """One step of each segment: observation (…, 2 B, S) and so on, with the learned reward."""
        observation, action = batch["observation"], batch["action"]
        steps = observation.shape[-2] - 1
        time = (self.noise("time", observation.shape[-4:-2], "bits") % steps)[..., None, None]  # (…, B, 2, 1, 1)
        pick = lambda x, t: x.gather(-2, t.expand(*t.shape[:-1], x.shape[-1])).squeeze(-2)  # noqa: E731
        seen, done = pick(observation, time), pick(action, time)
        out = {"observation": seen, "action": done, "next_observation": pick(observation, time + 1),
               "reward": self.rewards(seen, done)}
        out["terminated"] = torch.zeros_like(out["reward"])
        return {k: v.flatten(-2) if k in ("reward", "terminated") else v.flatten(-3, -2) for k, v in out.items()}

    @torch.no_grad()
    def score_segments(self, observation: Tensor, action: Tensor) -> Tensor:
        """The learned reward of segments: observation (n, k, S), action (n, k, A) -> (n,)"""
        return self.rewards(observation, action).sum(-1)
