"""Scores of responses against the plain computation from whole logits, in float64."""

from __future__ import annotations

import copy

import pytest
import token_policies
import torch
import torch.nn.functional as F

from methods.tokens import scoring
from methods.tokens.scoring import buckets, log_prob, log_prob_and_entropy, score, whole_kl
from methods.tokens.transformer import Shape, Transformer

SMALL = Shape(23, 32, 2, 4, 2, 48, context=64, qkv_bias=True)


def own(logits, target):
    """A measure that has no fast path of its own."""
    return log_prob_and_entropy(logits, target)


def batch(b=7, prompt=6, steps=9, vocabulary=23):
    torch.manual_seed(0)
    prompt_mask = torch.arange(prompt) >= torch.randint(0, prompt, (b, 1))
    mask = torch.arange(steps) < torch.randint(0, steps + 1, (b, 1))
    return (torch.randint(1, vocabulary, (b, prompt)) * prompt_mask, prompt_mask,
            torch.randint(1, vocabulary, (b, steps)) * mask, mask)


def policy(shape=SMALL):
    torch.manual_seed(1)
    model = Transformer(shape)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    return model


def plain(model, prompt, prompt_mask, response, mask, temperature):
    """The same from whole logits in float64: (log_prob, entropy), both (b, T)."""
    ids, whole = torch.cat([prompt, response], 1), torch.cat([prompt_mask, mask], 1)
    heat = temperature.unsqueeze(-1) if torch.is_tensor(temperature) else temperature
    logits = F.linear(model.hidden(ids, whole), model.head)[:, prompt.shape[1] - 1:-1] / heat
    log_p = logits.log_softmax(-1)
    at = log_p.gather(-1, response.unsqueeze(-1)).squeeze(-1)
    return at.where(mask, 0.0), -(log_p.exp() * log_p).sum(-1).where(mask, 0.0)


@pytest.mark.parametrize("measure", [log_prob_and_entropy, log_prob, own])
@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 1000, None])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heat", [1.0, 0.7, "each"])
def test_scores_and_gradients_are_those_of_whole_logits(measure, chunk, tied, heat, monkeypatch):
    monkeypatch.setattr(scoring, "KEPT", 0)  # general measures make their logits again
    data = batch()
    if heat == "each":
        heat = 0.5 + torch.rand(data[2].shape)
    model = policy(Shape(**{**SMALL.__dict__, "tied": tied}))
    exact = copy.deepcopy(model).double()
    weights = torch.randn(2, *data[2].shape)
    out = score(model, *data, measure, heat, chunk)
    truth = dict(zip(("log_prob", "entropy"), plain(exact, *data, heat)))
    for name, value in out.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), truth[name], atol=1e-5, rtol=1e-5)
    sum((w * v).sum() for w, v in zip(weights, out.values())).backward()
    sum((w * truth[name]).sum() for w, name in zip(weights, out)).backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        scale = q.grad.abs().max().clamp(min=1)
        torch.testing.assert_close(p.grad.double() / scale, q.grad / scale, atol=1e-5, rtol=0, msg=name)


def test_the_gradient_of_one_output_alone():
    data, model = batch(), policy()
    for name in ("log_prob", "entropy"):
        mine = torch.autograd.grad(score(model, *data)[name].sum(), list(model.parameters()))
        other = torch.autograd.grad(score(model, *data, own)[name].sum(), list(model.parameters()))
        for a, b in zip(mine, other):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("measure", [log_prob_and_entropy, own])
def test_no_logits_are_kept(measure, monkeypatch):
    monkeypatch.setattr(scoring, "KEPT", 0)
    model, data, sizes = policy(Shape(3001, 16, 1, 2, 2, 16)), batch(vocabulary=3001), []
    def note(t):
        sizes.append(t.shape)
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = score(model, *data, measure, chunk=4)
    assert sizes and all(shape == (3001, 16) or 3001 not in shape for shape in sizes)
    sum(v.sum() for v in out.values()).backward()


@pytest.mark.parametrize("measure", [log_prob_and_entropy, own])
def test_autocast(measure):
    model, data = policy(), batch()
    whole = score(model, *data, measure)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = score(model, *data, measure)
    sum(v.sum() for v in half.values()).backward()
    for name in whole:
        assert half[name].dtype == torch.float32
        assert 0 < (half[name] - whole[name]).abs().max() < 0.3
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_nothing_to_score():
    prompt, prompt_mask, response, mask = batch()
    for measure in (log_prob_and_entropy, own):
        out = score(policy(), prompt, prompt_mask, response, torch.zeros_like(mask), measure)
        assert not out["log_prob"].any()
        out["entropy"].sum().backward()


def test_buckets():
    lengths = torch.tensor([3, 9, 1, 4, 9, 2, 7])
    for settings in ({"rows": 2}, {"tokens": 14}, {"tokens": 5}, {"rows": 3, "tokens": 20}, {}):
        parts = buckets(lengths, **settings)
        assert sorted(torch.cat(parts).tolist()) == list(range(7))
        for part in parts:
            assert len(part) <= settings.get("rows", 7)
            assert len(part) == 1 or int(lengths[part].max()) * len(part) <= settings.get("tokens", 1000)
    assert len(buckets(lengths, tokens=14)) < 7


