"""Methods on preference pairs under test: over arms of a table, over a small transformer's tokens, or bare, for their parts."""

from __future__ import annotations

import copy
import string

import torch
from token_methods import bare

from methods.preference.pairs import Pairs
from methods.tokens.arms import Arms
from methods.tokens.small import Small
from runner.interface import Spec

LETTERS = string.ascii_lowercase


def tabular(cls, base, kind="table", features=None, **values):
    """A method over the arms of a table, base (X, K): the reference's logits. No bound of the gradient."""
    base = torch.as_tensor(base, dtype=torch.float32)
    x, k = base.shape
    method = bare(cls, **{"gradient_norm": 0.0, "learning_rate": 0.05, **values})
    method.blueprint = Arms(Arms.Config(kind=kind))
    method.setup(Spec(alphabet="".join(chr(0x4E00 + i) for i in range(x + k)), prompt_length=1, response_length=1, contexts=x,
                      arms=k, features=None if features is None else features.shape[-1]))
    method.policy.base.copy_(base)
    if features is not None:
        method.policy.features.copy_(features)
    return started(method)


def words(cls, width=6, seed=0, loud=3.0, **values):
    """A method over a transformer whose responses have up to `width` letters; it starts at random, apart from its reference."""
    torch.manual_seed(seed)
    method = bare(cls, **{"gradient_norm": 0.0, "learning_rate": 0.01, **values})
    method.blueprint = Small(Small.Config(layers=1, width=16, heads=2))
    method.setup(Spec(alphabet=LETTERS, end="z", prompt_length=4, response_length=width))
    with torch.no_grad():
        for p in method.policy.parameters():
            p.mul_(loud if p.dim() > 1 else 1.0)
    started(method)
    with torch.no_grad():
        for p in method.policy.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return method


def started(method):
    method.make_optimizers()
    method.prepare({})
    return method


def arm_pairs(method, triples, label=None) -> dict[str, torch.Tensor]:
    """A batch of (context, chosen, rejected), with the columns of the reference."""
    x, i, j = torch.tensor(triples).T.unsqueeze(-1)
    ones, arms = torch.ones(len(triples), 1), method.policy.base.shape[1]
    batch = {"prompt": x + arms + 1, "prompt_mask": ones.bool(), "chosen": i + 1, "chosen_mask": ones, "rejected": j + 1,
             "rejected_mask": ones, "label": torch.ones(len(triples)) if label is None else torch.as_tensor(label)}
    return prepared(method, batch)


def word_pairs(method, texts, label=None, padding=0) -> dict[str, torch.Tensor]:
    """A batch of (prompt, chosen, rejected) as texts; `padding`: further columns of it on both ends."""
    prompt, prompt_mask = method.encode([t[0] for t in texts])
    left = torch.zeros(len(texts), padding, dtype=torch.int64)
    batch = {"prompt": torch.cat([left, prompt], 1), "prompt_mask": torch.cat([left.bool(), prompt_mask], 1),
             "label": torch.ones(len(texts)) if label is None else torch.as_tensor(label)}
    for n, side in ((1, "chosen"), (2, "rejected")):
        ids, mask = method.encode_responses([t[n] for t in texts])
        batch |= {side: torch.cat([ids, left], 1), f"{side}_mask": torch.cat([mask.float(), left.float()], 1)}
    return prepared(method, batch)


def prepared(method, batch) -> dict[str, torch.Tensor]:
    """The batch as `prepare` hands it out, which sees the policy where it began: at the reference."""
    now = copy.deepcopy(method.policy.state_dict())
    if method.reference is not None:
        method.policy.load_state_dict(method.reference.state_dict())
    batch = method.prepare(batch) or batch
    method.policy.load_state_dict(now)
    return batch


TEXTS = [("ab", "cdz", "efghz"), ("xyz", "az", "bcz"), ("q", "mnopqz", "mz"), ("rstu", "hhhz", "iiz"), ("ab", "kz", "kkkkkz")]


def swapped(batch) -> dict[str, torch.Tensor]:
    """Every pair turned round, and its label with it."""
    turned = {k.replace("chosen", "*").replace("rejected", "chosen").replace("*", "rejected"): v for k, v in batch.items()}
    return {**turned, "label": 1 - batch["label"]}


def gradient(method, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradient of all parameters, flat) of one update, on a copy of the method."""
    method = copy.deepcopy(method)
    loss = method.update(batch)["loss"]
    return loss, torch.cat([p.grad.flatten() for p in method.policy.parameters()])


def seen(method, log_prob, reference=None, mask=None, label=None, **batch) -> Pairs:
    """Pairs as parts meet them. log_prob, reference, mask (2, b, T) or (2, b): then responses of one token."""
    log_prob = torch.as_tensor(log_prob)
    log_prob = log_prob.unsqueeze(-1) if log_prob.dim() == 2 else log_prob
    mask = torch.ones_like(log_prob) if mask is None else torch.as_tensor(mask).to(log_prob)
    reference = torch.zeros_like(log_prob) if reference is None else torch.as_tensor(reference).to(log_prob).view_as(log_prob)
    label = torch.ones(log_prob.shape[1]).to(log_prob) if label is None else torch.as_tensor(label).to(log_prob)
    pairs = Pairs(batch=batch, mask=mask, length=mask.sum(-1), reference=reference * mask, label=label, told={})
    method.see(pairs, {"log_prob": (log_prob * mask).flatten(0, 1)})
    return pairs


def value(method, *args, **kwargs) -> torch.Tensor:
    """Loss and penalty of such pairs."""
    pairs = seen(method, *args, **kwargs)
    loss, penalty = method.loss(pairs), method.penalty(pairs)
    return loss if penalty is None else loss + penalty


def slopes(method, log_prob, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, its gradient by log_prob)."""
    log_prob = torch.as_tensor(log_prob).clone().requires_grad_()
    out = value(method, log_prob, *args, **kwargs)
    return out.detach(), torch.autograd.grad(out, log_prob)[0]
