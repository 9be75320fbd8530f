"""TRPO: trust region policy optimisation (Schulman et al. 2015, arXiv 1502.05477).

One natural-gradient step an iteration in place of Adam's many (part optimise):

    step      x = -sqrt(2 delta / g^T H^-1 g) H^-1 g,  H = Hessian of mean KL(pi_old || pi) + damping I, by `cg_steps` of
              conjugate gradients                                                              (part step)
    search    theta + 0.8^i x, i = 0 … 14: the first with a smaller loss and KL <= delta       (part accepted)

| symbol | name |
|---|---|
| delta | max_kl |
| g | gradient of the policy's loss over the whole rollout |

The values are fitted by Adam as in the base. max_kl = 0 means no trust region: the base's own
optimisation. Differences from the official code (joschu/modular_rl): GAE, normalised observations and rewards, a factor of 0.8
instead of 0.5, and no required share of the predicted improvement in the search.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.control.a2c import A2C
from methods.control.onpolicy import standardised
from runner.errors import UserError
from runner.interface import knob


class TRPO(A2C):
    @dataclasses.dataclass(frozen=True)
    class Config(A2C.Config):
        max_kl: float = knob(0.01, "delta: bound of the mean KL of a step; 0: no trust region", low=0.0, source="paper, app. E")
        damping: float = knob(0.1, "added to the diagonal of H", low=0.0, source="joschu/modular_rl")
        cg_steps: int = knob(10, "steps of conjugate gradients", low=1, source="paper, app. C")
        learning_rate: float = knob(1e-3, "Adam's, for the values", low=0.0)

    PARTS = ("reward_transform", "costs", "advantage", "objective", "policy_loss", "penalty", "value_loss", "optimise",
             "step", "accepted")
    SHRINK, TRIALS = 0.8, 15  # of the search; if no trial is accepted the policy stays

    def make_optimizers(self):
        super().make_optimizers()
        if any(hasattr(p, "device_mesh") for p in self.policy.parameters()):
            raise UserError("a trust region's step is taken over whole parameters, which fsdp shards\nuse hardware=ddp")
        if self.config.max_kl > 0:
            adam = {"lr": self.config.learning_rate, "eps": 1e-5, "fused": True}
            del self.optimizers["networks"]
            self.optimizers["value"] = torch.optim.Adam(self.value.parameters(), **adam)

    def optimise(self, data):
        c = self.config
        if c.max_kl == 0:
            return super().optimise(data)
        if c.normalise_advantages:
            data["advantage"] = standardised(data["advantage"])
        metrics = self.natural_step(data)
        for mini in self.minibatches(data):
            loss = self.value_loss(mini, self.value(mini["seen"]).squeeze(-1))
            self.minimise(c.value_weight * loss, "value", c.gradient_norm)
            self.fit_cost_value(mini)
        return {**metrics, "value_loss": loss.detach()}

    def natural_step(self, data) -> dict[str, Tensor]:
        parameters, old = list(self.policy.parameters()), tuple(data[k] for k in sorted(data) if k.startswith("old_"))
        loss, ratio, kl = self.losses(data, old)
        gradient = self.average(flat(torch.autograd.grad(loss, parameters, retain_graph=True)))
        slope = flat(torch.autograd.grad(kl, parameters, create_graph=True))

        def curvature(v: Tensor) -> Tensor:
            product = flat(torch.autograd.grad(slope @ v, parameters, retain_graph=True))
            return self.average(product) + self.config.damping * v

        step = self.step(data, gradient, curvature, ratio)
        begin, first = flat(parameters).detach(), self.figures(data, loss, ratio, kl)
        size, told = 1.0, first
        with torch.no_grad():
            for _ in range(self.TRIALS):  # each trial waits for its figures: a search cannot do without
                put(parameters, begin + size * step)
                told = self.figures(data, *self.losses(data, old))
                if self.accepted(first, told):
                    break
                size *= self.SHRINK
            else:
                put(parameters, begin)
                size, told = 0.0, first
        entropy = self.policy.entropy(self.policy(data["seen"])).mean().detach()
        return {"policy_loss": told[0].detach(), "kl": told[1].detach(), "entropy": entropy,
                "step_size": torch.tensor(size, device=begin.device)}

    def losses(self, data, old) -> tuple[Tensor, Tensor, Tensor]:
        """loss, ratio (N,), mean KL(old || new)"""
        distribution = self.policy(data["seen"])
        ratio = (self.policy.log_prob(distribution, data["action"]) - data["log_prob"]).exp()
        loss = self.policy_loss(data, ratio) - self.config.entropy_weight * self.policy.entropy(distribution).mean()
        penalty = self.penalty(data, distribution)
        return loss if penalty is None else loss + penalty, ratio, self.policy.kl(old, distribution).mean()

    def figures(self, data, loss, ratio, kl) -> Tensor:
        """What the search looks at: loss, KL, and a subclass's own."""
        return self.average(torch.stack([loss.detach(), kl.detach()]))

    # -- parts
    def step(self, data, gradient: Tensor, curvature, ratio: Tensor) -> Tensor:
        """x (P,); curvature: v -> H v. `ratio` still has its graph."""
        direction = conjugate_gradients(curvature, gradient, self.config.cg_steps)
        return -direction * (2 * self.config.max_kl / (gradient @ direction).clamp_min(1e-12)).sqrt()

    def accepted(self, before: Tensor, now: Tensor) -> Tensor:
        """Whether a trial is taken; `before` and `now` are figures()."""
        return (now[0] < before[0]) & (now[1] <= self.config.max_kl)


def flat(tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def put(parameters, values: Tensor):
    for p, v in zip(parameters, values.split([p.numel() for p in parameters])):
        p.data.copy_(v.view_as(p))


def conjugate_gradients(product, b: Tensor, steps: int) -> Tensor:
    """x with A x = b for symmetric positive A, given by `product`; `steps` steps without any test for convergence."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r @ r
    for _ in range(steps):
        ap = product(p)
        a = rr / (p @ ap).clamp_min(1e-30)
        x, r = x + a * p, r - a * ap
        new = r @ r
        p, rr = r + new / rr.clamp_min(1e-30) * p, new
    return x
