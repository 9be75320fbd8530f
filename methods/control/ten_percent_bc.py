"""10%-BC: behaviour cloning of the best episodes alone (Chen et al. 2021, arXiv 2106.01345, the baseline "%BC").

    keep the share `kept` of the episodes with the highest returns; then L = - mean_B log pi(a|s)

At least one episode is kept. A data set's last episode may be cut short; it competes with the return that it has.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.control.bc import BC
from runner.interface import knob


class TenPercentBC(BC):
    @dataclasses.dataclass(frozen=True)
    class Config(BC.Config):
        kept: float = knob(0.1, "share of episodes that is cloned", low=0.0, high=1.0, source="Decision Transformer, table 3")

    def prepare(self, data):
        if self.config.kept < 1:
            data = {k: v[best_episodes(data, self.config.kept)] for k, v in data.items()}
            return super().prepare(data) or data
        return super().prepare(data)


def best_episodes(data, share: float):
    """Truth values (N,): the rows of the `share` of episodes with the highest returns."""
    episode = data["start"].long().cumsum(0) - 1
    returns = torch.zeros(int(episode[-1]) + 1, dtype=torch.float64, device=episode.device)
    returns.index_add_(0, episode, data["reward"].double())
    best = returns.topk(max(1, round(share * len(returns)))).indices
    return torch.isin(episode, best)
