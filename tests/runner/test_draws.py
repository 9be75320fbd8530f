"""Random numbers by (seed, name, update)."""

from __future__ import annotations

import pytest
import torch

from runner.draws import BLOCK, Draws


def test_numbers_depend_on_seed_name_and_update_alone():
    a, b = Draws(3), Draws(3)
    b("other", (4,), 0), b("noise", (2, 2), 7 * BLOCK)  # what else was drawn, and in which order, does not matter
    for update in (0, 1, BLOCK - 1, BLOCK, 5 * BLOCK + 3, 2):
        assert torch.equal(a("noise", (2, 2), update), b("noise", (2, 2), update))
    first = a("noise", (2, 2), 0).clone()
    assert not torch.equal(first, a("noise", (2, 2), 1))
    assert not torch.equal(first, a("noise", (2, 2), BLOCK))
    assert not torch.equal(first, a("noise2", (2, 2), 0))
    assert not torch.equal(first, Draws(4)("noise", (2, 2), 0))


def test_several_seeds_get_the_numbers_that_each_would_get_alone():
    together = Draws([5, 6, 9])
    for kind in ("normal", "uniform", "bits"):
        for update in (0, 3, BLOCK):
            expected = torch.stack([Draws(s)(kind, (7, 2), update, kind) for s in (5, 6, 9)])
            assert torch.equal(together(kind, (7, 2), update, kind), expected)


def test_kinds_are_what_they_say():
    draws = Draws(0)
    normal, uniform = draws("n", (40_000,), 0), draws("u", (40_000,), 0, "uniform")
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    bits = draws("b", (40_000,), 0, "bits")
    assert bits.min() >= 0 and bits.dtype == torch.int64
    assert torch.bincount(bits % 10).min() > 3700  # of 4,000 each
    assert draws("empty", (), 0).shape == ()


def test_ready_fills_every_known_name_once():
    draws = Draws(1)
    view = draws("a", (3,), 0)
    draws.ready(BLOCK)
    assert draws.blocks == {"a": 1} and torch.equal(view, Draws(1)("a", (3,), BLOCK))
    with pytest.raises(KeyError):
        draws.held["b"]
