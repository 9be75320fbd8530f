"""The peer's side of the benchmarks of token policies: a Qwen2 of a given shape with random weights, a tokenizer of letters."""

from __future__ import annotations

import torch


def qwen2(p: dict, letters: str):
    """(model, tokenizer) of transformers. p: the shape as policy=small has it; letters: one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = ["<pad>", "<eos>", "<unk>", *letters]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=p["vocabulary"], hidden_size=p["width"], num_hidden_layers=p["layers"], num_attention_heads=p["heads"],
        num_key_value_heads=p.get("kv_heads", p["heads"]), intermediate_size=p["mlp_width"],
        tie_word_embeddings=p.get("tied", False), max_position_embeddings=2048, bos_token_id=1, eos_token_id=1, pad_token_id=0))
    return model, tokenizer
