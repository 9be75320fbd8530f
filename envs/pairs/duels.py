"""Duels: batches of kind `duels`, responses that the policy has just sampled, compared two by two.

A batch is one of kind `prompts` (envs/prompts/base.py: groups of G responses to a prompt) with one column more:

    beats   (B, G)   probability that the row's response is preferred to each response of its group; 1/2 to itself

What a world prefers it says itself (`preferred`); where responses have a true reward the better one wins, ties are even.
"""

from __future__ import annotations

import torch

from envs.prompts.base import Prompts


class Duels(Prompts):
    def verified(self, written, out, samples):
        batch = super().verified(written, out, samples)
        groups = [written[i:i + samples] for i in range(0, len(written), samples)]
        beats = [[[self.world.preferred(self.pool[number], mine, other) for _, other in group] for number, mine in group]
                 for group in groups]
        batch["beats"] = torch.tensor(beats, dtype=torch.float32).view(len(written), samples).to(batch["reward"].device)
        return batch
