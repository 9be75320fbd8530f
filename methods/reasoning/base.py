"""Reinforcement of a token policy by verified rewards: the algorithm that this family's methods change. As it stands it is GRPO.

One update is one batch of rollouts, gone through once (`passes`) in `minibatches` steps of the optimiser. For response i of a
group g (the `samples` responses to one prompt) and its token t, with log-probability lp under the policy, lp_old under the one
that sampled (the same weights at the start of the update, by the training forward and at the sampling temperature):

     1. collect      what is sampled: Q = `prompts` problems, G = `samples` responses each
     2. reward       r_i (B,); as the verifier says                                              (additive)
     3. advantage    A (B,) or (B, T): (r_i - mean_g r) / (std_g r + 1e-6), std unbiased; where rows are turns of episodes
                     (envs/prompts/turns.py), mean and std are over the group's episodes
     4. measure      numbers of every response token from its logits: log_prob, entropy         (additive)
     5. observe      looks at the whole batch before the first step: statistics, anchors         (additive)
     6. weigh        changes A, the weight w (1), the clip range and the mask of a minibatch     (additive)
     7. surrogate    l = max(-A rho, -A clip(rho, 1-e_low, 1+e_high)), rho = exp(lp - lp_old); dual clip: A < 0 at most -A c
     8. penalty      scalar beside agg(w l): kl_weight agg(KL to the policy at the start)        (additive)
     9. after_update upkeep after the last step                                                  (additive)

agg, with the mask m and denominators of the whole minibatch, all processes together:
    token_mean           sum(l m) / sum(m)
    seq_mean_token_mean  mean_i sum_t(l m) / T_i          (the GRPO paper's)
    seq_mean_token_sum   mean_i sum_t(l m)
    token_sum_norm       sum(l m) / (rows * T_max)        (Dr. GRPO's)
KL per token, d = lp - lp_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1. On-policy, the gradient of k1 is 0, that of k2 is
that of KL(pi || ref), that of k3 of KL(ref || pi).

Sources: Shao et al. 2024 (GRPO, arXiv 2402.03300); Schulman et al. 2017 (clip); Ye et al. 2020 (dual clip); Schulman 2020 (KL).
Common code differs in details: verl clamps k3 at 10 (where its gradient vanishes), which is not done here; TRL uses 1e-4 in the
advantage's denominator, OpenRLHF 1e-9.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor

from methods.tokens.base import TokenMethod
from methods.tokens.scoring import log_prob_and_entropy
from runner.interface import knob


class Rows(SimpleNamespace):
    """A minibatch of b rows on its way through the parts: the batch's own columns under their names (reward, group, …), and

    now, old   what `measure` told, (b, T) each: of the policy (with gradient), and of the one that sampled
    log_prob   = now["log_prob"];  ratio = exp(log_prob - old["log_prob"]), both (b, T)
    advantage, mask, weight (b, T);  low, high: the clip range, numbers or (b, T)
    tokens, count: response tokens and rows, the mean over processes: the denominators of `aggregate`
    told       metrics, tensors; parts add theirs;  number: of the minibatch
    """


class GroupPolicy(TokenMethod):
    @dataclasses.dataclass(frozen=True)
    class Config(TokenMethod.Config):
        prompts: int = knob(32, "Q: prompts a batch", low=1)
        samples: int = knob(8, "G: responses to each prompt", low=1)
        temperature: float = knob(1.0, "of sampling; log-probabilities are taken at it, too", low=1e-3)
        minibatches: int = knob(2, "optimiser steps a batch; groups stay whole", low=1)
        clip_low: float = knob(0.2, "e_low", low=0.0)
        clip_high: float = knob(0.2, "e_high", low=0.0)
        dual_clip: float = knob(0.0, "c: with a negative advantage a token's loss is at most -A c; 0: no bound", low=0.0)
        scale: str = knob("group", "deviation that advantages are divided by: the group's, the batch's, or none",
                          choices=["group", "batch", "none"])
        aggregation: str = knob("token_mean", "how token losses become one", choices=[
            "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"])
        kl_weight: float = knob(0.0, "beta: of the KL to the policy as it was at the start", low=0.0)
        kl_estimator: str = knob("k3", "its estimate per token", choices=["k1", "k2", "k3"], when={"kl_weight": [0.5]})

    PARTS = ("collect", "reward", "advantage", "measure", "observe", "weigh", "surrogate", "penalty", "after_update")
    ADDITIVE = ("reward", "measure", "observe", "weigh", "penalty", "after_update")
    looks_first = False  # whether the advantage is made from what is measured of the tokens

    def needs_reference(self):
        return self.config.kl_weight > 0

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: see envs/prompts/base.py."""
        c = self.config
        batch = {**batch, "mask": batch["mask"].float()}
        self.told: dict[str, Tensor] = {}
        batch["reward"] = self.reward(batch)
        steps = c.minibatches * self.passes()
        first = steps > 1 or self.looks_first
        old = self.measured(batch) if first else {}  # else the step's own forward pass tells
        if self.needs_reference():
            old["reference_log_prob"] = self.score_reference(batch, c.temperature)["log_prob"]
        advantage = self.advantage(batch, old)
        batch["advantage"] = advantage if advantage.dim() == 2 else advantage[:, None].expand_as(batch["mask"])
        if first:
            self.observe(batch, old)
        lines = []
        for i, index in enumerate(rows for number in range(self.passes()) for rows in self.split(batch, number)):
            rows = Rows(**{k: v[index] for k, v in batch.items()}, old={k: v[index] for k, v in old.items()}, told={}, number=i)
            self.schedule(self.updates * steps + i, self.planned * steps)
            self.step(rows, batch)
            lines.append(rows.told)
        old = old if first else rows.old
        self.after_update(batch)
        told = {k: torch.stack([line[k] for line in lines]).mean() for k in lines[0]}
        return {**told, **self.summary(batch, old), **self.told}

    @torch.no_grad()
    def measured(self, batch) -> dict[str, Tensor]:
        """What `measure` tells of the policy as it stands, for all rows, in parts of `micro_rows`."""
        size = self.config.micro_rows or len(batch["response"])
        parts = torch.arange(len(batch["response"]), device=batch["response"].device).split(size)
        told = [self.score({k: batch[k][i] for k in ("prompt", "prompt_mask", "response", "mask")}, self.measuring(),
                           self.config.temperature) for i in parts]
        return {k: torch.cat([t[k] for t in told]) for k in told[0]}

    def measuring(self):
        """The part `measure`, or, where it adds nothing, the same two numbers by the quicker way of scoring.py."""
        return self.measure if self.measures_more() else log_prob_and_entropy

    def measures_more(self) -> bool:
        """Whether `measure` has more to tell at these settings than the base; a method that is its baseline at some says so, and
        otherwise asks super(), since it may be combined with another."""
        return any("measure" in vars(c) and "measures_more" not in vars(c) for c in type(self).__mro__)

    def passes(self) -> int:
        """How often an update goes through its batch, in `minibatches` steps of the optimiser each time."""
        return 1

    def split(self, batch, number: int = 0) -> list[Tensor]:
        """Rows of every minibatch of pass `number`; groups stay whole."""
        group, parts = batch["group"], self.config.minibatches
        if parts == 1:
            return [torch.arange(len(group), device=group.device)]
        groups = int(group.max()) + 1
        order = torch.argsort(self.noise(f"minibatches{number or ''}", (groups,), "uniform"))
        place = torch.empty_like(order).scatter_(0, order, torch.arange(groups, device=order.device))
        part = (place.to(group.device) * parts) // groups
        return [rows for i in range(parts) if len(rows := torch.nonzero(part[group] == i).squeeze(1))]

    def step(self, rows: Rows, batch):
        """One step of the optimiser on a minibatch."""
        rows.weight, rows.low, rows.high = torch.ones_like(rows.mask), self.config.clip_low, self.config.clip_high
        rows.tokens = self.engine.mean(rows.mask.sum())
        rows.count = len(rows.mask)

        def loss(now: dict[str, Tensor]) -> Tensor:
            rows.now, rows.log_prob = now, now["log_prob"]
            if "log_prob" not in rows.old:  # the only minibatch: the policy is still the one that sampled
                rows.old |= {k: v.detach() for k, v in now.items()}
                self.observe(batch, rows.old)
            rows.log_ratio = (rows.log_prob - rows.old["log_prob"]).clamp(-20, 20)
            rows.ratio = rows.log_ratio.exp()
            with torch.no_grad():
                self.weigh(rows)
            value = self.aggregate(self.surrogate(rows) * rows.weight, rows)
            penalty = self.penalty(rows)
            with torch.no_grad():
                self.tell(rows, value)
            return value if penalty is None else value + penalty

        rows.told["loss"] = self.fit(vars(rows), self.measuring(), self.config.temperature, loss)

    def aggregate(self, values: Tensor, rows: Rows, mode: str = "") -> Tensor:
        """values (b, T) -> scalar; rows.mask says which count, rows.tokens and rows.count what is divided by."""
        values, mode = values * rows.mask, mode or self.config.aggregation
        if mode == "token_mean":
            return values.sum() / rows.tokens.clamp(min=1)
        if mode == "token_sum_norm":
            return values.sum() / (rows.count * values.shape[1])
        sums = values.sum(1)
        return sums.mean() if mode == "seq_mean_token_sum" else (sums / rows.mask.sum(1).clamp(min=1)).mean()

    def tell(self, rows: Rows, value: Tensor):
        """Metrics of a minibatch."""
        low = (rows.ratio < 1 - rows.low) & (rows.advantage < 0)
        high = (rows.ratio > 1 + rows.high) & (rows.advantage > 0)
        share = rows.mask / rows.tokens.clamp(min=1)
        rows.told |= {"policy_loss": value.detach(), "clip_low": (low * share).sum(), "clip_high": (high * share).sum(),
                      "ratio": (rows.ratio.detach() * share).sum()}

    def summary(self, batch, old) -> dict[str, Tensor]:
        """Metrics of the whole batch of rollouts."""
        mask = batch["mask"]
        share = mask / self.engine.mean(mask.sum()).clamp(min=1)
        _, deviation, _ = self.compare(batch["reward"], batch)
        out = {"reward": self.each(batch["reward"], batch).mean(), "correct": self.each(batch["correct"], batch).mean(),
               "format": batch["format"].mean(), "length": batch["length"].mean(), "entropy": (old["entropy"] * share).sum(),
               "same_reward": self.each((deviation == 0).float(), batch).mean()}
        if "turn" in batch:
            out["turns"] = self.each(batch["turn"].float(), batch).mean() * 2 + 1  # of an episode: 0, 1, …, n-1
            sums, tokens = (self.engine.mean(mask.new_zeros(self.spec.turns).index_add(0, batch["turn"], v.sum(1)))
                            for v in (old["entropy"] * mask, mask))
            out["entropy_by_turn"] = (sums / tokens.clamp(min=1e-6)).sum() / (tokens > 0).sum().clamp(min=1)
        if "reference_log_prob" in old:
            out["kl"] = ((old["log_prob"] - old["reference_log_prob"]) * share).sum()
        return out

    # -- rows that count as one: the turns of an episode, where the batch has a column `unit`
    def compare(self, values: Tensor, batch) -> tuple[Tensor, Tensor, Tensor]:
        """group_statistics of values (B,) over what is compared: responses, or episodes."""
        return group_statistics(values, batch["group"], batch.get("unit"))

    def each(self, values: Tensor, batch) -> Tensor:
        """values (B,) -> one for each response, or for each episode the mean of its turns'."""
        return means(values, batch["unit"])[0] if "unit" in batch else values

    # -- parts
    def collect(self, source) -> dict[str, Tensor]:
        """The next batch: source.problems(number), source.rollouts(problems, samples, temperature, name)."""
        c = self.config
        return source.rollouts(source.problems(c.prompts), c.samples, c.temperature)

    def reward(self, batch) -> Tensor:
        """r (B,); overriders add to super()'s."""
        return batch["reward"]

    def advantage(self, batch, old) -> Tensor:
        """A (B,) or (B, T). `old` is filled only for a method that `looks_first`."""
        r = batch["reward"]
        mean, deviation, _ = self.compare(r, batch)
        if self.config.scale == "none":
            return r - mean
        return (r - mean) / ((deviation if self.config.scale == "group" else self.each(r, batch).std()) + 1e-6)

    def measure(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """logits (n, V) over the temperature, target (n,) -> {name: (n,)}; overriders add to super()'s."""
        return log_prob_and_entropy(logits, target)

    def observe(self, batch, old: dict[str, Tensor]):
        """The whole batch and what was measured of it before the first step; overriders call super()'s."""

    def weigh(self, rows: Rows):
        """Change rows.advantage, weight, low, high, mask, tokens; without gradient. Overriders call super()'s."""

    def surrogate(self, rows: Rows) -> Tensor:
        """l (b, T)"""
        a, ratio = rows.advantage, rows.ratio
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - rows.low, 1 + rows.high))
        if self.config.dual_clip:
            loss = torch.where(a < 0, torch.minimum(loss, -a * self.config.dual_clip), loss)
        return loss

    def penalty(self, rows: Rows) -> Tensor | None:
        """Added to the loss; overriders add to super()'s (None counts as zero)."""
        c = self.config
        if not c.kl_weight:
            return None
        return c.kl_weight * self.aggregate(kl(rows.log_prob, rows.old["reference_log_prob"], c.kl_estimator), rows)

    def after_update(self, batch):
        """After the last step; overriders call super()'s."""


