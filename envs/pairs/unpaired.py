"""Responses that are good or bad each for itself: batches of kind `unpaired`, dicts of tensors with b rows:

    prompt, prompt_mask (b, Tp); response, mask (b, T); label (b,): 1 desirable, 0 undesirable

A prompt may have any number of responses of either kind. They come from files (envs/pairs/textlabels.py), or from pairs that are
taken apart: `split`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from envs.pairs.base import PairWorld, Stored, digest
from envs.pairs.task import Pair
from runner.errors import UserError


class Row(NamedTuple):
    """label: 1 desirable, 0 undesirable."""

    prompt: str
    response: str
    label: float


def split(pairs: Sequence[Pair], keep_desirable: float, one_each: bool, seed: str) -> list[Row]:
    """Both sides of every pair, or one of them at random; of the desirable ones a random share is kept, one at least."""
    rng, good, bad = random.Random(seed), [], []
    for p in pairs:
        sides = [Row(p.prompt, p.chosen, p.label), Row(p.prompt, p.rejected, 1 - p.label)]
        for row in [rng.choice(sides)] if one_each else sides:
            (good if row.label > 0.5 else bad).append(row)
    return rng.sample(good, max(1, round(keep_desirable * len(good)))) + bad


def encode_rows(method, rows: Sequence[Row]) -> dict[str, Tensor]:
    """The columns of a batch `unpaired`, for all of them."""
    prompt, prompt_mask = method.encode([r.prompt for r in rows])
    response, mask = method.encode_responses([r.response for r in rows])
    label = torch.tensor([r.label for r in rows], device=prompt.device)
    return {"prompt": prompt, "prompt_mask": prompt_mask, "response": response, "mask": mask.float(), "label": label}


def stored(world: PairWorld, method, rows: Sequence[Row]) -> Stored:
    """The stream of these rows."""
    rows = rows[:world.config.limit or None]
    if not rows:
        raise UserError("this env has no labelled responses to learn from")
    desirable = sum(r.label > 0.5 for r in rows)
    world.told = {"responses": len(rows), "desirable": desirable, "digest": digest(rows)}
    return Stored(encode_rows(method, rows), world._start(), world.config.batch_size, method.seed, method.processes)
