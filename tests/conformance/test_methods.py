"""What every method must hold to. A new method is tested here by existing: nothing has to be added."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from runner import catalogue
from runner.checkpoint import Checkpoints
from runner.errors import UserError
from runner.loop import rng_state, seed_everything, set_rng_state

_spec = importlib.util.spec_from_file_location("lab", Path(__file__).with_name("lab.py"))
lab = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)

every_method = pytest.mark.parametrize("name", lab.METHODS)


@every_method
def test_one_update_changes_parameters_and_nothing_becomes_infinite(name):
    course = lab.course(name)
    assert course.states[0] != course.states[4]
    assert course.finite
    assert all(abs(v) < float("inf") for line in course.metrics for v in line.values())
    assert not course.histories


@every_method
def test_metrics_are_scalar_tensors_without_gradient(name):
    metrics = lab.course(name).returned
    assert metrics and all(torch.is_tensor(v) and v.numel() == 1 and not v.requires_grad for v in metrics.values())


@every_method
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(name):
    course, again = lab.course(name), lab.interrupted(name)
    assert again.states[2] == course.states[2]  # the next test compares two updates more
    method, _, stream = lab.assembled(name, "seed=4")
    assert any(lab.train(method, stream, 1) and lab.bits(method) != state for state in course.states[1:5])


@every_method
def test_evaluation_does_not_touch_training(name):
    assert lab.interrupted(name).states[4] == lab.course(name).states[4]


@every_method
def test_state_round_trips_through_a_checkpoint(name):
    """Stopped after 5 updates, loaded into a fresh process's worth of objects, continued: bit-equal to going on."""
    course, again = lab.course(name), lab.interrupted(name)
    assert again.going_on == course.metrics[5], "saving disturbs training"
    assert again.told == ["continuing from step 5"]
    assert again.continued == course.metrics[5:10]
    assert again.states[10] == course.states[10]


@every_method
def test_neutral_knobs_are_the_baseline_bit_for_bit(name):
    card = lab.BOOK.get("method", name).card
    if "baseline" not in card:
        assert not card.get("changes"), "a method that changes parts names its baseline"
        return
    neutral = [f"method.{k}={json.dumps(v)}" for k, v in card["neutral"].items()]
    ours, _, stream = lab.assembled(name, *neutral)
    told, mine = lab.train(ours, stream, 12), lab.bits(ours)
    expected = lab.course(card["baseline"], env=lab.smallest(name))
    shared = [{k: line[k] for k in of} for line, of in zip(told, expected.metrics, strict=True)]
    assert shared == expected.metrics  # it may tell more
    assert expected.finite
    base = expected.states[12]
    assert base.keys() <= mine.keys()
    assert {k: mine[k] for k in base} == base
    drawn = lab.samples(ours)
    assert drawn == expected.samples or drawn[0] != expected.samples[0]
    changed = lab.course(name)
    assert {k: changed.states[12].get(k) for k in base} != base or changed.samples != expected.samples, \
        "the defaults are neutral, too"


@every_method
def test_the_card_names_the_parts_that_are_overridden(name):
    entry = lab.BOOK.get("method", name)
    assert entry.card["changes"] == catalogue.changed_parts(entry)
    cls = catalogue.load_class(entry)
    own = set(cls.__mro__) - set(cls.__bases__[-1].__mro__)  # mixins, too
    assert entry.card["changes"] == [p for p in cls.PARTS if any(p in vars(c) for c in own)]
    assert set(cls.ADDITIVE) <= set(cls.PARTS)


def alternatives(knob):
    """Other values that a knob may take; one of them at least must change something. The likeliest come first: less work, or
    far from the default."""
    if knob.choices:
        return [c for c in knob.choices if c != knob.default]
    if knob.type == "bool":
        return [not knob.default]
    if knob.type == "float | None":
        tried = [0.1, 1.0, 5.0, None]
    elif knob.type == "int":
        tried = [3, knob.default // 2, knob.default * 2, knob.default + 1, 2, 1]
    elif knob.type == "float":
        tried = [knob.default / 20, knob.default * 20, knob.default * 2, knob.default / 2, 0.0, -1.0, 0.3, 1.0]
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


@functools.lru_cache(16)
def actions(name, *overrides):
    """Of a method that acts, samples of one that generates, after training."""
    return act(*lab.assembled(name, *overrides))


def act(method, world, stream, updates=None):
    lab.train(method, stream, updates_of(world) if updates is None else updates)
    torch.manual_seed(0)
    size = world.spec().observation_size
    return method.act(torch.ones(3, size), explore=True).tolist() if size else lab.samples(method)


def differs(name, context, *overrides) -> bool:
    """Whether these settings give another course than the context alone; looked at update by update, to stop at the first
    that tells. Not if they do not go together."""
    try:
        method, world, stream = lab.assembled(name, *context, *overrides)
    except UserError:
        return False
    updates = updates_of(world)
    usual = lab.course(name, *context, updates=updates) if context else lab.course(name)
    for line, state in zip(usual.metrics[:updates], usual.states[1:]):
        if lab.train(method, stream, 1) != [line] or lab.bits(method) != state:
            return True
    return act(method, world, stream, 0) != actions(name, *context)


@pytest.mark.parametrize(("name", "knob"), [(n, k) for n in lab.METHODS for k in catalogue.knobs(lab.BOOK.get("method", n))],
                         ids=lambda v: v if isinstance(v, str) else v.name)
def test_every_knob_changes_something(name, knob):
    """Under the settings its `when` names, another value changes weights, metrics or actions within a few updates."""
    context = [f"{k if '.' in k else 'method.' + k}={json.dumps(v[0] if isinstance(v, list) else v)}"
               for k, v in (knob.when or {}).items()]

    assert any(differs(name, context, f"method.{knob.name}={json.dumps(v)}") for v in alternatives(knob)), \
        f"no value of {name}.{knob.name} changes anything"


@every_method
def test_golden_trajectory(name):
    """The first updates as they were when the method was accepted (scripts/golden.py writes them anew)."""
    golden = json.loads((Path(__file__).parent.parent / "golden" / f"{name}.json").read_text())["metrics"]
    for line, expected in zip(lab.course(name).metrics[:len(golden)], golden, strict=True):
        assert line == pytest.approx(expected, rel=2e-3, abs=1e-5)  # other processors round differently


@every_method
def test_smoke_is_quick_and_complete(name, tmp_path):
    import time

    from runner.fabric import fabric_class
    from runner.run import execute
    fabric_class()  # its import is no method's
    began = time.process_time()
    job = lab.composed(name, lab.smallest(name))
    result = execute(job._replace(config={**job.config, "runs": str(tmp_path)}), quiet=True)
    assert result["status"] == "done" and result["metrics"]
    spec = lab.course(name).spec
    if spec.observation_size:  # it acts
        zero = [] if spec.actions else ["all-zero action"]  # none of numbered actions is zero force
        assert "return" in result["metrics"] and {"random policy", *zero} <= result["references"].keys()
    assert time.process_time() - began < 15  # the aim is 3 s; a loaded machine is given room


@every_method
def test_export_describes_what_it_holds(name):
    tensors, description = lab.course(name).exported
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
