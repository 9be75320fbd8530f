"""Flow-DPO (Liu et al. 2025, arXiv 2501.13918): direct preference optimisation of a flow,

    L = - mean log sigmoid( -(beta_t / 2) [ (m_w - m_w,ref) - (m_l - m_l,ref) ] )

with m the mean over D of the squared velocity error, one t and one noise for both samples of a pair, and the reference the
generator at the start. The theory gives beta_t = beta (1 - t)^2 (`weight=theory`: noise errors are (1 - t) times velocity
errors); the paper finds a constant beta better and less easily hacked. beta goes with the mean over D (officially 100).

A loser's larger error is rewarded without bound, and both errors may rise: metrics winner_gap, loser_gap (m - m_ref).
The online form, whose reference is refreshed, is flow_dpo_online; the paper's reward model with ties, bradley_terry_ties.
"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from methods.diffusion.preferences import PairRegression
from runner.interface import knob


class FlowDPO(PairRegression):
    @dataclasses.dataclass(frozen=True)
    class Config(PairRegression.Config):
        beta: float = knob(100.0, "of the implicit reward; 0: fine-tuning on winners", low=0.0, source="paper")
        weight: str = knob("constant", "course of beta over t: constant, or the theory's (1 - t)^2", choices=["constant",
                           "theory"], source="paper")

    keeps_start = True

    def loss(self, rows) -> Tensor:
        c = self.config
        if not c.beta:
            return super().loss(rows)
        winner, loser = (rows.error - self.reference_error(rows)).chunk(2)
        beta = c.beta * (1 - rows.t.chunk(2)[0]).square() if c.weight == "theory" else c.beta
        margin = -0.5 * beta * (winner - loser)
        rows.told |= {"winner_gap": winner.detach().mean(), "loser_gap": loser.detach().mean(),
                      "accuracy": (margin.detach() > 0).float().mean()}
        return -F.logsigmoid(margin).mean()
