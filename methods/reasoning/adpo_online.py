"""ADPO online: anchored direct preference optimisation on groups of sampled responses (arXiv 2510.18913).

For the P responses to a prompt, with their log-likelihoods l_i and an anchor's a_i,

    u_i = (l_i - a_i) / tau,   p = softmax(u),   q = softmax(A / beta_r),   L = mean over prompts of - sum_i q_i log p_i

    dL / dl_i = (p_i - q_i) / tau;   the optimum with a fixed anchor is p_anchor q^tau, made to sum to 1 on the group

A is the base's advantage, of one number a response. `passes` times an update goes through its batch. l_i is what `aggregation`
averages over responses: the sum of a response's log-probabilities (seq_mean_token_sum, the paper's), their mean
(seq_mean_token_mean, the author's later code), the sum over the batch's mean length (token_mean) or over the greatest
(token_sum_norm). Where rows are turns of episodes, l_i and a_i are of the episode, the sum of its turns'.

    anchor_policy   sampler: the policy that sampled the group; start: that at the start of training; ema: an average of all
                 since, moved once an update
    adaptive     tau (1 + a H + b (1 - H)(1 - R)) of every prompt, bounded; H: mean token entropy of its responses over log V;
                 R: its mean reward, 0 to 1 over the batch (of each process), 1/2 where all are equal
    ratio_bound, score_bound    |l - a| and |u| stay within; a response outside has no gradient (author's later code: 5 and 10)

Reductions. With the sampler's anchor, one pass and one minibatch, p is 1/P: nothing is anchored, and the gradient is REINFORCE's
with weights (q_i - 1/P) / tau. As beta_r grows these become A_i / (P beta_r tau): GRPO's gradient at one step of the optimiser,
beta_r tau times shorter, which AdamW hides. With two responses and beta_r near 0 it is DPO on the better and the worse one, at
beta = 1 / tau. Responses of equal reward have q = 1/P and are pulled to where the anchor has them.

Trap: what tau does depends on the anchor. With one that stays, trained to the end, a larger tau goes further from it (q^tau is
sharper). With the sampler's, in few steps, a larger tau is a smaller step.

Differences from the author's code: anchors' log-probabilities come from the training forward, not from the sampler; neither its
proxy for H (mean -lp), nor its other adaptive tau (one for the batch, which can fall below tau), nor its Plackett-Luce form is
here (lists of candidates: method=adpo). Not reproduced: language models on mathematics.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor

from methods.common.networks import polyak
from methods.reasoning.base import GroupPolicy, Rows
from methods.reasoning.disco import group_most, group_sums
from runner.interface import knob


class ADPOOnline(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        listwise: bool = knob(True, "the objective above; false: the base's")
        anchor_policy: str = knob("sampler", "what likelihoods are measured against", choices=["sampler", "start", "ema"],
                           source="paper", when={"listwise": True})
        ema_decay: float = knob(0.9, "decay of the ema anchor per update", low=0.0, high=1.0, source="project's choice",
                                when={"anchor_policy": "ema"})
        passes: int = knob(2, "times an update goes through its batch", low=1, source="paper")
        tau: float = knob(0.8, "temperature of the anchored scores", low=1e-6, source="author's code", when={"listwise": True})
        target_temperature: float = knob(0.5, "beta_r: of the target", low=1e-6, source="author's code",
                                         when={"listwise": True})
        adaptive: bool = knob(True, "temperature of each prompt, by entropy and reward", source="manuscript",
                              when={"listwise": True})
        a: float = knob(1.0, "adaptive temperature: weight of the entropy", low=0.0, source="manuscript",
                        when={"adaptive": True})
        b: float = knob(0.5, "adaptive temperature: weight of confident failure", low=0.0, source="manuscript",
                        when={"adaptive": True})
        tau_low: float = knob(0.1, "adaptive temperature: lower bound", low=1e-6, source="manuscript", when={"adaptive": True})
        tau_high: float = knob(5.0, "adaptive temperature: upper bound", low=1e-6, source="manuscript",
                               when={"adaptive": True})
        ratio_bound: float = knob(0.0, "bound of |l - a|; 0: none", low=0.0, source="author's code: 5",
                                  when={"anchor_policy": "start", "learning_rate": 0.01})
        score_bound: float = knob(0.0, "bound of |u|; 0: none", low=0.0, source="author's code: 10",
                                  when={"anchor_policy": "start", "learning_rate": 0.01})
        skip_failed: bool = knob(False, "prompts without any reward above 0 teach nothing", source="author's code",
                                 when={"listwise": True})
        dual_clip: float = knob(0.0, "c: with a negative advantage a token's loss is at most -A c; 0: no bound", low=0.0,
                                when={"listwise": False})

    def setup(self, spec):
        super().setup(spec)
        if self.averages():
            self.average = copy.deepcopy(self.policy).requires_grad_(False)

    def averages(self) -> bool:
        return self.config.listwise and self.config.anchor_policy == "ema"

    def load_start(self, start):
        super().load_start(start)
        if self.averages():
            self.average.load_state_dict(self.policy.state_dict())

    def needs_reference(self):
        return self.config.listwise and self.config.anchor_policy == "start" or super().needs_reference()

    def passes(self):
        return self.config.passes

    def observe(self, batch, old):
        super().observe(batch, old)
        c = self.config
        if not c.listwise:
            return
        if c.anchor_policy == "ema":
            old["anchor_log_prob"] = self.score_reference(batch, c.temperature, self.average)["log_prob"]
        old["heat"] = self.heat(batch, old["entropy"]) if c.adaptive else torch.full_like(batch["reward"], c.tau)
        self.told["tau"] = old["heat"].mean()

    def heat(self, batch, entropy: Tensor) -> Tensor:
        """tau of each row's prompt, (B,)."""
        c, group, mask = self.config, batch["group"], batch["mask"]
        spread = group_sums((entropy * mask).sum(1), group) / group_sums(mask.sum(1), group).clamp(min=1)
        spread = (spread / math.log(len(self.policy.head))).clamp(0, 1)
        mean = self.compare(batch["reward"], batch)[0]
        low, high = mean.min(), mean.max()
        success = torch.where(high > low, (mean - low) / (high - low).clamp(min=1e-12), 0.5)
        return (c.tau * (1 + c.a * spread + c.b * (1 - spread) * (1 - success))).clamp(c.tau_low, c.tau_high)

    def weigh(self, rows):
        super().weigh(rows)
        c, group = self.config, rows.group
        if not c.listwise:
            return
        anchor = rows.old[{"sampler": "log_prob", "start": "reference_log_prob", "ema": "anchor_log_prob"}[c.anchor_policy]]
        ratio, share = self.likelihood(rows.log_prob - anchor, rows), torch.ones_like(rows.reward)
        if "unit" in vars(rows):
            _, place = rows.unit.unique(return_inverse=True)
            ratio, share = group_sums(ratio, place), 1 / group_sums(share, place)
        ratio, inside = bounded(ratio, c.ratio_bound)
        score, within = bounded(ratio / rows.old["heat"], c.score_bound)
        log_p = log_shares(score, group, share)
        q = log_shares(rows.advantage[:, 0] / c.target_temperature, group, share).exp()
        size = rows.count / len(group.unique())  # a mean over rows becomes one over prompts
        if c.skip_failed:
            size = size * (group_most(rows.reward, group) > 0)
        pull = size * inside * within * (q - log_p.exp()) / rows.old["heat"]
        rows.told |= {"list_loss": -(size * share * q * log_p).mean(), "score": score.abs().mean()}
        # The value beside the gradient's: of each row, spread over its tokens so that `aggregate` puts it together again.
        value = pull * self.likelihood(rows.log_prob, rows) - size * share * q * log_p
        rows.constant = (value / self.likelihood(torch.ones_like(rows.mask), rows).clamp(min=1e-12))[:, None]
        rows.advantage = pull[:, None].expand_as(rows.mask)

    def likelihood(self, log_prob: Tensor, rows: Rows) -> Tensor:
        """l (b,): the numbers whose mean over rows is `aggregate`'s. log_prob (b, T)."""
        sums, mode = (log_prob * rows.mask).sum(1), self.config.aggregation
        if mode == "token_mean":
            return sums * rows.count / rows.tokens.clamp(min=1)
        if mode == "token_sum_norm":
            return sums / rows.mask.shape[1]
        return sums if mode == "seq_mean_token_sum" else sums / rows.mask.sum(1).clamp(min=1)

    def surrogate(self, rows):
        if not self.config.listwise:
            return super().surrogate(rows)
        return rows.constant - rows.advantage * rows.log_prob

    def after_update(self, batch):
        super().after_update(batch)
        if self.averages():
            polyak(list(self.average.parameters()), list(self.policy.parameters()), 1 - self.config.ema_decay)


def bounded(values: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """values within [-bound, bound], where there is one (0: none), and which were there already."""
    return (values.clamp(-bound, bound), values.abs() <= bound) if bound else (values, torch.ones_like(values, dtype=torch.bool))


def log_shares(score: Tensor, group: Tensor, share: Tensor) -> Tensor:
    """log softmax of score (b,) within each row's group, whose rows count `share` (b,) each."""
    centred = score - group_most(score, group)
    return centred - group_sums(share * centred.exp(), group).log()
