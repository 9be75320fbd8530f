"""The search of methods/control/neighbours.py as one Triton kernel for GPUs.

Every program compares a tile of queries with a share of the rows. The product q.x runs on the tensor cores in three TF32
passes, which is float32 up to rounding, and |x|^2 - 2 q.x is kept as the least of each lane (a lane sees every BR-th row of
the share). Rounding there can exceed the distance between close rows, so that at the end all lanes that come within the
rounding error of the least are measured again as sums of squared differences, and the nearest of those is returned. Nothing
of size queries x rows is ever written. Left to chance is only which of two rows is taken that share a lane (1 in BR of the
rows of one share) and whose distances agree up to that error.

Bytes: rows are read once for every tile of queries; multiply-adds: 3 x queries x rows x width, rounded up to 16 or a power of 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_QUERIES = 128
TILE_ROWS = 64
PROGRAMS = 264  # two for each multiprocessor of an H100
ROUNDING = 4e-6  # of |q|^2 + |x|^2: several times the error of the three-pass product


@triton.jit
def _search(queries, rows, squares, slack, best, where, n_queries, n_rows, rows_per_share, shares,
            WIDTH: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr):
    """queries (n_queries, WIDTH), rows (n_rows, WIDTH), padded with zeros; squares (n_rows,) of |x|^2; slack (n_queries,)."""
    q, d, lane = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, WIDTH), tl.arange(0, BR)
    share = tl.program_id(1)
    begin = share * rows_per_share
    end = tl.minimum(begin + rows_per_share, n_rows)
    asked = tl.load(queries + q[:, None] * WIDTH + d[None, :], mask=q[:, None] < n_queries, other=0.0)
    least = tl.full((BQ, BR), float("inf"), tl.float32)
    step = tl.zeros((BQ, BR), tl.int32)
    for first in range(begin, end, BR):
        r = first + lane
        x = tl.load(rows + r[None, :] * WIDTH + d[:, None], mask=r[None, :] < end, other=0.0)
        square = tl.load(squares + r, mask=r < end, other=float("inf"))
        distance = square[None, :] - 2 * tl.dot(asked, x, input_precision="tf32x3")
        closer = distance < least
        least = tl.where(closer, distance, least)
        step = tl.where(closer, first, step)
    bound = tl.min(least, 1) + tl.load(slack + q, mask=q < n_queries, other=0.0)
    near = least <= bound[:, None]
    row = step + lane[None, :]
    exact = tl.zeros((BQ, BR), tl.float32)
    for i in range(WIDTH):
        a = tl.load(queries + q * WIDTH + i, mask=q < n_queries, other=0.0)
        b = tl.load(rows + row * WIDTH + i, mask=near & (row < n_rows), other=0.0)
        exact += (a[:, None] - b) * (a[:, None] - b)
    exact = tl.where(near & (row < end), exact, float("inf"))
    nearest = tl.min(exact, 1)
    chosen = tl.min(tl.where(exact == nearest[:, None], row, 2147483647), 1)
    tl.store(best + q * shares + share, nearest, mask=q < n_queries)
    tl.store(where + q * shares + share, chosen, mask=q < n_queries)


class Search:
    def __init__(self, rows: Tensor):
        self.count, width = rows.shape
        self.width = max(16, triton.next_power_of_2(width))
        self.centre = rows.double().mean(0).float()  # smaller norms, smaller rounding
        self.rows = torch.nn.functional.pad(rows.float() - self.centre, (0, self.width - width)).contiguous()
        self.squares = self.rows.square().sum(1)
        self.largest = self.squares.max()

    def __call__(self, queries: Tensor) -> Tensor:
        """(n, width) -> (n,) int64"""
        n = len(queries)
        asked = torch.nn.functional.pad(queries - self.centre, (0, self.width - queries.shape[1]))
        slack = ROUNDING * (asked.square().sum(1) + self.largest)
        tiles = triton.cdiv(n, TILE_QUERIES)
        shares = max(1, min(PROGRAMS // tiles, triton.cdiv(self.count, TILE_ROWS)))
        share = triton.cdiv(triton.cdiv(self.count, shares), TILE_ROWS) * TILE_ROWS
        best = torch.empty(n, shares, device=queries.device)
        where = torch.empty(n, shares, device=queries.device, dtype=torch.int32)
        _search[(tiles, shares)](asked, self.rows, self.squares, slack, best, where, n, self.count, share, shares,
                                 WIDTH=self.width, BQ=TILE_QUERIES, BR=TILE_ROWS, num_warps=8, num_stages=3)
        return where.gather(1, best.argmin(1, keepdim=True)).squeeze(1).long()
