"""Rewards of whole responses by a linear head on a policy's trunk, read at the response's last token.

`score` (methods/tokens/scoring.py) reads the hidden state before a token. A response is therefore made one token longer, by
padding that nothing looks at, and what stands before that is its end.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.tokens import scoring
from runner.errors import UserError

HEAD = "reward_head"  # its name among a method's weights


class Rater:
    """A policy's trunk under another head (1, width): what score() asks of a policy."""

    def __init__(self, policy: nn.Module, head: Tensor):
        self.policy, self.head = policy, head
        self.model = getattr(policy, "model", None)

    def packed(self, ids: Tensor) -> Tensor:
        return self.policy.packed(ids)


def longer(response: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both (b, T) -> response and mask (b, T + 1), and where the token after the last one stands (b, T + 1)."""
    mask = F.pad(mask.float(), (0, 1))
    after = (torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True)).float()
    return F.pad(response, (0, 1)), mask + after, after


def value(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The measure of a head with one output."""
    return {"value": logits[:, 0]}


def rate(rater: Rater, rows: dict[str, Tensor]) -> Tensor:
    """rows: prompt, prompt_mask, response, mask -> rewards (b,)."""
    response, mask, after = longer(rows["response"], rows["mask"])
    told = scoring.score(rater, rows["prompt"], rows["prompt_mask"], response, mask.bool(), value)["value"]
    return (told * after).sum(1)


def rater_of(policy: nn.Module, weights: dict[str, Tensor]) -> Rater:
    """A rater from the weights of a finished run of a reward model, on a policy of the same shape."""
    head, held = weights.get(HEAD), {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
    like = policy.state_dict()
    if head is None or held.keys() != like.keys() or any(held[k].shape != v.shape for k, v in like.items()):
        raise UserError("the run that is to judge holds no reward model on a policy of this shape\n"
                        "train one on the same env: python -m runner method=reward_model env=…, with the same policy.…")
    policy = copy.deepcopy(policy).requires_grad_(False)
    policy.load_state_dict(held)
    return Rater(policy, head.to(next(policy.parameters()).device))
