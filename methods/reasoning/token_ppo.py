"""PPO on tokens: a value of every position instead of the group's mean (Schulman et al. 2017, arXiv 1707.06347; for language
models Ouyang et al. 2022, arXiv 2203.02155).

With V(s_t) of what stands before token t, by the weights at the start of the update, V(s_{T+1}) = 0, and

    r_t      = 1[t = T_i] r_i - reward_kl (lp_old - lp_ref)_t                                  (k1)
    delta_t  = r_t + gamma V(s_{t+1}) - V(s_t)
    A_t      = sum_{l >= 0} (gamma lambda)^l delta_{t+l}                                       (GAE, arXiv 1506.02438)
    R_t      = A_t + V(s_t),   A whitened over all tokens of the batch                         (whiten)
    L_V      = mean_t max((V - R)^2, (clip(V, V_old -+ value_clip) - R)^2) / 2

and GRPO's clipped surrogate. The critic is a network of its own: a copy of the policy's trunk as it is at the start, and a linear
head that starts at 0; it takes one step on every minibatch, by its own optimiser. A response that is cut at its longest ends like
any other. The k1 in the reward has the gradient of KL(pi || ref), unlike k3 as a loss.

Several epochs over a batch: ppo_rlhf. Not done: a first phase that trains the critic alone, sharing the trunk with the policy.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.reasoning.base import GroupPolicy
from methods.reasoning.reinforce_pp import whiten
from methods.tokens.base import BETAS
from methods.tokens.rewards import value
from runner.interface import knob


def trunk_of(policy: nn.Module) -> nn.Module:
    """What makes hidden states of tokens, without the head where the two can be told apart."""
    return getattr(policy, "model", policy)


class Critic(nn.Module):
    """A copy of a policy's trunk, and a head with one output: what score() asks of a policy."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.trunk = copy.deepcopy(trunk_of(policy))
        self.head = nn.Parameter(torch.zeros(1, policy.shape.width))

    def packed(self, ids: Tensor) -> Tensor:
        return self.trunk(ids)


def discounted_sums(x: Tensor, factor: float) -> Tensor:
    """(b, T): sum_{l >= 0} factor^l x_{t+l}, in log2 T steps, each of which doubles the terms."""
    reach = 1
    while reach < x.shape[1]:
        x = x + factor ** reach * F.pad(x[:, reach:], (0, reach))
        reach *= 2
    return x


def gae(reward: Tensor, values: Tensor, mask: Tensor, gamma: float, trace: float) -> Tensor:
    """A (b, T); all arguments are (b, T), 0 off the mask."""
    delta = reward + gamma * F.pad(values[:, 1:], (0, 1)) - values
    return discounted_sums(delta * mask, gamma * trace) * mask


class TokenPPO(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        critic: bool = knob(True, "advantages from values; false: the group's (GRPO)")
        gamma: float = knob(1.0, "discount of a token", low=0.0, high=1.0, when={"critic": True})
        trace: float = knob(0.95, "lambda of GAE; 1: the return less the value", low=0.0, high=1.0, source="paper",
                            when={"critic": True})
        whiten: bool = knob(True, "advantages have mean 0 and variance 1 over the batch's tokens", when={"critic": True})
        reward_kl: float = knob(0.0, "of the KL to the start in the reward", low=0.0, when={"critic": True})
        value_clip: float = knob(0.2, "how far an update moves a value at full gradient; 0: any distance", low=0.0,
                                 source="project's choice", when={"critic": True, "critic_rate": 0.01})
        critic_rate: float = knob(1e-4, "AdamW's learning rate of the critic", low=0.0, source="project's choice",
                                  when={"critic": True})
        scale: str = knob("group", "deviation that advantages are divided by: the group's, the batch's, or none",
                          choices=["group", "batch", "none"], when={"critic": False})

    looks_first = True

    def setup(self, spec):
        super().setup(spec)
        self.critic = Critic(self.policy)

    def prepare(self, data):
        super().prepare(data)
        self.critic.trunk.load_state_dict(trunk_of(self.policy).state_dict())

    def make_optimizers(self):
        super().make_optimizers()
        parameters = [p for p in self.critic.parameters() if p.requires_grad]
        self.optimizers["critic"] = torch.optim.AdamW(parameters, lr=self.config.critic_rate, betas=BETAS,
                                                      weight_decay=self.config.weight_decay, fused=True)

    def needs_reference(self):
        return super().needs_reference() or self.config.critic and self.config.reward_kl > 0

    def kl_cost(self) -> float | Tensor:
        """The weight of the KL in the reward, where `reward_kl` is not 0."""
        return self.config.reward_kl

    def parts(self, rows: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Rows that go through the critic at once."""
        size = self.config.micro_rows or len(rows["mask"])
        names = ("prompt", "prompt_mask", "response", "mask", "returns", "old_value")
        return [{k: rows[k][i:i + size] for k in names if k in rows} for i in range(0, len(rows["mask"]), size)]

    def advantage(self, batch, old):
        c = self.config
        if not c.critic:
            return super().advantage(batch, old)
        mask = batch["mask"]
        with torch.no_grad():
            values = torch.cat([self.score(part, value, policy=self.critic)["value"] for part in self.parts(batch)])
        last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))
        reward = last * batch["reward"][:, None]
        if c.reward_kl:
            reward = reward - self.kl_cost() * (old["log_prob"] - old["reference_log_prob"]) * mask
        advantage = gae(reward, values, mask, c.gamma, c.trace)
        batch |= {"old_value": values, "returns": advantage + values}
        error, returns = advantage[mask > 0], batch["returns"][mask > 0]
        self.told |= {"value": values[mask > 0].mean(), "explained": 1 - error.var() / returns.var().clamp(min=1e-8)}
        return whiten(advantage, mask) if c.whiten else advantage

    def step(self, rows, batch):
        """The base's, and one of the critic on the same rows."""
        super().step(rows, batch)
        if self.config.critic:
            rows.told["value_loss"] = self.fit_critic(rows)

    def fit_critic(self, rows) -> Tensor:
        clip, total = self.config.value_clip, torch.zeros((), device=rows.mask.device)
        parameters = self.optimizers["critic"].param_groups[0]["params"]
        for p in parameters:
            p.grad = None
        for part in self.parts(vars(rows)):
            now, before, goal = self.score(part, value, policy=self.critic)["value"], part["old_value"], part["returns"]
            loss = (now - goal).square()
            if clip:
                loss = torch.maximum(loss, (before + (now - before).clamp(-clip, clip) - goal).square())
            loss = 0.5 * (loss * part["mask"]).sum() / rows.tokens.clamp(min=1)
            self.engine.backward(loss)
            total += loss.detach()
        self._step("critic", parameters, self.config.gradient_norm, False)
        return total
