"""REDQ: randomised ensembled double Q-learning (Chen et al. 2021, arXiv 2101.05982).

Soft actor-critic with many critics and many critic steps for each environment step:

    y    = r + discount (1 - d) ( min_{i in M} Q_i'(s', a') - alpha log pi(a'|s') ),   M: `subset` of the critics, drawn anew
    L_pi = mean( alpha log pi(a|s) - mean_i Q_i(s, a) )

One update makes `critic_steps` critic steps, each on a batch of its own and followed by the targets, then one step of actor
and temperature on the last of these batches.

| symbol | name |
|---|---|
| N, M | critics, subset |
| G, the update-to-data ratio | critic_steps (an env plays steps_per_update steps before each update) |

The official code (watchernyu/REDQ) draws M without replacement, as here (`replacement`: with), and waits for 5,000 random
steps (env.start_steps).
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from methods.control.base import Sample
from methods.control.soft import SoftActorCritic
from runner.interface import knob


class REDQ(SoftActorCritic):
    @dataclasses.dataclass(frozen=True)
    class Config(SoftActorCritic.Config):
        critics: int = knob(10, "N: number of critics", low=1, source="paper, sec. 3")
        subset: int = knob(2, "M: target critics drawn for the minimum; 0: all of them", low=0, source="paper, sec. 3")
        replacement: bool = knob(False, "whether one critic may be drawn twice")
        critic_steps: int = knob(20, "G: critic steps per update, each on its own batch", low=1, source="paper, sec. 3")
        actor_value: str = knob("mean", "what the actor maximises over the critics", choices=["mean", "min"],
                                source="paper, alg. 1")

    @property
    def batches(self):
        return self.config.critic_steps

    def update(self, batch):
        metrics, last = critic_steps(self, batch, self.config.critic_steps)
        if (self.updates + 1) % self.config.actor_delay == 0:
            metrics |= self.update_actor(last)
        return metrics

    # -- parts
    def pessimism(self, values: Tensor) -> Tensor:
        return subset_minimum(self, values, self.config.subset, self.config.replacement)

    def actor_loss(self, batch, sample: Sample) -> Tensor:
        if self.config.actor_value == "min":
            return super().actor_loss(batch, sample)
        values, _ = self.critics(batch["observation"], sample.action)
        return (self.alpha.detach() * sample.log_prob - values.mean(-2)).mean(-1)


def critic_steps(method, batch: dict[str, Tensor], number: int) -> tuple[dict, dict]:
    """`number` critic steps on equal parts of a batch (…, number B, …), targets after each -> (metrics, batch) of the last."""
    rows = batch["reward"].shape[-1] // number
    for i in range(number):
        part = {k: v.narrow(v.dim() - 1 if v.dim() == batch["reward"].dim() else v.dim() - 2, i * rows, rows)
                for k, v in batch.items()} if number > 1 else batch
        method.part = i
        metrics = method.update_critics(part)
        method.update_targets()
    method.part = 0
    return metrics, part


def subset_minimum(method, values: Tensor, number: int, replacement: bool) -> Tensor:
    """values (…, critics, B) -> (…, B): the minimum over `number` critics drawn for the whole batch; 0: over all."""
    critics = values.shape[-2]
    if not number or number >= critics and not replacement:
        return values.amin(-2)
    if replacement:
        index = method.noise("subset", (number,), "bits") % critics
    else:
        index = method.noise("subset", (critics,), "uniform").argsort(-1)[..., :number]
    return values.take_along_dim(index.unsqueeze(-1), -2).amin(-2)
