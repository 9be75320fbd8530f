"""RLG: reinforcement learning guidance (Jin et al. 2025, arXiv 2508.21016), at generation alone.

A generator tuned by reinforcement and the one that it started from are combined like guidance combines conditions,

    g = g_ref + w (g_RL - g_ref)        each of them guided by the same classifier-free scale first

If p_RL ~ p_ref exp(R / beta) held at every noise level, g would be the score of p_ref exp(w R / beta): w < 1 interpolates, w >
1 acts as a smaller KL coefficient. It holds at t = 0 alone (a diffused tilt is not the tilt of the diffused), so that w > 1
overshoots. w = 1 is the tuned model. The first `tuned_steps` steps follow it alone (officially zero_init_step).

Training is Flow-GRPO's and begins at the env's start or at the network of `policy.path`, which is p_ref then: with nothing
trained the two would be one. `model=exact` needs no training: p_ref is the world's mixture, and the tuned model its exact tilt by
exp(x_1), whose tilt by exp(w x_1) the world knows, too (env.tilt).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.diffusion.policy_gradient import FlowPolicy
from runner.errors import UserError
from runner.interface import Spec, knob


class RLG(FlowPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(FlowPolicy.Config):
        weight: float = knob(1.6, "w: of the tuned model against the one it started from", source="paper")
        tuned_steps: int = knob(0, "first steps of generation that follow the tuned model alone", low=0)
        model: str = knob("trained", "the networks, or the world's exact velocity and that of its tilt by exp(x_1), with which "
                          "nothing is trained; given is refused", choices=["trained", "exact", "given"])

    keeps_start = True

    def setup(self, spec: Spec):
        if self.config.model == "given":
            raise UserError("method.model=given: rlg compares a tuned network with the one that it started from, and without "
                            "training the two are one\nfine-tune the network of policy.path, or the env's start, by Flow-GRPO: "
                            "method.model=trained")
        super().setup(spec)
        if self.config.model == "exact":
            if self.config.guidance != 1:
                raise UserError(f"method.guidance={self.config.guidance}: with method.model=exact both velocities are taken as "
                                "they are\nleave it at 1")
            self.use_exact()
            if not hasattr(spec.exact, "tilted"):
                raise UserError("method.model=exact: the tilt by exp(x_1) is known of mixtures, and this env's data is none\n"
                                "take env=ring or env=moons, or a trained network: method.model=trained")
            direction = torch.zeros_like(spec.exact.means[0])
            direction[0] = 1.0
            self.tilted = spec.exact.tilted(direction, 1.0)

    def update(self, batch):
        if self.exact is not None:
            return {"loss": torch.zeros((), device=self.device())}
        return super().update(batch)

    def follow(self, walk) -> Tensor:
        c = self.config
        if self.exact is not None:
            base = self.exact.velocity(walk.x, walk.t.expand(len(walk.x)), walk.condition)
            tuned = self.tilted.velocity(walk.x, walk.t.expand(len(walk.x)), walk.condition)
            walk.calls = walk.calls + 2
        else:
            tuned = super().follow(walk)
            if c.weight == 1 or walk.step < c.tuned_steps:
                return tuned
            network, walk.network = walk.network, self.reference
            base = super().follow(walk)
            walk.network = network
        weight = 1.0 if walk.step < c.tuned_steps else c.weight
        return base + weight * (tuned - base)
