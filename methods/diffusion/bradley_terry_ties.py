"""Bradley-Terry with ties: the reward model of VideoReward (Liu et al. 2025, arXiv 2501.13918), by Rao and Kupper (1967).

With d = r_a - r_b and k >= 1 one of three things is said of a pair,

    P(a > b) = sigma(d - log k)    P(b > a) = sigma(-d - log k)    P(tie) = (k^2 - 1) sigma(d - log k) sigma(-d - log k)

which sum to 1, and the loss is minus the logarithm of what was said:

    clear   -log sigma(r_w - r_l - log k)
    tie     -log sigma(d - log k) - log sigma(-d - log k) - log(k^2 - 1)

A tie draws the two ratings together (its gradient is 0 where they are equal), and d has to pass log k before a pair counts as
told apart. Equal ratings tie with probability (k - 1) / (k + 1): 2/3 at the paper's k = 5. k = 1 knows no ties: Bradley-Terry,
with ties by a coin or left out. Not reproduced: the vision-language model below the head, and its three separate dimensions.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.diffusion.sample_reward_model import SampleRewardModel
from runner.interface import knob


class BradleyTerryTies(SampleRewardModel):
    @dataclasses.dataclass(frozen=True)
    class Config(SampleRewardModel.Config):
        k: float = knob(5.0, "equal samples tie with probability (k - 1) / (k + 1); 1: Bradley-Terry", low=1.0, source="paper")
        ties: str = knob("coin", "a tie is a pair ordered by a coin, or left out", choices=["coin", "drop"],
                         when={"k": 1.0, "env.ties": 0.5})

    def loss(self, rows) -> Tensor:
        k = self.config.k
        if k == 1:
            return super().loss(rows)
        d = rows.winner - rows.loser
        won, lost = (F.logsigmoid(s - math.log(k)) for s in (d, -d))
        return -torch.where(rows.tie, won + lost + math.log(k * k - 1), won).mean()

    def tie_probability(self, difference):
        k = self.config.k
        won, lost = ((s - math.log(k)).sigmoid() for s in (difference, -difference))
        return (k * k - 1) * won * lost
