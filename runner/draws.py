"""Random numbers of updates as a pure function of (seed, name, number of the update).

A generator seeded from those three fills a block of BLOCK updates at once. Therefore nothing has to be saved; a method that
draws more does not shift what another draws (arms of a claim share batches and noise); several seeds trained at once get
the numbers that each would get alone; and a captured CUDA graph reads its numbers from where the block is filled in.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

BLOCK = 10  # updates drawn at once; also the number of updates that a CUDA graph holds at most


class Draws:
    """`seeds`: one number, or a list for a leading axis of that length."""

    def __init__(self, seeds: int | list[int] = 0, device: torch.device | str = "cpu"):
        self.batched = isinstance(seeds, list)
        self.seeds = seeds if self.batched else [seeds]
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device)
        self.held: dict[str, Tensor] = {}      # name -> (seeds, BLOCK, …)
        self.kinds: dict[str, str] = {}
        self.blocks: dict[str, int] = {}       # name -> which block is held

    def __call__(self, name: str, shape: tuple[int, ...], update: int, kind: str = "normal") -> Tensor:
        """Numbers of `shape` (behind the axis of seeds, if there is one) for one update. kind: normal; uniform in [0, 1);
        bits, 63 random ones in an int64. The tensor is a view that the next block overwrites: do not change it."""
        held = self.held.get(name)
        if held is None or held.shape[2:] != shape:
            dtype = torch.int64 if kind == "bits" else torch.float32
            held = self.held[name] = torch.empty(len(self.seeds), BLOCK, *shape, dtype=dtype, device=self.device)
            self.kinds[name], self.blocks[name] = kind, -1
        if self.blocks[name] != update // BLOCK:
            self._fill(name, update // BLOCK)
        numbers = held[:, update % BLOCK]
        return numbers if self.batched else numbers[0]

    def ready(self, update: int):
        """Fill every name known so far for the block of `update`, before a captured graph reads it."""
        block = update // BLOCK
        for name, held in self.blocks.items():
            if held != block:
                self._fill(name, block)

    def _fill(self, name: str, block: int):
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"numbers '{name}' were first asked for inside a captured update")
        held, kind = self.held[name], self.kinds[name]
        for values, seed in zip(held, self.seeds):
            text = f"{seed}/{name}/{block}".encode()
            self.generator.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1)
            if kind == "normal":
                values.normal_(generator=self.generator)
            elif kind == "uniform":
                values.uniform_(generator=self.generator)
            else:
                values.random_(generator=self.generator)
        self.blocks[name] = block
