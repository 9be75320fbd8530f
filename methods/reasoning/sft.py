"""Supervised fine-tuning: cross-entropy on the response tokens of demonstrations,

    L = - sum_t m_t log pi(y_t | x, y_<t) / sum_t m_t

Starting points of reinforcement are made by it: `python -m runner data build countdown`.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.tokens.base import TokenMethod
from methods.tokens.scoring import log_prob_and_entropy
from runner.interface import knob


class SFT(TokenMethod):
    @dataclasses.dataclass(frozen=True)
    class Config(TokenMethod.Config):
        learning_rate: float = knob(2e-3, "AdamW's", low=0.0, source="project's choice, for small models")
        weight_decay: float = knob(0.01, "AdamW's", low=0.0, source="project's choice")
        warmup: int = knob(100, "optimiser steps over which the learning rate rises from 0", low=0)
        decay: str = knob("cosine", "course of the learning rate over the run after that; cosine ends at a twentieth",
                          choices=["constant", "cosine"])

    def update(self, batch):
        """batch: prompt, prompt_mask, response, mask (b, T)."""
        self.schedule(self.updates, self.planned)
        tokens = self.engine.mean(batch["mask"].sum()).clamp(min=1)
        told = {}

        def loss(now):
            told["entropy"] = (now["entropy"].detach() * batch["mask"]).sum() / tokens
            return -(now["log_prob"] * batch["mask"]).sum() / tokens

        value = self.fit(batch, log_prob_and_entropy, 1.0, loss)
        return {"loss": value, **told, "perplexity": torch.exp(value)}
