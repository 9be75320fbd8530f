"""GRPO-Guard: regulated clipping for GRPO on flows (Wang et al. 2025, arXiv 2510.22319).

With the log-probability a mean over D numbers, the ratio of a denoising step is biased below 1. Let s be the step's deviation,
dmu = mu_theta - mu_old, z = (x' - mu_old) / s ~ N(0, I), delta^2 = mean_d (dmu / s)^2:

    log r = (1/D) (z . dmu / s - |dmu|^2 / 2 s^2),   E log r = -delta^2 / 2,   Std log r = delta / sqrt(D),
    E r = exp(-(delta^2 / 2)(1 - 1/D)) < 1

so that a symmetric clip stops bad samples and never good ones, most of all at low noise, where delta is largest. Guard changes
two parts:

    log_ratio    log r^ = s (log p_theta - log p_old + mean_d dmu^2 / 2 s^2) = z . dmu / D: mean 0, no 1 / s left. The gradient
                 flows through the added term, too: only then is the identity one of gradients
    step_weight  1 / h, h = t - t': the factor of the velocity in mu is -k h with k = 1 + a^2 / 2 at every t < 1, so that
                 afterwards every step trains it equally. Where k is not constant (sde=dance, cps, ddim) 1 / (k h)

| knob | |
|---|---|
| normalise | the first change; off: Flow-GRPO's ratio |
| reweigh   | the second |
| bias      | row: of each sample, as derived; batch: the mean over the batch, as the official script has it |

eps does not carry over from Flow-GRPO: Std log r^ = rms(dmu) / sqrt(D). Officially 2e-6 (4e-6 for PickScore) at D = 65,536; a
rule that works is 0.5 to 1 times the median deviation of the log-ratio after one batch (metric ratio_deviation).
Differences from the official code: see `bias` (its dims are those of an array reduced before, which an author confirmed in the
public tracker); it divides by h alone, whatever the sampler. Another public implementation has no
1 / h. With summed log-probabilities (log_prob_over=sum) E r = 1 and there is nothing to mend but E log r < 0.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from methods.diffusion import flow
from methods.diffusion.policy_gradient import FlowPolicy
from runner.interface import knob


class GRPOGuard(FlowPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(FlowPolicy.Config):
        clip: float = knob(1e-3, "eps: of the normalised ratio", low=0.0)
        normalise: bool = knob(True, "the ratio's bias is taken out, and its scale", source="paper")
        reweigh: bool = knob(True, "every step's loss is divided by its share of the time", source="paper")
        bias: str = knob("row", "over what the bias is averaged", choices=["row", "batch"])

    keeps_mean = True

    def log_ratio(self, rows) -> Tensor:
        if not self.config.normalise:
            return super().log_ratio(rows)
        moved = rows.now.mean - rows.mean
        over, std = self.config.log_prob_over, rows.std[:, None]
        ratio = flow.aggregate((rows.next - rows.mean) * moved, 2, over) / std  # z . dmu / D, without the sum's cancellation
        if self.config.bias == "row":
            return ratio
        bias = flow.aggregate(moved.square(), 2, over) / (2 * std)
        return ratio + bias.mean(1, keepdim=True) - bias

    def step_weight(self, rows) -> Tensor:
        if not self.config.reweigh:
            return super().step_weight(rows)
        return 1 / (rows.h * (1.0 if self.config.sde == "flow" else rows.by.factor))
