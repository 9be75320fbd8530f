"""RLOO: REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740).

The baseline of a response is the mean reward of the others of its group,

    A_i = r_i - (1 / (G-1)) sum_{j != i} r_j = G / (G-1) (r_i - mean_g r)

without division by a deviation: the direction of Dr. GRPO, G / (G-1) times as long. The paper takes one step a batch on the
whole sequence's log-probability; `minibatches` above 1 uses the base algorithm's clipped ratio. A group of one has A = 0.
"""

from __future__ import annotations

import dataclasses

from methods.reasoning.base import GroupPolicy
from runner.interface import knob


class RLOO(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        leave_one_out: bool = knob(True, "the baseline leaves the response itself out, and nothing is divided by a deviation")
        scale: str = knob("group", "deviation that advantages are divided by: the group's, the batch's, or none",
                          choices=["group", "batch", "none"], when={"leave_one_out": False})

    def advantage(self, batch, old):
        if not self.config.leave_one_out:
            return super().advantage(batch, old)
        mean, _, size = self.compare(batch["reward"], batch)
        return (batch["reward"] - mean) * size / (size - 1).clamp(min=1) * (size > 1)
