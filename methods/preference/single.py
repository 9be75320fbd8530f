"""Pairs each for itself: gradients of single pairs, and training on one pair alone, of many pairs at once.

A batch of other pairs moves a response, too; what a pair does by itself shows only in steps on it alone. Here n pairs have n
copies of the policy, stacked, and one pass serves them all. Memory goes with n times the policy's size: for small policies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from methods.preference.phrases import SIDES
from methods.tokens.transformer import pack


class Likelihood(nn.Module):
    """log pi of response tokens, (s, T): ids (s, L), packed to the left; place (s, T): of the token before each of them."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, ids, place, response, mask):
        hidden = self.policy.packed(ids)
        hidden = hidden.gather(1, place.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        log_p = (hidden @ self.policy.head.T).float().log_softmax(-1)
        return log_p.gather(-1, response.unsqueeze(-1)).squeeze(-1) * mask


class Singles:
    """n pairs, each with weights of its own that start as the policy's are now. batch: their columns of tokens; names: of the
    weights that are trained."""

    def __init__(self, policy, batch: dict[str, Tensor], names: list[str]):
        self.model = Likelihood(policy)
        prompt, prompt_mask = (batch[k].repeat(len(SIDES), 1) for k in ("prompt", "prompt_mask"))
        response, mask = torch.cat([batch[s] for s in SIDES]), torch.cat([batch[f"{s}_mask"] for s in SIDES]).bool()
        whole = torch.cat([prompt_mask.bool(), mask], 1)
        ids, _ = pack(torch.cat([prompt, response], 1), whole)
        place = (whole.cumsum(-1)[:, prompt.shape[1]:] - 2).clamp(min=0)
        self.rows = tuple(t.unflatten(0, (len(SIDES), -1)).transpose(0, 1) for t in (ids, place, response, mask.float()))
        self.start = {f"policy.{k}": policy.get_parameter(k).detach() for k in names}
        self.weights: dict[str, Tensor] = {}  # {name: (n, …)} once they differ

    def log_probs(self) -> Tensor:
        """(2, n, T), without gradient."""
        with torch.no_grad(), plain():
            told = vmap(self._one, in_dims=(self._axis(), 0))(self.weights or self.start, self.rows)
        return told.transpose(0, 1)

    def gradients(self, weights: Tensor) -> dict[str, Tensor]:
        """Of sum_t w_t log pi(y_t) over both sides, each pair's by its own w, (2, n, T): {name: (n, …)}."""
        def value(own, row, w):
            return (w * self._one(own, row)).sum()

        with torch.enable_grad(), plain():
            return vmap(grad(value), in_dims=(self._axis(), 0, 0))(self.weights or self.start, self.rows, weights.transpose(0, 1))

    def move(self, directions: dict[str, Tensor], rate: float):
        """Every pair's weights a step of plain gradient ascent along its own directions."""
        base = self.weights or self.start
        self.weights = {k: base[k] + rate * v for k, v in directions.items()}

    def _axis(self):
        return 0 if self.weights else None

    def _one(self, weights, row):
        return functional_call(self.model, weights, row)


def plain():
    """Attention by its definition: the fused kernels know nothing of a further axis."""
    return sdpa_kernel(SDPBackend.MATH)


def inner(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    """(n,): inner products of n directions each."""
    return sum((a[k] * b[k]).flatten(1).sum(1) for k in a)


def combined(a: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """x a + y b, x and y (n,)."""
    def wide(s, like):
        return s.view(-1, *[1] * (like.dim() - 1))

    return {k: wide(x, v) * v + wide(y, v) * b[k] for k, v in a.items()}


def pull(method, columns: dict[str, Tensor], now: Tensor) -> Tensor:
    """(2, n, T): what the method's loss on each pair alone asks of its tokens, minus its derivative by their log-probabilities
    `now`. Penalties are left out."""
    pairs, leaf = method.pairs(columns), now.detach().requires_grad_()
    with torch.enable_grad():
        method.see(pairs, {"log_prob": leaf.flatten(0, 1)})
        value = method.loss(pairs)
    return -now.shape[1] * torch.autograd.grad(value, leaf)[0]


def condition_ratio(own: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    """c (n,) = <g_w, g_l> / min(|g_w|^2, |g_l|^2): above 1 a step on g_w - g_l moves both sides' likelihoods the same way."""
    return inner(own, other) / torch.minimum(inner(own, own), inner(other, other)).clamp(min=1e-12)


def by_side(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (2, n, T) of the chosen side alone, and of the rejected one alone."""
    none = torch.zeros_like(weights[0])
    return torch.stack([weights[0], none]), torch.stack([none, weights[1]])
