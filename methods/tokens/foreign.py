"""What needs transformers: architectures of its own behind a policy's members, GGUF files, tokenizers."""

from __future__ import annotations

import inspect
import struct
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.tokens import sampling
from methods.tokens.engine import Generated
from runner.errors import UserError


class Sizes(NamedTuple):
    vocabulary: int
    width: int
    context: int


def transformers_module(purpose: str):
    try:
        import transformers
    except ImportError:
        raise UserError(f"{purpose} needs transformers, which is not installed\n"
                        "without it: checkpoints of Llama, Qwen2 and Mistral in Hugging Face's layout, tokens of characters\n"
                        "install it: pip install -e '.[lm]'") from None
    transformers.utils.logging.disable_progress_bar()  # a run shows progress of its own
    return transformers


def from_folder(folder, dtype: torch.dtype) -> nn.Module:
    hub = transformers_module("this architecture")
    try:
        return hub.AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as e:
        raise UserError(f"transformers can't read {folder}: {str(e).splitlines()[0]}\n"
                        "copy the checkpoint again, or take another version of transformers") from None


def from_gguf(file) -> nn.Module:
    """The model in a GGUF file, as float32."""
    hub = transformers_module("a GGUF file")
    _need_gguf()
    try:
        return hub.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32,
                                                        local_files_only=True)
    except (ValueError, OSError, KeyError, RuntimeError, struct.error) as e:
        raise UserError(f"transformers can't read {file}: {str(e).splitlines()[0]}\n"
                        "give a checkpoint in Hugging Face's layout") from None


def load_tokenizer(place):
    """transformers' tokenizer of a folder or a GGUF file."""
    hub = transformers_module("a pretrained tokenizer")
    gguf = place.suffix == ".gguf"
    if gguf:
        _need_gguf()
    try:
        return hub.AutoTokenizer.from_pretrained(str(place.parent if gguf else place), local_files_only=True,
                                                 **({"gguf_file": place.name} if gguf else {}))
    except (ValueError, OSError, KeyError, TypeError, ImportError) as e:
        raise UserError(f"there is no tokenizer that can be read at {place}: {str(e).splitlines()[0]}\n"
                        "put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside config.json") from None


def _need_gguf():
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("a GGUF file needs the package gguf, which is not installed\n"
                        "without it: checkpoints in Hugging Face's layout\ninstall it: pip install -e '.[data]'") from None


class Foreign(nn.Module):
    """A causal language model of transformers as a policy. Generates slowly, through its own cache."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.trunk_name = inner.base_model_prefix
        head, config = inner.get_output_embeddings(), inner.config.get_text_config()
        context = next((getattr(config, n) for n in ("max_position_embeddings", "n_positions", "max_seq_len")
                        if getattr(config, n, None)), 2 ** 31)
        if head is None or not hasattr(inner, self.trunk_name):
            raise self._refusal("its trunk and head can't be told apart")
        self.shape = Sizes(*head.weight.shape, context)
        self.takes_places = "position_ids" in inspect.signature(inner.forward).parameters
        self._check()

    def _refusal(self, why: str) -> UserError:
        return UserError(f"{type(self.inner).__name__} can't be a policy: {why}\nthe nearest that can: Llama, Qwen2, Mistral, "
                         "or another whose logits are its last hidden states times one matrix\ntake such a checkpoint")

    @torch.no_grad()
    def _check(self):
        """Some architectures scale or bound their logits: scores from hidden states would be wrong without a word."""
        ids = torch.arange(1, 5, device=self.head.device).remainder(self.shape.vocabulary).unsqueeze(0)
        self.eval()
        truth, mine = self.inner(input_ids=ids).logits.float(), F.linear(self.packed(ids), self.head).float()
        if truth.shape != mine.shape or (truth - mine).abs().max() > 1e-2 * truth.abs().max().clamp(min=1e-3):
            raise self._refusal("its logits are more than its last hidden states times one matrix")

    @property
    def head(self) -> Tensor:
        return self.inner.get_output_embeddings().weight

    def train(self, mode: bool = True):
        """Always as in evaluation: with dropout, scores would not be those of what was drawn."""
        return super().train(False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.hidden(ids, mask)

    def packed(self, ids: Tensor) -> Tensor:
        return self.hidden(ids, None)

    def hidden(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        more = {} if mask is None else {"attention_mask": mask.long()}
        return getattr(self.inner, self.trunk_name)(input_ids=ids, use_cache=False, **self._places(ids, mask), **more)[0]

    def _places(self, ids: Tensor, mask: Tensor | None) -> dict:
        """position_ids, for architectures that take them; others count over the mask themselves."""
        if mask is None or not self.takes_places:
            return {}
        return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    @torch.no_grad()
    def generate(self, prompt: Tensor, prompt_mask: Tensor, *, group: int, steps: int, eos: int, pad: int, uniforms: Tensor,
                 temperature: float = 1.0, top_p: float = 1.0, adjust=None) -> Generated:
        """As engine.Sampler.generate."""
        new, mask = prompt.repeat_interleave(group, 0), prompt_mask.repeat_interleave(group, 0)
        alive = torch.ones(len(new), 1, dtype=torch.bool, device=new.device)
        response = torch.full((len(new), steps), pad, device=new.device)
        written = torch.zeros(len(new), steps, dtype=torch.bool, device=new.device)
        log_probs, past = torch.zeros(len(new), steps, device=new.device), None
        for t in range(steps):
            places = {name: p[:, -new.shape[1]:] for name, p in self._places(new, mask).items()}
            out = self.inner(input_ids=new, attention_mask=mask.long(), past_key_values=past, use_cache=True, **places)
            past, logits = out.past_key_values, out.logits[:, -1].float()
            heat = float(temperature) if temperature == 0 or adjust is None else adjust(logits)
            token, p = sampling.draw(logits, uniforms[:, t:t + 1], heat, top_p if top_p < 1 else None)
            new = torch.where(alive, token, pad)
            response[:, t:t + 1], written[:, t:t + 1], log_probs[:, t:t + 1] = new, alive, p.log().where(alive, 0.0)
            mask, alive = torch.cat([mask, alive], 1), alive & (new != eos)
            if not alive.any():
                break
        return Generated(response, written, log_probs)

    def save(self, folder):
        from methods.tokens.lora import merged_copy
        merged_copy(self.inner).save_pretrained(str(folder))
