"""beta-DPO: beta set by the batch, and outliers left out (Wu et al. 2024, arXiv 2407.08639).

With Delta_i = rho(y_w) - rho(y_l) without gradient, its moving mean M and deviation S (of batches, updated before they are used):

    kept    floor((1 - f) B) pairs, drawn without replacement with probability proportional to exp(-(Delta_i - M)^2 / (2 S^2))
    beta_b  max(1e-3, beta (1 + a (mean of Delta over the kept pairs - M)))
    L       mean over kept pairs of -log sigma(beta_b Delta_i)

A batch of wide margins gets a larger beta, is held nearer to the reference. M and S begin at 0; S is 1e-3 at least. Pairs are
drawn by Gumbel's trick: the largest log-weights plus noise. S is the deviation with divisor B. Of several processes each draws
from its own pairs, M, S and beta_b are common.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.preference.pairs import PairPolicy, times
from runner.interface import knob

LEAST = 1e-3  # of S and of beta_b


class BetaDPO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        gain: float = knob(0.6, "a: how far beta follows the batch's margin", low=0.0, source="paper")
        left_out: float = knob(0.2, "f: share of a batch's pairs that is left out", low=0.0, high=0.99, source="paper")
        memory: float = knob(0.9, "decay of the moving mean and deviation", low=0.0, high=1.0, source="paper")

    def setup(self, spec):
        super().setup(spec)
        self.register_buffer("gap_mean", torch.zeros(()))
        self.register_buffer("gap_deviation", torch.zeros(()))

    def worth(self, pairs):
        s, c = super().worth(pairs), self.config
        gap = (s[0] - s[1]).detach()
        mean = self.engine.mean(gap.mean())
        spread = self.engine.mean((gap - mean).square().mean()).sqrt()
        pairs.mean = c.memory * self.gap_mean + (1 - c.memory) * mean
        pairs.deviation = c.memory * self.gap_deviation + (1 - c.memory) * spread
        pairs.kept = self.draw(gap, pairs)
        inside = self.engine.mean((gap * pairs.kept).sum() / pairs.kept.sum())
        beta = (c.beta * (1 + c.gain * (inside - pairs.mean))).clamp(min=LEAST)
        pairs.told["beta"] = beta
        return s * (beta / c.beta) if c.gain else s

    def draw(self, gap, pairs):
        """1 for the pairs that are kept, else 0, (b,)."""
        number = max(1, int((1 - self.config.left_out) * len(gap) + 1e-6))
        if number >= len(gap):
            return torch.ones_like(gap)
        u = self.noise("kept", (len(gap),), "uniform").clamp(min=1e-20)
        key = -(gap - pairs.mean).square() / (2 * pairs.deviation.clamp(min=LEAST) ** 2) - (-u.log()).log()
        return torch.zeros_like(gap).index_fill(0, key.topk(number).indices, 1.0)

    def weigh(self, z, pairs):
        weight = super().weigh(z, pairs)
        return times(weight, pairs.kept / pairs.kept.mean()) if self.config.left_out else weight

    def after_update(self, pairs):
        super().after_update(pairs)
        self.gap_mean.copy_(pairs.mean)
        self.gap_deviation.copy_(pairs.deviation)
