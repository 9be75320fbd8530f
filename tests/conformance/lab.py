"""A method under test: assembled at size=smoke on the smallest env that fits, run for some updates, fingerprinted."""

from __future__ import annotations

import functools
import hashlib
import json

import torch

from runner import catalogue
from runner.catalogue import Catalogue
from runner.compose import compose, identity
from runner.run import assemble

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
def _composed(name: str, env: str):
    return compose(words_for(name, env=env), BOOK)


def assembled(name: str, *overrides: str, env: str = ""):
    """Composed once for a method and env; overrides are put in afterwards, checked, which is what Hydra would do with them
    at a hundred times the cost."""
    job = _composed(name, env)
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


def weights(method) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in method.state_dict().items()}


def digest(method) -> str:
    """The state's bits, in short."""
    out = hashlib.blake2b()
    for key, value in method.state_dict().items():
        out.update(key.encode() + value.detach().contiguous().numpy().tobytes())
    return out.hexdigest()


def same(a: dict, b: dict) -> bool:
    """Bit equality of two states."""
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)
