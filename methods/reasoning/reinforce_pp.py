"""REINFORCE++: a global baseline instead of the group's (Hu et al. 2025, arXiv 2501.03262).

The reward of token t is -beta k1_t, that of a response's last token r_i more; its return to go (no discount) is whitened over all
response tokens of the batch,

    R_t = sum_{s >= t} (1[s = T_i] r_i - beta (lp_old - lp_ref)_s),   A_t = (R_t - mean) / sqrt(var + 1e-8)

var with Bessel's correction. baseline=group (REINFORCE++-baseline) first takes the group's mean off r_i. Long responses weigh
more in the statistics, as in the published code.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from methods.reasoning.base import GroupPolicy
from runner.interface import knob


class ReinforcePP(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        whitening: str = knob("batch", "over what advantages are compared: all tokens of the batch, or the group (GRPO)",
                              choices=["batch", "group"])
        scale: str = knob("group", "deviation that advantages are divided by: the group's, the batch's, or none",
                          choices=["group", "batch", "none"], when={"whitening": "group"})
        baseline: str = knob("none", "taken off the reward first", choices=["none", "group"], when={"whitening": "batch"})
        reward_kl: float = knob(0.0, "beta of the KL in the reward (k1, so that its gradient is that of KL(pi || ref))", low=0.0,
                                when={"whitening": "batch"})

    looks_first = True

    def needs_reference(self):
        return super().needs_reference() or self.config.reward_kl > 0

    def advantage(self, batch, old):
        c = self.config
        if c.whitening == "group":
            return super().advantage(batch, old)
        reward, mask = batch["reward"], batch["mask"]
        if c.baseline == "group":
            reward = reward - self.compare(reward, batch)[0]
        returns = reward[:, None] * mask
        if c.reward_kl:
            cost = (old["log_prob"] - old["reference_log_prob"]) * mask
            returns = returns - c.reward_kl * cost.flip(1).cumsum(1).flip(1)
        return whiten(returns, mask)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(b, T): mean 0 and variance 1 over the mask, 0 off it."""
    number = mask.sum()
    centred = (values - (values * mask).sum() / number) * mask
    return centred / (centred.square().sum() / (number - 1).clamp(min=1) + 1e-8).sqrt()
