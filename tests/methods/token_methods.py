"""Token methods under test: bare, for their parts alone; or assembled on countdown at size smoke."""

from __future__ import annotations

import dataclasses
import functools

from runner.catalogue import Catalogue
from runner.compose import compose
from runner.interface import make_config
from runner.knobs import knobs_of
from runner.run import assemble

BOOK = Catalogue()


def bare(cls, **values):
    """A method without a policy, for its parts."""
    return cls(make_config([cls.Config], {**{k.name: k.default for k in knobs_of(cls.Config)}, **values}))


@functools.cache
def composed(*words):
    env = () if any(w.startswith("env=") for w in words) else ("env=countdown",)
    return compose([*words, *env, "size=smoke", "logger=none", "hardware=cpu"], BOOK)


def assembled(*words, **settings):
    """settings: of the method, put in after it is built (composing is slow)."""
    method, world, stream = assemble(composed(*words))
    method.config = dataclasses.replace(method.config, **settings)
    return method, world, stream
