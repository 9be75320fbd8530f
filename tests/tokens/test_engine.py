"""The cached engine draws the tokens that plain forwards draw, with the same log-probabilities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from token_policies import CASES, assert_drawn_rightly, policy, prompts

from methods.tokens import sampling
from methods.tokens.engine import Sampler, reference_generate
from methods.tokens.tokenizer import Characters
from methods.tokens.transformer import Shape
from runner.errors import UserError


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("case", CASES)
def test_the_engine_is_the_reference(case, padded):
    model, settings = policy(), {"group": 4, "steps": 12, "eos": 3, "pad": 0, **CASES[case]}
    prompt, mask = prompts(6, 9, 19, padded)
    settings["uniforms"] = torch.rand(6 * settings["group"], settings["steps"])
    sampler = Sampler(model)
    for _ in range(2):  # the second time in used caches
        mine, plain = sampler.generate(prompt, mask, **settings), reference_generate(model, prompt, mask, **settings)
        assert torch.equal(mine.response, plain.response) and torch.equal(mine.mask, plain.mask)
        torch.testing.assert_close(mine.log_prob, plain.log_prob, atol=1e-5, rtol=0)
    assert_drawn_rightly(model, mine, prompt, mask, **settings)
    with pytest.raises(AssertionError):
        assert_drawn_rightly(model, mine._replace(response=mine.response.flip(0)), prompt, mask, **settings)
    if settings["steps"] > 1:
        ended = (mine.response == 3).any(-1)
        assert ended.any() and (case == "long" or not ended.all())
    assert not mine.response[~mine.mask].any() and not mine.log_prob[~mine.mask].any()


@pytest.mark.parametrize("shape", [Shape(19, 32, 2, 4, 4, 48, context=64, tied=False),
                                   Shape(1500, 32, 2, 4, 1, 48, head_size=12)], ids=["untied", "large"])
def test_other_shapes(shape):
    model = policy(shape)
    prompt, mask = prompts(5, 7, shape.vocabulary)
    settings = {"group": 3, "steps": 9, "eos": 3, "pad": 0, "uniforms": torch.rand(15, 9)}
    mine, plain = Sampler(model).generate(prompt, mask, **settings), reference_generate(model, prompt, mask, **settings)
    assert torch.equal(mine.response, plain.response)
    assert_drawn_rightly(model, mine, prompt, mask, **settings)
    torch.testing.assert_close(mine.log_prob, plain.log_prob, atol=1e-5, rtol=0)


def test_log_probs_are_those_of_a_full_forward():
    model = policy()
    prompt, mask = prompts(6, 9, 19)
    out = Sampler(model).generate(prompt, mask, group=2, steps=12, eos=3, pad=0, uniforms=torch.rand(12, 12))
    ids = torch.cat([prompt.repeat_interleave(2, 0), out.response], 1)
    whole = torch.cat([mask.repeat_interleave(2, 0), out.mask], 1)
    log_p = model.logits(ids, whole).log_softmax(-1)[:, 8:-1].gather(-1, out.response.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out.log_prob, log_p.where(out.mask, 0.0), atol=1e-5, rtol=0)


def test_rows_do_not_depend_on_padding_or_company():
    model = policy()
    prompt, mask = prompts(6, 9, 19)
    wide = F.pad(prompt, (4, 0)), F.pad(mask, (4, 0))
    uniforms = torch.rand(12, 10)
    settings = {"group": 2, "steps": 10, "eos": 3, "pad": 0}
    all_of_them = Sampler(model).generate(prompt, mask, uniforms=uniforms, **settings)
    alone = Sampler(model).generate(prompt[2:3], mask[2:3], uniforms=uniforms[4:6], **settings)
    wider = Sampler(model).generate(*wide, uniforms=uniforms, **settings)
    assert torch.equal(all_of_them.response, wider.response) and torch.equal(all_of_them.response[4:6], alone.response)


def test_refresh_brings_new_weights():
    model, other = policy(), policy(seed=1)
    prompt, mask = prompts(6, 9, 19)
    settings = {"group": 2, "steps": 10, "eos": 3, "pad": 0, "uniforms": torch.rand(12, 10)}
    sampler = Sampler(model)
    old = sampler.generate(prompt, mask, **settings)
    model.load_state_dict(other.state_dict())
    assert torch.equal(sampler.generate(prompt, mask, **settings).response, old.response)  # until it is told
    where = sampler.copies.embedding.data_ptr()
    sampler.refresh()
    assert sampler.copies.embedding.data_ptr() == where
    new = reference_generate(other, prompt, mask, **settings)
    assert torch.equal(sampler.generate(prompt, mask, **settings).response, new.response)


def test_low_precision_copies():
    model = policy(loud=4.0)
    prompt, mask = prompts(6, 9, 19)
    settings = {"group": 2, "steps": 10, "eos": 3, "pad": 0, "uniforms": torch.rand(12, 10)}
    out = Sampler(model, dtype=torch.bfloat16).generate(prompt, mask, **settings)
    ids = torch.cat([prompt.repeat_interleave(2, 0), out.response], 1)
    whole = torch.cat([mask.repeat_interleave(2, 0), out.mask], 1)
    log_p = model.logits(ids, whole).log_softmax(-1)[:, 8:-1].gather(-1, out.response.unsqueeze(-1)).squeeze(-1)
    assert out.log_prob.dtype == torch.float32
    assert 0 < (out.log_prob - log_p).where(out.mask, 0.0).abs().max() < 0.1


def test_what_exceeds_the_context_is_refused():
    prompt, mask = prompts(2, 30, 19)
    with pytest.raises(UserError, match="context has 64"):
        Sampler(policy()).generate(prompt, mask, group=1, steps=40, eos=3, pad=0, uniforms=torch.rand(2, 40))


@pytest.mark.parametrize("size", [19, 1024, 1025, 5000])
def test_frequencies_are_the_probabilities(size):
    """Every 1/n-th quantile once: each token comes as often as n times its probability, give or take one."""
    torch.manual_seed(0)
    n = 20_000 if size == 19 else 6_000
    logits = 2 * torch.randn(size)
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5).div(n).float().unsqueeze(-1)
    for temperature, share in ((1.0, None), (0.5, None), (1.0, 0.6)):
        heat = torch.tensor([[temperature]])
        parts = [sampling.draw(logits.expand(len(u), -1), u, heat, share) for u in uniform.split(2000)]
        token, probability = (torch.cat(p).squeeze(-1) for p in zip(*parts))
        p = (logits.double() / temperature).softmax(-1)
        if share:
            ranked = p.sort(descending=True)
            kept = ranked.indices[:int((ranked.values.cumsum(-1) < share).sum()) + 1]
            p = torch.zeros_like(p).index_copy(0, kept, p[kept])
            p = p / p.sum()
        count = token.bincount(minlength=size)
        assert ((count - n * p).abs() < 1 + n * 2e-6).all()
        torch.testing.assert_close(probability.double(), p[token], atol=0, rtol=2e-6)


@pytest.mark.parametrize("size", [7, 1500])
def test_the_ends_of_the_unit_interval(size):
    p = torch.zeros(2, size)
    p[:, 3], p[:, 5] = 0.25, 0.75
    for u, token in ((0.0, 3), (1 - 2.0 ** -24, 5)):
        assert (sampling.choose(p, torch.full((2, 1), u)) == token).all()
    assert (sampling.choose(torch.full((2, size), torch.nan), torch.zeros(2, 1)) < size).all()  # a diverged run's


def test_characters():
    words = Characters("01+=\n", eos="\n")
    assert (words.size, words.pad, words.eos) == (6, 0, 5)
    assert words.decode([*words.encode("1+0=\n"), 0, 0]) == "1+0=\n"
    assert words.decode(torch.tensor([1, 2, 0, 3])) == "01"
    with pytest.raises(UserError, match="'x'"):
        words.encode("1x")


def test_padding_takes_no_part_in_the_forward():
    model = policy()
    prompt, mask = prompts(5, 9, 19)
    hidden = model.hidden(prompt, mask)
    for i in range(5):
        n = int(mask[i].sum())
        torch.testing.assert_close(hidden[i, 9 - n:], model.hidden(prompt[i:i + 1, 9 - n:], None)[0], atol=1e-5, rtol=1e-5)
