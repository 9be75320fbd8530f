"""CPO: constrained policy optimisation (Achiam et al. 2017, arXiv 1705.10528).

TRPO's step (methods/control/trpo.py) under linearised constraints, one per cost channel, in the unit of returns:

    minimise g^T x   s.t.   b_j^T x + c_j <= 0,   x^T H x / 2 <= delta
    c_j = J_Cj - d_j,   b_j = episode length * gradient of mean rho A_Cj
    x = -(H^-1 g + sum_j nu_j H^-1 b_j) / lambda,   (lambda, nu) from the dual
    no feasible x: x = -sqrt(2 delta / b^T H^-1 b) H^-1 b, b the sum of the b_j of violated constraints

| symbol | name |
|---|---|
| d | cost_limit (per episode, undiscounted) |
| J_C | cost_return |
| delta | max_kl |

The search takes a trial if KL <= delta, no cost rises by more than its slack -c_j, the violated ones do not rise in sum, and,
where none is violated, the loss falls. cost_limit < 0 means no constraint: TRPO. Differences from the official code
(jachiam/cpo): the limit bounds the undiscounted cost of whole episodes; there is no shaping of costs; several constraints are
solved for at once, by trying which of them are active.
"""

from __future__ import annotations

import dataclasses
from itertools import combinations

import torch
from torch import Tensor

from methods.control.trpo import TRPO, conjugate_gradients, flat
from runner.interface import knob


class CPO(TRPO):
    @dataclasses.dataclass(frozen=True)
    class Config(TRPO.Config):
        cost_limit: float = knob(0.5, "d: cost allowed per episode, for every channel; below 0: no constraint")

    def limits(self, spec):
        return [self.config.cost_limit] * spec.costs if self.config.cost_limit >= 0 else []

    def step(self, data, gradient, curvature, ratio):
        if not self.constrained:
            return super().step(data, gradient, curvature, ratio)
        delta, parameters = self.config.max_kl, list(self.policy.parameters())
        rises = self.rises(data, ratio)
        b = [self.average(flat(torch.autograd.grad(x, parameters, retain_graph=True))) for x in rises]
        surplus = self.cost_return - self.limit
        solved = torch.stack([conjugate_gradients(curvature, v, self.config.cg_steps) for v in (gradient, *b)])
        products = (torch.stack([gradient, *b]) @ solved.T).double()
        weights = dual((products + products.T) / 2, surplus.double(), delta)
        self.told["surplus"] = surplus.max()
        self.told["feasible"] = torch.tensor(float(weights is not None), device=gradient.device)
        if weights is not None:
            return -(weights.to(solved.dtype) @ solved)
        violated = (surplus > 0).to(solved.dtype)
        total, direction = violated @ torch.stack(b), violated @ solved[1:]
        return -direction * (2 * delta / (total @ direction).clamp_min(1e-12)).sqrt()

    def rises(self, data, ratio) -> Tensor:
        """(C,): by how much each cost per episode rises under the new policy, to first order."""
        centred = data["cost_advantage"] - data["cost_advantage"].mean(0)
        return self.episode_length * (centred * (ratio.unsqueeze(-1) - 1)).mean(0)

    def figures(self, data, loss, ratio, kl):
        figures = super().figures(data, loss, ratio, kl)
        return figures if not self.constrained else torch.cat([figures, self.average(self.rises(data, ratio).detach())])

    def accepted(self, before, now):
        if not self.constrained:
            return super().accepted(before, now)
        surplus, rises = self.cost_return - self.limit, now[2:]
        violated = surplus > 0
        better = (now[0] < before[0]) | violated.any()
        held = torch.where(violated, 0.0, rises + surplus).amax() <= 1e-6
        return better & (now[1] <= self.config.max_kl) & held & ((rises * violated).sum() <= 1e-6)


def dual(products: Tensor, surplus: Tensor, delta: float) -> Tensor | None:
    """products (1+C, 1+C): [g, b]^T H^-1 [g, b]; surplus c (C,) -> (1+C,): 1/lambda and nu/lambda, the weights of H^-1 g and
    H^-1 b_j in -x; None where no x is feasible. Every set of active constraints is tried: with those in W equalities,

        lambda = sqrt( (q - r_W^T S_WW^-1 r_W) / (2 delta - c_W^T S_WW^-1 c_W) ),   nu_W = S_WW^-1 (lambda c_W - r_W)

    is the solution if nu_W >= 0 and the other constraints hold."""
    q, r, s = products[0, 0], products[0, 1:], products[1:, 1:]
    channels = range(len(surplus))
    for number in range(len(surplus) + 1):
        for active in combinations(channels, number):
            w = list(active)
            inverse = torch.linalg.pinv(s[w][:, w], hermitian=True)
            room = 2 * delta - surplus[w] @ inverse @ surplus[w]
            if not room > 0:
                continue
            scale = ((q - r[w] @ inverse @ r[w]).clamp_min(1e-12) / room).sqrt()
            nu = torch.zeros_like(surplus)
            nu[w] = inverse @ (scale * surplus[w] - r[w])
            slack = surplus - (r + s @ nu) / scale
            if (nu >= 0).all() and (slack <= 1e-6 * (1 + surplus.abs())).all():
                return torch.cat([torch.ones_like(q).reshape(1), nu]) / scale
    return None
