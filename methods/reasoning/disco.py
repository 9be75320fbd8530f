"""DisCO: discriminative constrained optimisation (Li et al. 2025, arXiv 2505.12366), the objective that DRPO builds on.

Right responses (correct > 0) are told from wrong ones by their scores s_i = (1/T_i) sum_t lp, group by group:

    J_g = mean_right s_i - tau ln mean_wrong exp(s_j / tau)
    L   = -(1/Q) sum_g J_g + beta sg([K - delta]_+) K,   K = mean_t of the KL from the old policy (k1 = lp_old - lp, or k3)

Groups that are all right or all wrong have J = 0 and count in Q. There is no clip. Here the loss is -mean_i (mean_t A_i lp) with
A_i = G / n_right for right responses and -G softmax_wrong(s_j / tau) for wrong ones, at the current weights: that is its
gradient; a constant makes its value -(1/Q) sum J. `constraint` and `radius` are for language models; where a step makes K of
1e-3 to 1e-2, a radius of that size and a constraint of 100 let it learn. k1 has no gradient on-policy (in the mean): it acts
from the second minibatch on.

Groups have equal sizes, otherwise 1/Q would mean different things: refused. Other aggregations than seq_mean_token_mean give
responses the weight of their length. The official code takes likelihood ratios as scores, too; not offered.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.reasoning.base import GroupPolicy, group_statistics, plus
from runner.errors import UserError
from runner.interface import knob


def group_sums(values: Tensor, group: Tensor) -> Tensor:
    """values (b,) summed over each row's group, (b,)."""
    return values.new_zeros(int(group.max()) + 1).index_add_(0, group, values)[group]


def group_most(values: Tensor, group: Tensor) -> Tensor:
    """The greatest of each row's group, (b,)."""
    lowest = values.new_full((int(group.max()) + 1,), -torch.inf)
    return lowest.scatter_reduce_(0, group, values, "amax")[group]


class DisCO(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        discriminative: bool = knob(True, "the objective above; false: the base's")
        tau: float = knob(10.0, "temperature of wrong responses: the smaller, the more the likeliest of them counts", low=1e-3,
                          source="paper", when={"discriminative": True})
        constraint: float = knob(1e3, "beta; 0: none", low=0.0, source="paper", when={"discriminative": True})
        radius: float = knob(1e-4, "delta: KL that costs nothing", low=0.0, source="paper", when={"discriminative": True})
        constraint_kl: str = knob("k1", "K's estimate", choices=["k1", "k3"], source="official code",
                                  when={"discriminative": True})
        scale: str = knob("group", "deviation that advantages are divided by: the group's, the batch's, or none",
                          choices=["group", "batch", "none"], when={"discriminative": False})
        dual_clip: float = knob(0.0, "c: with a negative advantage a token's loss is at most -A c; 0: no bound", low=0.0,
                                when={"discriminative": False})

    def reward(self, batch):
        if self.config.discriminative and (batch["group"].bincount().diff() != 0).any():
            raise UserError("disco and drpo need groups of one size, and these are not\nleave out the method that drops rows of "
                            "groups, or combine it with another than these")
        return super().reward(batch)

    def weigh(self, rows):
        super().weigh(rows)
        c = self.config
        if not c.discriminative:
            return
        right, group = rows.correct > 0, rows.group
        score = (rows.log_prob.detach() * rows.mask).sum(1) / rows.mask.sum(1).clamp(min=1)
        mixed = (group_sums(right.float(), group) > 0) & (group_sums((~right).float(), group) > 0)
        pull = torch.where(right, vars(rows).get("preference", torch.ones_like(score)), 0.0)
        pull = pull / group_sums(pull, group).clamp(min=1e-30)
        most = group_most(torch.where(right, -torch.inf, score), group)
        push = torch.where(right, 0.0, ((score - most) / c.tau).exp())
        total = group_sums(push, group).clamp(min=1e-30)
        push = push / total
        coefficient = torch.where(mixed, pull - push, 0.0) * group_statistics(score, group)[2]
        rows.advantage = coefficient[:, None].expand_as(rows.mask)
        # tau ln mean exp(s / tau), less the mean score under the softmax, which is in -A s already
        partition = most + c.tau * (total / group_sums((~right).float(), group).clamp(min=1)).log()
        rows.constant = torch.where(mixed, partition - group_sums(push * score, group), 0.0)[:, None]
        rows.told["right_pushed_down"] = ((coefficient < 0) & right).sum() / right.sum().clamp(min=1)

    def surrogate(self, rows):
        if not self.config.discriminative:
            return super().surrogate(rows)
        return rows.constant - rows.advantage * rows.log_prob

    def penalty(self, rows):
        c, penalty = self.config, super().penalty(rows)
        if not (c.discriminative and c.constraint):
            return penalty
        values = -rows.log_ratio if c.constraint_kl == "k1" else rows.ratio - rows.log_ratio - 1
        distance = self.aggregate(values, rows, "token_mean")
        excess = (self.engine.mean(distance.detach()) - c.radius).clamp(min=0)
        rows.told["constraint"] = distance.detach()
        return plus(penalty, c.constraint * excess * distance)
