"""Preferences over one's own responses: the algorithm of online methods on pairs. As it stands it is online DPO.

One update is one round. With pi_t, the policy at the round's start:

    collect      Q = `prompts` prompts, G = `responses` each, drawn from pi_t; the oracle compares them two by two
    pair         which two of a group are compared, and the label p = P(first beats second): the first two, or the best against
                 the worst by mean win rate; the label is drawn from the oracle's probability, or that probability itself
    then `passes` times through the pairs, in `minibatches` optimiser steps each, with the parts of methods/preference/pairs.py;
    beside `reference` (log-probabilities under the policy at its very start) they see `current`, those under pi_t, both (2, b, T)

Source: Guo et al. 2024 (online DPO from AI feedback, arXiv 2402.04792).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.preference.pairs import SIDES, PairPolicy
from runner.interface import knob


class OnlinePairs(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        prompts: int = knob(32, "Q: prompts a round", low=1)
        responses: int = knob(2, "G: responses to each prompt", low=2)
        temperature: float = knob(1.0, "of sampling", low=1e-3)
        pairing: str = knob("first", "the first two responses, or the best and the worst of a group by mean win rate",
                            choices=["first", "extremes"], when={"responses": 4})
        labels: str = knob("drawn", "the oracle's verdict is drawn from its probability, or is that probability",
                           choices=["drawn", "soft"])
        passes: int = knob(1, "times through a round's pairs", low=1)
        minibatches: int = knob(1, "optimiser steps a pass", low=1)

    PARTS = ("collect", *PairPolicy.PARTS)
    own_samples = True

    def collect(self, source) -> dict[str, Tensor]:
        """The next round's responses: source.problems(number), source.rollouts(problems, samples, temperature)."""
        c = self.config
        batch = source.rollouts(source.problems(c.prompts), c.responses, c.temperature)
        rows = len(batch["beats"])
        batch["draw"] = source.draws("oracle", (source.ranks * rows,), source.batch, "uniform")[source.rank * rows:][:rows]
        return batch

    def update(self, batch):
        """batch: see envs/pairs/duels.py."""
        c, told = self.config, []
        columns = self.paired(batch)
        with torch.no_grad():
            rows = self.rows(columns)
            current = self.score(rows)["log_prob"].view(2, -1, rows["response"].shape[1])
            reference = self.score_reference(rows)["log_prob"].view(current.shape)
        for i, side in enumerate(SIDES):
            columns |= {f"{side}_reference": reference[i], f"{side}_current": current[i]}
        number = len(columns["label"])
        for i in range(c.passes):
            order = torch.argsort(self.noise(f"order{i}", (number,), "uniform")).to(current.device)
            for j, index in enumerate(order.chunk(c.minibatches)):
                step = (self.updates * c.passes + i) * c.minibatches + j
                self.schedule(step, self.planned * c.passes * c.minibatches)
                told.append(self.step({k: v[index] for k, v in columns.items()}))
        out = {k: torch.stack([line[k] for line in told]).mean() for k in told[0]}
        return {**out, "reward": batch["reward"].mean(), "decided": (columns["oracle"] - 0.5).abs().mean() * 2}

    def step(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step of the optimiser on pairs."""
        pairs = self.pairs(columns)
        pairs.current = torch.stack([columns[f"{s}_current"] for s in SIDES])

        def loss(now):
            self.see(pairs, now)
            value, penalty = self.loss(pairs), self.penalty(pairs)
            return value if penalty is None else value + penalty

        value = self.fit(self.rows(columns), self.measuring(), 1.0, loss, self.beside())
        with torch.no_grad():
            told = {"loss": value, **self.summary(pairs), **pairs.told}
        self.after_update(pairs)
        return told

    def paired(self, batch) -> dict[str, Tensor]:
        """The columns of a batch of pairs, one a group."""
        c, size = self.config, self.config.responses
        groups = len(batch["beats"]) // size
        beats = batch["beats"].view(groups, size, size)
        if c.pairing == "extremes" and size > 2:
            wins = beats.mean(-1)
            first, second = wins.argmax(-1), size - 1 - wins.flip(-1).argmin(-1)  # of equal ones the last loses
        else:
            first, second = torch.zeros(2, groups, dtype=torch.int64, device=beats.device) + \
                torch.arange(2, device=beats.device)[:, None]
        start = torch.arange(groups, device=beats.device) * size
        oracle = beats[torch.arange(groups, device=beats.device), first, second]
        draw = batch["draw"].to(oracle.device)[start]
        label = oracle if c.labels == "soft" else (draw < oracle).float()
        swap = label < 0.5  # what is preferred stands first
        first, second, label = torch.where(swap, second, first), torch.where(swap, first, second), torch.maximum(label, 1 - label)
        out = {"prompt": batch["prompt"][start], "prompt_mask": batch["prompt_mask"][start], "label": label, "oracle": oracle}
        for side, which in zip(SIDES, (start + first, start + second)):
            out |= {side: batch["response"][which], f"{side}_mask": batch["mask"][which]}
        return out
