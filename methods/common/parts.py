"""What additive parts of methods share."""

from __future__ import annotations

from torch import Tensor


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two penalties, either of which may be absent."""
    return b if a is None else a if b is None else a + b
