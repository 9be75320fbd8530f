"""Checkpoints in Hugging Face's layout against transformers itself, on tiny random models written here."""

from __future__ import annotations

import copy
import importlib.util
import json

import pytest
import torch

from methods.tokens import checkpoint
from methods.tokens.engine import Sampler, reference_generate
from methods.tokens.scoring import score
from methods.tokens.transformer import Shape, Transformer
from runner.errors import UserError


def needs(*names):
    for name in names:
        if importlib.util.find_spec(name) is None:
            print(f"skipped: {name} is not installed (pip install -e '.[lm,data]')")
            pytest.skip(f"{name} is not installed")
    return pytest.importorskip(names[0])


SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": None,
         "eos_token_id": None}
KINDS = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
}


def write(folder, kind="llama", shard=None, **more):
    """A tiny random model of transformers, in a folder; the model itself."""
    hub = needs("transformers")
    name, settings = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(hub, f"{name}ForCausalLM")(getattr(hub, f"{name}Config")(**{**SIZES, **settings, **more})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return model


def rows():
    torch.manual_seed(1)
    mask = torch.arange(11) >= torch.tensor([0, 4, 9]).unsqueeze(-1)
    return torch.randint(0, 50, (3, 11)), mask


def same_forward(mine, theirs, tolerance=1e-5):
    ids, mask = rows()
    with torch.no_grad():
        truth = theirs(input_ids=ids, attention_mask=mask.long(), position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        found = torch.nn.functional.linear(mine.hidden(ids, mask), mine.head)
        torch.testing.assert_close(found[mask], truth[mask], atol=tolerance * float(truth.abs().max()), rtol=0)
        torch.testing.assert_close(torch.nn.functional.linear(mine.packed(ids), mine.head), theirs(input_ids=ids).logits,
                                   atol=tolerance * float(truth.abs().max()), rtol=0)


@pytest.mark.parametrize("shard", [None, "20KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_round_trip(kind, shard, tmp_path):
    theirs = write(tmp_path / "a", kind, shard)
    assert (tmp_path / "a" / "model.safetensors.index.json").exists() == bool(shard)
    mine = checkpoint.load(tmp_path / "a")
    assert isinstance(mine, Transformer) and mine.shape.context == 64
    same_forward(mine, theirs)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    checkpoint.save(mine, tmp_path / "b")
    again = needs("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert type(again) is type(theirs) and (tmp_path / "b" / "tokenizer.json").exists()
    same_forward(mine, again)
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_policy_is_saved_so_that_transformers_reads_it(bias, tmp_path):
    hub = needs("transformers")
    torch.manual_seed(0)
    mine = Transformer(Shape(50, 32, 2, 4, 2, 48, context=64, qkv_bias=bias, tied=bias, rope_theta=5000.0, norm_eps=1e-4))
    with torch.no_grad():
        for p in mine.parameters():
            p.add_(0.2 * torch.randn_like(p))
    checkpoint.save(mine, tmp_path)
    same_forward(mine, hub.AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    again = checkpoint.load(tmp_path)
    assert again.shape == Shape(**{**mine.shape.__dict__, "head_size": 8})
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), again.state_dict().values()))
    assert checkpoint.load(tmp_path, torch.bfloat16).head.dtype == torch.bfloat16


def write_gguf(file, model: Transformer):
    """A tiny Qwen2 in GGUF's format, float32, with a vocabulary of single letters."""
    gguf, shape = needs("gguf", "transformers"), model.shape
    out = gguf.GGUFWriter(str(file), "qwen2")
    out.add_context_length(shape.context), out.add_block_count(shape.layers), out.add_embedding_length(shape.width)
    out.add_feed_forward_length(shape.mlp_width), out.add_head_count(shape.heads), out.add_head_count_kv(shape.kv_heads)
    out.add_layer_norm_rms_eps(shape.norm_eps), out.add_rope_freq_base(shape.rope_theta)
    out.add_tokenizer_model("gpt2"), out.add_token_list([chr(97 + i) for i in range(shape.vocabulary)])
    out.add_token_merges(["a b"]), out.add_token_types([1] * shape.vocabulary), out.add_eos_token_id(1)
    blocks = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
              **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
              **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, tensor in checkpoint.named(model).items():
        layer, _, kind = name.rpartition(".")
        if layer not in names:
            _, _, i, rest = layer.split(".", 3)
            names[layer] = f"blk.{i}.{blocks[rest]}"
        out.add_tensor(f"{names[layer]}.{kind}", tensor.detach().numpy())
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()


def test_a_gguf_file(tmp_path):
    needs("gguf", "transformers")
    torch.manual_seed(0)
    model = Transformer(Shape(26, 64, 2, 4, 2, 96, context=64, qkv_bias=True, rope_theta=5e3))
    (tmp_path / "inside").mkdir()
    write_gguf(tmp_path / "inside" / "tiny.gguf", model)
    for place in (tmp_path, tmp_path / "inside" / "tiny.gguf"):
        mine = checkpoint.load(place)
        assert mine.shape.width == 64 and mine.shape.kv_heads == 2
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), mine.state_dict().values()))
        ids = torch.arange(20).view(2, 10)
        torch.testing.assert_close(mine.hidden(ids), model.hidden(ids), atol=1e-5, rtol=0)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF....")
    with pytest.raises(UserError, match="broken.gguf"):
        checkpoint.load(tmp_path / "broken.gguf")


