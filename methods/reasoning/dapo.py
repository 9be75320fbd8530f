"""DAPO: decoupled clip and dynamic sampling policy optimisation (Yu et al. 2025, arXiv 2503.14476).

Four changes to GRPO, of which two are settings of the base algorithm:

    clip-higher        e_high = 0.28 beside e_low = 0.2                             (clip_high)
    token-level loss   aggregation token_mean
    dynamic sampling   groups whose responses are all right or all wrong are dropped and further problems sampled, until Q
                       groups remain or `most_rounds` rounds are over (then the batch is short)
    overlong shaping   r_i += min(0, -(T_i - (T_max - L)) / L) * overlong_weight, L = overlong_buffer * T_max (the paper: 4096
                       of 20480)

Dynamic sampling costs rollouts: compare runs along `responses`, not along steps. If a round leaves no group at all, the last
one's are kept, whose advantages are 0.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.reasoning.base import GroupPolicy
from methods.reasoning.batches import groups_of, join
from runner.interface import knob


class DAPO(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        dynamic: bool = knob(True, "sample until enough groups have both right and wrong responses")
        most_rounds: int = knob(5, "rounds of sampling a batch at most", low=1, when={"dynamic": True})
        overlong_buffer: float = knob(0.2, "L as a share of the longest response; 0: no shaping", low=0.0, high=1.0)
        overlong_weight: float = knob(1.0, "what the longest response loses", low=0.0)

    def collect(self, source):
        c = self.config
        if not c.dynamic:
            return super().collect(source)
        kept, number = [], 0
        for round_ in range(c.most_rounds):
            batch = source.rollouts(source.problems(c.prompts), c.samples, c.temperature, f"rollout{round_ or ''}")
            _, deviation, _ = self.compare(batch["correct"], batch)
            mixed = torch.zeros(c.prompts, dtype=torch.bool, device=deviation.device).index_put((batch["group"],), deviation > 0)
            number += int(mixed.sum())
            if mixed.any():
                kept.append(groups_of(batch, mixed))
            enough = torch.tensor(float(number >= c.prompts), device=deviation.device)
            if self.engine.mean(enough) == 1:  # every process has: all must ask for problems alike
                break
        batch = join(kept) if kept else batch
        groups = int(batch["group"].max()) + 1
        return groups_of(batch, torch.arange(groups, device=batch["group"].device) < c.prompts)

    def reward(self, batch):
        c, reward = self.config, super().reward(batch)
        if not c.overlong_buffer:
            return reward
        longest = batch["mask"].shape[1]
        buffer = c.overlong_buffer * longest
        return reward + c.overlong_weight * ((longest - buffer - batch["length"]) / buffer).clamp(max=0.0)
