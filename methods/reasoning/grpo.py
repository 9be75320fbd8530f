"""GRPO: Group Relative Policy Optimization (Shao et al. 2024, arXiv 2402.03300).

The family's base algorithm as it stands (methods/reasoning/base.py): rewards are compared within the responses to one prompt,

    A_i = (r_i - mean_g r) / (std_g r + 1e-6),   L = agg max(-A rho, -A clip(rho, 1-e, 1+e)) + beta agg k3

The paper's aggregation is seq_mean_token_mean and its beta 0.04; the defaults here are those that later work compares with:
token_mean and no KL.
"""

from __future__ import annotations

from methods.reasoning.base import GroupPolicy


class GRPO(GroupPolicy):
    pass
