"""What every method must hold to. A new method is tested here by existing: nothing has to be added."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from runner import catalogue
from runner.catalogue import Catalogue
from runner.checkpoint import Checkpoints
from runner.compose import compose
from runner.loop import rng_state, seed_everything, set_rng_state

_spec = importlib.util.spec_from_file_location("lab", Path(__file__).with_name("lab.py"))
lab = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)

every_method = pytest.mark.parametrize("name", lab.METHODS)


@every_method
def test_one_update_changes_parameters_and_nothing_becomes_infinite(name):
    method, _, stream = lab.assembled(name)
    before = lab.weights(method)
    metrics = lab.train(method, stream, 4)
    after = lab.weights(method)
    assert not lab.same(before, after)
    assert all(torch.isfinite(v).all() for v in after.values() if v.is_floating_point())
    assert all(abs(v) < float("inf") for line in metrics for v in line.values())


@every_method
def test_metrics_are_scalar_tensors_without_gradient(name):
    method, _, stream = lab.assembled(name)
    metrics = method.update(stream.next())
    assert metrics and all(torch.is_tensor(v) and v.numel() == 1 and not v.requires_grad for v in metrics.values())


@every_method
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(name):
    runs = []
    for seed in (3, 3, 4):
        method, _, stream = lab.assembled(name, f"seed={seed}")
        lab.train(method, stream, 4)
        runs.append(lab.weights(method))
    assert lab.same(runs[0], runs[1])
    assert not lab.same(runs[0], runs[2])


@every_method
def test_state_round_trips_through_a_checkpoint(name, tmp_path):
    """Stop after 5 updates, load into a fresh process's worth of objects, go on: bit-equal to going on."""
    from runner.loop import Loop
    from runner.settings import Loop as Settings

    def new():
        method, world, stream = lab.assembled(name)
        return Loop(method, world, stream, Settings(steps=10), seed=0, checkpoints=Checkpoints(tmp_path))

    first = new()
    lab.train(first.method, first.stream, 5)
    first.step = 5
    first.save()
    told = lab.train(first.method, first.stream, 5)
    seed_everything(99)
    second = new()
    assert second.resume() == ["continuing from step 5"]
    assert lab.train(second.method, second.stream, 5) == told
    assert lab.same(lab.weights(first.method), lab.weights(second.method))


@every_method
def test_evaluation_does_not_touch_training(name):
    from runner.loop import aside

    results = []
    for evaluate in (False, True):
        method, world, stream = lab.assembled(name)
        lab.train(method, stream, 2)
        if evaluate:
            with aside():
                world.evaluate(method, 0)
                world.validate(method)
        lab.train(method, stream, 2)
        results.append(lab.weights(method))
    assert lab.same(*results)


@every_method
def test_neutral_knobs_are_the_baseline_bit_for_bit(name):
    card = lab.BOOK.get("method", name).card
    if "baseline" not in card:
        assert not card.get("changes"), "a method that changes parts names its baseline"
        return
    neutral = [f"method.{k}={json.dumps(v)}" for k, v in card["neutral"].items()]
    ours, _, stream = lab.assembled(name, *neutral)
    told = lab.train(ours, stream, 12)
    theirs, _, stream = lab.assembled(card["baseline"], env=lab.smallest(name))  # seeds the global generator again
    expected = lab.train(theirs, stream, 12)
    assert [{k: line[k] for k in of} for line, of in zip(told, expected)] == expected  # it may tell more
    mine, base = lab.weights(ours), lab.weights(theirs)
    assert base.keys() <= mine.keys()
    assert lab.same({k: mine[k] for k in base}, base)
    default, world, stream = lab.assembled(name)
    lab.train(default, stream, 12)
    changed = lab.weights(default)
    assert samples(ours, world) == samples(theirs, world)
    assert not lab.same({k: changed.get(k, torch.empty(0)) for k in base}, base) or \
        samples(default, world) != samples(theirs, world), "the defaults are neutral, too"


def samples(method, world) -> list | None:
    """What a method that generates makes of three noises; its methods may differ in nothing else."""
    shape = world.spec().sample_shape
    if not shape:
        return None
    g = torch.Generator().manual_seed(0)
    return method.draw(torch.randn(3, *shape, generator=g), torch.zeros(3, dtype=torch.int64), g).x.tolist()


@every_method
def test_the_card_names_the_parts_that_are_overridden(name):
    entry = lab.BOOK.get("method", name)
    assert entry.card["changes"] == catalogue.changed_parts(entry)
    cls = catalogue.load_class(entry)
    own = set(cls.__mro__) - set(cls.__bases__[-1].__mro__)  # mixins, too
    assert entry.card["changes"] == [p for p in cls.PARTS if any(p in vars(c) for c in own)]
    assert set(cls.ADDITIVE) <= set(cls.PARTS)


