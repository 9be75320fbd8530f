"""Several seeds trained at once: the networks of all are stacked along a leading axis (see Method.batchable).

The stacked method starts from the states that single runs would start from, and draws the numbers that they would draw.
What is evaluated, saved and compared is one seed's method at a time, cut out of the stack.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from runner.errors import UserError
from runner.loop import seed_everything


class Stack:
    """Builds the stacked method; `member(i)` cuts the i-th seed's method out of it."""

    def __init__(self, new_method, spec, seeds: list[int]):
        self.new, self.spec, self.seeds = new_method, spec, seeds
        states = []
        for seed in seeds:
            seed_everything(seed)
            single = new_method()
            single.setup(spec)
            states.append({k: v.detach().clone() for k, v in single.state_dict().items()})
        if not single.batchable:
            raise UserError("this method cannot train several seeds in one process\n"
                            "leave hardware.seeds at 1 and sweep instead: -m seed=" + ",".join(map(str, seeds)))
        self.single = single
        self.method = new_method()
        self.method.setup(dataclasses.replace(spec, seeds=len(seeds)))
        self.method.load_state_dict(self.stack(states))

    def stack(self, states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Single states side by side; what all seeds share (statistics of the data) stays single."""
        own = self.method.state_dict()
        assert own.keys() == states[0].keys()
        return {k: torch.stack([s[k] for s in states]) if own[k].dim() > states[0][k].dim() else states[0][k] for k in own}

    def slice(self, state: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """One seed's part of a stacked state."""
        single = self.single.state_dict()
        return {k: v[index] if v.dim() > single[k].dim() else v for k, v in state.items()}

    def member(self, index: int):
        """The single method of one seed, as it stands now. The next call overwrites it."""
        self.single.to(next(self.method.parameters()).device)
        self.single.load_state_dict(self.slice(self.method.state_dict(), index))
        return self.single.eval()
