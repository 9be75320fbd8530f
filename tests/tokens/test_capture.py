"""The course of a captured rollout where there is no GPU: tensors pretend to be on one, a graph runs what it was given.

What only a GPU can tell (whether the step can be captured at all) is left to test_gpu.py."""

from __future__ import annotations

import contextlib

import pytest
import torch
from token_policies import CASES, policy, prompts

from methods.tokens import engine
from methods.tokens.engine import Sampler, reference_generate
from methods.tokens.scoring import score
from methods.tokens.transformer import Shape

SMALL = Shape(19, 32, 2, 4, 2, 48, context=512, qkv_bias=True)
LARGE = Shape(3001, 32, 2, 4, 4, 48, context=512, tied=False)


@pytest.fixture
def pretend(monkeypatch):
    """A list of (slot, width) of the steps that graphs replayed."""
    replayed, recording, plain, product = [], [], Sampler._advance, torch.mm

    class Graph:
        def replay(self):
            self.step()

        def pool(self):
            return None

    class Stream:
        def wait_stream(self, _):
            pass

    @contextlib.contextmanager
    def record(graph, pool=None):
        recording.append(graph)
        yield
        recording.pop()

    def advance(self, state, width):
        def step():
            replayed.append((int(state.slot), width))
            plain(self, state, width)

        if recording:  # nothing is executed
            recording[-1].step = step
        else:
            plain(self, state, width)

    def wide(a, b, out_dtype=None):
        return product(a, b) if out_dtype is None else product(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    for name, stand_in in {"Stream": Stream, "current_stream": Stream, "stream": lambda s: contextlib.nullcontext(),
                           "synchronize": lambda: None, "CUDAGraph": Graph, "graph": record}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "mm", wide)
    monkeypatch.setattr(engine.Sampler, "_advance", advance)
    return replayed


@pytest.mark.parametrize("case", [*CASES, "very long"])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_replayed_rollouts_are_the_reference(shape, case, pretend):
    settings = {"group": 4, "steps": 12, "eos": 3, "pad": 0, **CASES.get(case, {"steps": 280, "group": 1})}
    model = policy(shape)
    sampler = Sampler(model)
    for seed in range(2):
        if seed:
            model.load_state_dict(policy(shape, seed).state_dict())
            sampler.refresh()
        pretend.clear()
        prompt, mask = prompts(6, 9, shape.vocabulary)
        settings["uniforms"] = torch.rand(6 * settings["group"], settings["steps"])
        mine, plain = sampler.generate(prompt, mask, **settings), reference_generate(model, prompt, mask, **settings)
        same = (mine.response == plain.response).all(-1)
        assert same.all() or (case == "very long" and same.float().mean() > 0.9)  # a number at the edge of two tokens
        assert torch.equal(mine.mask[same], plain.mask[same])
        torch.testing.assert_close(mine.log_prob[same], plain.log_prob[same], atol=1e-4, rtol=0)
        assert [slot for slot, _ in pretend] == list(range(9, 9 + len(pretend)))
        assert all(slot < width for slot, width in pretend)
    if shape is LARGE:  # no row ends
        assert len(pretend) == settings["steps"] - 1
        assert len({width for _, width in pretend}) == (0 if case == "one token" else 4 if case == "very long" else 1)
    assert len(sampler.states) == 1


def test_shapes_are_forgotten_and_a_new_function_is_captured(pretend):
    model = policy()
    sampler = Sampler(model)
    prompt, mask = prompts(2, 5, 19)

    def generate(steps, adjust=None):
        settings = {"group": 1, "steps": steps, "eos": 3, "pad": 0, "uniforms": torch.full((2, steps), 0.5)}
        return sampler.generate(prompt, mask, adjust=adjust, **settings)

    for steps in range(2, 4 + engine.KEPT):
        generate(steps)
    assert len(sampler.states) == engine.KEPT
    cold, hot = generate(8, lambda x: torch.full_like(x[:, :1], 0.01)), generate(8, lambda x: torch.full_like(x[:, :1], 9.0))
    assert (cold.log_prob[:, 0] > -0.01).all() and (hot.log_prob[:, 0] < -0.1).all()


def test_bf16(pretend):
    model = policy(LARGE, loud=4.0)
    prompt, mask = prompts(6, 9, 3001)
    settings = {"group": 4, "steps": 20, "eos": 3, "pad": 0, "uniforms": torch.rand(24, 20)}
    out = Sampler(model, dtype=torch.bfloat16).generate(prompt, mask, **settings)
    data = prompt.repeat_interleave(4, 0), mask.repeat_interleave(4, 0), out.response, out.mask
    whole = score(model, *data)["log_prob"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = score(model, *data)["log_prob"]
    assert 0 < (out.log_prob - whole).abs().max() < 0.1 and (out.log_prob - half).abs().mean() < 0.01
