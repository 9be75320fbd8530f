"""What a policy gives given responses: log-probabilities, entropies, or any measure of its logits.

The trunk runs once over prompts and responses, packed and cut to the longest row. The head meets only positions that predict
a token of a response, in chunks whose logits live in float32 while the chunk does; the backward pass makes them again. So no
(b, T, V) tensor is ever kept: for a vocabulary of 151,936 and 16,384 tokens it would take 10 GB, and its gradient as much.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from methods.tokens.sampling import product
from methods.tokens.transformer import pack

ELEMENTS = 2 ** 28  # of one chunk's logits: 1 GB in float32
KEPT = 2 ** 24  # a general measure's logits up to this many are kept for the backward pass, not made again


def log_prob_and_entropy(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The measure most losses want: natural logarithms, gradients through both. logits (n, V), target (n,) -> (n,) each."""
    log_p = logits.log_softmax(-1)
    return {**log_prob(logits, target), "entropy": -(log_p.exp() * log_p).sum(-1)}


def log_prob(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """log_prob_and_entropy without the entropy: fewer passes over the logits."""
    return {"log_prob": logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)}


def whole_kl(logits: Tensor, reference: Tensor, reverse: bool = False) -> Tensor:
    """KL(reference || policy) over the whole vocabulary, exact; reverse: KL(policy || reference). Logits (n, V) twice -> (n,).

    By log_softmax on both sides: the logarithm of a softmax would be -inf for what has all but no probability."""
    log_p, log_q = logits.log_softmax(-1), reference.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1) if reverse else (log_q.exp() * (log_q - log_p)).sum(-1)


Measure = Callable[..., dict[str, Tensor]]  # (logits (n, V), target (n,)[, the other policy's logits (n, V)]) -> (n,) each


def score(policy, prompt: Tensor, prompt_mask: Tensor, response: Tensor, mask: Tensor,
          measure: Measure = log_prob_and_entropy, temperature: float | Tensor = 1.0,
          chunk: int | None = None, trunk=None, waits: bool = True, beside=None) -> dict[str, Tensor]:
    """What `measure` says of every response token, (b, T) float32 each; 0 off the mask.

    prompt, prompt_mask (b, Tp), padded on the left, no row empty; response, mask (b, T), padded on the right. `measure` gets
    logits (n, V) float32, divided by the temperature (a number, or a tensor like response), and targets (n,). chunk: positions
    whose logits exist at once. trunk: ids -> hidden in the place of the policy's, for the whole width (graphed.py).
    beside: another policy over the same tokens; `measure` then gets its logits, too, without gradient, over the same
    temperature. Of it only hidden states are kept, never logits.
    Waits for the device, since the number of positions decides shapes; with waits=False padding goes through the head as well."""
    whole = torch.cat([prompt_mask, mask], 1)
    packed, _ = pack(torch.cat([prompt, response], 1), whole)
    longest = whole.shape[1] if trunk or not waits else int(whole.sum(-1).max())
    # among the b * T tokens of responses
    picked = mask.flatten().nonzero().squeeze(-1) if waits else torch.arange(mask.numel(), device=mask.device)
    place = (whole.cumsum(-1)[:, prompt.shape[1]:] - 2).clamp(min=0)  # of the token before, which predicts this one
    row = torch.arange(len(mask), device=mask.device).unsqueeze(-1) * longest
    place = (place + row).flatten()[picked]
    hidden = (trunk or policy.packed)(packed[:, :longest]).flatten(0, 1).index_select(0, place)
    other = None
    if beside is not None:
        with torch.no_grad():
            other = beside.packed(packed[:, :longest]).flatten(0, 1).index_select(0, place), beside.head
    target = response.flatten()[picked]
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(response.shape).flatten()[picked].unsqueeze(-1).float()
    values = measured(hidden, policy.head, target, measure, temperature, chunk, other)
    if not waits:
        return {name: value.float().view(mask.shape).where(mask, 0.0) for name, value in values.items()}
    zeros = torch.zeros(mask.numel(), device=mask.device)
    return {name: zeros.index_copy(0, picked, value.float()).view(mask.shape) for name, value in values.items()}


