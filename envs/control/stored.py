"""A data set of transitions, kept on the device: the stream of kind `offline`.

Batches are drawn uniformly with replacement. A batch is one gather of whole rows, so that its tensors are views into one
block of memory; columns of truth values come back as 0 and 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runner.draws import BLOCK, Draws
from runner.interface import Stream


class Stored(Stream):
    """`columns`: {name: (N,) or (N, width)}; at least observation, action, reward, terminated, next_observation.
    `seeds`: one number, or a list for batches (seeds, B, …)."""

    lookahead = BLOCK

    def __init__(self, columns: dict[str, Tensor], batch_size: int, seeds: int | list[int], device):
        self.device, self.batch_size = torch.device(device), batch_size
        self.draws = Draws(seeds, device)
        self.taken = 0
        self.replace(columns)

    def data(self) -> dict[str, Tensor]:
        return self._split(self.rows)

    def replace(self, data: dict[str, Tensor]):
        self.widths = [1 if v.dim() == 1 else v.shape[1] for v in data.values()]
        self.flat = [v.dim() == 1 for v in data.values()]
        self.names = list(data)
        parts = [v.to(self.device, torch.float32).reshape(len(v), -1) for v in data.values()]
        self.rows = torch.cat(parts, 1)

    def __len__(self):
        return len(self.rows)

    def ready(self, number: int):
        self.draws.ready(self.taken)

    def take(self) -> dict[str, Tensor]:
        index = self.draws("batch", (self.batch_size,), self.taken, "bits") % len(self.rows)
        self.taken += 1
        rows = self.rows.index_select(0, index.reshape(-1)).view(*index.shape, -1)
        return self._split(rows)

    def _split(self, rows: Tensor) -> dict[str, Tensor]:
        parts = rows.split(self.widths, -1)
        return {n: p.squeeze(-1) if flat else p for n, p, flat in zip(self.names, parts, self.flat)}

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]
