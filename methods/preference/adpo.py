"""ADPO: anchored direct preference optimisation (arXiv 2510.18913).

Fit softmax of *anchored* log-ratios, not of raw log-probabilities, to a target distribution over a candidate list:

    u_i = (log pi(y_i) - log pi_anchor(y_i)) / tau,     L = - sum_i q_i log softmax(u)_i

    dL / d log pi(y_i) = (softmax(u)_i - q_i) / tau,    optimum  pi* ~ pi_anchor q^tau  on the list

| symbol | name | |
|---|---|---|
| pi_anchor | anchor | uniform (= KD), self (student at its start), teacher, ema, copy_every_n, on_policy |
| q | target, teacher_ratio | from rewards; teacher_ratio: softmax((log pi_T - a) / tau), whose optimum is the teacher |
| tau | tau, adaptive, a, b, tau_low, tau_high | adaptive: tau (1 + a H + b (1 - H)(1 - R)) per context |
| form | form | listwise, pairwise_hard, pairwise_soft, plackett_luce, plackett_luce_soft |
| beta_r | target_temperature | |

`target` and `teacher_ratio` serve the listwise form; the others use the rewards themselves.
Pairwise forms draw one pair per context and step: L = -t log sigma(D) - (1-t) log sigma(-D), D = u_i - u_j. Hard with a
fixed anchor and tau = 1/beta is DPO. Plackett-Luce: L = sum_k [ logsumexp_{j>=k} u_(j) - u_(k) ], sorted by reward.

Two traps. A fixed `self` anchor moves the optimum to pi_0 pi_T^tau: the teacher is out of reach. A moving anchor (ema,
copy_every_n) on a static target has no fixed point and sharpens without limit: keep the best validation (loop.select).

Differences from the author's code (two public code bases, language models only): control was not published, so states,
candidates and budget are this project's choice; the code's Plackett-Luce options (top_k, smoothing, poly) are here, off
by default; H is the policy's entropy over the list / log P (the manuscript's is over tokens). Not reproduced: online
language models.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch

from methods.common.networks import polyak
from methods.preference import forms
from methods.preference.kd import KD
from runner.errors import UserError
from runner.interface import knob


class ADPO(KD):
    @dataclasses.dataclass(frozen=True)
    class Config(KD.Config):
        anchor: str = knob("ema", "the policy that log-probabilities are measured against", source="paper",
                           choices=["uniform", "self", "teacher", "ema", "copy_every_n", "on_policy"])
        ema_decay: float = knob(0.99, "decay of the ema anchor per update", low=0.0, high=1.0, source="project's choice",
                                when={"anchor": "ema"})
        copy_every: int = knob(100, "updates between two copies of the student into the copy_every_n anchor", low=1,
                               source="project's choice",
                               when={"anchor": "copy_every_n"})
        form: str = knob("listwise", "the loss on the anchored scores", source="paper, sec. 3",
                         choices=["listwise", "pairwise_hard", "pairwise_soft", "plackett_luce", "plackett_luce_soft"])
        teacher_ratio: bool = knob(False, "target softmax((log pi_T - log pi_anchor) / tau) in place of `target`")
        rankings: int = knob(4, "Gumbel rankings drawn for plackett_luce_soft", low=1, source="paper",
                             when={"form": "plackett_luce_soft"})
        top_k: int = knob(0, "Plackett-Luce: only the first positions count; 0: all", low=0, source="author's code: 3-8",
                          when={"form": ["plackett_luce", "plackett_luce_soft"]})
        smoothing: float = knob(0.0, "Plackett-Luce: label smoothing inside a position", low=0.0, high=1.0,
                                source="author's code: 0.1",
                                when={"form": ["plackett_luce", "plackett_luce_soft"]})
        poly: float = knob(0.0, "Plackett-Luce: weight of the term 1 - exp(-L_k)", low=0.0, source="author's code: 1",
                           when={"form": ["plackett_luce", "plackett_luce_soft"]})
        adaptive: bool = knob(False, "temperature per context, by entropy and reward", source="manuscript")
        a: float = knob(1.0, "adaptive temperature: weight of the entropy", low=0.0, source="manuscript",
                        when={"adaptive": True})
        b: float = knob(0.5, "adaptive temperature: weight of confident failure", low=0.0, source="manuscript",
                        when={"adaptive": True})
        tau_low: float = knob(0.1, "adaptive temperature: lower bound", low=1e-6, source="manuscript",
                              when={"adaptive": True})
        tau_high: float = knob(5.0, "adaptive temperature: upper bound", low=1e-6, source="manuscript",
                               when={"adaptive": True})

    @property
    def records_behaviour(self):
        return self.config.anchor == "on_policy"

    def setup(self, spec):
        if self.config.teacher_ratio and self.config.adaptive:
            raise UserError("method.teacher_ratio=true fits the teacher at one temperature; it does not go with "
                            "method.adaptive=true")
        if spec.candidates and (self.config.teacher_ratio or self.config.anchor in ("teacher", "on_policy")):
            raise UserError("stored lists have neither a teacher nor a sampler: method.anchor must be uniform, self, ema or "
                            "copy_every_n, and method.teacher_ratio=false")
        super().setup(spec)
        if self.config.anchor in ("self", "ema", "copy_every_n"):
            self.anchor = copy.deepcopy(self.policy).requires_grad_(False)

    def prepare(self, data):
        super().prepare(data)
        if hasattr(self, "anchor"):  # the anchor is the student at its start, normalisation and pre-training included
            self.anchor.load_state_dict(self.policy.state_dict())

    def anchor_log_prob(self, batch):
        if self.config.anchor == "uniform":
            return super().anchor_log_prob(batch)
        if self.config.anchor == "teacher":
            return batch["teacher_log_prob"]
        if self.config.anchor == "on_policy":
            return batch["behaviour_log_prob"]
        return self.anchor.log_prob(batch["context"], batch["candidates"])

    def score(self, log_prob, anchor, batch):
        if not self.config.adaptive:
            return super().score(log_prob, anchor, batch)
        ratio = log_prob if anchor is None else log_prob - anchor
        return ratio / self.temperature(log_prob.detach(), batch["reward"])

    def temperature(self, log_prob, reward):
        """tau(x) (B, 1) = tau (1 + a H + b (1 - H)(1 - R)), clipped; H list entropy / log P, R min-max batch reward."""
        c, log_p = self.config, log_prob.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True) / math.log(log_prob.shape[-1])
        mean = reward.mean(-1, keepdim=True)
        low, high = mean.amin(), mean.amax()
        rank = torch.where(high > low, (mean - low) / (high - low).clamp_min(1e-12), torch.full_like(mean, 0.5))
        return (c.tau * (1 + c.a * entropy + c.b * (1 - entropy) * (1 - rank))).clamp(c.tau_low, c.tau_high)

    def target(self, batch, anchor):
        if self.config.teacher_ratio:
            ratio = batch["teacher_log_prob"] if anchor is None else batch["teacher_log_prob"] - anchor
            return (ratio / self.config.tau).softmax(-1)
        return super().target(batch, anchor)

    def loss(self, score, target, batch):
        c, reward = self.config, batch["reward"]
        if c.form == "listwise":
            return super().loss(score, target, batch)
        if c.form.startswith("pairwise"):
            i, j = forms.random_pairs(reward)
            gap = reward.gather(1, i) - reward.gather(1, j)
            t = (gap > 0).to(score.dtype) if c.form == "pairwise_hard" else torch.sigmoid(gap / c.target_temperature)
            return forms.pairwise(score.gather(1, i) - score.gather(1, j), t).mean()
        if c.form == "plackett_luce":
            return forms.plackett_luce(score, reward, c.top_k, c.smoothing, c.poly).mean()
        losses = [forms.plackett_luce(score, forms.gumbel_ranking(reward / c.target_temperature),
                                      c.top_k, c.smoothing, c.poly).mean() for _ in range(c.rankings)]
        return torch.stack(losses).mean()

    def after_update(self):
        super().after_update()
        if self.config.anchor == "ema":
            polyak(list(self.anchor.parameters()), list(self.policy.parameters()), 1 - self.config.ema_decay)
        elif self.config.anchor == "copy_every_n" and (self.updates + 1) % self.config.copy_every == 0:
            polyak(list(self.anchor.parameters()), list(self.policy.parameters()), 1.0)