def generated(policy, engine):
    torch.manual_seed(2)
    ids, mask = rows()
    return engine(ids, mask, group=3, steps=8, eos=7, pad=0, uniforms=torch.rand(9, 8), temperature=1.3)


def test_another_architecture_is_wrapped(tmp_path):
    hub = needs("transformers")
    torch.manual_seed(0)
    theirs = hub.GPT2LMHeadModel(hub.GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48,
                                                initializer_range=0.3, bos_token_id=None, eos_token_id=None)).eval()
    theirs.save_pretrained(tmp_path / "a")
    mine = checkpoint.load(tmp_path / "a").eval()
    assert not isinstance(mine, Transformer) and tuple(mine.shape) == (50, 32, 64)
    same_forward(mine, theirs)
    fast, slow = generated(mine, Sampler(mine).generate), generated(mine, lambda *a, **k: reference_generate(mine, *a, **k))
    assert torch.equal(fast.response, slow.response) and torch.equal(fast.mask, slow.mask)
    torch.testing.assert_close(fast.log_prob, slow.log_prob, atol=1e-5, rtol=0)
    ids, mask = rows()
    scores = score(mine, ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), fast.response, fast.mask, temperature=1.3)
    torch.testing.assert_close(scores["log_prob"].detach(), fast.log_prob, atol=1e-5, rtol=0)
    checkpoint.save(mine, tmp_path / "b")
    same_forward(mine, hub.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval())


