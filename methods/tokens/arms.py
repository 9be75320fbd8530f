"""A policy over arms: in context x it takes arm y with probability softmax(base(x, .) + f(x, .))_y, where f is 0 at the start.

    table   f = theta[x, y]                    one number a context and arm: nothing is shared
    linear  f = theta . phi(x, y)              features phi that the env gives; what is learned of one arm moves others
    mlp     f = MLP(phi(x, y))                 the same, nonlinear; the last layer starts at 0, unless the env trained it first

To a method it is a policy of token sequences as any other: a prompt is one token (the context), a response one (the arm).
Losses, divergences and samplers written for language models therefore meet problems that can be enumerated.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from methods.common.networks import mlp
from methods.tokens import sampling
from methods.tokens.engine import Generated
from methods.tokens.tokenizer import Characters
from runner.errors import UserError
from runner.interface import Spec, knob

NEVER = -1e4  # logit of padding, which is no arm: its probability is 0, and 0 times its logarithm as well


class Sizes(NamedTuple):
    vocabulary: int
    width: int
    context: int


class ArmPolicy(nn.Module):
    """Buffers base (X, K) and features (X, K, D) come from the env's start, as `theta` or the MLP's weights may."""

    def __init__(self, spec: Spec, kind: str, hidden=(64, 64)):
        super().__init__()
        x, k, d = spec.contexts, spec.arms, spec.features or 0
        if kind != "table" and not d:
            raise UserError(f"policy.kind={kind} needs features of arms, which this env has none of; here: policy.kind=table")
        self.kind, self.shape = kind, Sizes(k + 1, k + 1, 2)
        self.register_buffer("base", torch.zeros(x, k))
        self.register_buffer("features", torch.zeros(x, k, d))
        self.register_buffer("head", torch.eye(k + 1), persistent=False)
        if kind == "mlp":
            self.net = mlp(d, hidden, 1, "tanh")
            for p in self.net[-1].parameters():
                nn.init.zeros_(p)
        else:
            self.theta = nn.Parameter(torch.zeros(x, k) if kind == "table" else torch.zeros(d))

    def learned(self, context: Tensor) -> Tensor:
        """f: context (n,) -> (n, K)."""
        if self.kind == "table":
            return self.theta[context]
        features = self.features[context]
        return features @ self.theta if self.kind == "linear" else self.net(features).squeeze(-1)

    def scores(self, context: Tensor) -> Tensor:
        """context (n,) -> unnormalised log-probabilities of the arms (n, K)."""
        return self.base[context] + self.learned(context)

    def _hidden(self, token: Tensor, length: int, alone: bool = False) -> Tensor:
        """token (b,): the contexts -> (b, length, K + 1), the same at every position. alone: of f without base."""
        context = token - self.shape.width
        scores = self.learned(context) if alone else self.scores(context)
        return torch.cat([torch.full_like(scores[:, :1], NEVER), scores], 1).unsqueeze(1).expand(-1, length, -1)

    def packed(self, ids: Tensor) -> Tensor:
        return self._hidden(ids[:, 0], ids.shape[1])

    def rater(self) -> Alone:
        """f as a policy to score by."""
        return Alone(self)

    def hidden(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        first = torch.zeros(len(ids), 1, dtype=torch.int64, device=ids.device) if mask is None else \
            mask.long().argmax(1, keepdim=True)
        return self._hidden(ids.gather(1, first).squeeze(1), ids.shape[1])

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.hidden(ids, mask)

    @torch.no_grad()
    def generate(self, prompt: Tensor, prompt_mask: Tensor, *, group: int, steps: int, eos: int, pad: int, uniforms: Tensor,
                 temperature: float = 1.0, top_p: float = 1.0, adjust=None) -> Generated:
        """As engine.Sampler.generate: one token."""
        logits = self.hidden(prompt, prompt_mask)[:, -1].repeat_interleave(group, 0)
        heat = float(temperature) if temperature == 0 or adjust is None else adjust(logits)
        token, p = sampling.draw(logits, uniforms[:, :1], heat, top_p if top_p < 1 else None)
        response = torch.full((len(logits), steps), pad, device=logits.device)
        response[:, :1] = token
        mask = torch.zeros_like(response, dtype=torch.bool)
        mask[:, 0] = True
        return Generated(response, mask, p.log() * mask)


class Alone:
    """What score() asks of a policy; its logits are f."""

    def __init__(self, policy: ArmPolicy):
        self.policy, self.head = policy, policy.head

    def packed(self, ids: Tensor) -> Tensor:
        return self.policy._hidden(ids[:, 0], ids.shape[1], alone=True)


class Arms:
    @dataclasses.dataclass(frozen=True)
    class Config:
        kind: str = knob("table", "how arms share what is learned", choices=["table", "linear", "mlp"])
        hidden: tuple[int, ...] = knob((64, 64), "widths of the MLP's hidden layers", low=1, when={"kind": "mlp"})

    own_weights = False

    def __init__(self, config):
        self.config = config

    def build(self, spec: Spec) -> tuple[ArmPolicy, Characters]:
        if not spec.arms:
            raise UserError("policy=arms is for envs whose responses are arms, such as env=bandit; here: policy=small")
        return ArmPolicy(spec, self.config.kind, self.config.hidden), Characters(spec.alphabet, spec.end)
