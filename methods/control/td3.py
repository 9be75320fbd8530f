"""TD3: twin delayed deterministic policy gradient (Fujimoto et al. 2018, arXiv 1802.09477).

Three changes to DDPG (methods/control/base.py):

    twin critics      critics = 2; the target takes min_i Q_i'                          (a setting of the base)
    delay             actor and targets move at every second critic update              (a setting of the base)
    smoothing         a' = clip(pi'(s') + clip(sigma eps, -c, c), -1, 1), eps ~ N(0, I)  (part next_action)

| symbol | name |
|---|---|
| sigma, c | target_noise, target_noise_clip |
| d (delay) | actor_delay |
| tau | target_rate |

The official code (sfujim/TD3) agrees; it multiplies the noise constants by the action scale, which is 1 here because
actions are stored in [-1, 1].
"""

from __future__ import annotations

import dataclasses

from methods.control.base import Sample
from methods.control.ddpg import DDPG
from runner.interface import knob


class TD3(DDPG):
    @dataclasses.dataclass(frozen=True)
    class Config(DDPG.Config):
        critics: int = knob(2, "number of critics; the target takes their minimum", low=1, source="paper, sec. 4.2")
        actor_delay: int = knob(2, "critic updates per actor (and target) update", low=1, source="paper, sec. 5.2")
        target_noise: float = knob(0.2, "standard deviation of the noise on the target action", low=0.0,
                                   source="paper, sec. 5.3")
        target_noise_clip: float = knob(0.5, "bound of that noise", low=0.0, source="paper, sec. 5.3")

    def next_action(self, batch):
        action = super().next_action(batch).action
        c = self.config
        if c.target_noise > 0:  # at 0 nothing is drawn, so that neutral knobs are DDPG to the bit
            noise = self.noise("target", action.shape[-2:]) * c.target_noise
            action = (action + noise.clamp_(-c.target_noise_clip, c.target_noise_clip)).clamp_(-1, 1)
        return Sample(action)