def score_forked(policy, prompt: Tensor, prompt_mask: Tensor, response: Tensor, mask: Tensor,
                 measure: Measure = log_prob_and_entropy, temperature: float = 1.0, beside=None) -> dict[str, Tensor]:
    """`score` of several responses to each prompt, which goes through the trunk once: b prompts (b, Tp), responses (s * b, T),
    the first of every prompt, then the second of every prompt, …; what is told is (s * b, T).

    A row is [prompt | first | second | …] without padding between; a response sees its prompt and itself, and its positions
    go on from the prompt's. Needs the project's own Transformer."""
    b = len(prompt)
    sides = len(response) // b
    ids = torch.cat([prompt, *response.view(sides, b, -1).unbind(0)], 1)
    whole = torch.cat([prompt_mask, *mask.view(sides, b, -1).unbind(0)], 1)
    widths = torch.tensor([prompt.shape[1], *[response.shape[1]] * sides], device=ids.device)
    part = torch.arange(sides + 1, device=ids.device).repeat_interleave(widths).expand_as(ids)  # 0: of the prompt
    ids, order = pack(ids, whole)
    longest = int(whole.sum(-1).max())
    ids, part = ids[:, :longest], torch.where(whole, part, sides + 1).gather(1, order)[:, :longest]
    counts = torch.stack([(part == i).sum(1) for i in range(sides + 1)], 1)  # (b, 1 + s) tokens of every part
    begins = counts.cumsum(1) - counts
    place = torch.arange(longest, device=ids.device)
    lengths = counts[:, :1]  # of the prompts
    known = part.clamp(max=sides)
    positions = torch.where(part == 0, place, place - begins.gather(1, known) + lengths)
    earlier = place[:, None] >= place
    seen = earlier & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))
    hidden, other = policy.model(ids, positions, seen), None
    # The token before the first of a response is the prompt's last.
    inside = mask.long().cumsum(-1).view(sides, b, -1) - 1
    before = torch.where(inside == 0, lengths - 1, begins.T[1:, :, None] + inside - 1)
    row = torch.arange(b, device=ids.device)[:, None] * longest
    picked = mask.flatten().nonzero().squeeze(-1)
    place = (before + row).flatten()[picked]
    hidden = hidden.flatten(0, 1).index_select(0, place)
    if beside is not None:
        with torch.no_grad():
            other = beside.model(ids, positions, seen).flatten(0, 1).index_select(0, place), beside.head
    values = measured(hidden, policy.head, response.flatten()[picked], measure, temperature, None, other)
    zeros = torch.zeros(mask.numel(), device=mask.device)
    return {name: zeros.index_copy(0, picked, value.float()).view(mask.shape) for name, value in values.items()}


