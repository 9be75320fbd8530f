"""A2C: advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783, the synchronous form).

The on-policy base as it stands (methods/control/onpolicy.py): the gradient of -mean rho A with rho = pi / pi_old, GAE,
a value network. At the first minibatch rho = 1 and the gradient is the policy gradient; `epochs=1 minibatches=1` is A2C.
With more passes it is the unclipped surrogate, the baseline that PPO's paper compares its clipping with.

Differences from the paper: GAE in place of n-step returns, Adam in place of RMSprop, separate networks, and the settings of
the PPO comparison (10 epochs, 32 minibatches), so that ppo differs from a2c by PPO's clipping and by nothing else.
"""

from __future__ import annotations

from methods.control.onpolicy import OnPolicy


class A2C(OnPolicy):
    pass
