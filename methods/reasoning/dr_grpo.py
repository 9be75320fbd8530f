"""Dr. GRPO: GRPO done right (Liu et al. 2025, arXiv 2503.20783).

Two divisions of GRPO are left out, which weigh prompts by their difficulty and responses by their length:

    A_i = r_i - mean_g r   (scale: none)          L = sum(l m) / (rows * T_max)   (aggregation: token_sum_norm)

Both are settings of the base algorithm; this method is their values. verl's mode of that name divides by the width alone, not
by the number of rows; here T_max is the constant length of a response, so that the loss does not depend on padding.
"""

from __future__ import annotations

from methods.reasoning.base import GroupPolicy


class DrGRPO(GroupPolicy):
    pass
