"""APG: adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416).

The part of the guidance difference along the prediction itself makes samples over-saturated; it is dropped. On predictions of
the data, D_c and D_u (methods/diffusion/flow.py), at each step of generation:

    d = D_c - D_u
    m <- d + beta m;  d <- m                     `momentum` beta < 0: pushes away from where guidance went before
    d <- d min(1, r / |d|)                       `radius` r: of a whole sample; 0: no bound
    d_par = <d, u> u,  u = D_c / |D_c|;  d_orth = d - d_par         (float64)
    D = D_c + (w - 1) (d_orth + eta d_par)       `parallel` eta; 1: all of it

eta = 1, beta = 0 and no bound are classifier-free guidance exactly. "Along the prediction" means something for centred data
only. r goes with the size of a sample (2.5 for EDM2-class models, 15 for SDXL).
Differences from a common implementation (diffusers): its default formula is D_u + w (…), which at eta = 0 is another update;
this is the paper's. The radial error it saves needs steps enough: at w = 15 twenty Euler steps are not.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.diffusion import flow
from methods.diffusion.cfg import CFG
from runner.interface import knob


class APG(CFG):
    @dataclasses.dataclass(frozen=True)
    class Config(CFG.Config):
        parallel: float = knob(0.0, "eta: share of the parallel component", source="paper")
        momentum: float = knob(-0.5, "beta: of the guidance difference; 0: none", source="paper")
        radius: float = knob(2.5, "r: bound of the difference's norm; 0: none", low=0.0, source="paper")

    def guide(self, walk, conditional: Tensor) -> Tensor:
        c = self.config
        if c.guidance == 1 or (c.parallel, c.momentum, c.radius) == (1, 0, 0):
            return super().guide(walk, conditional)
        t = walk.t
        data = flow.to_data(walk.x, conditional, t).double()
        d = data - flow.to_data(walk.x, self.unconditional(walk), t)
        if c.momentum:
            d = walk.memory["momentum"] = d + c.momentum * walk.memory.get("momentum", 0)
        if c.radius:
            d = d * flow.rows((c.radius / norm(d)).clamp(max=1), d)
        along = data / flow.rows(norm(data), d)
        parallel = flow.rows((d * along).flatten(1).sum(1), d) * along
        guided = data + (c.guidance - 1) * (d - parallel + c.parallel * parallel)
        return flow.from_data(walk.x, guided.to(torch.float32), t)


def norm(x: Tensor) -> Tensor:
    """(n,), of whole samples; never 0."""
    return x.flatten(1).norm(dim=1).clamp(min=1e-12)
