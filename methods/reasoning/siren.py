"""SIREN: selective entropy regularisation (Jiang et al. 2025, arXiv 2509.25133).

An entropy bonus over a whole vocabulary and a long response explodes. SIREN regularises the entropy of the nucleus only, only at
the positions where it peaks, and pulls it to its own initial value:

    p~        = the most probable tokens while their cumulative sum stays below P, renormalised; the token that crosses P is left
                out (unlike in nucleus sampling), so that H~ = 0 where the top token alone has P
    H~_{i,t}  = - sum p~ log p~, gradient through p~
    M_{i,t}   = 1[H~_{i,t} > quantile_q of H~_i over the response], q = `peak`
    Hbar      = mean_i (sum_t H~ M / sum_t M)        always so, whatever the policy loss does; a row without a kept position is 0
    L         = L_pg + beta (Hbar - H_a)^2,  H_a = Hbar of the first batch before any step, frozen

The base is Dr. GRPO's advantage and aggregation with dual clip 3. beta 0.005 is for language models; where H~ is 0.1 to 0.6
nats 0.1 to 10 is needed. Ablations: anchor=none is the bonus -beta Hbar; nucleus=1 the whole vocabulary; peak=0 all
positions with any entropy; peak_of=full chooses positions by the full entropy.

Differences from the official code: it evaluates (Hbar - H_a)^2 per micro-batch and averages, which adds the variance between
micro-batches; here Hbar is the minibatch's. It cuts the logits to the 10,000 largest first (`largest`). Its run script sets a
clip of 0.28, which its own configuration overrides with 0.2.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.reasoning.base import GroupPolicy, plus
from runner.interface import knob


def nucleus_entropy(logits: Tensor, nucleus: float, largest: int) -> Tensor:
    """logits (n, V) -> H~ (n,), with gradient."""
    p = logits.softmax(-1)
    top, _ = p.topk(min(largest, p.shape[-1]), -1)
    kept = top * (top.cumsum(-1) < nucleus)
    kept = kept / (kept.sum(-1, keepdim=True) + 1e-12)
    return -(kept * (kept + 1e-12).log()).sum(-1)


def peaks(entropy: Tensor, mask: Tensor, level: float) -> Tensor:
    """(b, T): 1 where a token's entropy is above the `level` quantile of its own response."""
    threshold = torch.nanquantile(torch.where(mask > 0, entropy.detach(), torch.nan), level, 1, keepdim=True)
    return (entropy.detach() > threshold) * mask


def mean_at_peaks(entropy: Tensor, peak: Tensor) -> Tensor:
    """Hbar: mean over rows of the mean over the row's peaks; 0 for a row without."""
    return ((entropy * peak).sum(1) / peak.sum(1).clamp(min=1)).mean()


class SIREN(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        beta: float = knob(0.005, "weight of the squared distance to the anchor", low=0.0, source="paper")
        nucleus: float = knob(0.8, "P", low=0.0, high=1.01, source="paper", when={"beta": 0.5})
        peak: float = knob(0.8, "q", low=0.0, high=1.0, source="paper", when={"beta": 0.5})
        anchor: str = knob("initial", "what the entropy is pulled to; none: it is raised without bound",
                           choices=["initial", "none"], when={"beta": 0.5})
        peak_of: str = knob("nucleus", "the entropy that chooses positions", choices=["nucleus", "full"], when={"beta": 0.5})
        largest: int = knob(10000, "logits that are looked at", low=1, source="official code", when={"beta": 0.5})

    def setup(self, spec):
        super().setup(spec)
        self.register_buffer("anchor", torch.tensor(torch.nan))

    def measure(self, logits, target):
        told = super().measure(logits, target)
        if self.config.beta:
            told["nucleus_entropy"] = nucleus_entropy(logits, self.config.nucleus, self.config.largest)
        return told

    def measures_more(self):
        return self.config.beta > 0 or super().measures_more()

    def level(self, entropies: dict[str, Tensor], mask: Tensor) -> Tensor:
        """Hbar of some rows."""
        c = self.config
        chooser = entropies["nucleus_entropy" if c.peak_of == "nucleus" else "entropy"]
        return mean_at_peaks(entropies["nucleus_entropy"], peaks(chooser, mask, c.peak))

    def observe(self, batch, old):
        super().observe(batch, old)
        if self.config.beta:
            level = self.engine.mean(self.level(old, batch["mask"]))
            self.anchor.copy_(torch.where(self.anchor.isnan(), level, self.anchor))
            self.told |= {"peak_entropy": level, "anchor": self.anchor.clone()}

    def penalty(self, rows):
        c, penalty = self.config, super().penalty(rows)
        if not c.beta:
            return penalty
        level = self.level(rows.now, rows.mask)
        return plus(penalty, c.beta * (level - self.anchor).square() if c.anchor == "initial" else -c.beta * level)
