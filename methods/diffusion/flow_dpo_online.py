"""Flow-DPO, online (Liu et al. 2025, arXiv 2501.13918; the authors' scripts beside Flow-GRPO's): pairs of the generator's own
samples as they come, the best against the worst of each group by the reward (methods/diffusion/online.py), Flow-DPO's loss on
them (methods/diffusion/flow_dpo.py), and a reference that is the generator itself, `ref_update_step` optimiser steps ago at most:

    theta_ref <- theta   after every `ref_update_step` steps (40; 0: the start stays the reference)

It is the reference that samples, as in the official code: DPO's loss is made for pairs of its reference (`rollouts=current`: the
weights as they are). A refreshed reference bounds each stretch and not the whole way: nothing then holds the generator to its
start. There are no labels to be noisy: who wins is the reward's to say.

Differences from the official code: rollouts are deterministic (there with Flow-GRPO's noise, 0.7); a batch is gone through once
(there 39 times, each with other times and noise); the reference may be made anew between two steps on one batch.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.diffusion.flow_dpo import FlowDPO
from methods.diffusion.flow_sft_online import FlowSFTOnline
from runner.interface import Spec, knob


class FlowDPOOnline(FlowDPO, FlowSFTOnline):
    @dataclasses.dataclass(frozen=True)
    class Config(FlowDPO.Config, FlowSFTOnline.Config):
        ref_update_step: int = knob(40, "optimiser steps after which the reference is made anew; 0: never", low=0,
                                    source="official code")
        rollouts: str = knob("reference", "which weights sample the pairs", choices=["reference", "current"],
                             source="official code")

    def setup(self, spec: Spec):
        super().setup(spec)
        self.register_buffer("made", torch.zeros((), dtype=torch.int64))  # optimiser steps

    def sampling(self):
        return self.reference if self.config.rollouts == "reference" else super().sampling()

    @torch.no_grad()
    def after_update(self, rows):
        super().after_update(rows)
        every = self.config.ref_update_step
        if not every:
            return
        self.made += 1
        due = self.made % every == 0  # on the device: the same work at every step
        for old, new in zip(self.reference.parameters(), self.network.parameters()):
            old.copy_(torch.where(due, new, old))
