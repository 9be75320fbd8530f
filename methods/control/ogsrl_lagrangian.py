"""OGSRL on PPO-Lagrangian in place of CPO (arXiv 2505.16242, where "other constrained optimisers are allowed").

    max V_r(pi)   s.t.   V_c(pi) <= d_c  (the costs),   V_g(pi) <= d_g,   g(s, a) = 1[(s, a) outside the support]

Formulation, symbols, options and differences from the released code as in methods/control/ogsrl.py; each limit has its own
multiplier (methods/control/ppo_lagrangian.py). `guardian: none` is PPO-Lagrangian.

| symbol | name |
|---|---|
| d_c, d_g | cost_limit, guardian_limit |
"""

from __future__ import annotations

import dataclasses

from methods.control.guardian import Guarded
from methods.control.ppo_lagrangian import PPOLagrangian


class OGSRLLagrangian(Guarded, PPOLagrangian):
    @dataclasses.dataclass(frozen=True)
    class Config(Guarded.Config, PPOLagrangian.Config):
        """PPOLagrangian's settings and the guardian's."""