def test_scaled_rotary_positions_are_left_to_transformers(tmp_path):
    theirs = write(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    mine = checkpoint.load(tmp_path).eval()
    assert not isinstance(mine, Transformer)
    same_forward(mine, theirs)


def test_logits_that_are_more_than_a_product_are_refused(tmp_path):
    hub = needs("transformers")
    config = hub.CohereConfig(**{**SIZES, "logit_scale": 0.0625, "pad_token_id": 0})
    hub.CohereForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="CohereForCausalLM can't be a policy"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_adapters(kind, tmp_path):
    needs("peft")
    from methods.tokens.lora import add_lora, reference
    write(tmp_path / "a", kind)
    model = checkpoint.load(tmp_path / "a")
    base = copy.deepcopy(model)
    (ids, mask), state = rows(), base.state_dict()
    trainable = add_lora(model, rank=4, alpha=8.0, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
    assert trainable and all(p.requires_grad for p in trainable)
    assert sum(p.requires_grad for p in model.parameters()) == len(trainable) == 3 * 4 * 2
    torch.testing.assert_close(model.hidden(ids, mask), base.hidden(ids, mask), atol=0, rtol=0)
    with torch.no_grad():
        for p in trainable:
            p.add_(0.1 * torch.randn_like(p))
    assert (model.hidden(ids, mask) - base.hidden(ids, mask)).abs().max() > 0.01
    loss = score(model, ids, mask, ids, torch.ones_like(mask))["log_prob"].sum()
    with reference(model), torch.no_grad():
        assert torch.equal(model.hidden(ids, mask), base.hidden(ids, mask))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)
    fast = generated(model, Sampler(model).generate)
    slow = generated(model, lambda *a, **k: reference_generate(model, *a, **k))
    assert torch.equal(fast.response, slow.response)
    torch.testing.assert_close(fast.log_prob, slow.log_prob, atol=2e-5, rtol=0)
    checkpoint.save(model, tmp_path / "b")
    same_forward(model, needs("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval(), 1e-4)
    assert state.keys() == checkpoint.load(tmp_path / "b").state_dict().keys()


def test_a_target_that_is_no_layer():
    needs("peft")
    from methods.tokens.lora import add_lora
    with pytest.raises(UserError, match="q_proj"):
        add_lora(Transformer(Shape(19, 32, 1, 4, 4, 48)), targets=("q_project",))


# ---- bad input -----------------------------------------------------------------------------------------------------


def new(folder, **config):
    checkpoint.save(Transformer(Shape(19, 32, 1, 4, 4, 48)), folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def test_refusals(tmp_path):
    good = new(tmp_path / "model")
    assert checkpoint.load(good).shape.width == 32
    with pytest.raises(UserError, match="did you mean: model"):
        checkpoint.load(tmp_path / "modle")
    with pytest.raises(UserError, match="no config.json and 0 .gguf"):
        checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="its folder"):
        checkpoint.load(good / "config.json")
    with pytest.raises(UserError, match="BertForMaskedLM, which is no causal"):
        checkpoint.load(new(tmp_path / "bert", architectures=["BertForMaskedLM"], model_type="bert"))
    with pytest.raises(UserError, match="LlamaForSequenceClassification"):
        checkpoint.load(new(tmp_path / "classes", architectures=["LlamaForSequenceClassification"]))
    with pytest.raises(UserError, match=r"lacks 10 of 21 tensors: model.layers.1"):
        checkpoint.load(new(tmp_path / "deeper", num_hidden_layers=2, tie_word_embeddings=False))
    with pytest.raises(UserError, match=r"embed_tokens.weight is \(19, 32\) .* but \(20, 32\)"):
        checkpoint.load(new(tmp_path / "wider", vocab_size=20))
    with pytest.raises(UserError, match="is not JSON"):
        (new(tmp_path / "broken") / "config.json").write_text("{")
        checkpoint.load(tmp_path / "broken")
    with pytest.raises(UserError, match="can't be read"):
        (new(tmp_path / "cut") / "model.safetensors").write_bytes(b"\x10")
        checkpoint.load(tmp_path / "cut")
    with pytest.raises(UserError, match="lacks"):
        (new(tmp_path / "empty") / "model.safetensors").unlink()
        checkpoint.load(tmp_path / "empty")
    with pytest.raises(UserError, match="no package 'no_such_package'"):
        checkpoint.load("package:no_such_package")


def test_missing_extras_are_named(tmp_path, monkeypatch):
    import sys
    for name in ("transformers", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[lm\]'"):
        checkpoint.load(new(tmp_path, architectures=["GPT2LMHeadModel"], model_type="gpt2"))
    from methods.tokens.lora import add_lora
    with pytest.raises(UserError, match=r"pip install -e '\.\[lm\]'"):
        add_lora(Transformer(Shape(19, 32, 1, 4, 4, 48)))


def test_a_tokenizer_and_its_limits(tmp_path):
    hub = needs("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    known = {w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", "one", "two", "three"])}
    words = Tokenizer(models.WordLevel(known, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    kept = hub.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    folder = new(tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        checkpoint.tokenizer(folder)
    kept.save_pretrained(folder)
    policy = checkpoint.load(folder)
    mine = checkpoint.tokenizer(folder, policy=policy)
    assert (mine.size, mine.pad, mine.eos) == (6, 0, 1)
    assert mine.encode("one two") == [3, 4] and mine.decode([5, 4, 1, 0, 3]) == "three two"
    small = Transformer(Shape(5, 32, 1, 4, 4, 48))
    with pytest.raises(UserError, match="vocabulary of 5"):
        checkpoint.tokenizer(folder, policy=small)
    with pytest.raises(UserError, match="no chat template"):
        checkpoint.tokenizer(folder, chat=True)
    kept.chat_template = ("{% for m in messages %}one {{ m.content }}{% endfor %}"
                          "{% if add_generation_prompt %} three{% endif %}")
    kept.save_pretrained(folder)
    assert checkpoint.tokenizer(folder, chat=True).encode("two") == [3, 4, 5]
