"""OGSRL: offline guarded safe reinforcement learning for treatment policies (arXiv 2505.16242).

CPO inside a simulator made of a log, held to the part of (s, a) that the log supports (methods/control/guardian.py):

    max V_r(pi)   s.t.   V_c(pi) <= d_c  (the costs),   V_g(pi) <= d_g,   g(s, a) = 1[(s, a) outside the support]

| symbol | name |
|---|---|
| d_c | cost_limit |
| d_g | guardian_limit: unsupported steps allowed per episode |
| threshold, h | support_share, bandwidth |

The guardian is one more cost channel (part costs). `guardian: penalty` is the released roll-out instead: from the step on at
which an episode leaves the support its reward is `penalty` and its cost 1, to its end. `guardian: none` is CPO. With
cost_limit < 0 the guardian alone is a constraint; with the penalty that leaves TRPO. ogsrl_lagrangian is the same on
PPO-Lagrangian.

Differences from the released code (Runz96/SafeRL-OGSRL): costs are positive and the constraint is in the unit of returns.
There they are stored as -1 per violation against the limit +0.5 (and standardised), so that the constraint never binds:
`official_costs`. There the state freezes where the support is left; here the episode plays on, at the same reward and cost,
which is the same problem unless the simulator ends the episode. The bandwidth is fitted (there 0.535, in 15 dimensions), rows
of the simulator are not misaligned, and values are trained on raw advantages.
"""

from __future__ import annotations

import dataclasses

from methods.control.cpo import CPO
from methods.control.guardian import Guarded


class OGSRL(Guarded, CPO):
    @dataclasses.dataclass(frozen=True)
    class Config(Guarded.Config, CPO.Config):
        """CPO's settings and the guardian's."""
