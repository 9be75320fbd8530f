"""Generators aligned by pairs of samples: flow matching's regression, weighted or contrasted. As it stands it is fine-tuning on
winners.

One update on chosen and rejected samples (n, *shape) of the same conditions, with their rewards: both go through flow
matching's parts (methods/diffusion/regression.py) with one t and one noise a pair, and the condition left out for both or
neither. rows hold them one after the other: error (2n,) = [m_w, m_l], reward (2n,).

    loss              mean m_w                                       (methods override it)
    reference_error   m of the generator as it was at the start, (2n,)

The start's weights are the env's; reference_error asks the frozen copy of them.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor

from methods.diffusion.regression import Regression
from runner.interface import knob


class PairRegression(Regression):
    @dataclasses.dataclass(frozen=True)
    class Config(Regression.Config):
        learning_rate: float = knob(5e-4, "AdamW's", low=0.0)
        label_dropout: float = knob(0.0, "probability with which the condition is left out in training", low=0.0, high=1.0)

    PARTS = (*Regression.PARTS, "reference_error")
    starts = True

    def gather(self, batch) -> SimpleNamespace:
        t, noise = self.times(len(batch["condition"])), self.noise("noise", tuple(batch["chosen"].shape))
        condition = self.dropped(batch["condition"])
        return SimpleNamespace(x=torch.cat([batch["chosen"], batch["rejected"]]), t=torch.cat([t, t]), noise=torch.cat([noise,
                               noise]), condition=torch.cat([condition, condition]), told={},
                               reward=torch.cat([batch["chosen_reward"], batch["rejected_reward"]]))

    def loss(self, rows) -> Tensor:
        return rows.error.chunk(2)[0].mean()

    @torch.no_grad()
    def reference_velocity(self, rows) -> Tensor:
        return self.velocity(self.reference, rows.x_t, rows.t, rows.condition)

    def reference_error(self, rows) -> Tensor:
        return self.error(SimpleNamespace(**{**vars(rows), "v": self.reference_velocity(rows)}))
