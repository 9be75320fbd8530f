"""A softmax table in a known Markov decision process: the algorithm that the tabular methods change.

    pi = softmax(logits);  mu = (1-gamma) (I - gamma P_pi^T)^-1 mu_0  by a differentiable linear solve, in float64
    one Adam step on  -( J(pi) - penalty ),  J = sum_{s,a} mu(s,a) r(s,a)

    1. penalty   subtracted from J; none here        (additive)

Training starts at the reference policy. Source: textbook (Puterman 1994, sec. 6.9, for occupancies).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from runner.interface import Method, Spec, knob


class Tabular(Method):
    @dataclasses.dataclass(frozen=True)
    class Config:
        learning_rate: float = knob(0.3, "Adam's, on the logits", low=0.0, source="project's choice")

    PARTS = ("penalty",)
    ADDITIVE = ("penalty",)

    def setup(self, spec: Spec):
        self.logits = nn.Parameter(torch.zeros(spec.observation_size, spec.actions, dtype=torch.float64))

    def make_optimizers(self):
        self.optimizers = {"logits": torch.optim.Adam([self.logits], lr=self.config.learning_rate)}

    def prepare(self, data):
        """data: the tables; training starts at the reference."""
        with torch.no_grad():
            self.logits.copy_(data["reference"].log())

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: transition (S, A, S), reward (S, A), start (S,), discount (), reference (S, A); float64."""
        policy = self.logits.softmax(1)
        mu = occupancy(policy, batch)
        value = (mu * batch["reward"]).sum()
        penalty = self.penalty(batch, policy, mu)
        self.minimise(-value if penalty is None else penalty - value, "logits")
        return {"proxy_value": value.detach()}

    def penalty(self, batch, policy: Tensor, mu: Tensor) -> Tensor | None:
        """policy, mu (S, A), with gradient -> scalar; overriders add to super()'s (None counts as zero)."""
        return None

    @torch.no_grad()
    def probabilities(self, observation: Tensor) -> Tensor:
        """One-hot (n, S) -> (n, A)"""
        return self.logits.softmax(1)[observation.argmax(-1)]

    @torch.no_grad()
    def act(self, observation: Tensor, explore: bool) -> Tensor:
        p = self.probabilities(observation)
        return torch.multinomial(p, 1).squeeze(1) if explore else p.argmax(-1)

    def export(self):
        return {"logits": self.logits.detach().clone()}, {"kind": "softmax table"}


def occupancy(policy: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """(S, A) -> normalised discounted occupancy (S, A)."""
    steps, discount = torch.einsum("sa,sat->st", policy, tables["transition"]), tables["discount"]
    inverse = torch.eye(len(policy), dtype=policy.dtype, device=policy.device) - discount * steps.T
    return torch.linalg.solve(inverse, (1 - discount) * tables["start"]).unsqueeze(1) * policy
