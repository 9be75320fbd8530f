"""f-SFT: imitation whose objective holds the policy near its start (Wang et al. 2025, arXiv 2507.00018).

Imitation as max over rewards, min over policies of E_demo[psi(r)] - E_pi[r] + beta KL(pi || pi_0) has the inner solution r = beta
log(pi / pi_0) + const, DPO's map between policies and rewards. Put in, -E_pi[r] + beta KL is a constant: what remains is

    L = - mean phi(z),   z = beta rho,   rho = log pi(y | x) - log pi_0(y | x)

of every response (rho summed over its tokens) or of every token, with phi(z) = -f*(-z) of an f-divergence:

| divergence | phi(z) | slope, by which a demonstration weighs |
|---|---|---|
| tv | z | 1: SFT; the KL to the start holds nothing |
| pearson | z - z^2 / 4 | 1 - z / 2: 0 at z = 2, negative beyond |
| hellinger | z / (1 + z) | (1 + z)^-2; z is kept at `lowest` or above, there is a pole at -1 |
| kl | -exp(-z - 1) | exp(-z - 1), at z = 0 only 1/e; the exponent stops at 20 |

A demonstration pulls the less the more likely it has become, measured against the start: only the bounded slope holds the policy.
tv needs no reference: the start's share of the loss, a constant, is left out. With level=token and beta=1 it is SFT to the bit;
by responses it is SFT whose long responses weigh by their length, beta times over (which AdamW hides, but for the bound of the
gradient's norm). With sums over long responses z is tens of nats: beta must be of the order of 1 / length there.

Below `lowest` a clamp has no gradient: a demonstration that has fallen that far is given up. below=tangent goes on along the
tangent instead, with the slope at `lowest`.

The paper's first remedy is SFT with a learning rate of a quarter to a tenth: method.learning_rate. No code was published: the
objectives are a reconstruction from the duality; which divergences the paper ships, and its beta, are not known. Not
reproduced: its logits read as Q values; language models.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.tokens.demonstrated import Demonstrated
from runner.interface import knob


def phi(z: Tensor, divergence: str, lowest: float = -0.9, tangent: bool = False) -> Tensor:
    """phi(z), elementwise."""
    if divergence == "pearson":
        return z - z.square() / 4
    if divergence == "hellinger":
        kept = z.clamp(min=lowest)
        value = kept / (1 + kept)
        return value + (z - kept) / (1 + lowest) ** 2 if tangent else value
    if divergence == "kl":
        return -(-z - 1).clamp(max=20).exp()
    return z


class FSFT(Demonstrated):
    @dataclasses.dataclass(frozen=True)
    class Config(Demonstrated.Config):
        divergence: str = knob("pearson", "f, see above; tv is SFT", choices=["tv", "pearson", "hellinger", "kl"],
                               source="project's choice")
        level: str = knob("response", "what phi is of: the log-ratio of a response, or of each token",
                          choices=["response", "token"])
        beta: float = knob(0.1, "z = beta rho", low=1e-6, source="project's choice")
        lowest: float = knob(-0.9, "hellinger: z is kept at this or above", low=-0.999, high=0.0, source="project's choice",
                             when={"divergence": "hellinger", "level": "token", "beta": 20.0})
        below: str = knob("flat", "hellinger: what stands below that: nothing more, or the tangent", choices=["flat", "tangent"],
                          when={"divergence": "hellinger", "level": "token", "beta": 20.0})

    def needs_reference(self):
        return self.config.divergence != "tv" or super().needs_reference()

    def value(self, rows):
        c, ratio = self.config, rows.log_prob
        if c.divergence != "tv":
            ratio = ratio - self.start_log_prob(rows)
        ratio = ratio * rows.weight
        z = c.beta * (ratio if c.level == "token" else (ratio * rows.mask).sum(1))
        if c.divergence != "tv":
            with torch.no_grad():
                rows.told["z"] = self.mean(z, rows)
        return -phi(z, c.divergence, c.lowest, c.below == "tangent")
