"""f-DPO: other divergences in the place of the reverse KL (Wang et al. 2023, arXiv 2309.16240).

The policy is tied to the reference by D_f = E_ref f(u), u = pi / pi_ref, f convex with f(1) = 0. At its optimum
r = beta f'(u) + nu, nu a constant of the prompt, so that with s(rho) = f'(e^rho), constants dropped,

    L = -log sigma( beta s(rho(y_w)) - beta s(rho(y_l)) )

| divergence | f(u) | s(rho) | optimum u at z = (r - nu) / beta |
|---|---|---|---|
| reverse_kl (DPO) | u ln u | rho | e^z, as e^(z - 1) with another nu |
| forward_kl | -ln u | -e^-rho | -1 / z, z < 0 |
| js | u ln u - (u + 1) ln((u + 1) / 2) | log sigma(rho) | e^z / (2 - e^z), z < ln 2 |
| alpha, 0 < a < 1 | (u^(1-a) - (1 - a) u - a) / (a (a - 1)) | -e^(-a rho) / a | (1 - a z)^(-1/a), z < 1 / a |

alpha goes from reverse (a -> 0) to forward KL (a -> 1). Beware of the common library's coefficient, which is 1 - a of the paper.
Exponents are cut at 80 (`cut`: how often). Beyond reverse KL the score is not invariant to a shift of rho: rho must come from a
normalised policy, as it does here. A loser's score falls like e^-rho as it loses probability: sequences need a small rate.
"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from methods.preference.pairs import PairPolicy
from runner.interface import knob

MOST = 80.0  # exponents in float32


class FDPO(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        divergence: str = knob("js", "which, see above", choices=["reverse_kl", "forward_kl", "js", "alpha"], source="paper")
        alpha: float = knob(0.5, "a", low=1e-3, high=0.999, source="paper", when={"divergence": "alpha"})

    def worth(self, pairs):
        c, rho = self.config, super().worth(pairs)
        if c.divergence in ("forward_kl", "alpha"):
            pairs.told["cut"] = (exponent(rho, c.divergence, c.alpha) > MOST).float().mean().detach()
        return score(rho, c.divergence, c.alpha)

    def implicit_reward(self, rho):
        return self.config.beta * score(rho, self.config.divergence, self.config.alpha)


def exponent(rho: Tensor, divergence: str, alpha: float) -> Tensor:
    return -rho if divergence == "forward_kl" else -alpha * rho


def score(rho: Tensor, divergence: str, alpha: float = 0.5) -> Tensor:
    """f'(e^rho) up to a constant, elementwise."""
    if divergence == "reverse_kl":
        return rho
    if divergence == "js":
        return F.logsigmoid(rho)
    grown = exponent(rho, divergence, alpha).clamp(max=MOST).exp()
    return -grown if divergence == "forward_kl" else -grown / alpha
