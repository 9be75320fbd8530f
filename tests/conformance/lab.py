"""A method under test: assembled at size=smoke on the smallest env that fits, run for some updates, fingerprinted.

Two runs serve most tests of a method: `course`, which nothing disturbs, and `interrupted`, which is evaluated, stopped and
continued. Both are kept as bits and numbers."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from runner import catalogue
from runner.catalogue import Catalogue
from runner.checkpoint import Checkpoints
from runner.compose import compose, identity
from runner.interface import Spec
from runner.loop import Loop, aside, seed_everything
from runner.run import assemble
from runner.settings import Loop as Settings

BOOK = Catalogue()
METHODS = BOOK.names("method")
# Methods whose settings need what the smallest env lacks: several tokens, phrases, rankings.
WHERE = {"rrpo": "slots", "ches": "answers", "gradient_entanglement": "answers", "reward_model": "bandit_rankings",
         "best_of_n": "bandit_rankings"}


def smallest(name: str) -> str:
    if name in WHERE:
        return WHERE[name]
    fits = BOOK.fitting(BOOK.methods(name))
    if BOOK.methods(name)[0].card.get("tokens") == "several":
        fits = [e for e in fits if BOOK.get("env", e).card.get("policy") != "arms"]
    return next((e for e in ("pointmass", "pointmass_medium", "pendulum", "countdown", "bandit", "ring") if e in fits), fits[0])


def words_for(name: str, *overrides: str, env: str = "") -> list[str]:
    return [f"method={name}", f"env={env or smallest(name)}", "size=smoke", "logger=none", *overrides]


@functools.cache
def composed(name: str, env: str):
    return compose(words_for(name, env=env), BOOK)


def assembled(name: str, *overrides: str, env: str = ""):
    """Composed once for a method and env; overrides are put in afterwards, checked, which is what Hydra would do with them
    at a hundred times the cost."""
    job = composed(name, env or smallest(name))
    config = json.loads(json.dumps(job.config))
    schemas = {"method": catalogue.composed_knobs(job.methods), "env": catalogue.knobs(job.env)}
    for word in overrides:
        key, _, value = word.partition("=")
        section, _, last = key.rpartition(".")
        value = json.loads(value)
        if section:
            value = next(k for k in schemas[section] if k.name == last).check(value, section)
            config[section][last] = list(value) if isinstance(value, tuple) else value
        else:
            config[last] = value
    return assemble(job._replace(config=config, id=identity(config)))


def train(method, stream, updates: int) -> list[dict]:
    """Updates as the loop makes them; returns their metrics as numbers."""
    out = []
    for _ in range(updates):
        metrics = method.update(stream.next())
        method.updates += 1
        out.append({k: v.item() for k, v in metrics.items()})
    return out


def bits(method) -> dict[str, bytes]:
    """For each tensor of the state what is equal where its bits are, and small enough to be kept."""
    return {k: hashlib.blake2b(f"{v.dtype}{tuple(v.shape)}".encode() + v.detach().contiguous().numpy().tobytes()).digest()
            for k, v in method.state_dict().items()}


def samples(method) -> list | None:
    """What a method that generates makes of three noises; its methods may differ in nothing else."""
    shape = getattr(getattr(method, "spec", None), "sample_shape", None)
    if not shape:
        return None
    g = torch.Generator().manual_seed(0)
    steps = getattr(method.config, "sampler_steps", None)  # samples are compared where as many steps are walked
    return [steps, *method.draw(torch.randn(3, *shape, generator=g), torch.zeros(3, dtype=torch.int64), g).x.tolist()]


class Course(NamedTuple):
    spec: Spec           # of the world
    returned: dict       # by the first update, as it was
    metrics: list[dict]  # of every update, as numbers
    states: list[dict]   # bits before the first update and after each
    finite: bool         # whether the state was, all the time
    histories: list[str]  # tensors of the state that carry an autograd graph: it would grow with every update
    exported: tuple      # (number of tensors, description)
    samples: list | None  # of a method that generates, at the end


def course(name: str, *overrides: str, env: str = "", updates: int = 12) -> Course:
    """A run that nothing disturbs."""
    return _course(name, overrides, env or smallest(name), updates)


@functools.cache
def _course(name, overrides, env, updates):
    method, world, stream = assembled(name, *overrides, env=env)
    returned, states, finite = [], [bits(method)], True
    for _ in range(updates):
        returned.append(method.update(stream.next()))
        method.updates += 1
        states.append(bits(method))
        finite &= all(torch.isfinite(v).all().item() for v in method.state_dict().values() if v.is_floating_point())
    tensors, description = method.export()
    histories = [k for k, v in method.state_dict(keep_vars=True).items() if v.grad_fn is not None]
    metrics = [{k: v.item() for k, v in line.items()} for line in returned]
    return Course(world.spec(), returned[0], metrics, states, finite, histories, (len(tensors), description),
                  samples(method))


class Interrupted(NamedTuple):
    states: dict[int, dict]  # bits after some numbers of updates
    going_on: dict           # metrics of the update after saving
    told: list[str]          # by the process that continued
    continued: list[dict]    # metrics of its updates


@functools.lru_cache(2)
def interrupted(name: str) -> Interrupted:
    """`course` again: evaluated after 2 updates, saved after 5; then loaded into a fresh process's worth of objects, which
    make 5 updates."""
    with tempfile.TemporaryDirectory() as folder:
        def new() -> Loop:
            return Loop(*assembled(name), Settings(steps=10), seed=0, checkpoints=Checkpoints(Path(folder)))

        loop = new()
        states = {}
        train(loop.method, loop.stream, 2)
        states[2] = bits(loop.method)
        with aside():
            loop.world.evaluate(loop.method, 0)
            loop.world.validate(loop.method)
        train(loop.method, loop.stream, 2)
        states[4] = bits(loop.method)
        train(loop.method, loop.stream, 1)
        loop.step = 5
        loop.save()
        going_on, = train(loop.method, loop.stream, 1)
        seed_everything(99)
        loop = new()
        told = loop.resume()
        continued = train(loop.method, loop.stream, 5)
        states[10] = bits(loop.method)
    return Interrupted(states, going_on, told, continued)
