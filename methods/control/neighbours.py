"""Exact nearest neighbours by exhaustion, on the device of the data.

Squared distances are sums of squared differences, never ||x||^2 - 2 x y + ||y||^2, whose cancellation picks wrong neighbours
among close ones. On a GPU one fused kernel (methods/control/neighbours_triton.py) keeps the distances in registers; else
rows go by in chunks that fit the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Neighbours:
    """Rows (N, width) to be searched."""

    def __init__(self, rows: Tensor):
        self.rows = rows.contiguous()
        self.kernel = None
        if rows.is_cuda:
            from methods.control import neighbours_triton
            self.kernel = neighbours_triton.Search(self.rows)

    def nearest(self, queries: Tensor, k: int = 1) -> Tensor:
        """queries (n, width) -> indices (n, k) of the k nearest rows, nearest first; the first of equal ones."""
        if self.kernel is not None and k == 1:
            return self.kernel(queries).unsqueeze(1)
        best = index = None
        size = max(1, 2_000_000 // max(1, len(queries)))
        for begin in range(0, len(self.rows), size):
            distances = torch.cdist(queries, self.rows[begin:begin + size], compute_mode="donot_use_mm_for_euclid_dist")
            if k == 1:  # many times faster than topk
                near, where = distances.min(1, keepdim=True)
            else:
                near, where = distances.topk(min(k, distances.shape[1]), largest=False, sorted=True)
            where = where + begin
            if best is not None:
                near, where = torch.cat([best, near], 1), torch.cat([index, where], 1)
                near, order = near.sort(dim=1, stable=True)
                near, where = near[:, :k], where.gather(1, order[:, :k])
            best, index = near, where
        return index
