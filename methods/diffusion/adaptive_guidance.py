"""Adaptive guidance and LinearAG (Castillo et al. 2023, arXiv 2312.12487): network calls that guidance does not need are left
out.

Conditional and unconditional predictions agree more and more towards the end. With g = <v_c, v_u> / |v_c| |v_u| of a whole
sample: the first time that g > gamma, guidance ends for that sample, and later steps ask the conditional model alone.

g is taken of velocities. In other terms both predictions are mostly the noise: of noise predictions g > .99 at the very first
step. Of velocities it falls first and rises later, so that only the last `armed` part of the steps may end guidance. gamma
above 1 never does: classifier-free guidance.

`linear` (LinearAG): in the first half of the steps every second unconditional prediction is replaced by a linear combination of
all conditional ones so far and the unconditional ones that were asked, with scalar coefficients for each step, fitted by least
squares on 200 trajectories of the model's own (their calls are not counted: they are made once for a model).

Differences: no official code is public; the search for the policy by gradient descent is not reproduced. `calls` counts each
sample's own calls: batched hardware still computes the rows of a batch that no longer need one.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.diffusion.cfg import CFG
from runner.interface import knob

TRAJECTORIES = 200  # to fit the coefficients on (paper)


class AdaptiveGuidance(CFG):
    @dataclasses.dataclass(frozen=True)
    class Config(CFG.Config):
        gamma: float = knob(0.991, "cosine above which guidance ends; above 1: never", source="paper")
        armed: float = knob(0.67, "last part of the steps that may end it", low=0.0, high=1.0,
                            when={"gamma": -1.0})
        linear: bool = knob(False, "LinearAG: every second unconditional prediction of the first half is a regression's")

    def guide(self, walk, conditional: Tensor) -> Tensor:
        c, memory = self.config, walk.memory
        if c.guidance == 1:
            return super().guide(walk, conditional)
        active = memory.setdefault("active", torch.ones(len(walk.x), dtype=torch.bool, device=walk.x.device))
        guess = self._replaced(walk) and "fitting" not in memory
        if guess:
            unconditional = self._regressed(walk, conditional)
        else:
            unconditional = self.unconditional(walk, counted=active)
        self._remember(walk, conditional, None if guess else unconditional)
        if not guess and walk.step >= (1 - c.armed) * walk.steps:
            cosine = torch.nn.functional.cosine_similarity(conditional.flatten(1), unconditional.flatten(1), dim=1)
            memory["active"] = active & (cosine <= c.gamma)
        guided = conditional + (c.guidance - 1) * (conditional - unconditional)
        return torch.where(active.view(-1, *[1] * (guided.dim() - 1)), guided, conditional)

    # -- LinearAG
    def _replaced(self, walk) -> bool:
        return self.config.linear and walk.step % 2 == 1 and walk.step < walk.steps // 2

    def _remember(self, walk, conditional, unconditional):
        if self.config.linear and walk.step < walk.steps // 2:  # nothing is regressed later
            walk.memory.setdefault("past", []).append(conditional)
            if unconditional is not None:
                walk.memory["past"].append(unconditional)

    def _regressed(self, walk, conditional: Tensor) -> Tensor:
        known = [*walk.memory["past"], conditional]
        weights = walk.memory["weights"][walk.step]
        return sum(w * v for w, v in zip(weights, known, strict=True))

    def walk(self, noise, condition, network=None):
        walk = super().walk(noise, condition, network)
        if self.config.linear and self.config.guidance != 1:
            walk.memory["weights"] = self._fit(noise.device, network)
        return walk

    def _fit(self, device, network) -> dict[int, Tensor]:
        """{step: coefficients} by least squares over whole samples of trajectories with every call made."""
        g = torch.Generator().manual_seed(0)
        noise = self.begin(torch.randn(TRAJECTORIES, *self.spec.sample_shape, generator=g).to(device))
        condition = torch.arange(TRAJECTORIES, device=device) % self.spec.classes
        walk, times, out = super().walk(noise, condition, network), self.grid(), {}
        walk.memory |= {"fitting": True}
        for j in range((len(times) - 1) // 2):
            before = list(walk.memory.get("past", []))
            at = self.stride(walk, times, j, "ode", 0.0)
            past = walk.memory["past"]
            if self._replaced(walk):
                known = torch.stack([v.flatten() for v in [*before, past[-2]]], 1).double()
                products = known.T @ known  # with a trace of ridge, since what is regressed on is nearly collinear
                ridge = 1e-9 * products.diagonal().mean() * torch.eye(len(products), dtype=torch.float64, device=device)
                out[j] = torch.linalg.solve(products + ridge, known.T @ past[-1].flatten().double()).float()
                past.pop()  # in use it is not asked for
            walk.x = at.mean
        return out
