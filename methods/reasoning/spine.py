"""SPINE: test-time training of forks alone, with their entropy in a band (Wu et al. 2025, arXiv 2511.17938).

Majority votes reinforce every token of every winning response until nothing is left to vote on. SPINE updates the tokens where
responses branch and keeps their entropy:

    F     = tokens of high entropy under the policy that sampled
            top_resp      the `fork_share` highest of each response
            top_batch     those above one threshold for the batch
            two_cluster   those above the threshold that maximises the variance of log H between the two sides
    L     = sum_F l / |F| + band_weight mean_F ([H_lo - H]_+ + [H - H_hi]_+) + beta k3,   gradient through the current H
    edges   quantile: q10 and q90 of H over F in the first batch, frozen;  mad: median -+ 2 median absolute deviations, averaged
            over the batches (`refresh`)

No official code was to be had when this was written: fork rule, edges, the band's form and its weight are this project's
reading of the abstract and of public summaries; squared bands and the three fork rules are the readings that remain. The KL, if
there is one, is over F, too. renormalise=false divides by all tokens: the step shrinks five-fold, which alone looks like
stability. A band slows the march to the majority's label, it cannot make a wrong majority right. At 0.01 on modular a linear
band goes on pushing when the votes agree and nothing else does: the policy drifts and labels go wrong; 0.003, or a squared
band, does not.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.reasoning.base import plus
from methods.reasoning.ttrl import TTRL
from runner.interface import knob


def two_clusters(values: Tensor) -> Tensor:
    """The threshold of values (n,) above which the variance between the two sides is greatest."""
    values = values.sort().values.double()
    below = torch.arange(1, max(len(values), 2), device=values.device)
    sums = values.cumsum(0)
    least = sums[:len(below)] / below
    most = (sums[-1] - sums[:len(below)]) / (len(values) - below).clamp(min=1)
    return values[(below * (len(values) - below) * (most - least).square()).argmax()].float()


class SPINE(TTRL):
    @dataclasses.dataclass(frozen=True)
    class Config(TTRL.Config):
        fork: str = knob("top_resp", "rule that finds forks", choices=["top_resp", "top_batch", "two_cluster"])
        fork_share: float = knob(0.2, "of the tokens that are forks; 1: all", low=0.0, high=1.0, source="paper")
        renormalise: bool = knob(True, "divide by the number of forks")
        band_weight: float = knob(0.01, "of the entropy band", low=0.0, source="project's choice")
        band: str = knob("linear", "distance to the band", choices=["linear", "squared"])
        edges: str = knob("quantile", "what sets the band", choices=["quantile", "mad"])
        band_low: float = knob(0.1, "quantile that is its lower edge", low=0.0, high=1.0, source="project's choice")
        band_high: float = knob(0.9, "quantile that is its upper edge", low=0.0, high=1.0, source="project's choice")
        deviations: float = knob(2.0, "its half width in median absolute deviations", low=0.0, source="project's choice",
                                 when={"edges": "mad"})
        refresh: float = knob(0.9, "share of the old edges that stays, a batch", low=0.0, high=1.0, source="project's choice",
                              when={"edges": "mad"})

    def setup(self, spec):
        super().setup(spec)
        self.register_buffer("band_edges", torch.tensor([-torch.inf, torch.inf]))

    def forks(self, entropy: Tensor, mask: Tensor) -> Tensor:
        """F (b, T) among the tokens of the mask."""
        c = self.config
        if c.fork != "two_cluster" and c.fork_share == 1.0:
            return mask
        threshold = self.threshold
        if c.fork == "top_resp":
            threshold = torch.where(mask > 0, entropy, torch.nan).nanquantile(1 - c.fork_share, 1, keepdim=True)
        return (entropy > threshold) * mask

    def observe(self, batch, old):
        super().observe(batch, old)
        c, entropy, mask = self.config, old["entropy"], batch["mask"]
        known = entropy[mask > 0]
        self.threshold = two_clusters(known.clamp(min=1e-8).log()).exp() if c.fork == "two_cluster" \
            else known.quantile(1 - c.fork_share)
        at_forks = torch.where(self.forks(entropy, mask) > 0, entropy, torch.nan)
        first, old_edges = self.band_edges.isinf(), self.band_edges.clone()
        if c.edges == "quantile":
            edges = torch.stack([at_forks.nanquantile(c.band_low), at_forks.nanquantile(c.band_high)])
            edges = torch.where(first, self.engine.mean(edges), old_edges)
        else:
            middle = at_forks.nanquantile(0.5)
            reach = c.deviations * (at_forks - middle).abs().nanquantile(0.5)
            edges = self.engine.mean(torch.stack([middle - reach, middle + reach]))
            edges = torch.where(first, edges, c.refresh * old_edges + (1 - c.refresh) * edges)
        self.band_edges.copy_(torch.where(edges.isnan(), old_edges, edges))  # without any fork
        self.told |= {"fork_entropy": at_forks.nanmean().nan_to_num(), "forks": (~at_forks.isnan()).sum() / mask.sum()}

    def weigh(self, rows):
        super().weigh(rows)
        rows.fork = self.forks(rows.old["entropy"], rows.mask)
        rows.fork_tokens = self.engine.mean(rows.fork.sum())
        if self.config.renormalise:
            rows.mask, rows.tokens = rows.fork, rows.fork_tokens
        else:
            rows.weight = rows.weight * rows.fork

    def penalty(self, rows):
        c, penalty = self.config, super().penalty(rows)
        if not c.band_weight:
            return penalty
        low, high = self.band_edges
        entropy = rows.now["entropy"]
        outside = (low - entropy).relu() + (entropy - high).relu()
        outside = outside.square() if c.band == "squared" else outside
        return plus(penalty, c.band_weight * (outside * rows.fork).sum() / rows.fork_tokens.clamp(min=1))