def alternatives(knob):
    """Other values that a knob may take; one of them at least must change something."""
    if knob.choices:
        return [c for c in knob.choices if c != knob.default]
    if knob.type == "bool":
        return [not knob.default]
    if knob.type == "float | None":
        tried = [0.1, 1.0, 5.0, None]
    elif knob.type == "int":
        tried = [knob.default + 1, knob.default * 2, knob.default // 2, 1, 2, 3]
    elif knob.type == "float":
        tried = [knob.default * 2, knob.default / 2, knob.default * 20, knob.default / 20, 0.0, -1.0, 0.3, 1.0]
    else:
        tried = [[9] * len(knob.default)]
    out = []
    for value in tried:
        try:
            if knob.check(value, "method") != knob.default and value not in out:
                out.append(value)
        except Exception:  # out of range
            continue
    return out


def updates_of(world) -> int:
    return 3 if world.spec().alphabet else 5  # token policies take longer, and all that acts does so early


def final(method, world):
    """What is left after training: the state's bits, and actions of a method that acts, samples of one that generates."""
    torch.manual_seed(0)
    size = world.spec().observation_size
    acts = method.act(torch.ones(3, size), explore=True).tolist() if size else None
    return lab.digest(method), acts, samples(method, world)


@functools.lru_cache(64)
def fingerprint(name, *overrides):
    method, world, stream = lab.assembled(name, *overrides)
    return lab.train(method, stream, updates_of(world)), final(method, world)


def differs(name, usual, *overrides) -> bool:
    """Whether these settings give another course than `usual`; looked at update by update, to stop at the first that tells."""
    method, world, stream = lab.assembled(name, *overrides)
    return any(lab.train(method, stream, 1) != [line] for line in usual[0]) or final(method, world) != usual[1]


@pytest.mark.parametrize(("name", "knob"), [(n, k) for n in lab.METHODS for k in catalogue.knobs(lab.BOOK.get("method", n))],
                         ids=lambda v: v if isinstance(v, str) else v.name)
def test_every_knob_changes_something(name, knob):
    """Under the settings its `when` names, another value changes weights, metrics or actions within a few updates."""
    context = [f"{k if '.' in k else 'method.' + k}={json.dumps(v[0] if isinstance(v, list) else v)}"
               for k, v in (knob.when or {}).items()]

    usual = fingerprint(name, *context)
    assert any(differs(name, usual, *context, f"method.{knob.name}={json.dumps(v)}") for v in alternatives(knob)), \
        f"no value of {name}.{knob.name} changes anything"


@every_method
def test_golden_trajectory(name):
    """The first updates as they were when the method was accepted (scripts/golden.py writes them anew)."""
    golden = json.loads((Path(__file__).parent.parent / "golden" / f"{name}.json").read_text())
    method, _, stream = lab.assembled(name)
    for line, expected in zip(lab.train(method, stream, len(golden["metrics"])), golden["metrics"], strict=True):
        assert line == pytest.approx(expected, rel=2e-3, abs=1e-5)  # other processors round differently


@every_method
def test_smoke_is_quick_and_complete(name, tmp_path):
    import time

    import lightning.fabric  # noqa: F401

    from runner.run import execute
    began = time.process_time()
    job = compose(lab.words_for(name, f"runs={tmp_path}"), Catalogue())
    result = execute(job, quiet=True)
    assert result["status"] == "done" and result["metrics"]
    spec = lab.assembled(name)[1].spec()
    if spec.observation_size:  # it acts
        zero = [] if spec.actions else ["all-zero action"]  # none of numbered actions is zero force
        assert "return" in result["metrics"] and {"random policy", *zero} <= result["references"].keys()
    assert time.process_time() - began < 15  # the aim is 3 s; a loaded machine is given room


@every_method
def test_export_describes_what_it_holds(name):
    method, _, _ = lab.assembled(name)
    tensors, description = method.export()
    assert tensors and description["kind"] and all(isinstance(v, str) for v in description.values())


def test_random_state_round_trips_through_json_types(tmp_path):
    import random

    import numpy as np

    seed_everything(5)
    torch.randn(3), np.random.randn(3), random.random()
    Checkpoints(tmp_path).save(1, {"rng": rng_state()})
    expected = torch.randn(4).tolist(), np.random.randn(4).tolist(), random.random()
    seed_everything(6)
    set_rng_state(Checkpoints(tmp_path).load(1)["rng"])
    assert (torch.randn(4).tolist(), np.random.randn(4).tolist(), random.random()) == expected
