"""Offline pre-training, then online soft actor-critic: the frame of the offline-to-online comparisons; with K = 0 the naive one.

    phase 1   `offline_updates` updates of Cal-QL (or CQL: calibrated = false) on the data set, with the networks of phase 2
    switch    actor, critics, target critics, temperature and all states of Adam stay; the online replay is empty
    phase 2   one environment step, then `critic_steps` critic steps on a batch each, targets after each, without the
              conservative term:   y = r + discount (1 - d) min over `subset` target critics drawn with replacement (pessimism);
              then one step of actor and temperature on all these batches together:
              L_pi = mean( T log pi - min over ALL critics ), L_T = T (entropy - H)

T = softplus(rho) or exp(rho) (temperature_form). One update is an offline update of phase 1, or all learning after one
environment step in phase 2; before the first of these, steps are played until the replay holds a batch.

Source: the common setting of Zhou et al. 2024 (arXiv 2412.07762), whose own change is methods/control/wsrl.py. Differences
from their code (zhouzypaul/wsrl): the conservative term takes all critics, not a drawn subset (the same in expectation);
layers start as PyTorch's do.
"""

from __future__ import annotations

import dataclasses
import math

import torch.nn.functional as F
from torch import Tensor

from methods.control.cal_ql import CalQL
from methods.control.redq import critic_steps, subset_minimum
from runner.interface import Feed, knob


class FineTune(CalQL):
    @dataclasses.dataclass(frozen=True)
    class Config(CalQL.Config):
        hidden: tuple[int, ...] = knob((256, 256), "widths of the hidden layers of actor and critics", low=1, source="WSRL")
        layer_norm: str = knob("all", "which networks normalise the outputs of their hidden layers",
                               choices=["none", "critics", "all"], source="WSRL")
        critics: int = knob(10, "number of critics", low=1, source="WSRL")
        subset: int = knob(2, "target critics drawn, with replacement, for the minimum; 0: all of them", low=0, source="WSRL")
        max_target: bool = knob(True, "offline: the target takes the best of n actions of the policy", source="WSRL")
        temperature_learning_rate: float = knob(1e-4, "Adam's, for rho; 0: it stays", low=0.0, source="WSRL")
        temperature_form: str = knob("softplus", "how the temperature follows from its parameter",
                                     choices=["softplus", "exp"], source="WSRL")
        offline_updates: int = knob(250_000, "updates on the data set before online play", low=0, source="WSRL, locomotion")
        critic_steps: int = knob(4, "online: critic steps per environment step", low=1, source="WSRL")
        online_loss: str = knob("sac", "online: sac drops the conservative term, cql keeps it", choices=["sac", "cql"],
                                source="WSRL")
        retained: float = knob(0.0, "online: share of stored data in every batch", low=0.0, high=1.0, source="WSRL")

    def make_targets(self):
        super().make_targets()
        if self.config.temperature_form == "softplus":
            self.log_temperature.data.fill_(math.log(math.expm1(self.config.temperature)))

    def temperature(self) -> Tensor:
        if self.config.temperature_form == "exp":
            return super().temperature()
        return F.softplus(self.log_temperature)

    # -- phases
    def stage(self) -> int:
        return int(self.updates >= self.config.offline_updates)

    @property
    def batches(self):
        return self.config.critic_steps if self.stage() else 1

    @property
    def conservative(self):
        return super().conservative and (not self.stage() or self.config.online_loss == "cql")

    @property
    def maximises(self):
        return super().maximises and not self.stage()

    def update(self, batch):
        if not self.stage():
            return super().update(batch)
        metrics, _ = critic_steps(self, batch, self.config.critic_steps)
        if (self.updates + 1) % self.config.actor_delay == 0:
            metrics |= self.update_actor(batch)
        return metrics

    # -- parts
    def feed(self) -> Feed:
        return Feed(steps=1, stored=self.config.retained) if self.stage() else Feed()

    def pessimism(self, values: Tensor) -> Tensor:
        return subset_minimum(self, values, self.config.subset, replacement=True)
