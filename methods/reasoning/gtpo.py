"""GTPO: trajectory-based policy optimisation (Simoni et al. 2025, arXiv 2508.03772): no contradictory pushes on shared tokens.

A token at the same place of rewarded and of unrewarded responses of a group (tags, boilerplate) is pushed up and down at once.

    A_i      r_i - mean_g r; positive and negative responses by its sign; no clip, no KL, one step a batch
    forward  conflict of (place t from the start, token v): at least one positive and one negative response of the group have it;
             of each response, the uninterrupted run of conflicts at its beginning
    backward the same with places counted from a response's last token; the uninterrupted run at its end
    weight   lambda of a run: 0 in negative, `conflict_weight` in positive responses, 1 elsewhere; those of both runs multiply
    entropy  Hm_i = mean entropy of response i, as a number:  A_i <- 0 if Hm_i > thr, else A_i - gamma Hm_i
    L        -mean_i (1/T_i) sum_t rho A_i lambda_{i,t}

So a response with advantage 0 gets -gamma Hm_i: groups that are all right are pushed down, too (as published). The filter acts
only if the start's mean entropy, over the first batch, is below thr; thr is 0.7 nats, or, threshold_of=initial, `threshold` times
the start's mean entropy: small vocabularies never come near 0.7.

official_divisor: a response's loss is divided by max(length of its run at the beginning, of that at the end, 1) (the paper's code
meant the number of conflicts, but joins the two masks in reversed coordinates); that code also sums over the group.
With conflicts=false, threshold=0 and gamma=0 this is GRPO without clip and deviation, seq_mean_token_mean. Not reproduced:
graded rewards of 10 for format and 10 for correctness, 4-bit bases.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.reasoning.base import GroupPolicy
from runner.interface import knob


def shared(token: Tensor, place: Tensor, rows, sign: Tensor) -> Tensor:
    """(b, T) bool: a positive and a negative response of the group have this token at this place. sign (b, 1)."""
    width, kept = token.shape[1], rows.mask > 0
    at = rows.group[:, None] * width + place.clamp(min=0)
    key = torch.where(kept, at * (token.max() + 1) + token, -1)
    number = torch.unique(key, return_inverse=True)[1]
    seen = torch.zeros(2, key.numel() + 1, dtype=torch.bool, device=token.device)
    for line, which in ((0, sign > 0), (1, sign < 0)):
        seen[line, number[kept & which]] = True
    return (seen[0] & seen[1])[number] & kept


def runs(rows, sign: Tensor) -> tuple[Tensor, Tensor]:
    """(b, T) each, 1 on the run of conflicts at a response's beginning, and on that at its end. sign (b,)"""
    token, mask = rows.response, rows.mask
    sign = sign[:, None]
    place = torch.arange(token.shape[1], device=token.device).expand_as(token)
    forward = shared(token, place, rows, sign).float().cumprod(1)
    backward = shared(token, mask.sum(1, keepdim=True).long() - 1 - place, rows, sign)
    backward = torch.where(mask > 0, backward.float(), 1.0).flip(1).cumprod(1).flip(1) * mask
    return forward, backward


class GTPO(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        conflicts: bool = knob(True, "weigh conflicting tokens")
        conflict_weight: float = knob(2.0, "lambda of a conflicting token of a positive response", low=0.0, source="paper",
                                      when={"conflicts": True})
        threshold: float = knob(0.7, "thr, nats: responses with a higher mean entropy are left out; 0: none", low=0.0,
                                source="official code", when={"threshold_of": "initial"})
        threshold_of: str = knob("absolute", "thr as it stands, or times the mean entropy at the start",
                                 choices=["absolute", "initial"], when={"threshold": 1.2})
        gamma: float = knob(0.1, "of the entropy that is taken off advantages", low=0.0, source="paper")
        official_divisor: bool = knob(False, "divide a response's loss by the length of its longer run", when={"conflicts": True})
        clip_low: float = knob(1.0, "e_low; 1: none", low=0.0, when={"minibatches": 2})
        clip_high: float = knob(1e9, "e_high; 1e9: none", low=0.0, when={"minibatches": 2})

    def setup(self, spec):
        super().setup(spec)
        self.register_buffer("first_entropy", torch.tensor(torch.nan))

    def observe(self, batch, old):
        super().observe(batch, old)
        level = self.engine.mean((old["entropy"] * batch["mask"]).sum() / batch["mask"].sum())
        self.first_entropy.copy_(torch.where(self.first_entropy.isnan(), level, self.first_entropy))

    def weigh(self, rows):
        super().weigh(rows)
        c, share = self.config, rows.mask / rows.mask.sum(1, keepdim=True).clamp(min=1)
        if c.conflicts:
            sign = (rows.advantage * rows.mask).sum(1).sign()
            begin, end = runs(rows, sign)
            one = torch.where(sign > 0, c.conflict_weight, 0.0)[:, None]  # where the sign is 0 there is no conflict
            rows.weight = rows.weight * torch.where(begin > 0, one, 1.0) * torch.where(end > 0, one, 1.0)
            if c.official_divisor:
                rows.weight = rows.weight / torch.maximum(begin.sum(1), end.sum(1)).clamp(min=1)[:, None]
            rows.told["conflicts"] = (torch.maximum(begin, end) * rows.mask).sum() / rows.mask.sum()
        entropy = (rows.now["entropy"].detach() * share).sum(1, keepdim=True)
        if c.gamma:
            rows.advantage = rows.advantage - c.gamma * entropy
        if c.threshold:
            bound = c.threshold * (self.first_entropy if c.threshold_of == "initial" else 1.0)
            out = (entropy > bound) & (self.first_entropy < bound)
            rows.advantage = rows.advantage * ~out
            rows.told["left_out"] = out.float().mean()
