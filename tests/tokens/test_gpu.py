"""On a GPU: captured rollouts are the reference's, bf16 stays near float32. Without one this prints NOT EXERCISED."""

from __future__ import annotations

import copy

import pytest
import token_policies
import torch

from methods.tokens import scoring
from methods.tokens.engine import Sampler, reference_generate
from methods.tokens.scoring import log_prob_and_entropy, score
from methods.tokens.transformer import Shape, Transformer

if not torch.cuda.is_available():
    print("\ntests/tokens/test_gpu.py: NOT EXERCISED, there is no GPU")
    pytest.skip("no GPU", allow_module_level=True)

SMALL = Shape(19, 64, 2, 4, 2, 96, context=512, qkv_bias=True)
LARGE = Shape(151_936, 64, 2, 4, 4, 96, context=512)
BF16 = {"device_type": "cuda", "dtype": torch.bfloat16}


def heat(logits):
    return 0.5 + logits.std(-1, keepdim=True)


def policy(shape=SMALL, seed=0, loud=12.0) -> Transformer:
    return token_policies.policy(shape, seed, loud).cuda()


def prompts(n, width, vocabulary=19):
    return [t.cuda() for t in token_policies.prompts(n, width, vocabulary)]


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("settings", [
    {}, {"temperature": 0.0}, {"temperature": 1.7}, {"top_p": 0.7}, {"adjust": heat}, {"steps": 1}, {"steps": 300},
], ids=["plain", "greedy", "hot", "nucleus", "adjusted", "one", "long"])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_the_engine_is_the_reference(shape, settings, graph):
    model, other = policy(shape), policy(shape, seed=1)
    sampler = Sampler(model, graph=graph)
    settings = {"group": 4, "steps": 12, "eos": 3, "pad": 0, **settings}
    for turn in range(3):
        torch.manual_seed(turn)
        prompt, mask = prompts(6, 9, shape.vocabulary)
        settings["uniforms"] = torch.rand(24, settings["steps"], device="cuda")
        if turn == 2:  # replayed with other weights
            model.load_state_dict(other.state_dict())
            sampler.refresh()
        mine = sampler.generate(prompt, mask, **settings)
        token_policies.assert_drawn_rightly(model, mine, prompt, mask, **settings)
        if shape is LARGE:
            continue
        plain = reference_generate(model, prompt, mask, **settings)
        same = (mine.response == plain.response).all(-1)
        assert same.float().mean() > 0.9  # a number at the very edge between two tokens may fall on either side
        torch.testing.assert_close(mine.log_prob[same], plain.log_prob[same], atol=1e-4, rtol=0)
        assert torch.equal(mine.mask[same], plain.mask[same])
    assert len(sampler.states) == 1
    state = next(iter(sampler.states.values()))
    assert bool(state.graphs) == (graph and settings["steps"] > 1)
    assert settings["steps"] < 300 or not graph or len(state.graphs) == 4


def test_bf16_copies_are_near():
    model = policy(loud=4.0)
    prompt, mask = prompts(16, 9)
    sampler = Sampler(model)
    with torch.autocast(**BF16):
        out = sampler.generate(prompt, mask, group=4, steps=40, eos=3, pad=0, uniforms=torch.rand(64, 40, device="cuda"))
    assert sampler.copies.dtype == torch.bfloat16
    data = prompt.repeat_interleave(4, 0), mask.repeat_interleave(4, 0), out.response, out.mask
    whole = score(model, *data)["log_prob"]
    with torch.autocast(**BF16):
        half = score(model, *data)["log_prob"]
    assert (out.log_prob - whole).abs().max() < 0.2 and (out.log_prob - half).abs().mean() < 0.02


@pytest.mark.parametrize("chunk", [7, None])
def test_scores_in_bf16_and_on_the_cpu(chunk, monkeypatch):
    monkeypatch.setattr(scoring, "KEPT", 0)
    model = policy(Shape(3001, 64, 2, 4, 2, 96, context=512), loud=4.0)
    prompt, mask = prompts(8, 9, 3001)
    response, ones = torch.randint(1, 3001, (8, 12), device="cuda"), torch.ones(8, 12, dtype=torch.bool, device="cuda")
    own = lambda logits, target: log_prob_and_entropy(logits, target)  # noqa: E731
    exact = copy.deepcopy(model).cpu()
    truth = score(exact, prompt.cpu(), mask.cpu(), response.cpu(), ones.cpu())
    sum(v.sum() for v in truth.values()).backward()
    for measure in (log_prob_and_entropy, own):
        for half, value_error, slope_error in ((False, 1e-3, 1e-3), (True, 0.3, 0.1)):
            model.zero_grad()
            with torch.autocast(enabled=half, **BF16):
                out = score(model, prompt, mask, response, ones, measure, 1.0, chunk)
            sum(v.sum() for v in out.values()).backward()
            for name, v in out.items():
                assert (v.cpu() - truth[name]).abs().max() < value_error
            for p, q in zip(model.parameters(), exact.parameters()):
                assert (p.grad.cpu() - q.grad).norm() < slope_error * q.grad.norm() + 1e-3


def test_no_logits_are_kept():
    """4,096 positions of 151,936 tokens: whole logits would be 2.5 GB in float32, their gradients as much again."""
    model = policy(LARGE, loud=1.0)
    prompt, mask = prompts(32, 8, 151_936)
    response = torch.randint(1, 151_936, (32, 128), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast(**BF16):
        out = score(model, prompt, mask, response, torch.ones_like(response, dtype=torch.bool), chunk=256)
    assert torch.cuda.memory_allocated() - before < 2 ** 28
    sum(v.sum() for v in out.values()).backward()
    assert torch.cuda.max_memory_allocated() - before < 2 ** 30


@pytest.mark.parametrize("half", [False, True])
def test_captured_passes_give_the_usual_gradients(half):
    """The trunk as two graphs (graphed.py), replayed with other rows and other weights."""
    from methods.tokens.graphed import OFTEN, Graphed

    model = policy()
    graphed = Graphed(model)
    for turn in range(OFTEN + 2):
        with torch.autocast(**BF16, enabled=half):  # anew, as the loop does: while it is open it keeps casts of the weights alive
            torch.manual_seed(turn)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.97)
            prompt, mask = prompts(8, 9)
            response = torch.randint(1, 19, (8, 6), device="cuda")
            gradients, values = [], []
            trunk = graphed.trunk(8, 15)
            assert (trunk is not None) == (turn >= OFTEN - 1)
            for through in (trunk, None):
                for p in model.parameters():
                    p.grad = None
                told = score(model, prompt, mask, response, torch.ones_like(response).bool(), trunk=through)
                (told["log_prob"].mean() + 0.1 * told["entropy"].mean()).backward()
                values.append(told["log_prob"].detach().clone())
                gradients.append({k: p.grad.clone() for k, p in model.named_parameters()})
                del told  # as after a step of training: a pass that is still alive ties its parameters to the usual stream
            torch.testing.assert_close(*values, atol=2e-2 if half else 1e-5, rtol=1e-4)
            for key, value in gradients[1].items():
                torch.testing.assert_close(gradients[0][key], value, atol=1e-3 if half else 1e-6, rtol=5e-2 if half else 1e-3)
