"""The trunk's forward and backward as two CUDA graphs: small models are bound by launches, of which a pass makes hundreds.

One pair for every shape of input that keeps coming, captured at its third use (batches of episodes differ in their rows at
every update: those stay with the usual pass). A pair may run once between two steps of the optimiser: its
activations and gradients lie in fixed places. While it is captured no earlier pass may be alive, since autograd ties parameters
to the stream of a living one. Therefore only TokenMethod.fit uses it, for the one pass whose gradient it takes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALL = 100_000_000  # parameters up to which launches, not arithmetic, take the time
KEPT = 4  # shapes
OFTEN = 3  # uses from which a shape is captured


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
        self.uses: dict[tuple, int] = {}
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
            self.uses[key] = self.uses.get(key, 0) + 1
            if self.uses[key] < OFTEN or len(self.uses) > 8 * KEPT:  # too many shapes: none is worth its capture
                return None
            # Capturing runs the passes on a stream of its own once; that later gradients come from another is meant.
            getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", lambda on: None)(False)
            while len(self.pairs) >= KEPT:
                self.pairs.pop(next(iter(self.pairs)))
            sample = torch.zeros(rows, length, dtype=torch.int64, device=device)
            with torch.autocast(device.type, torch.get_autocast_dtype(device.type), enabled=half, cache_enabled=False):
                self.pairs[key] = torch.cuda.make_graphed_callables(_Call(self.policy.model).train(), (sample,))
        return self.pairs[key]