def measured(hidden: Tensor, head: Tensor, target: Tensor, measure: Measure, temperature: float | Tensor = 1.0,
             chunk: int | None = None, other: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
    """`measure` of the logits hidden @ head.T / temperature: hidden (n, width), head (V, width), target (n,) -> (n,) each.

    Computes in autocast's precision where it is on, else in hidden's; temperature: a number or (n, 1) without gradient. other:
    hidden states and head of another policy, whose logits `measure` is to see, too."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    hidden = hidden.to(dtype)
    chunk = chunk or max(1, ELEMENTS // len(head) // (1 if other is None else 2))
    with torch.autocast(kind, enabled=False):
        if measure is log_prob_and_entropy:
            return dict(zip(("log_prob", "entropy"), _Fast.apply(hidden, head, target, temperature, chunk, True)))
        if measure is log_prob:
            return {"log_prob": _Fast.apply(hidden, head, target, temperature, chunk, False)[0]}
        other = tuple(t.to(dtype) for t in other or ())
        return _general(hidden, head, target, measure, temperature, chunk, *other)


def _general(hidden, head, target, measure, temperature, chunk, beside=None, beside_head=None) -> dict[str, Tensor]:
    def part(hidden, target, temperature, *beside):
        logits = [_Logits.apply(hidden, head)]
        with torch.no_grad():
            logits += [product(b, beside_head) for b in beside]
        if not (isinstance(temperature, float) and temperature == 1.0):
            logits = [z / temperature for z in logits]
        return measure(logits[0], target, *logits[1:])

    again = torch.is_grad_enabled() and len(hidden) * len(head) > KEPT
    parts = []
    for i in range(0, max(len(hidden), 1), chunk):
        heat = temperature[i:i + chunk] if isinstance(temperature, Tensor) else temperature
        args = [hidden[i:i + chunk], target[i:i + chunk], heat] + ([] if beside is None else [beside[i:i + chunk]])
        parts.append(checkpoint(part, *args, use_reentrant=False) if again else part(*args))
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def _head_gradient(gradient: Tensor, hidden: Tensor) -> Tensor:
    """gradient.T @ hidden in float32: (n, V), (n, width) -> (V, width)."""
    return product(gradient.t(), hidden.t())


class _Logits(torch.autograd.Function):
    """`product`, with a gradient: F.linear would round a half-precision product before it is a float32."""

    @staticmethod
    def forward(ctx, hidden, head):
        ctx.save_for_backward(hidden, head)
        return product(hidden, head.to(hidden.dtype))

    @staticmethod
    def backward(ctx, gradient):
        hidden, head = ctx.saved_tensors
        gradient = gradient.to(hidden.dtype)
        return (gradient @ head.to(hidden.dtype) if ctx.needs_input_grad[0] else None,
                _head_gradient(gradient, hidden).to(head.dtype) if ctx.needs_input_grad[1] else None)


class _Fast(torch.autograd.Function):
    """log p(target) and the entropy H, chunk by chunk; z: logits divided by the temperature t, p = softmax(z).

    dL/dlogits = (g_lp (onehot - p) - g_H p (log p + H)) / t. The head is cast to hidden's precision for the products only, so
    that its gradient is summed, and handed on, in its own."""

    @staticmethod
    def forward(ctx, hidden, head, target, temperature, chunk, entropy):
        pieces, half = [], head.to(hidden.dtype)
        for i in range(0, max(len(hidden), 1), chunk):
            z, goal = _scaled(hidden, half, temperature, slice(i, i + chunk)), target[i:i + chunk].unsqueeze(-1)
            raw, log_p = z.gather(-1, goal), z.log_softmax(-1)
            del z
            at_goal = log_p.gather(-1, goal)
            total = raw - at_goal  # the logarithm of the sum, without more passes over the logits
            spread = -(log_p.exp().mul_(log_p)).sum(-1, keepdim=True) if entropy else torch.zeros_like(total)
            pieces.append(torch.cat([at_goal, spread, total], 1))
        at_goal, spread, total = torch.cat(pieces).unbind(-1)
        ctx.save_for_backward(hidden, head, target, spread, total)
        ctx.temperature, ctx.chunk, ctx.entropy = temperature, chunk, entropy
        ctx.set_materialize_grads(False)
        return at_goal.clone(), spread.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_log_prob, g_entropy):
        hidden, head, target, spread, total = (t if t.dim() > 1 else t.unsqueeze(-1) for t in ctx.saved_tensors)
        none, half = torch.zeros_like(spread), head.to(hidden.dtype)
        g_lp = none if g_log_prob is None else g_log_prob.unsqueeze(-1).float() / ctx.temperature
        g_h = g_entropy.unsqueeze(-1).float() / ctx.temperature if ctx.entropy and g_entropy is not None else None
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_head = torch.zeros(head.shape, device=head.device) if ctx.needs_input_grad[1] else None
        for i in range(0, len(hidden), ctx.chunk):
            at = slice(i, i + ctx.chunk)
            log_p = _scaled(hidden, half, ctx.temperature, at).sub_(total[at])
            if g_h is None:
                slope = log_p.exp_().mul_(-g_lp[at])
            else:
                p, constant = log_p.exp(), -(g_lp[at] + g_h[at] * spread[at])
                slope = log_p.mul_(-g_h[at]).add_(constant).mul_(p)
                del p
            slope = slope.scatter_add_(-1, target[at], g_lp[at]).to(hidden.dtype)
            if to_hidden is not None:
                to_hidden[at] = slope @ half
            if to_head is not None:
                to_head += _head_gradient(slope, hidden[at])
        return to_hidden, None if to_head is None else to_head.to(head.dtype), None, None, None, None


def _scaled(hidden: Tensor, head: Tensor, temperature: float | Tensor, at: slice) -> Tensor:
    z = product(hidden[at], head)
    if isinstance(temperature, Tensor):
        return z.div_(temperature[at])
    return z if temperature == 1.0 else z.div_(temperature)


def buckets(lengths: Tensor, *, tokens: int | None = None, rows: int | None = None) -> list[Tensor]:
    """Micro-batches of rows of like length, longest first: index tensors that together name each row once.

    lengths (b,): of prompt and response together. A micro-batch has at most `rows` rows, and at most `tokens` tokens with its
    padding (but one row at least). Waits for the device."""
    order = lengths.argsort(descending=True, stable=True)
    out, start, host = [], 0, [int(n) for n in lengths[order].to("cpu")]
    while start < len(host):
        most = len(host) if rows is None else rows
        if tokens is not None:
            most = min(most, max(1, tokens // max(host[start], 1)))
        out.append(order[start:start + most])
        start += most
    return out