def test_recomputed_blocks_change_nothing():
    model, data = policy(), batch()
    first = torch.autograd.grad(score(model, *data)["log_prob"].sum(), list(model.parameters()))
    model.model.recompute = True
    second = torch.autograd.grad(score(model, *data)["log_prob"].sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_responses_to_one_prompt_share_its_pass(kv_heads):
    """score_forked is score: values and gradients, with padding on both ends, an empty response and a prompt of one token."""
    model = token_policies.policy(Shape(19, 64, 2, 4, kv_heads, 96, context=512, qkv_bias=True), loud=4.0)
    prompt, prompt_mask = token_policies.prompts(6, 9, 19)
    prompt_mask[0], prompt_mask[0, -1] = False, True
    response, length = torch.randint(3, 19, (18, 7)), torch.randint(0, 8, (18,))
    length[:3] = torch.tensor([7, 0, 1])
    mask = torch.arange(7) < length[:, None]
    gradients = []
    plain = score(model, prompt.repeat(3, 1), prompt_mask.repeat(3, 1), response, mask)
    forked = scoring.score_forked(model, prompt, prompt_mask, response, mask)
    for told in (plain, forked):
        model.zero_grad()
        (told["log_prob"].square() + told["entropy"]).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for key in plain:
        torch.testing.assert_close(forked[key], plain[key], atol=1e-5, rtol=1e-5)
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, atol=1e-4 * float(one.abs().max()), rtol=1e-3)


# ---- another policy's logits beside


def both(logits, target, first):
    return {"forward": whole_kl(logits, first), "reverse": whole_kl(logits, first, reverse=True), **own(logits, target)}


def other_policy():
    torch.manual_seed(2)
    return policy(Shape(**{**SMALL.__dict__, "width": 48, "tied": False}))  # only the vocabulary has to be the same


@pytest.mark.parametrize("chunk", [1, 5, None])
@pytest.mark.parametrize("kept", [0, 2 ** 24])
@pytest.mark.parametrize("heat", [1.0, 0.7, "each"])
def test_exact_kl_to_another_policy_and_its_gradient(chunk, kept, heat, monkeypatch):
    monkeypatch.setattr(scoring, "KEPT", kept)
    data, model, other = batch(), policy(), other_policy()
    if heat == "each":
        heat = 0.5 + torch.rand(data[2].shape)
    exact, known = copy.deepcopy(model).double(), copy.deepcopy(other).double()
    weights = torch.randn(2, *data[2].shape)
    out = score(model, *data, both, heat, chunk, beside=other)
    whole = torch.cat([data[1], data[3]], 1)
    log_p, log_q = ((m.hidden(torch.cat([data[0], data[2]], 1), whole) @ m.head.T)[:, data[0].shape[1] - 1:-1]
                    for m in (exact, known))
    log_p, log_q = ((z / (heat.unsqueeze(-1) if torch.is_tensor(heat) else heat)).log_softmax(-1) for z in (log_p, log_q))
    log_q = log_q.detach()
    truth = {"forward": (log_q.exp() * (log_q - log_p)).sum(-1), "reverse": (log_p.exp() * (log_p - log_q)).sum(-1)}
    for name, value in truth.items():
        assert value[data[3]].min() > 0.01
        torch.testing.assert_close(out[name].double(), value.where(data[3], 0.0), atol=1e-5, rtol=1e-5)
    sum((w * out[name]).sum() for w, name in zip(weights, truth)).backward()
    sum((w * truth[name].where(data[3], 0.0)).sum() for w, name in zip(weights, truth)).backward()
    for (name, p), q in zip(model.named_parameters(), exact.named_parameters()):
        scale = q[1].grad.abs().max().clamp(min=1)
        torch.testing.assert_close(p.grad.double() / scale, q[1].grad / scale, atol=1e-5, rtol=0, msg=name)
    assert all(p.grad is None for p in other.parameters())


def test_the_kl_to_itself_is_nothing_and_of_what_has_no_probability_finite():
    data, model = batch(), policy()
    out = score(model, *data, both, beside=copy.deepcopy(model))
    assert max(out[k].abs().max() for k in ("forward", "reverse")) < 1e-6
    far = torch.tensor([[0.0, -300.0, 5.0]])
    for reverse in (False, True):
        assert whole_kl(far, far.flip(-1), reverse).isfinite().all()
    assert whole_kl(torch.zeros(1, 2), torch.tensor([[0.0, -300.0]])).item() == pytest.approx(torch.tensor(2.0).log().item())


def test_no_logits_of_either_policy_are_kept(monkeypatch):
    monkeypatch.setattr(scoring, "KEPT", 0)
    shape, sizes = Shape(3001, 16, 1, 2, 2, 16), []
    model, other, data = policy(shape), policy(shape), batch(vocabulary=3001)

    def note(t):
        sizes.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = score(model, *data, both, chunk=4, beside=other)
    assert sizes and all(shape == (3001, 16) or 3001 not in shape for shape in sizes)
    out["forward"].sum().backward()


def test_autocast_beside():
    model, other, data = policy(), other_policy(), batch()
    whole = score(model, *data, both, beside=other)["forward"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = score(model, *data, both, beside=other)["forward"]
    half.sum().backward()
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().max() < 0.5


def test_a_policy_without_its_adapters_beside_itself():
    pytest.importorskip("peft")
    from methods.tokens.lora import Unadapted, add_lora
    data, model = batch(), policy(Shape(**{**SMALL.__dict__, "tied": False}))
    base = copy.deepcopy(model)
    trainable = add_lora(model, rank=2, alpha=4.0, targets=("q_proj", "down_proj", "lm_head"))
    with torch.no_grad():
        for p in trainable:
            p.add_(0.3 * torch.randn_like(p))
    mine, copied = (score(model, *data, both, beside=b) for b in (Unadapted(model), base))
    assert mine["forward"].max() > 1e-3
    for name in mine:
        assert torch.equal(mine[name], copied[name])
    gradients = [torch.autograd.grad(out["forward"].sum(), trainable) for out in (mine, copied)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and all(g.abs().sum() > 0 for g in gradients[0])
    assert all(p.requires_grad for p in trainable)
