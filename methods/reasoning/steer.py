"""STEER: tokens that would change the entropy much weigh less (Hao et al. 2025, arXiv 2510.10150).

The change of entropy by a policy-gradient step on one token is estimated from that token alone, and the loss of tokens with a
great change is damped, whichever its direction:

    Omega = A / pi_old * pi (1 - pi)^power (log pi + H),   pi = exp(lp), H the entropy of the policy that sampled; D = |Omega|
    w     = clip(exp(-k D), w_min, 1),   k = -log(w_min) / max(max D, 0.02)                            exponential
    w     = w_max - (D - min D) (w_max - w_min) / (max D - min D); all D equal: (w_min + w_max) / 2     linear

w has no gradient; max and min are over the minibatch's tokens. H is frozen over the minibatches while lp is current (so is the
official code's). Its power is 1, the paper's 2. A step's true first-order change is -A (p_a (log p_a + H) - sum_v p_v^2
(log p_v + H)): Omega leaves the sum out, and has the sign wrong for a tenth of random states.

One rare token sets the maximum, 1/pi_old being large there, so that w is about 1 everywhere else: at w_min 0.8 little is to be
seen (on countdown 0.05 is a start); `quantile` takes another level than the maximum. Controls: `permuted` deals the same
weights out at random; `signed` damps only what lowers the entropy; `renormalise` divides the weights by their mean, since
damping shrinks the step.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from methods.reasoning.base import GroupPolicy
from runner.interface import knob


def entropy_change(advantage: Tensor, log_prob: Tensor, old_log_prob: Tensor, entropy: Tensor, power: int = 1) -> Tensor:
    """Omega; 0 where it is not finite."""
    pi, old = (lp.exp().clamp(1e-8, 1 - 1e-8) for lp in (log_prob, old_log_prob))
    omega = advantage / old * pi * (1 - pi) ** power * (pi.log() + entropy)
    return torch.where(omega.isfinite(), omega, 0.0)


class STEER(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        w_min: float = knob(0.8, "weight of the token with the greatest change; 1: no damping", low=1e-4, high=1.0,
                            source="paper")
        w_max: float = knob(1.2, "weight of the token with the least", low=0.0, source="paper", when={"map": "linear"})
        map: str = knob("exponential", "from change to weight", choices=["exponential", "linear"])
        power: int = knob(1, "of 1 - pi: 1 in the official code, 2 in the paper", low=1, high=2)
        quantile: float = knob(1.0, "level of D that stands for its maximum", low=0.0, high=1.0, when={"w_min": 0.1})
        signed: bool = knob(False, "damp only tokens whose step lowers the entropy")
        permuted: bool = knob(False, "control: the same weights, dealt out at random")
        renormalise: bool = knob(False, "divide the weights by their mean")

    def weigh(self, rows):
        super().weigh(rows)
        c, mask = self.config, rows.mask
        change = entropy_change(rows.advantage, rows.log_prob, rows.old["log_prob"], rows.old["entropy"], c.power)
        change = change.clamp(min=0.0) if c.signed else change.abs()
        weight = self.weights_of(change, mask)
        if c.permuted:
            weight = dealt(weight, mask, self.noise(f"steer{rows.number}", tuple(mask.shape), "uniform"))
        mean = (weight * mask).sum() / mask.sum().clamp(min=1)
        rows.weight = rows.weight * (weight / mean if c.renormalise else weight)
        rows.told |= {"steer_mean": mean, "steer_least": torch.where(mask > 0, weight, torch.inf).min()}

    def weights_of(self, change: Tensor, mask: Tensor) -> Tensor:
        """w (b, T) from D."""
        c = self.config
        among = torch.where(mask > 0, change, torch.nan)
        most = among.nanquantile(c.quantile)
        if c.map == "exponential":
            return torch.exp(math.log(c.w_min) * change / most.clamp(min=0.02)).clamp(c.w_min, 1.0)
        least = torch.where(mask > 0, change, torch.inf).min()
        weight = c.w_max - (change - least) * (c.w_max - c.w_min) / (most - least)
        return torch.where(most > least, weight.clamp(c.w_min, c.w_max), (c.w_min + c.w_max) / 2)


def dealt(values: Tensor, mask: Tensor, uniform: Tensor) -> Tensor:
    """The values on the mask in random order, on the mask again."""
    here = (mask > 0).flatten()
    to = torch.argsort(torch.where(here, 0, 1), stable=True)              # the places on the mask, then the others
    source = torch.argsort(torch.where(here, uniform.flatten(), 2.0))     # the same places in random order, then the others
    return torch.empty_like(values).flatten().scatter_(0, to, values.flatten()[source]).view_as(values)
