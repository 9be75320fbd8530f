"""f-distill: one-step diffusion models with f-divergences (Xu et al. 2025, arXiv 2502.15681).

The gradient of D_f(p || q) = E_q f(p / q), p the teacher's distribution and q the generator's, at every level of noise is DMD's
with a weight of each sample: r = p / q,

    grad = -E[ h(r) (s_p - s_q) dG / dtheta ],   h(r) = f''(r) r^2

| divergence | f | h |
|---|---|---|
| rkl       reverse KL    | -log r | 1 |
| kl        forward KL    | r log r | r |
| js        Jensen-Shannon | r log r - (r + 1) log((r + 1) / 2) | r / (1 + r) |
| softened  softened reverse KL | (r + 1) log((r + 1) / 2r) | 1 / (1 + r) |
| hellinger squared Hellinger | (1 - sqrt r)^2 (times 2) | sqrt r |
| jeffreys  both KLs      | (r - 1) log r | 1 + r |
| neyman    Neyman's chi-squared | (1 - r)^2 / r (by 2) | 1 / r |

The classifier of DMD2 gives r^ = exp(logit) at the same noised sample, cut to [lowest_ratio, highest_ratio]; it is real over
generated, so that with a poor teacher the target is the data. Two normalisations:

| knob | |
|---|---|
| bins      | r^ is divided by the moving average (rate `bin_rate`) of its level's mean: ten parts of the grid of levels |
| normalise | h is divided by its mean over the batch |

Differences from the official code (FastGen): the features are the fake score's, as in DMD2, not the teacher's; every update
trains the fake score (there 4 of 5); the `rkl` of that code crashes, here it is h = 1 as it stands, without normalisation. The
paper's weights of the classifier: 0.003 (ImageNet), 0.001 (CIFAR-10). Not reproduced: the approximate R1 penalty.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.diffusion.dmd2 import DMD2
from runner.errors import UserError
from runner.interface import Spec, knob

WEIGHTS = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened": lambda r: 1 / (1 + r),
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}


class FDistill(DMD2):
    @dataclasses.dataclass(frozen=True)
    class Config(DMD2.Config):
        divergence: str = knob("js", "which f-divergence", source="paper",
                               choices=["rkl", "kl", "js", "softened", "hellinger", "jeffreys", "neyman"])
        lowest_ratio: float = knob(0.1, "least r", low=1e-6, source="paper")
        highest_ratio: float = knob(20.0, "greatest r", low=1e-6, source="paper")
        bins: int = knob(10, "parts of the grid of levels in which r is divided by its mean; 0: it is not", low=0, source="paper")
        bin_rate: float = knob(0.0, "of the moving average of those means; 0: of the batch alone", low=0.0, high=0.9999,
                               source="paper")
        normalise: bool = knob(True, "h is divided by its mean over the batch", source="paper")

    def setup(self, spec: Spec):
        super().setup(spec)
        if self.config.divergence != "rkl" and not self.config.gan_weight:
            raise UserError("method.gan_weight=0: the classifier tells the ratio that the divergence's weight is made of\n"
                            "give it a weight; or choose method.divergence=rkl, which needs no ratio")
        if self.config.lowest_ratio >= self.config.highest_ratio:
            raise UserError(f"method.lowest_ratio={self.config.lowest_ratio} is not below method.highest_ratio="
                            f"{self.config.highest_ratio}")
        self.register_buffer("level_ratio", torch.ones(max(self.config.bins, 1)))

    def ratio_of(self, rows) -> Tensor:
        """r^ (n,) at x_t, cut and normalised over its part of the levels."""
        c = self.config
        r = self.logit(rows.x_t, rows.t, rows.condition).clamp(-10, 10).exp().clamp(c.lowest_ratio, c.highest_ratio)
        if not c.bins:
            return r
        part = (rows.u * c.bins).long().clamp(max=c.bins - 1)
        member = (part[:, None] == torch.arange(c.bins, device=r.device)).float()  # (n, bins)
        number = member.sum(0)
        mean = torch.where(number > 0, member.T @ r / number.clamp(min=1), self.level_ratio)
        self.level_ratio.copy_(torch.lerp(mean, self.level_ratio, c.bin_rate))
        return r / (self.level_ratio[part] + 1e-6)

    # -- parts
    def weight(self, rows) -> Tensor:
        c, plain = self.config, super().weight(rows)
        if c.divergence == "rkl":
            return plain
        h = WEIGHTS[c.divergence](self.ratio_of(rows))
        return plain * (h / (h.mean() + 1e-6) if c.normalise else h)
