"""Generate responses: prompts once, then a token at a time from a cache of keys and values that stays in place.

The prompt is read once per prompt and its cache copied to the rows of its group. On a GPU one token is one CUDA graph,
captured at the first use of a shape: where to write is a tensor on the device, and what is not yet written is masked, so that
the same graph serves every token. Attention reads a prefix of the cache, of four widths at most (one graph each).

Rotary positions are slots of the cache: rows differ from the positions counted over their mask by a constant, and attention
sees only differences. The engine multiplies with copies of its own: q, k, v in one matrix, gate and up in another, in bf16 on
a GPU where autocast is on. `refresh` writes them anew in place, so that graphs stay valid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from methods.tokens import sampling
from methods.tokens.transformer import Weights, angles, attend, pack, rotate
from runner.errors import UserError

KEPT = 6  # shapes whose caches and graphs are kept; the one longest unused goes first
LOOK = 16  # tokens between looks at whether all rows have ended: a look waits for the device


class Generated(NamedTuple):
    response: Tensor  # (B, T) int64; padding after the end
    mask: Tensor  # (B, T) bool; the end's token included
    log_prob: Tensor  # (B, T) float32, of the distribution drawn from (greedy: of temperature 1); 0 off the mask


class _Layer(NamedTuple):
    norm: Tensor
    qkv: Tensor
    bias: Tensor | None
    o: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class _Copies:
    """The policy's weights as the engine reads them."""

    def __init__(self, weights: Weights, dtype: torch.dtype):
        new = lambda *like: like[0].new_empty(sum(len(t) for t in like), *like[0].shape[1:], dtype=dtype)  # noqa: E731
        self.dtype, self.device = dtype, weights.norm.device
        self.tied = weights.head is weights.embedding
        self.embedding, self.norm = new(weights.embedding), new(weights.norm)
        self.head = self.embedding if self.tied else new(weights.head)
        self.layers = [_Layer(new(w.norm), new(w.q, w.k, w.v), None if w.q_bias is None else new(w.q_bias, w.k_bias, w.v_bias),
                              new(w.o), new(w.mlp_norm), new(w.gate, w.up), new(w.down)) for w in weights.layers]

    def write(self, weights: Weights):
        into, source = [self.embedding, self.norm], [weights.embedding, weights.norm]
        if not self.tied:
            into.append(self.head)
            source.append(weights.head)
        for own, w in zip(self.layers, weights.layers):
            into += [own.norm, *own.qkv.split([len(w.q), len(w.k), len(w.v)]), own.o, own.mlp_norm,
                     *own.gate_up.chunk(2), own.down]
            source += [w.norm, w.q, w.k, w.v, w.o, w.mlp_norm, w.gate, w.up, w.down]
            if own.bias is not None:
                into += own.bias.split([len(w.q), len(w.k), len(w.v)])
                source += [w.q_bias, w.k_bias, w.v_bias]
        torch._foreach_copy_(into, source)


