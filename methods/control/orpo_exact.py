"""ORPO's objective without sampling (arXiv 2403.03185): occupancies, divergences and gradients are exact.

    maximise  J(pi, R~) - lambda D(mu_pi, mu_ref),   lambda = strength x sigma,   sigma = std of R~ under mu_ref

    D   sqrt_chi2  sqrt(chi2), the paper's;  chi2 = E_{mu_pi}[mu_pi / mu_ref] - 1      (part penalty)
        chi2, kl, tv
    over  state_action, state (both sides summed over actions), or action: E_{s ~ mu_pi} D( pi(.|s), ref(.|s) ), which is the
          usual remedy (AD) and the baseline

| symbol | name |
|---|---|
| lambda / sigma | strength |

The theory's choice is strength = sqrt(1 - r^2), r the proxy's correlation with the truth under mu_ref. strength = 0 is
exact_gradient. The deep version is orpo_occupancy. Under the root 1e-12 is added: at mu_pi = mu_ref it has no gradient.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from methods.control.exact_gradient import ExactGradient
from methods.control.tabular import occupancy
from runner.interface import knob


class ORPOExact(ExactGradient):
    @dataclasses.dataclass(frozen=True)
    class Config(ExactGradient.Config):
        strength: float = knob(0.3, "lambda in units of sigma; 0: no penalty", low=0.0, source="paper: sqrt(1 - r^2)")
        divergence: str = knob("sqrt_chi2", "from the reference", choices=["sqrt_chi2", "chi2", "kl", "tv"], source="paper")
        over: str = knob("state_action", "what is compared", choices=["state_action", "state", "action"], source="paper")

    def penalty(self, batch, policy, mu):
        penalty, c = super().penalty(batch, policy, mu), self.config
        if c.strength == 0:
            return penalty
        reference = occupancy(batch["reference"], batch)
        mean = (reference * batch["reward"]).sum()
        sigma = (reference * (batch["reward"] - mean).square()).sum().sqrt()
        if c.over == "action":
            by_state = divergence(policy, batch["reference"], c.divergence)
            own = (mu.sum(1) * by_state).sum()
        elif c.over == "state":
            own = divergence(mu.sum(1), reference.sum(1), c.divergence)
        else:
            own = divergence(mu.flatten(), reference.flatten(), c.divergence)
        own = c.strength * sigma * own
        return own if penalty is None else penalty + own


def divergence(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """D(p, q) of distributions over the last axis."""
    if kind == "kl":
        return (p * (p.clamp_min(1e-300) / q).log()).sum(-1)
    if kind == "tv":
        return 0.5 * (p - q).abs().sum(-1)
    chi2 = (p * p / q).sum(-1) - 1
    return chi2 if kind == "chi2" else (chi2.clamp_min(0) + 1e-12).sqrt()
