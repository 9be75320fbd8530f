"""O-DICE: orthogonal-gradient distribution correction estimation (Mao et al., ICLR 2024, arXiv 2402.00348).

The dual's value loss has two gradients: the forward one g_f, through V(s), and the backward one g_b, through V(s'). What of
the backward gradient lies along the forward one cancels it; it is projected away before the two are added:

    g = g_f + g_b - <g_f, g_b> / max(<g_f, g_f>, 1e-10) g_f,   with g_f of Lambda mean f*(e_f), g_b of Lambda eta mean f*(e_b)

over the whole flattened parameter vector; the gradient of (1 - Lambda) mean V(s) is added unprojected.

| symbol | name |
|---|---|
| Lambda | conservatism |
| eta | backward_weight; 0: the semi-gradient, which is sdice |
| gradient | orthogonal, or full: the objective's own gradient, V(s') differentiated, no target network (as OptiDICE) |

`cosine` of g_f and g_b and `cancellation` |g| / |g_f| are logged. Differences from the official code (maoliyuan/ODICE-Pytorch):
none known in the update; rewards are rescaled to a span of returns of 1000 as there, and weight decay is AdamW's.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.control.dice import ValueDice
from runner.interface import knob


def dot(a: list[Tensor], b: list[Tensor], axis: bool) -> Tensor:
    """<a, b> over all parameters, of each seed where there is such an axis."""
    return torch.stack([(x * y).flatten(1).sum(1) if axis else (x * y).sum() for x, y in zip(a, b)]).sum(0)


class ODice(ValueDice):
    @dataclasses.dataclass(frozen=True)
    class Config(ValueDice.Config):
        gradient: str = knob("orthogonal", "projected backward gradient, or the objective's own", choices=["orthogonal", "full"],
                             source="paper, sec. 4")
        backward_weight: float = knob(1.0, "eta: weight of the backward gradient; 0: semi-gradient (sdice)", low=0.0,
                                      source="paper, eq. 9", when={"gradient": "orthogonal"})

    def value_gradient(self, batch):
        c = self.config
        if c.gradient == "orthogonal" and c.backward_weight == 0:
            return super().value_gradient(batch)
        axis = batch["reward"].dim() > 1
        residual, value = self.forward_residual(batch, target=c.gradient == "orthogonal")
        batch["residual"] = residual.detach()
        mean, forward = value.mean((-2, -1)), c.conservatism * self.conjugate(residual).mean((-2, -1))
        told = {"value_loss": ((1 - c.conservatism) * mean + forward).detach(), "value": mean.detach()}
        plain = torch.autograd.grad((1 - c.conservatism) * mean.sum(), self._value, retain_graph=True)
        g_f = list(torch.autograd.grad(forward.sum(), self._value))
        if c.gradient == "full":
            return [p + f for p, f in zip(plain, g_f)], told
        backward = c.conservatism * c.backward_weight * self.conjugate(self.backward_residual(batch)).mean((-2, -1))
        g_b = list(torch.autograd.grad(backward.sum(), self._value))
        along, own, other = dot(g_f, g_b, axis), dot(g_f, g_f, axis), dot(g_b, g_b, axis)
        share = along / own.clamp(min=1e-10)
        each = [share.view(-1, *[1] * (f.dim() - 1)) if axis else share for f in g_f]
        g = [f + b - e * f for f, b, e in zip(g_f, g_b, each)]
        told["cosine"] = along / (own * other).sqrt().clamp(min=1e-20)
        told["cancellation"] = (dot(g, g, axis) / own.clamp(min=1e-10)).sqrt()
        return [p + x for p, x in zip(plain, g)], told
