"""Learning from responses that are given: weighted likelihood, the algorithm that several families' methods change. As it stands
it is supervised fine-tuning (SFT).

One update is one batch of prompts and responses, one step of the optimiser. For token t of response i, with log-probability lp,
by its parts:

     1. measure       numbers of every response token from its logits, and, for a method that `compares`, from those of the
                      policy at the start beside them: log_prob, entropy                          (additive)
     2. weigh_tokens  w (b, T), without gradient: 1                                               (additive: factors)
     3. value         what is lost: -w lp of every token (b, T), or one number a response (b,)
     4. penalty       scalar beside it; none                                                      (additive)
     5. after_update  upkeep after the step                                                       (additive)

    L = sum_it m_it value_it / sum_it m_it      of tokens: the flat mean over the batch, all processes together
    L = mean_i value_i                          of responses

A token's weight is a factor of its log-probability wherever a `value` uses it, also inside a sum over the response.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor

from methods.tokens.base import TokenMethod
from methods.tokens.scoring import log_prob_and_entropy
from runner.interface import knob


class Given(SimpleNamespace):
    """A batch of b rows on its way through the parts: the batch's own columns under their names (prompt, response, mask, …), and

    now        what `measure` told, (b, T) each, with gradient;  log_prob = now["log_prob"]
    weight     what `weigh_tokens` told, (b, T)
    tokens     response tokens, the mean over processes: the denominator of `mean`
    told       metrics, tensors; parts add theirs
    """


class Demonstrated(TokenMethod):
    @dataclasses.dataclass(frozen=True)
    class Config(TokenMethod.Config):
        learning_rate: float = knob(2e-3, "AdamW's", low=0.0, source="project's choice, for small models")
        weight_decay: float = knob(0.01, "AdamW's", low=0.0, source="project's choice")
        warmup: int = knob(100, "optimiser steps over which the learning rate rises from 0", low=0)
        decay: str = knob("cosine", "course of the learning rate over the run after that; cosine ends at a twentieth",
                          choices=["constant", "cosine"])

    PARTS = ("measure", "weigh_tokens", "value", "penalty", "after_update")
    ADDITIVE = ("measure", "weigh_tokens", "penalty", "after_update")

    def compares(self) -> bool:
        """Whether `measure` sees the logits of the policy at the start. Such a method needs the reference, too; where it is its
        baseline at some settings it says so, and otherwise asks super(), since it may be combined with another."""
        return False

    def measures_more(self) -> bool:
        """Whether `measure` has more to tell at these settings than the base; asks super() as `compares` does."""
        return self.compares()

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: prompt, prompt_mask, response, mask (b, T), and whatever columns the kind of batches has."""
        self.schedule(self.updates, self.planned)
        rows = Given(**{**batch, "mask": batch["mask"].float()}, told={})
        rows.tokens = self.engine.mean(rows.mask.sum()).clamp(min=1)

        def loss(now: dict[str, Tensor]) -> Tensor:
            rows.now, rows.log_prob = now, now["log_prob"]
            rows.told["entropy"] = self.mean(now["entropy"].detach(), rows)
            with torch.no_grad():
                rows.weight = self.weigh_tokens(rows)
            value = self.mean(self.value(rows), rows)
            penalty = self.penalty(rows)
            return value if penalty is None else value + penalty

        measure = self.measure if self.measures_more() else log_prob_and_entropy
        value = self.fit(vars(rows), measure, 1.0, loss, self.start_policy() if self.compares() else None)
        nll = self.mean(-rows.log_prob.detach(), rows)
        self.after_update(batch)
        return {"loss": value, **rows.told, "perplexity": torch.exp(nll)}

    def mean(self, values: Tensor, rows: Given) -> Tensor:
        """values (b, T): over all response tokens of the batch; (b,): over its rows."""
        return values.mean() if values.dim() == 1 else (values * rows.mask).sum() / rows.tokens

    @torch.no_grad()
    def start_log_prob(self, rows: Given) -> Tensor:
        """(b, T) of the policy as it was at the start, asked for once an update. A method that calls it needs the reference."""
        if "first_log_prob" not in vars(rows):
            rows.first_log_prob = self.score_reference(vars(rows))["log_prob"]
        return rows.first_log_prob

    # -- parts
    def measure(self, logits: Tensor, target: Tensor, first: Tensor | None = None) -> dict[str, Tensor]:
        """logits (n, V), target (n,), the logits of the policy at the start (n, V) for a method that `compares` -> {name: (n,)};
        overriders add to super()'s."""
        return log_prob_and_entropy(logits, target)

    def weigh_tokens(self, rows: Given) -> Tensor:
        """w (b, T), without gradient; overriders multiply super()'s."""
        return torch.ones_like(rows.mask)

    def value(self, rows: Given) -> Tensor:
        """What is lost, by tokens (b, T) or by responses (b,), weights included."""
        return -rows.log_prob * rows.weight

    def penalty(self, rows: Given) -> Tensor | None:
        """Added to the loss; overriders add to super()'s (None counts as zero)."""
        return None

    def after_update(self, batch):
        """After the step; overriders call super()'s."""
