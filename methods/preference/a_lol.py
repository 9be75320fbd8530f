"""A-LoL: advantage-leftover-lunch RL (Baheti et al. 2024, arXiv 2305.14718): likelihood of logged responses, by their rewards.

A whole response is one action. The value V(x) of the policy at the start is estimated once at every prompt (the env's: the mean
reward of some of its own responses); what is learned are the responses that are better than it, A = R - V(x) > 0, the more the
better they are:

    L = mean_i [ c_i sum_t w_it (-lp_it) ],   l = sum_t lp_t,   r = sg[exp(l - l_0)],   r_t = sg[exp(lp_t - lp_0t)]

| variant | c | w | |
|---|---|---|---|
| a_lol | max(A, 0) | clip(r, 1 - e, 1 + e) | the ratio of the response |
| seq | max(A, 0) | clip(r_t, 1 - e, 1 + e) | that of each token |
| ref_free | max(A, 0) | 1 | |
| kl | max(A, 0) | 1 | + kl_weight mean_i (l_i - l_0i) |
| r_lol | R | clip(r, 1 - e, 1 + e) | |
| weighted_bc | R | 1 | |
| r_gold | R | max(p_t, floor) | p_t without gradient (GOLD's) |
| nll | | | SFT to the bit: the mean over tokens, drawn uniformly |

Rows are drawn in proportion to c (`draw` priority), uniformly among those with c > 0 (filter), or uniformly among all; auto is
priority for advantages and all for rewards. Drawn by priority and weighed by c, a response counts by c^2.

Traps. The clip has no part in the gradient: it is c clip(r) grad l everywhere, where PPO's is 0 outside. With e = 0.9 the ratio
of a long response is almost always at the clip: `clipped` tells. The variant kl has the gradient of ref_free with max(A, 0) -
kl_weight in the place of max(A, 0): it anchors nothing. Half the data or more may have no advantage; the loop's steps are what
is given, the paper takes the share `kept` of them.

V is the env's mean for that very prompt, or, with critic=head, what a head on the frozen start's hidden states makes of all of
them (methods/preference/value_head.py), as in the official code, which has one sample a prompt (env.samples_per_prompt=1).

Differences from the official code: its head learns from validation prompts, here from the rows' own, all at once; its rewards go
through a sigmoid first; its epochs are shuffled, here rows are drawn with replacement; it keeps the weights of the best reward in
validation, here the last. It can draw by reward for the variants of R, too: draw=priority.
"""

from __future__ import annotations

import dataclasses

from methods.preference.value_head import fitted_values
from methods.tokens.demonstrated import Demonstrated
from runner.errors import UserError
from runner.interface import knob

OF_ADVANTAGE = ("a_lol", "seq", "ref_free", "kl")


class ALoL(Demonstrated):
    @dataclasses.dataclass(frozen=True)
    class Config(Demonstrated.Config):
        variant: str = knob("a_lol", "which, see above", source="paper", choices=[
            "a_lol", "seq", "ref_free", "kl", "r_lol", "weighted_bc", "r_gold", "nll"])
        draw: str = knob("auto", "how rows are drawn: by advantage or reward, those that have some, or all",
                         choices=["auto", "priority", "filter", "all"], source="paper",
                         when={"variant": ["a_lol", "seq", "ref_free", "kl", "r_lol", "weighted_bc", "r_gold"]})
        critic: str = knob("means", "V(x): the mean reward of own responses to that prompt, or a head fitted to these means",
                           choices=["means", "head"], source="official code: head",
                           when={"variant": ["a_lol", "seq", "ref_free", "kl"]})
        value_steps: int = knob(200, "AdamW's steps that fit the head, all prompts at once", low=1, source="project's choice; "
                                "official code: 10 epochs", when={"critic": "head"})
        value_rate: float = knob(0.01, "its learning rate", low=0.0, source="project's choice; official code: 1e-5",
                                 when={"critic": "head"})
        clip: float = knob(0.9, "e: of the likelihood ratio to the start", low=0.0, source="paper",
                           when={"variant": ["a_lol", "seq", "r_lol"]})
        kl_weight: float = knob(0.1, "b: of l - l_0", low=0.0, source="project's choice", when={"variant": "kl"})
        floor: float = knob(0.1, "least weight of a token", low=0.0, high=1.0, source="official code",
                            when={"variant": "r_gold"})

    def needs_reference(self):
        return self.config.variant in ("a_lol", "seq", "kl", "r_lol") or super().needs_reference()

    def prepare(self, data):
        """Adds the columns credit (N,), c above, and draw (N,)."""
        super().prepare(data)
        c = self.config
        if c.variant == "nll":
            return None
        of_advantage = c.variant in OF_ADVANTAGE
        value = data["value"] if of_advantage else 0.0
        if of_advantage and c.critic == "head":
            value = fitted_values(self.policy, data["prompt"], data["prompt_mask"], value, c.value_steps, c.value_rate)
        credit = (data["reward"] - value).clamp(min=0)
        if not (credit > 0).any():
            raise UserError(f"of {len(credit)} responses none is better than what the policy gives by itself: there is nothing "
                            "to learn for variants by advantage\nlearn from rewards: method.variant=r_lol, or weighted_bc"
                            if of_advantage else f"none of {len(credit)} responses has a positive reward\nlearn from all of "
                            "them alike: method.variant=nll")
        self.kept = (credit > 0).float().mean()
        draw = {"auto": "priority" if of_advantage else "all"}.get(c.draw, c.draw)
        more = {"priority": {"draw": credit}, "filter": {"draw": (credit > 0).float()}, "all": {}}[draw]
        return {**data, "credit": credit, **more}

    def weigh_tokens(self, rows):
        c, weight = self.config, super().weigh_tokens(rows)
        if c.variant == "nll":
            return weight
        rows.told |= {"credit": rows.credit.mean(), "kept": self.kept}
        weight = weight * rows.credit[:, None]
        if c.variant in ("a_lol", "r_lol", "seq"):
            ratio = (rows.log_prob - self.start_log_prob(rows)) * rows.mask
            ratio = (ratio if c.variant == "seq" else ratio.sum(1, keepdim=True)).clamp(-20, 20).exp()
            kept = ratio.clamp(1 - c.clip, 1 + c.clip)
            rows.told |= {"ratio": self.mean(ratio.expand_as(rows.mask), rows),
                          "clipped": self.mean((kept != ratio).float().expand_as(rows.mask), rows)}
            weight = weight * kept
        return weight * rows.log_prob.exp().clamp(min=c.floor) if c.variant == "r_gold" else weight

    def value(self, rows):
        value = super().value(rows)
        return value if self.config.variant == "nll" else (value * rows.mask).sum(1)

    def penalty(self, rows):
        penalty = super().penalty(rows)
        if self.config.variant != "kl":
            return penalty
        distance = ((rows.log_prob - self.start_log_prob(rows)) * rows.mask).sum(1).mean()
        rows.told["distance"] = distance.detach()
        own = self.config.kl_weight * distance
        return own if penalty is None else penalty + own