class _State:
    """All that one shape's rollouts write: fixed places, which graphs know by their address."""

    def __init__(self, shape, rows: int, prompt: int, steps: int, like: _Copies):
        kwargs = {"device": like.device}
        size, kinds = shape.head_dim, shape.heads + 2 * shape.kv_heads
        self.rows, self.prompt, self.steps = rows, prompt, steps
        self.slots = -(-(prompt + steps) // 16) * 16  # attention with a mask wants an even width
        # Zeros, since what is masked is still multiplied, by zero.
        self.cache = [torch.zeros(rows, 2 * shape.kv_heads, self.slots, size, dtype=like.dtype, **kwargs)
                      for _ in range(shape.layers)]
        self.bias = torch.zeros(rows, 1, 1, self.slots, dtype=like.dtype, **kwargs)
        cos, sin = angles(torch.arange(self.slots, **kwargs), size, shape.rope_theta)
        turns = torch.stack([cos, sin], 1).unsqueeze(2).repeat(1, 1, kinds, 1)  # (slots, 2, heads of q, k, v, size)
        turns[:, 0, shape.heads + shape.kv_heads:], turns[:, 1, shape.heads + shape.kv_heads:] = 1.0, 0.0  # v is not turned
        self.turns = turns.to(like.dtype)
        self.place = torch.zeros(2, dtype=torch.int64, **kwargs)
        self.slot, self.step = self.place[:1], self.place[1:]  # of the cache that is written; of the response
        self.uniforms, self.probability = (torch.zeros(rows, steps, **kwargs) for _ in range(2))
        self.response = torch.zeros(rows, steps, dtype=torch.int64, **kwargs)
        self.token = torch.zeros(rows, dtype=torch.int64, **kwargs)
        self.temperature, self.top_p = (torch.ones(1, 1, **kwargs) for _ in range(2))
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.full = False  # whether no prompt is padded

    def begin(self, lengths: Tensor, uniforms: Tensor, temperature: float, top_p: float):
        """lengths (B,): of the prompts, whose tokens lie in the first slots."""
        slots = torch.arange(self.slots, device=lengths.device)
        self.bias.copy_(torch.where(slots < lengths[:, None], 0.0, -torch.inf)[:, None, None])
        self.uniforms.copy_(uniforms)
        self.slot.fill_(self.prompt - 1), self.step.zero_()
        self.temperature.fill_(temperature), self.top_p.fill_(top_p)

    def ended(self, eos: int, steps: int) -> bool:
        """Whether every row has its end among its first tokens. Waits for the device."""
        return bool((self.response[:, :steps] == eos).any(-1).all())

    def result(self, eos: int, pad: int) -> Generated:
        """Rows go on after their end, which costs nothing; what they say there is dropped here."""
        end = self.response == eos
        mask = end.cumsum(-1) == end  # no end before this token
        log_prob = self.probability.clamp_min(torch.finfo(torch.float32).tiny).log()
        return Generated(self.response.where(mask, pad), mask, log_prob.where(mask, 0.0))

    def widths(self) -> list[int]:
        """Prefixes of the cache that graphs read, rising: four at most, none of them short."""
        few = 1 if self.slots <= 256 else 4
        ends = {-(-(self.prompt + self.steps * (i + 1) // few) // 16) * 16 for i in range(few)}
        return sorted(ends - {self.slots}) + [self.slots]


class Sampler:
    """Generates from `policy` (a Transformer; or foreign.Foreign, which generates slowly).

    dtype: of its copies; None: autocast's where it is on and the device is a GPU, else that of the parameters. graph: whether
    CUDA graphs are used. Holds copies, caches and graphs only: nothing of it belongs to a run's state."""

    def __init__(self, policy, dtype: torch.dtype | None = None, graph: bool = True):
        self.policy, self.dtype, self.graph = policy, dtype, graph
        self.copies: _Copies | None = None
        self.states: dict[tuple, _State] = {}
        self.pool = None

    @torch.no_grad()
    def refresh(self):
        """The policy's weights have changed: copy them. Cheap; graphs stay valid."""
        if not hasattr(self.policy, "weights"):
            return
        weights = self.policy.weights()
        kind, dtype = weights.norm.device.type, self.dtype
        if dtype is None:
            half = weights.norm.is_cuda and torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if half else weights.norm.dtype
        if self.copies is None or (self.copies.dtype, self.copies.device) != (dtype, weights.norm.device):
            self.states.clear()
            self.pool = None
            self.copies = _Copies(weights, dtype)
        self.copies.write(weights)

    @torch.no_grad()
    def generate(self, prompt: Tensor, prompt_mask: Tensor, *, group: int, steps: int, eos: int, pad: int, uniforms: Tensor,
                 temperature: float = 1.0, top_p: float = 1.0, adjust: Callable[[Tensor], Tensor] | None = None) -> Generated:
        """`group` responses of at most `steps` tokens to each prompt, with the weights of the last `refresh`.

        prompt, prompt_mask (P, Tp), padded on the left, no row empty; uniforms (P * group, steps) in [0, 1).
        temperature 0: greedy. top_p < 1: from the most probable tokens only. adjust: raw logits (B, V) float32 -> (B, 1), the
        temperature of each row instead; it is captured with the rest, so it may read tensors that stay in place, and should
        be the same function at every call. UserError: a prompt and its response exceed the context."""
        check(self.policy, prompt, steps)
        if not hasattr(self.policy, "weights"):
            return self.policy.generate(prompt, prompt_mask, group=group, steps=steps, eos=eos, pad=pad, uniforms=uniforms,
                                        temperature=temperature, top_p=top_p, adjust=adjust)
        if self.copies is None:
            self.refresh()
        with torch.autocast(prompt.device.type, enabled=False):
            heat = "greedy" if temperature == 0 else "adjusted" if adjust else "unit" if temperature == 1 else "scaled"
            state = self._state(len(prompt) * group, prompt.shape[1], steps, heat, top_p < 1, adjust)
            state.full = not prompt.is_cuda and bool(prompt_mask.all())
            state.begin(prompt_mask.sum(-1).repeat_interleave(group), uniforms, temperature, top_p)
            self._choose(state, self._prefill(state, prompt, prompt_mask, group))
            self._continue(state, eos)
            return state.result(eos, pad)

    def _continue(self, state: _State, eos: int):
        for step in range(1, state.steps):
            if step % LOOK == 0 and state.ended(eos, step):
                return
            slot = state.prompt + step - 1
            if state.graphs:
                state.graphs[next(w for w in state.graphs if w > slot)].replay()
            else:
                self._advance(state, slot + 1)

    def _state(self, rows: int, prompt: int, steps: int, heat: str, nucleus: bool, adjust) -> _State:
        key = (rows, prompt, steps, heat, nucleus)
        state = self.states.pop(key, None)
        if state is None or (heat == "adjusted" and state.adjust != adjust):
            state = _State(self.policy.shape, rows, prompt, steps, self.copies)
            state.heat, state.nucleus, state.adjust = heat, nucleus, adjust
            if state.token.is_cuda and self.graph and steps > 1:
                self._capture(state)
        self.states[key] = state
        while len(self.states) > KEPT:
            del self.states[next(iter(self.states))]
        return state

    def _capture(self, state: _State):
        """Record one token's step for each width. What the rehearsals write is overwritten when a rollout begins."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        for width in state.widths():
            with torch.cuda.stream(stream):
                stream.wait_stream(torch.cuda.current_stream())
                for _ in range(2):  # libraries choose their kernels and make their work space
                    state.place.zero_()
                    self._advance(state, width)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self._advance(state, width)
            self.pool, state.graphs[width] = graph.pool(), graph

    def _prefill(self, state: _State, prompt: Tensor, mask: Tensor, group: int) -> Tensor:
        """Read the prompts, fill the cache; logits (B, V) of what follows."""
        copies, shape, (prompts, width) = self.copies, self.policy.shape, prompt.shape
        ids, _ = pack(prompt, mask)
        lengths = mask.sum(-1, keepdim=True)
        # The last token of every prompt has the position of the last slot, as if they lay at the right.
        positions = torch.arange(width, device=ids.device) + (width - lengths)
        cos, sin = (t.to(copies.dtype).unsqueeze(2) for t in angles(positions, shape.head_dim, shape.rope_theta))
        x = F.embedding(ids, copies.embedding)
        for layer, cache in zip(copies.layers, state.cache):
            qkv = F.linear(self._norm(x, layer.norm), layer.qkv, layer.bias).unflatten(-1, (-1, shape.head_dim))
            q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], 2)
            q, k, v = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)
            cache = cache.view(prompts, group, *cache.shape[1:])[:, :, :, :width]
            cache[:, :, :shape.kv_heads].copy_(k.unsqueeze(1))
            cache[:, :, shape.kv_heads:].copy_(v.unsqueeze(1))
            x = x + F.linear(attend(q, k, v).transpose(1, 2).flatten(-2), layer.o)
            x = x + F.linear(self._gated(self._norm(x, layer.mlp_norm), layer), layer.down)
        last = x.gather(1, (lengths - 1).clamp(min=0).unsqueeze(-1).expand(-1, -1, x.shape[-1])).squeeze(1)
        return sampling.product(self._norm(last, copies.norm), copies.head).repeat_interleave(group, 0)

    def _advance(self, state: _State, width: int):
        """One token further: state.token goes through the layers at state.slot, and the next one is drawn."""
        copies, shape = self.copies, self.policy.shape
        state.bias.index_fill_(-1, state.slot, 0.0)
        cos, sin = state.turns.index_select(0, state.slot)[0]
        x = F.embedding(state.token, copies.embedding)
        bias = None if state.full and not x.is_cuda else state.bias[..., :width]
        size, kv = shape.head_dim, shape.kv_heads
        for layer, cache in zip(copies.layers, state.cache):
            qkv = F.linear(self._norm(x, layer.norm), layer.qkv, layer.bias).view(state.rows, -1, size)
            qkv = rotate(qkv, cos, sin)
            cache.index_copy_(2, state.slot, qkv[:, shape.heads:].unsqueeze(2))
            # The heads that share a key are the queries of one product.
            q = qkv[:, :shape.heads].unflatten(1, (kv, -1))
            out = self._attend(q, cache[:, :kv, :width], cache[:, kv:, :width], bias)
            x.addmm_(out.reshape(state.rows, -1), layer.o.t())
            x.addmm_(self._gated(self._norm(x, layer.mlp_norm), layer), layer.down.t())
        self._choose(state, sampling.product(self._norm(x, copies.norm), copies.head))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """q (B, kv_heads, heads a key, size), k and v (B, kv_heads, width, size), bias (B, 1, 1, width)."""
        if bias is not None:
            bias = bias.expand(-1, k.shape[1], q.shape[2], -1)
        choice = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if q.is_cuda else contextlib.nullcontext()
        with choice:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.policy.shape.norm_eps)

    def _gated(self, x: Tensor, layer: _Layer) -> Tensor:
        gate, up = F.linear(x, layer.gate_up).chunk(2, -1)
        return F.silu(gate).mul_(up)

    def _choose(self, state: _State, logits: Tensor):
        """Draw the next token from logits (B, V) and write it down, at `step`; then both places go one further."""
        heat = {"greedy": 0.0, "unit": None, "scaled": state.temperature}
        temperature = state.adjust(logits) if state.heat == "adjusted" else heat[state.heat]
        token, p = sampling.draw(logits, state.uniforms.index_select(1, state.step), temperature,
                                 state.top_p if state.nucleus else None)
        state.response.index_copy_(1, state.step, token)
        state.probability.index_copy_(1, state.step, p)
        state.token.copy_(token.squeeze(-1))
        state.place.add_(1)


def check(policy, prompt: Tensor, steps: int):
    """UserError if prompts (P, Tp) and their responses exceed the policy's context."""
    context, wanted = policy.shape.context, prompt.shape[1] + steps
    if wanted > context:
        raise UserError(f"prompts of {prompt.shape[1]} tokens and responses of {steps} need {wanted} positions\n"
                        f"the policy's context has {context}\n"
                        "take shorter prompts or responses, or a checkpoint with a longer context")


@torch.no_grad()
def reference_generate(policy, prompt: Tensor, prompt_mask: Tensor, *, group: int, steps: int, eos: int, pad: int,
                       uniforms: Tensor, temperature: float = 1.0, top_p: float = 1.0, adjust=None) -> Generated:
    """What `Sampler.generate` does, plainly: no cache, a full forward for every token, sums in float64. For tests."""
    ids, mask = prompt.repeat_interleave(group, 0), prompt_mask.repeat_interleave(group, 0)
    rows, width = ids.shape
    alive = torch.ones(rows, dtype=torch.bool, device=ids.device)
    log_probs = torch.zeros(rows, steps, device=ids.device)
    for t in range(steps):
        hidden = policy.hidden(ids, mask)[:, -1]  # prompts are padded on the left; what follows an end no longer counts
        logits = F.linear(hidden, policy.head).float()
        heat = 1.0 if temperature == 0 else temperature if adjust is None else adjust(logits)
        p = (logits / heat).double().softmax(-1)
        if top_p < 1 and temperature:
            p = sampling.nucleus(p, top_p)
            p = p / p.sum(-1, keepdim=True)
        sums = p.cumsum(-1)
        above = sums > sums[:, -1:] * uniforms[:, t:t + 1]
        token = p.argmax(-1) if temperature == 0 else above.to(torch.uint8).argmax(-1)
        log_probs[:, t] = p.gather(-1, token[:, None]).squeeze(-1).log().where(alive, 0.0)
        token = torch.where(alive, token, pad)
        ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, alive[:, None]], 1)
        alive = alive & (token != eos)
    return Generated(ids[:, width:], mask[:, width:], log_probs)
