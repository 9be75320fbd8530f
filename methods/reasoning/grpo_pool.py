"""GRPO on the unlabelled pool with the right labels: what test-time training could reach at most (its oracle).

The base algorithm as it stands, on the batches that TTRL and SPINE learn from; alone of that kind it reads the verifier's
rewards.
"""

from __future__ import annotations

from methods.reasoning.base import GroupPolicy


class GRPOPool(GroupPolicy):
    pass