def means(values: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """values (B,), unit (B,) any numbers -> the mean of each unit's values (U,), of equal ones to the bit; the place of each
    row's unit among them (B,)."""
    numbers, place = unit.unique(return_inverse=True)
    zero = values.new_zeros(len(numbers))
    mean = zero.index_add(0, place, values) / zero.index_add(0, place, torch.ones_like(values))
    low, high = (zero.scatter_reduce(0, place, values, how, include_self=False) for how in ("amin", "amax"))
    return torch.where(low == high, low, mean), place


def group_statistics(values: Tensor, group: Tensor, unit: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """values (B,), group (B,) numbers from 0 -> mean, unbiased standard deviation and size of each row's group, (B,) each. A
    group of one has mean 0 and deviation 1; equal values have deviation 0, to the bit. Rows of one `unit` (B,) count as one
    value, their mean."""
    if unit is not None:
        mean, place = means(values, unit)
        return tuple(told[place] for told in group_statistics(mean, torch.zeros_like(mean).long().scatter(0, place, group)))
    groups = int(group.max()) + 1
    one = torch.ones_like(values)
    size = torch.zeros(groups, device=values.device).index_add_(0, group, one)
    mean = torch.zeros_like(size).index_add_(0, group, values) / size
    low = torch.full_like(size, torch.inf).scatter_reduce_(0, group, values, "amin")
    high = torch.full_like(size, -torch.inf).scatter_reduce_(0, group, values, "amax")
    square = torch.zeros_like(size).index_add_(0, group, (values - mean[group]).square())
    deviation = (square / (size - 1).clamp(min=1)).sqrt()
    mean, deviation = torch.where(low == high, low, mean), torch.where(low == high, 0.0, deviation)  # exact where all are equal
    mean, deviation = torch.where(size == 1, 0.0, mean), torch.where(size == 1, 1.0, deviation)
    return mean[group], deviation[group], size[group]


def kl(log_prob: Tensor, reference: Tensor, estimator: str, cap: float = 0.0) -> Tensor:
    """Estimates of KL(pi || ref) per token from its samples, (b, T)."""
    d = log_prob - reference
    if estimator == "k1":
        return d
    value = 0.5 * d.square() if estimator == "k2" else (-d).clamp(-20, 20).exp() + d - 1
    return value.clamp(max=cap) if cap else value


def plus(penalty: Tensor | None, more: Tensor) -> Tensor:
    """A part's own penalty beside super()'s."""
    return more if penalty is None else penalty + more
