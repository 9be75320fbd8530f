"""A method under test: assembled at size=smoke on the smallest env that fits, run for some updates, fingerprinted."""

from __future__ import annotations

import torch

from runner.catalogue import Catalogue
from runner.compose import compose
from runner.run import assemble

BOOK = Catalogue()
METHODS = BOOK.names("method")


def smallest(name: str) -> str:
    fits = BOOK.fitting(BOOK.methods(name))
    return next((e for e in ("pointmass", "pointmass_medium", "pendulum") if e in fits), fits[0])


def words_for(name: str, *overrides: str, env: str = "") -> list[str]:
    return [f"method={name}", f"env={env or smallest(name)}", "size=smoke", "logger=none", *overrides]


def assembled(name: str, *overrides: str, book=BOOK, env: str = ""):
    return assemble(compose(words_for(name, *overrides, env=env), book))


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


def same(a: dict, b: dict) -> bool:
    """Bit equality of two states."""
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)
