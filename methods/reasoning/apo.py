"""APO: asymmetric policy optimisation (Hong et al. 2025, arXiv 2506.21655): DADS and STCR.

    solved     s_i = 1 for a correct response;  difficulty of a prompt d = 1 - mean_g s
    DADS       the KL of a response with A_i > 0 weighs W = 1 - exp(-e (1 - d)), e = 2.718…: hard prompts may drift; with
               A_i <= 0, and where d is 0 or 1, W = 1
    STCR       a wrong response longer than the mean Tbar of its group's correct ones: A_i <- A_i (2 - b^-(T_i - Tbar));
               groups without a correct response stay as they are
    L          = L_GRPO + kl_scale mean_i (W_i mean_t k3_{i,t}),   r_i = correct + 0.5 format

W jumps: as d -> 1 it falls to 0, at d = 1 (no correct response, and A > 0 by the format alone) it is 1. Published b = 1.00001
makes at most 1.04 of responses up to 4096 tokens, and nothing of short ones: scale it with the length, b = 1 + 1 / (0.3 T_max).
The official code solves by trunc(r); here the verifier's word is taken, which is the same for its rewards of 1 and 0.5. An
earlier form there, W = exp(-e d), is commented out. Its 1e-9 in A's denominator is 1e-6 here. Not reproduced: images.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from methods.reasoning.base import GroupPolicy, group_statistics, kl, plus
from runner.interface import knob


class APO(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        format_reward: float = knob(0.5, "of a response in the right form, beside 1 for a correct one", low=0.0, source="paper")
        kl_scale: float = knob(1e-3, "weight of the KL (k3) to the start, a mean over responses", low=0.0, source="paper")
        by_difficulty: bool = knob(True, "DADS; false: the same weight for every response", when={"kl_scale": 0.5})
        length_base: float = knob(1.00001, "b of STCR; 1: none", low=1.0, source="paper")

    def needs_reference(self):
        return super().needs_reference() or self.config.kl_scale > 0

    def reward(self, batch):
        return super().reward(batch) + self.config.format_reward * batch["format"]

    def weigh(self, rows):
        super().weigh(rows)
        solved = (rows.correct > 0).float()
        easy, _, size = group_statistics(solved, rows.group)
        easy = torch.where(size == 1, solved, easy)  # a group of one is told to have mean 0
        if self.config.kl_scale:
            weight = 1 - torch.exp(-math.e * easy)
            positive = (rows.advantage * rows.mask).sum(1) > 0
            rows.kl_weight = torch.where(positive & (easy > 0) & (easy < 1), weight, 1.0)
            rows.told["kl_weight"] = rows.kl_weight.mean()
        if self.config.length_base > 1:
            right, _, _ = group_statistics(solved * rows.length, rows.group)
            excess = (rows.length - right / easy.clamp(min=1e-6)).clamp(min=0) * (solved == 0) * (easy > 0)
            factor = 1 - torch.expm1(-excess * math.log(self.config.length_base))
            rows.advantage = rows.advantage * factor[:, None]
            rows.told["length_factor"] = factor.mean()

    def penalty(self, rows):
        c, penalty = self.config, super().penalty(rows)
        if not c.kl_scale:
            return penalty
        distance = kl(rows.log_prob, rows.old["reference_log_prob"], "k3")
        weight = rows.kl_weight[:, None] if c.by_difficulty else 1.0
        return plus(penalty, c.kl_scale * self.aggregate(weight * distance, rows, "seq_mean_token_mean"))
