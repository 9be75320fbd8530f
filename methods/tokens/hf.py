"""A causal language model in Hugging Face's layout on disk: policy=hf policy.path=FOLDER (or a .gguf, or package:NAME).

Llama, Qwen2 and Mistral shapes become the project's own Transformer (checkpoint.py), with the fast engine; other architectures
run through transformers. Texts go through the checkpoint's own tokeniser, prompts through its chat template if there is one.
With `lora_rank` only low-rank adapters learn (peft), and the reference policy is the same module with its adapters off.
"""

from __future__ import annotations

import dataclasses

from methods.tokens import checkpoint
from methods.tokens.lora import TARGETS, add_lora
from methods.tokens.tokenizer import Pretrained
from runner.errors import UserError
from runner.interface import Spec, knob


class HF:
    @dataclasses.dataclass(frozen=True)
    class Config:
        path: str = knob("", "folder with config.json and safetensors, a .gguf file, or package:NAME of an installed package")
        chat: str = knob("auto", "prompts become a user's turn of the chat template; auto: if there is one",
                         choices=["auto", "yes", "no"])
        lora_rank: int = knob(0, "rank of low-rank adapters, which alone learn then; 0: all weights learn", low=0)
        lora_alpha: float = knob(32.0, "adapters are scaled by alpha / rank", low=0.0, when={"lora_rank": 4})
        recompute: bool = knob(False, "keep only the blocks' inputs for the backward pass: less memory, a third more time")

    own_weights = True  # the env's starting weights are not for it

    def __init__(self, config):
        self.config = config
        if not config.path:
            raise UserError("policy=hf needs a checkpoint on disk: policy.path=FOLDER (config.json, *.safetensors, tokenizer)\n"
                            "without one: policy=small, the project's own transformer")

    def build(self, spec: Spec):
        """-> (policy, tokeniser)"""
        c = self.config
        if spec.arms:
            raise UserError("this env's responses are arms of a table, not texts: leave policy as it is (policy=arms)")
        policy = checkpoint.load(c.path)
        tokenizer = checkpoint.tokenizer(c.path, False, policy)
        if c.chat == "yes" or c.chat == "auto" and getattr(tokenizer.inner, "chat_template", None):
            tokenizer = Pretrained(tokenizer.inner, chat=True)
        if c.recompute and hasattr(policy, "model"):
            policy.model.recompute = True
        if c.lora_rank:
            add_lora(policy, c.lora_rank, c.lora_alpha, TARGETS)
        return policy, tokenizer
