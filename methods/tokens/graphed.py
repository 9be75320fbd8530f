"""The trunk's forward and backward as two CUDA graphs: small models are bound by launches, of which a pass makes hundreds.

One pair for every shape of input, captured at its first use. A pair may run once between two steps of the optimiser: its
activations and gradients lie in fixed places. Therefore only TokenMethod.fit uses it, for the one pass whose gradient it takes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALL = 100_000_000  # parameters up to which launches, not arithmetic, take the time
KEPT = 4  # shapes


class _Call(nn.Module):
    """The trunk by another name: capturing replaces this module's forward, and leaves the policy's own alone."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk

    def forward(self, ids: Tensor) -> Tensor:
        return self.trunk(ids)


class Graphed:
    def __init__(self, policy):
        self.policy, self.pairs = policy, {}
        self.possible = hasattr(policy, "model") and not policy.model.recompute and \
            sum(p.numel() for p in policy.parameters()) <= SMALL and all(p.requires_grad for p in policy.parameters())

    def trunk(self, rows: int, length: int):
        """A function ids (rows, length) -> hidden with gradient; None where the usual pass is the better one."""
        device = next(self.policy.parameters()).device
        if not self.possible or not torch.cuda.is_available() or device.type == "cpu":
            return None
        half = torch.is_autocast_enabled(device.type)
        key = (rows, length, half, device)
        if key not in self.pairs:
            while len(self.pairs) >= KEPT:
                self.pairs.pop(next(iter(self.pairs)))
            sample = torch.zeros(rows, length, dtype=torch.int64, device=device)
            with torch.autocast(device.type, torch.get_autocast_dtype(device.type), enabled=half, cache_enabled=False):
                self.pairs[key] = torch.cuda.make_graphed_callables(_Call(self.policy.model).train(), (sample,))
        return self.pairs[key]
