"""EPO: entropy-regularised policy optimisation for agents of many turns (Xu et al. 2025, arXiv 2509.22576).

An entropy bonus, and a penalty on tokens whose entropy leaves a band around the historical average of their turn:

    h_k[s]   = mean entropy of the response tokens of turn s in update k      (over the episodes that still run)
    Hh[s]    = mean of h_1[s], …, h_k[s]                                      (of the updates in which turn s occurred)
    P_{i,t}  = alpha ([low Hh[s_i] - H_{i,t}]_+ + [H_{i,t} - high Hh[s_i]]_+)
    L        = L_pg - lambda (agg H - c beta_k agg P) + KL,   c = smooth_weight

beta_k is the phase weight, u = k / horizon: 1 - 0.2 (1 - exp(-4u)) up to u = 1/2, then 0.8 exp(-3 (2u - 1)) (decay, the code's);
its mirror image (grow, what the abstract of version 2 describes: conservative early, strong late); or 1. band_of=response holds
the mean entropy of a response against the band instead of each token's.

mode=indicator is the published form, P = alpha outside the band and 0 inside: its gradient is zero, so that it changes the
logged loss alone and trains as the plain bonus does, to the bit. mode=mask, in the published code but unused, weighs the bonus
of a token by 1 inside the band and alpha outside, without P. `late_turn` applies P only to minibatches that hold a row of at
least that turn, as the published code does (half of a number of turns that it takes to be 50).

The base is GRPO over episodes with the paper's KL and dual clip; the published "PPO+EPO" script never switches the penalty on.
The paper's lambda is 0.001 at 3 to 7 billion parameters; small policies need 0.01 to 0.1. Worlds of one turn have s = 0 only.

Differences from the published code: there the history of an update whose episodes end early is padded with zeros at the front,
which shifts its turns, and episodes that have ended go on generating and count; its response mean is over the padded width
(band_of=padded), and its share of tokens inside the band counts padding. Not reproduced: the PPO form with a critic.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from methods.reasoning.base import GroupPolicy, plus
from runner.interface import knob


def phase(u: float, course: str) -> float:
    """beta_k at the share u of the horizon."""
    if course == "const":
        return 1.0
    u = min(u, 1.0)
    u = u if course == "decay" else 1 - u
    return 1 - 0.2 * (1 - math.exp(-4 * u)) if u <= 0.5 else 0.8 * math.exp(-3 * (2 * u - 1))


class EPO(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        entropy_weight: float = knob(0.001, "lambda; 0: neither bonus nor penalty", low=0.0, source="paper")
        mode: str = knob("hinge", "the penalty: distance to the band, the published indicator (no gradient), or none and a bonus "
                         "that is weaker outside", choices=["hinge", "indicator", "mask"],
                         when={"band_low": 1.5, "alpha": 0.5, "entropy_weight": 0.1})
        alpha: float = knob(0.1, "height of the penalty", low=0.0, source="paper, ALFWorld (0.05 on ScienceWorld)",
                            when={"band_low": 1.5})
        band_low: float = knob(0.0, "the band's lower edge as a multiple of the average", low=0.0, source="paper's scripts")
        band_high: float = knob(2.0, "its upper edge", low=0.0, source="paper's scripts")
        band_of: str = knob("token", "whose entropy is held against it: each token's, the response's mean, or that over the "
                            "padded width (as published)", choices=["token", "response", "padded"], when={"band_low": 1.5})
        smooth_weight: float = knob(1.0, "c, of the penalty beside alpha and the phase", low=0.0, source="official code",
                                    when={"band_low": 1.5})
        phase: str = knob("decay", "course of beta", choices=["decay", "grow", "const"], when={"band_low": 1.5})
        horizon: int = knob(150, "updates over which beta runs its course", low=1, source="official code",
                            when={"band_low": 1.5})
        late_turn: int = knob(0, "the penalty applies to minibatches with a row of at least this turn (published: 25)", low=0,
                              when={"band_low": 1.5})

    def setup(self, spec):
        super().setup(spec)
        self.register_buffer("history", torch.zeros(2, spec.turns or 1))  # sum of h[s] over updates, and number of them

    @staticmethod
    def turns(mask: Tensor, columns: dict[str, Tensor]) -> Tensor:
        """(b,) number of each row's turn."""
        return columns["turn"] if "turn" in columns else torch.zeros(len(mask), dtype=torch.int64, device=mask.device)

    def average(self) -> Tensor:
        """Hh (turns,)"""
        return self.history[0] / self.history[1].clamp(min=1)

    def observe(self, batch, old):
        super().observe(batch, old)
        if not self.config.entropy_weight:
            return
        mask, zero = batch["mask"], torch.zeros_like(self.history[0])
        turn = self.turns(mask, batch)
        entropy = self.engine.mean(zero.index_add(0, turn, (old["entropy"] * mask).sum(1)))
        tokens = self.engine.mean(zero.index_add(0, turn, mask.sum(1)))
        self.history += torch.stack([entropy / tokens.clamp(min=1e-6), (tokens > 0).float()])
        self.told |= {"entropy_history": self.history[0].sum() / self.history[1].sum(), "phase": zero[0] + self.beta()}

    def beta(self) -> float:
        return phase(self.updates / self.config.horizon, self.config.phase)

    def band(self, rows) -> tuple[Tensor, Tensor, Tensor]:
        """(entropy held against the band, its lower edge, its upper edge), (b, T) each or (b, 1)"""
        c, entropy = self.config, rows.now["entropy"]
        centre = self.average()[self.turns(rows.mask, vars(rows))][:, None]
        if c.band_of != "token":
            sums = (entropy * rows.mask).sum(1, keepdim=True)
            entropy = sums / (rows.mask.sum(1, keepdim=True).clamp(min=1) if c.band_of == "response" else rows.mask.shape[1])
        return entropy, c.band_low * centre, c.band_high * centre

    def penalty(self, rows):
        c, penalty = self.config, super().penalty(rows)
        if not c.entropy_weight:
            return penalty
        entropy, low, high = self.band(rows)
        inside = ((entropy > low) & (entropy < high)).float().detach()
        rows.told["in_band"] = (inside * rows.mask).sum() / rows.mask.sum().clamp(min=1)
        bonus = rows.now["entropy"]
        if c.mode == "mask":
            bonus = bonus * (inside + c.alpha * (1 - inside))
        penalty = plus(penalty, -c.entropy_weight * self.aggregate(bonus, rows))
        if c.mode == "mask":
            return penalty
        outside = 1 - inside if c.mode == "indicator" else (low - entropy).clamp(min=0) + (entropy - high).clamp(min=0)
        late = (self.turns(rows.mask, vars(rows)) >= c.late_turn).any().float()
        strength = c.entropy_weight * c.smooth_weight * c.alpha * self.beta()
        return plus(penalty, strength * late * self.aggregate(outside.expand_as(rows.mask), rows))
