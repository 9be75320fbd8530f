"""Batches of rollouts cut and joined: dicts of tensors with one row a response (envs/prompts/base.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rows_of(batch: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """The rows `index` (numbers or a mask); groups keep their numbers."""
    return {k: v[index] for k, v in batch.items()}


def groups_of(batch: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """The groups marked in `keep` (groups,), numbered anew from 0."""
    number = keep.long().cumsum(0) - 1
    out = rows_of(batch, keep[batch["group"]])
    return {**out, "group": number[out["group"]]}


def join(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of several: groups, episodes and answers are numbered on, prompts padded (left) to the widest."""
    width = max(b["prompt"].shape[1] for b in batches)
    out: dict[str, list[Tensor]] = {k: [] for k in batches[0]}
    groups = answers = units = 0
    for batch in batches:
        for key, value in batch.items():
            if key in ("prompt", "prompt_mask"):
                value = F.pad(value, (width - value.shape[1], 0))
            elif key == "group":
                value = value + groups
            elif key == "unit":
                value = value + units
            elif key == "answer":
                value = torch.where(value < 0, value, value + answers)
            out[key].append(value)
        groups += int(batch["group"].max()) + 1
        answers += int(batch["answer"].max()) + 1
        units += int(batch["unit"].max()) + 1 if "unit" in batch else 0
    return {k: torch.cat(v) for k, v in out.items()}


def votes(answer: Tensor, group: Tensor) -> Tensor:
    """How many rows of the same group have the same answer, itself included (B,); those without one (-1) are one class."""
    pairs = group * (answer.max() + 2) + answer + 1
    _, number, count = torch.unique(pairs, return_inverse=True, return_counts=True)
    return count[number]
