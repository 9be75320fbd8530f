"""TTRL: test-time reinforcement learning from majority votes (Zuo et al. 2025, arXiv 2504.16084).

Of a prompt without a label M = `votes` responses are drawn; the most common answer is taken for the right one:

    label = mode_j a_j,   r_i = 1[a_i = label],   GRPO on the first G = `samples` of the M

A response without an answer does not vote and gets 0; among equally common answers the one met first wins. The true label is used
by the metrics only: label_accuracy (label = truth), reward_accuracy (r_i = true reward), majority (share of the votes for the
label). Votes confirm themselves: where the majority is wrong, it becomes unanimous.

labels=verifier rewards truly, which is the ceiling. The paper's learning rate of 5e-7, cosine, over 80 epochs of the test set is
not reproduced; small policies take M = G = 16.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.reasoning.base import GroupPolicy
from methods.reasoning.batches import rows_of, votes
from runner.interface import knob


def elected(answer: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The row (B,) that holds the most common answer of each row's group, the first of equals, and that answer's votes (B,); no
    votes where nobody has an answer, and the row is then one without."""
    rows = len(answer)
    count = torch.where(answer >= 0, votes(answer, group), 0)
    rank = count * rows - torch.arange(rows, device=answer.device)
    best = torch.full((int(group.max()) + 1,), -rows, device=answer.device).scatter_reduce_(0, group, rank, "amax")
    winner = (-best % rows)[group]
    return winner, count[winner]


class TTRL(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        votes: int = knob(64, "M: responses that vote, at least `samples`", low=1, source="paper")
        labels: str = knob("votes", "what is rewarded: the majority's answer, or the right one", choices=["votes", "verifier"])

    def collect(self, source):
        c = self.config
        if c.labels == "verifier":
            return super().collect(source)
        number = max(c.votes, c.samples)
        batch = source.rollouts(source.problems(c.prompts), number, c.temperature)
        winner, count = elected(batch["answer"], batch["group"])
        batch |= {"label": batch["answer"][winner], "label_correct": batch["correct"][winner] * (count > 0),
                  "majority": count / number}
        return rows_of(batch, torch.arange(len(winner), device=winner.device) % number < c.samples)

    def reward(self, batch):
        if self.config.labels == "verifier":
            return super().reward(batch)
        reward = ((batch["answer"] == batch["label"]) & (batch["label"] >= 0)).float()
        self.told |= {"label_accuracy": batch["label_correct"].mean(), "majority": batch["majority"].mean(),
                      "reward_accuracy": (reward == (batch["correct"] > 0)).float().mean()}
        return super().reward({**batch, "reward": reward})
