"""DPOP: DPO that is not content with lowering both sides (Pal et al. 2024, arXiv 2402.13228, "Smaug").

    L = -log sigma( beta (rho(y_w) - rho(y_l) - lambda max(0, -rho(y_w))) )

DPO may raise its margin while the preferred response loses probability, as long as the other one loses more. Here a fall of
rho(y_w) below 0 costs the margin lambda times as much. Where a label is a probability p, each side pays in the measure in which
it is preferred: p for y_w, 1 - p for y_l.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.preference.pairs import PairPolicy
from runner.interface import knob


class DPOP(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        beta: float = knob(0.3, "strength of the tie to the reference", low=0.0, source="paper")
        fall_weight: float = knob(50.0, "lambda: price of a preferred response's fall; the paper's 5 to 500", low=0.0,
                                  source="paper")

    def worth(self, pairs):
        s = super().worth(pairs)
        share = torch.stack([pairs.label, 1 - pairs.label])
        return s - self.config.fall_weight * share * (-pairs.rho).clamp(min=0)
