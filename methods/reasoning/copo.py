"""COPO: consistency-aware policy optimisation (Han et al. 2025, arXiv 2508.04138).

Groups whose responses all have the same reward teach nothing. COPO adds a second, global advantage, which compares prompts, and
blends the two by how far the group's answers agree:

    A_i = GRPO's, local;  B_q = (R_q - mean_q R) / (std_q R + 1e-6),  R_q = mean_i r_i  (std unbiased, over the batch's prompts)
    E_q = -sum_a f_a log2 f_a,  f_a the share of answer a among the G responses (6 in the paper)
    w_q = sigmoid(k (E_q - b))
    l   = (1 - w') clip(B_q) + w' clip(A_i),  both with the same rho and the dual clip

    w' = w_q                soft
         w_q 1[r_i != 0]    soft_with_zero, which the released launcher chooses: a wrong response gets the global term alone
         1[A_i != 0]        forced: the global term only where the local one is void

In a group above the batch's average B_q > 0 pushes wrong responses up, too; `wrong_pushed_up` counts the share of wrong
responses whose blended advantage is positive. Wrong answers count in E_q as well; responses without an answer are one class.
discounted takes R_q (1 - E_q (1 - 1/G) / log2 G). With scale=none the official code never fills the reward that soft_with_zero
looks at, so that all weight goes to the global term (official_zero). Prompts are compared within each process.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.reasoning.base import GroupPolicy, group_statistics
from methods.reasoning.batches import votes
from runner.interface import knob


def answer_entropy(answer: Tensor, group: Tensor) -> Tensor:
    """E of each row's group, in bits (B,)."""
    count = votes(answer, group).float()
    size = torch.bincount(group)[group]
    share = count / size
    # sum over answers of f log f = mean over rows of log f(own answer)
    return torch.zeros_like(share).index_add_(0, group, -share.log2() / size)[group].clamp(min=0.0)


def global_advantage(value: Tensor, group: Tensor) -> Tensor:
    """B of each row (B,) from the values of its responses."""
    each = torch.zeros(int(group.max()) + 1, device=value.device)
    each = each.index_add_(0, group, value) / torch.bincount(group)
    mean, deviation, _ = group_statistics(each, torch.zeros_like(each, dtype=torch.int64))
    return ((each - mean) / (deviation + 1e-6))[group]


class COPO(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        blend: str = knob("soft", "weight of the local advantage; local: it alone", choices=[
            "soft", "soft_with_zero", "forced", "local"])
        steepness: float = knob(5.0, "k", source="paper")
        middle: float = knob(1.0, "b, bits of answer entropy where both weigh alike", source="paper")
        discounted: bool = knob(False, "a prompt's reward falls with its answer entropy", source="official code")
        official_zero: bool = knob(False, "as the official code has it without std: all weight to the global advantage",
                                   when={"scale": "none", "blend": "soft_with_zero"})

    def advantage(self, batch, old):
        c, local = self.config, super().advantage(batch, old)
        if c.blend == "local":
            return local
        reward, group = batch["reward"], batch["group"]
        entropy = answer_entropy(batch["answer"], group)
        size = torch.bincount(group)[group].float()
        value = reward * (1 - entropy * (1 - 1 / size) / size.log2().clamp(min=1.0)) if c.discounted else reward
        batch["global_advantage"] = between = global_advantage(value, group)
        weight = torch.sigmoid(c.steepness * (entropy - c.middle))
        if c.blend == "soft_with_zero":
            weight = weight * (reward != 0) * (not (c.official_zero and c.scale == "none"))
        if c.blend == "forced":
            weight = (local != 0).float()
        batch["local_weight"] = weight
        wrong = batch["correct"] == 0
        up = wrong & (weight * local + (1 - weight) * between > 0)
        self.told |= {"answer_entropy": entropy.mean(), "local_weight": weight.mean(),
                      "wrong_pushed_up": up.sum() / wrong.sum().clamp(min=1)}
        return local

    def surrogate(self, rows):
        loss = super().surrogate(rows)
        if self.config.blend == "local":
            return loss
        local, rows.advantage = rows.advantage, rows.global_advantage[:, None].expand_as(rows.advantage)
        between = super().surrogate(rows)
        rows.advantage = local
        weight = rows.local_weight[:, None]
        return (1 - weight) * between + weight * loss
