"""A decoder-only transformer as Llama and Qwen2 have it; its parameters bear Hugging Face's names.

Pre-norm blocks with RMSNorm, rotary positions (half rotation), grouped-query attention and SwiGLU. Padding never makes an
attention mask: rows are packed to the left first, and then causality alone keeps padding from what is real.
Sources: Llama (arXiv 2302.13971), RoPE (2104.09864), grouped queries (2305.13245), SwiGLU (2002.05202).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer. `context` is the greatest number of positions; a head has `head_size` or width / heads."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    head_size: int | None = None
    context: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    tied: bool = True

    def __post_init__(self):
        if self.heads % self.kv_heads or (self.head_size is None and self.width % self.heads) or self.head_dim % 2:
            raise ValueError(f"{self}: kv_heads must divide heads, heads divide width, and a head's size be even")

    @property
    def head_dim(self) -> int:
        return self.head_size or self.width // self.heads


class LayerWeights(NamedTuple):
    """One block's matrices (outputs, inputs), adapters added; biases are None where there are none."""

    norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class Weights(NamedTuple):
    embedding: Tensor  # (V, width)
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor  # (V, width); the embedding itself where they are tied


def merged(linear: nn.Module) -> Tensor:
    """The matrix that a layer multiplies with: its own, plus those of its adapters that are switched on (peft's LoRA)."""
    if not hasattr(linear, "base_layer"):
        return linear.weight
    weight = linear.base_layer.weight
    if linear.disable_adapters or linear.merged:
        return weight
    return sum((linear.get_delta_weight(name).to(weight.dtype) for name in linear.active_adapters), weight)


def angles(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (*positions, size), as `rotate` wants them: the first half of sin is negated."""
    rates = 1.0 / theta ** (torch.arange(0, size, 2, device=positions.device).float() / size)
    turn = positions.float().unsqueeze(-1) * rates
    cos, sin = turn.cos(), turn.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the halves of x's last axis."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Causal attention. q (B, heads, L, D), k and v (B, kv_heads, L, D) -> (B, heads, L, D). seen (B, 1, L, L) bool: what each
    position looks at instead."""
    if seen is not None:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    if q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if q.is_cuda and q.dtype != torch.float32:  # the flash kernel, the only one that reads grouped keys in place
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def pack(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's real tokens moved to its left end, in order. (ids, order), both (B, L); order: where each came from."""
    order = mask.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    return ids.gather(-1, order), order


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        out = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        kind = x.device.type  # under autocast: one cast here, instead of one for every matrix that reads it
        return out.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else out


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        size = self.size = shape.head_dim
        self.q_proj = nn.Linear(shape.width, shape.heads * size, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.width, shape.kv_heads * size, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.width, shape.kv_heads * size, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(shape.heads * size, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        return self.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, seen).transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.down_proj = nn.Linear(shape.mlp_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.width, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.width, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, seen)
        return x + self.mlp(self.post_attention_layernorm(x))

    def weights(self) -> LayerWeights:
        a, m = self.self_attn, self.mlp
        biases = (a.q_proj.bias, a.k_proj.bias, a.v_proj.bias)
        return LayerWeights(self.input_layernorm.weight, merged(a.q_proj), merged(a.k_proj), merged(a.v_proj), *biases,
                            merged(a.o_proj), self.post_attention_layernorm.weight, merged(m.gate_proj), merged(m.up_proj),
                            merged(m.down_proj))


class Trunk(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.recompute = shape, False
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps)

    def forward(self, ids: Tensor, positions: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """positions (B, L) where they do not simply count, seen (B, L, L) bool where attention is not simply causal."""
        x = self.embed_tokens(ids)
        places = torch.arange(ids.shape[-1], device=ids.device) if positions is None else positions.unsqueeze(1)
        turn = angles(places, self.shape.head_dim, self.shape.rope_theta)
        seen = None if seen is None else seen.unsqueeze(1)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, *turn, seen, use_reentrant=False)
            else:
                x = layer(x, *turn, seen)
        return self.norm(x)


class Transformer(nn.Module):
    """A policy over tokens. New weights are normal with deviation 0.02, norms 1, biases 0 (as Llama).

    Set `model.recompute = True` to keep only the blocks' inputs for the backward pass (less memory, a third more time).
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        if not shape.tied:
            self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def head(self) -> Tensor:
        """(V, width): logits are hidden @ head.T."""
        return self.model.embed_tokens.weight if self.shape.tied else merged(self.lm_head)

    def packed(self, ids: Tensor) -> Tensor:
        """Hidden states (B, L, width) after the last norm, of rows (B, L) that are padded on the right only, or not at all."""
        return self.model(ids)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.hidden(ids, mask)

    def hidden(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, L, width) after the last norm. Positions count the tokens in `mask` (B, L); None: all.

        What stands at padding is finite, and of no meaning."""
        if mask is None:
            return self.packed(ids)
        packed, _ = pack(ids, mask)
        place = (mask.cumsum(-1) - 1).clamp_(min=0)
        return self.packed(packed).gather(1, place.unsqueeze(-1).expand(-1, -1, self.shape.width))

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, V) in float32, whole: for tests and small vocabularies. Training uses `scoring.score`."""
        return F.linear(self.hidden(ids, mask), self.head).float()

    def weights(self) -> Weights:
        """Every matrix as it is multiplied with, adapters added: what the engine copies."""
        return Weights(self.model.embed_tokens.weight, [layer.weights() for layer in self.model.layers],
                       self.model.norm.weight, self.head)
