"""Reinforcement of a policy over arms that is held to its start by a KL, with exact gradients: the algorithm that methods change.

    J = mean_x [ sum_y pi(y | x) Phi(x, y) - beta KL(pi(. | x) || pi_ref(. | x)) ],   optimum  pi_ref exp(Phi / beta) / Z

by its parts:

    1. signal        Phi (X, K), made once before training from rewards and the reference; here the reward as it is
    2. objective     J of given contexts, to be maximised
    3. after_update  upkeep after the optimiser's step                                              (additive)

Phi is centred by context and divided by one number, its deviation under pi_ref (the root of the mean over contexts of its
variance): neither moves the optima, but beta then means the same for every Phi. With a `kl_target` beta is adapted,

    log beta <- log beta + beta_rate clip(KL / target - 1, -1, 1)

so that methods can be compared at the same KL: at the same beta they differ in how far they go.

Source: the objective of RLHF (Ziegler et al. 2019, arXiv 1909.08593).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.tokens.base import TokenMethod
from runner.errors import UserError
from runner.interface import knob


class ExactArms(TokenMethod):
    @dataclasses.dataclass(frozen=True)
    class Config(TokenMethod.Config):
        beta: float = knob(1.0, "weight of the KL, in deviations of Phi under the reference; with a target: at the start",
                           low=1e-6, source="project's choice")
        kl_target: float = knob(0.0, "KL(pi || pi_ref) that beta is adapted to; 0: beta stays", low=0.0,
                                source="project's choice")
        beta_rate: float = knob(0.02, "how fast", low=0.0, source="project's choice", when={"kl_target": 0.5})

    PARTS = ("signal", "objective", "after_update")
    ADDITIVE = ("after_update",)

    @property
    def capturable(self):
        c = self.config
        return not (c.warmup or c.decay != "constant")

    def setup(self, spec):
        if not spec.arms:
            raise UserError("this method sums over all responses, so they must be arms: env=bandit, or another of its kind")
        super().setup(spec)
        self.register_buffer("log_beta", torch.tensor(self.config.beta).log())

    def prepare(self, data):
        """Adds the columns signal and reference: Phi and log pi_ref, (X, K)."""
        super().prepare(data)
        columns = {k: v for k, v in data.items() if "/" not in k}
        with torch.no_grad():
            reference = self.log_arms(columns)
            p, phi = reference.exp(), self.signal(columns["reward"], reference)
            phi = phi - (p * phi).sum(-1, keepdim=True)
            phi = phi / (p * phi.square()).sum(-1).mean().sqrt().clamp(min=1e-12)
        return {**columns, "signal": phi, "reference": reference}

    def log_arms(self, batch) -> Tensor:
        """log pi(arm | context), (X, K)"""
        logits = self.policy.hidden(batch["prompt"], batch["prompt_mask"])[:, -1] @ self.policy.head.T
        return logits.float().log_softmax(-1).gather(-1, batch["arms"])

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: prompt, prompt_mask (b, Tp), arms, reward, signal, reference (b, K)."""
        self.schedule(self.updates, self.planned)
        size, told = len(batch["reward"]), []
        parameters = self.optimizers["policy"].param_groups[0]["params"]
        for p in parameters:
            p.grad = None
        for rows in torch.arange(size, device=batch["reward"].device).split(self.config.micro_rows or size):
            part, share = {k: v[rows] for k, v in batch.items()}, len(rows) / size
            log_p = self.log_arms(part)
            value = self.objective(log_p, part) * share
            self.engine.backward(-value)
            with torch.no_grad():
                p = log_p.exp()
                told.append(torch.stack([value, *(share * (p * x).sum(-1).mean() for x in (
                    part["signal"], log_p - part["reference"], part["reward"], -log_p))]))
        self._step("policy", parameters, self.config.gradient_norm, False)
        value, signal, kl, reward, entropy = torch.stack(told).sum(0).detach().unbind()
        out = {"objective": value, "signal": signal, "kl": kl, "reward": reward, "entropy": entropy, "beta": self.log_beta.exp()}
        self.after_update(self.engine.mean(kl))
        return out

    # -- parts
    def signal(self, reward: Tensor, reference: Tensor) -> Tensor:
        """Phi (X, K), from the rewards and log pi_ref (X, K)."""
        return reward

    def objective(self, log_p: Tensor, batch) -> Tensor:
        """J, a scalar"""
        p = log_p.exp()
        gain = (p * batch["signal"]).sum(-1)
        return (gain - self.log_beta.exp() * (p * (log_p - batch["reference"])).sum(-1)).mean()

    def after_update(self, kl: Tensor):
        """After the optimiser's step, with the KL before it; overriders call super()'s."""
        c = self.config
        if c.kl_target:
            self.log_beta += c.beta_rate * (kl / c.kl_target - 1).clamp(-1, 1)
