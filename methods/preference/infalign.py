"""InfAlign-CTRL: alignment for what is decoded, by calibrating and transforming rewards (Balashankar et al. 2024, 2412.19792).

What is wanted is the win rate of decoded samples, the best or the worst of N draws of pi, against those decoded alike from
pi_ref. Ordinary KL-RL does that on another reward, Phi(C):

    C(x, y) = [ #{m: r(x, z_m) < r(x, y)} + #{m: =} / 2 ] / M,   z_1 … z_M ~ pi_ref(. | x)          calibration

| transform | Phi | for |
|---|---|---|
| identity | C | the win rate of plain samples |
| best_of | exp(t C) | the best of N |
| worst_of | -exp(-t C) | the worst of N |
| log | log C | the target that best-of-N distillation has |

signal=raw and zscore are the baselines without calibration: r, and r less its mean over its deviation under pi_ref, by context.
`reference_samples` 0: C exact, P(r(z) < r) + P(=) / 2. log C is at least log 1/(2M) (exact: no more than the least C of an arm
is needed).

Traps. Phi's scales differ by exp(t): compare at the same KL (kl_target), not at the same beta. Ties need their half, or
discrete rewards are miscalibrated. With M samples C is at most 1, and few steps of 1/M tell the best arms apart, just where
exp(t C) looks. t = 10 is near the best for N = 4, and far from it for large N. What best-of-N gains plain samples lose.

No official code was found; t and M as the paper's are recalled. The paper trains language models by PPO; here arms, exactly.
Not reproduced: language models, the learned quantile regressor, fixed points of Phi for other decodings.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.preference.kl_rl import KLRL
from runner.interface import knob


class InfAlign(KLRL):
    @dataclasses.dataclass(frozen=True)
    class Config(KLRL.Config):
        source: str = knob("quantile", "what is rewarded: the reward's quantile under the reference, the reward, or its z-score",
                           choices=["quantile", "raw", "zscore"])
        transform: str = knob("best_of", "Phi of the quantile", choices=["identity", "best_of", "worst_of", "log"],
                              when={"source": "quantile"})
        t: float = knob(10.0, "exponent", low=1e-3, source="paper", when={"transform": ["best_of", "worst_of"]})
        reference_samples: int = knob(100, "M: drawn from the reference in every context; 0: exact quantiles", low=0,
                                      source="paper", when={"source": "quantile"})

    def signal(self, reward, reference):
        c = self.config
        if c.source == "raw":
            return super().signal(reward, reference)
        p = reference.exp()
        if c.source == "zscore":
            centred = reward - (p * reward).sum(-1, keepdim=True)
            return centred / (p * centred.square()).sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
        quantile = self.quantile(reward, p)
        if c.transform == "log":
            return quantile.clamp(min=1 / (2 * c.reference_samples) if c.reference_samples else 1e-12).log()
        if c.transform == "best_of":
            return (c.t * (quantile - 1)).exp()
        return -(-c.t * quantile).exp() if c.transform == "worst_of" else quantile

    def quantile(self, reward: Tensor, p: Tensor) -> Tensor:
        """C (X, K) of rewards under probabilities, both (X, K)."""
        weight = p
        if m := self.config.reference_samples:
            u = self.draws("calibration", (len(p), m), 0, "uniform").to(p.device)
            sums = p.cumsum(-1)
            drawn = torch.searchsorted(sums, u * sums[:, -1:], right=True).clamp(max=p.shape[1] - 1)
            weight = torch.zeros_like(p).scatter_add(-1, drawn, torch.full_like(u, 1 / m))
        ordered, order = reward.sort(-1)
        sums = torch.cat([torch.zeros_like(p[:, :1]), weight.gather(-1, order).cumsum(-1)], -1)
        below, upto = (sums.gather(-1, torch.searchsorted(ordered, reward.contiguous(), right=r)) for r in (False, True))
        return (below + upto) / 2
