"""The search of methods/control/neighbours.py as one Triton kernel for GPUs.

Every program compares a tile of queries with a share of the rows and keeps the smallest squared distance and its row; a
second, small reduction takes the smallest over shares. Nothing of size queries x rows is ever written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_QUERIES = 64
TILE_ROWS = 128
SHARES = 264  # two programs for each multiprocessor of an H100, for every tile of queries


@triton.jit
def _search(queries, columns, best, where, n_queries, n_rows, rows_per_share, shares,
            WIDTH: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr):
    """queries (WIDTH, n_queries), columns (WIDTH, n_rows): one line a dimension, so that loads are contiguous."""
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    share = tl.program_id(1)
    begin = share * rows_per_share
    end = tl.minimum(begin + rows_per_share, n_rows)
    nearest = tl.full((BQ, BR), float("inf"), tl.float32)
    index = tl.zeros((BQ, BR), tl.int32)
    for first in range(begin, end, BR):
        r = first + tl.arange(0, BR)
        distance = tl.zeros((BQ, BR), tl.float32)
        for d in tl.static_range(WIDTH):
            a = tl.load(queries + d * n_queries + q, mask=q < n_queries, other=0.0)
            b = tl.load(columns + d * n_rows + r, mask=r < end, other=float("inf"))
            difference = a[:, None] - b[None, :]
            distance += difference * difference
        closer = distance < nearest
        nearest = tl.where(closer, distance, nearest)
        index = tl.where(closer, r[None, :] + tl.zeros((BQ, BR), tl.int32), index)
    least = tl.min(nearest, 1)
    first_row = tl.min(tl.where(nearest == least[:, None], index, 2147483647), 1)
    tl.store(best + q * shares + share, least, mask=q < n_queries)
    tl.store(where + q * shares + share, first_row, mask=q < n_queries)


class Search:
    def __init__(self, rows: Tensor):
        self.columns = rows.T.contiguous().float()
        self.width, self.rows = self.columns.shape

    def __call__(self, queries: Tensor) -> Tensor:
        """(n, width) -> (n,) int64"""
        n = len(queries)
        tiles = triton.cdiv(n, TILE_QUERIES)
        shares = max(1, min(SHARES // tiles if tiles < SHARES else 1, triton.cdiv(self.rows, TILE_ROWS)))
        share = triton.cdiv(triton.cdiv(self.rows, shares), TILE_ROWS) * TILE_ROWS
        best = torch.empty(n, shares, device=queries.device)
        where = torch.empty(n, shares, device=queries.device, dtype=torch.int32)
        _search[(tiles, shares)](queries.T.contiguous(), self.columns, best, where, n, self.rows, share, shares,
                                 WIDTH=self.width, BQ=TILE_QUERIES, BR=TILE_ROWS, num_warps=8)
        return where.gather(1, best.argmin(1, keepdim=True)).squeeze(1).long()
