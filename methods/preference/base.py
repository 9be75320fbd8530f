"""Candidate lists: the algorithm that the preference family's methods change.

One update on a context x with candidates y_1 … y_P and rewards r_i, by its parts:

    1. anchor_log_prob  a_i = log pi_anchor(y_i | x), without gradient; none here (the uniform anchor)
    2. score            u_i = (log pi(y_i | x) - a_i) / tau
    3. target           q = softmax(r / target_temperature); without gradient
    4. loss             L = mean_x [ - sum_i q_i log softmax(u)_i ]
    5. penalty          added to L; zero here                            (additive)
    6. after_update     upkeep after the optimiser's step; none here     (additive)

pi is a Gaussian over actions, or, where the world says how long its lists are (Spec.candidates), a softmax over the list
itself. Such a policy may start from a reference: the cross-entropy of clean lists' best items, for a few steps.

The gradient of L in log pi(y_i) is (softmax(u)_i - q_i) / tau: constants in log pi or a cancel.
Source: the anchored cross-entropy of ADPO (arXiv 2510.18913), of which distillation, SFT on a list and DPO are cases.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.common.networks import describe_mlp
from methods.common.policies import GaussianPolicy, ListPolicy
from methods.preference import targets
from runner.interface import Method, Spec, knob


class CandidateLists(Method):
    @dataclasses.dataclass(frozen=True)
    class Config:
        tau: float = knob(1.0, "temperature of the scores", low=1e-6, source="paper")
        target: str = knob("raw", "rewards over a list are used as they are, as z-scores, as kernel-smoothed ranks "
                           "(two forms), or only the best one counts", source="paper",
                           choices=["raw", "zscore", "rank_kde", "smoothed_rank", "hard"])
        target_temperature: float = knob(1.0, "temperature of the target distribution (beta_r, T_q)", low=1e-6,
                                         source="project's choice")
        hidden: tuple[int, ...] = knob((64, 64), "widths of the student's hidden layers", low=1, source="project's choice")
        activation: str = knob("tanh", "between the student's layers", choices=["relu", "tanh", "silu", "gelu"])
        log_std: float = knob(-0.5, "initial log standard deviation of the student")
        log_std_low: float = knob(-5.0, "lower bound of the log standard deviation", source="project's choice")
        log_std_high: float = knob(2.0, "upper bound of the log standard deviation", source="project's choice")
        learning_rate: float = knob(1e-3, "Adam's", low=0.0, source="project's choice")
        clip: float = knob(1.0, "bound of the gradient's norm; 0: none", low=0.0, source="project's choice")

    PARTS = ("anchor_log_prob", "score", "target", "loss", "penalty", "after_update")
    ADDITIVE = ("penalty", "after_update")
    records_behaviour = False  # whether batches should hold the log-probs with which they were drawn

    def setup(self, spec: Spec):
        c, sizes = self.config, (spec.observation_size, spec.action_size)
        self.gaussian = spec.candidates is None
        if self.gaussian:
            self.policy = GaussianPolicy(*sizes, c.hidden, c.activation, c.log_std, (c.log_std_low, c.log_std_high))
        else:
            self.policy = ListPolicy(*sizes, c.hidden, c.activation)
            self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    def make_optimizers(self):
        adam = torch.optim.Adam(self.policy.parameters(), lr=self.config.learning_rate, fused=True)
        self.optimizers = {"policy": adam}

    def prepare(self, data):
        """Normalise observations by the training contexts (n, S): 1e-3 is added to the deviation, not the variance.
        A policy over lists is pre-trained instead, where there are clean lists; so pre-trained it is the reference."""
        if self.gaussian:
            self.policy.offset.copy_(data["context"].mean(0))
            self.policy.scale.copy_(data["context"].std(0) + 1e-3)
        elif "clean_best" in data:
            self.pretrain(data)
            self.reference.load_state_dict(self.policy.state_dict())

    def pretrain(self, data):
        """Cross-entropy of the best item: clean_context (n, S), clean_candidates (n, P, A), clean_best (n,), in the
        batches that reference_batches (steps, B) names. No randomness of its own: one seed, one reference."""
        context, candidates, best = data["clean_context"], data["clean_candidates"], data["clean_best"]
        adam = torch.optim.AdamW(self.policy.parameters(), lr=data["reference_learning_rate"])
        for rows in data["reference_batches"]:
            adam.zero_grad()
            F.nll_loss(self.policy.log_prob(context[rows], candidates[rows]), best[rows]).backward()
            adam.step()

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: context (B, S), candidates (B, P, A), reward and teacher_log_prob (B, P)."""
        log_prob = self.policy.log_prob(batch["context"], batch["candidates"])
        with torch.no_grad():
            anchor = self.anchor_log_prob(batch)
            target = self.target(batch, anchor)
        score = self.score(log_prob, anchor, batch)
        loss = self.loss(score, target, batch)
        penalty = self.penalty(batch, log_prob, anchor)
        self.minimise(loss if penalty is None else loss + penalty, "policy", self.config.clip)
        metrics = {"loss": loss.detach(), "candidate_log_prob": log_prob.detach().mean()}
        if self.gaussian:
            with torch.no_grad():  # past a bound the clamp passes no gradient: log_std would stay there for good
                self.policy.log_std.clamp_(*self.policy.bounds)
            metrics["student_log_std"] = self.policy.log_std.detach().mean()
        self.after_update()
        return metrics

    # -- parts
    def anchor_log_prob(self, batch) -> Tensor | None:
        """a (B, P), or None for the uniform anchor."""
        return None

    def score(self, log_prob: Tensor, anchor: Tensor | None, batch) -> Tensor:
        """u (B, P)"""
        return (log_prob if anchor is None else log_prob - anchor) / self.config.tau

    def target(self, batch, anchor: Tensor | None) -> Tensor:
        """q (B, P), rows sum to 1."""
        return targets.distribution(batch["reward"], self.config.target, self.config.target_temperature)

    def loss(self, score: Tensor, target: Tensor, batch) -> Tensor:
        """u, q (B, P) -> scalar"""
        return -(target * score.log_softmax(-1)).sum(-1).mean()

    def penalty(self, batch, log_prob: Tensor, anchor: Tensor | None) -> Tensor | None:
        """Added to the loss; overriders add to super()'s (None counts as zero)."""
        return None

    def after_update(self):
        """After the optimiser's step; overriders call super()'s."""

    # -- what a world asks for
    @torch.no_grad()
    def act(self, observation: Tensor, explore: bool) -> Tensor:
        if explore:
            return self.policy.sample(observation, 1).squeeze(1)
        return self.policy(observation)[0]

    @torch.no_grad()
    def sample(self, context: Tensor, number: int) -> Tensor:
        """(n, S) -> (n, number, A), from the policy as it is."""
        return self.policy.sample(context, number)

    @torch.no_grad()
    def log_prob(self, context: Tensor, candidates: Tensor) -> Tensor:
        """(n, S), (n, P, A) -> (n, P)"""
        return self.policy.log_prob(context, candidates)

    @torch.no_grad()
    def reference_log_prob(self, context: Tensor, candidates: Tensor) -> Tensor:
        """(n, S), (n, P, A) -> (n, P), of the policy as it was before training; policies over lists only."""
        return self.reference.log_prob(context, candidates)

    @torch.no_grad()
    def distribution(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(n, S) -> mean (n, A), standard deviation (n, A)"""
        mean, log_std = self.policy(context)
        return mean, log_std.exp().expand_as(mean)

    def export(self):
        """A plain MLP: the mean network with the normalisation folded into its first layer, or the scorer of (x, y_i)."""
        tensors = {k: v.clone() for k, v in self.policy.net.state_dict().items()}
        if self.gaussian:
            weight = tensors["0.weight"] / self.policy.scale
            tensors["0.bias"] = tensors["0.bias"] - weight @ self.policy.offset
            tensors["0.weight"] = weight
        return tensors, describe_mlp(self.policy.net)
