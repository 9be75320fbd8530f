"""The project's own small transformer: RoPE, RMSNorm, pre-norm, SwiGLU, grouped-query attention (methods/tokens/transformer.py).

Its tokens are the characters of the world's alphabet, or, where the world has none of its own, printable ASCII. It starts from
the weights that the env offers, or from those of a finished run of the same shape (`policy.path=runs/…`)."""

from __future__ import annotations

import dataclasses
import string

from methods.common.stored import load_run
from methods.tokens.tokenizer import Characters
from methods.tokens.transformer import Shape, Transformer
from runner.errors import UserError
from runner.interface import Spec, knob


class Small:
    @dataclasses.dataclass(frozen=True)
    class Config:
        layers: int = knob(2, "blocks", low=1)
        width: int = knob(64, "of the residual stream", low=4)
        heads: int = knob(4, "of attention; the width is divided among them", low=1)
        kv_heads: int = knob(0, "heads of keys and values; 0: as many as heads", low=0)
        mlp_width: int = knob(0, "hidden width of the gated MLP; 0: 8/3 of the width, in steps of 8", low=0)
        context: int = knob(0, "most tokens of prompt and response; 0: what the world needs", low=0)
        vocabulary: int = knob(0, "tokens; 0: the world's alphabet and padding. More are never meant, only possible", low=0)
        tied: bool = knob(False, "the head is the embedding")
        qkv_bias: bool = knob(False, "biases in the projections to queries, keys and values, as in Qwen2")
        rope_theta: float = knob(10000.0, "base of the rotary frequencies", low=1.0)
        path: str = knob("", "folder of a finished run (or its weights.safetensors) to start from; empty: the env's start")

    def __init__(self, config):
        self.config = config
        self.own_weights = bool(config.path)

    def build(self, spec: Spec) -> tuple[Transformer, Characters]:
        c = self.config
        if c.width % c.heads or c.heads % (c.kv_heads or c.heads) or c.width // c.heads % 2:
            raise UserError(f"policy.width={c.width}, policy.heads={c.heads}, policy.kv_heads={c.kv_heads}: the heads must "
                            "divide the width into even parts, and kv_heads must divide the heads")
        if spec.arms:
            raise UserError("this env's responses are arms of a table, and its gold metrics read that table: leave policy as it "
                            "is (policy=arms)")
        tokenizer = Characters(spec.alphabet or string.printable, spec.end or "\n")
        size = c.vocabulary or tokenizer.size
        if size < tokenizer.size:
            raise UserError(f"policy.vocabulary={size} is smaller than the world's alphabet ({tokenizer.size} tokens)")
        policy = Transformer(Shape(
            vocabulary=size, width=c.width, layers=c.layers, heads=c.heads, kv_heads=c.kv_heads or c.heads,
            mlp_width=c.mlp_width or -(-c.width * 8 // 3 // 8) * 8, tied=c.tied, qkv_bias=c.qkv_bias, rope_theta=c.rope_theta,
            context=c.context or spec.prompt_length + spec.response_length))
        if c.path:
            load_run(policy, c.path, ("policy",))
        return policy, tokenizer
