"""A learned value of prompts: one number a prompt from the hidden states of a frozen policy (A-LoL, arXiv 2305.14718).

    V(x) = sigmoid( w . pool(h(x)) + b ),   pool: h heads, each with a query q of its own on its share of the width,
                                            sum_t softmax_t(q . h_t / sqrt(d)) h_t

fitted by the square to rewards of own responses in [0, 1]. Hidden states are standardised first, and all kept: (P, T, width)
float32. Queries, w and b start at 0: V is 1/2 everywhere, and nothing is drawn. What is handed out is the fit of the least error
on the way, as in the official code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HEADS = 8     # official code's, where the width can be shared among them; else one
AT_ONCE = 256  # prompts that go through the policy at once


class ValueHead(nn.Module):
    def __init__(self, width: int, device=None):
        super().__init__()
        self.heads = HEADS if width % HEADS == 0 else 1
        self.query = nn.Parameter(torch.zeros(self.heads, width // self.heads, device=device))
        self.weight = nn.Parameter(torch.zeros(width, device=device))
        self.bias = nn.Parameter(torch.zeros((), device=device))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden (P, T, width), mask (P, T) bool -> (P,)"""
        shared = hidden.unflatten(-1, (self.heads, -1))
        told = (shared * self.query).sum(-1) / math.sqrt(shared.shape[-1])
        attention = told.masked_fill(~mask.unsqueeze(-1), -torch.inf).softmax(1)
        pooled = (attention.unsqueeze(-1) * shared).sum(1).flatten(1)
        return torch.sigmoid(pooled @ self.weight + self.bias)


@torch.no_grad()
def hidden_states(policy, prompt: Tensor, mask: Tensor) -> Tensor:
    """(P, T, width) float32, standardised over all positions that are no padding."""
    parts = torch.arange(len(prompt), device=prompt.device).split(AT_ONCE)
    hidden = torch.cat([policy.hidden(prompt[i], mask[i])[:, -prompt.shape[1]:].float() for i in parts])
    inside = hidden[mask]
    return (hidden - inside.mean(0)) / inside.std(0, correction=0).clamp(min=1e-6)


def fitted_values(policy, prompt: Tensor, mask: Tensor, value: Tensor, steps: int, rate: float) -> Tensor:
    """V (N,) of the prompts (N, Tp) of rows whose own responses had the mean reward `value` (N,), the same for equal prompts."""
    whole, place = torch.unique(torch.cat([prompt, mask.long()], 1), dim=0, return_inverse=True)
    ids, inside = whole[:, :prompt.shape[1]], whole[:, prompt.shape[1]:].bool()
    goal = torch.zeros(len(ids), device=value.device).index_copy_(0, place, value)
    hidden, head = hidden_states(policy, ids, inside), ValueHead(policy.shape.width, prompt.device)
    adam = torch.optim.AdamW(head.parameters(), lr=rate)
    best, least = torch.zeros_like(goal), torch.full((), torch.inf, device=goal.device)
    for _ in range(steps):
        with torch.enable_grad():
            told = head(hidden, inside)
            error = (told - goal).square().mean()
            adam.zero_grad()
            error.backward()
        better = error.detach() < least
        best, least = torch.where(better, told.detach(), best), torch.minimum(error.detach(), least)
        adam.step()
    return best[place]
