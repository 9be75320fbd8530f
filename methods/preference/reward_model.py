"""A reward model: the Bradley-Terry likelihood of pairs (Christiano et al. 2017, arXiv 1706.03741; for language models Ouyang et
al. 2022, arXiv 2203.02155).

    L = -log sigma( r(x, y_w) - r(x, y_l) ) + center (r_w + r_l)^2

r is a linear head, at 0 before training, on the hidden state at the response's last token; the whole policy is trained with it.
Over arms r is the table (or the function of features) that is added to the reference's logits: there the policy that gold
metrics look at is pi_ref exp(r), and training without `center` is that of DPO at beta = 1. Only differences of r are told by
pairs, context by context; `center` keeps its level near 0 (Eisenstein et al. 2023, arXiv 2312.09244; 0.01 there).

form=implicit reads the reward off the policy's log-ratio instead, which is DPO.

Where rows are rankings of P responses, s(1) best (columns between, envs/pairs/rankings.py), the likelihood of all of it,

    plackett_luce    L = -sum_{k < P} [ r_s(k) - log sum_{j >= k} exp r_s(j) ]          (Luce 1959; Plackett 1975)
    all_pairs        L = -mean_{k < j} log sigma(r_s(k) - r_s(j))                       (InstructGPT's: one batch element a list)
    ends             L = -log sigma(r_s(1) - r_s(P)),   what methods on pairs see of such rows

With two responses all three are the one above. The level is held for the ends. Of lists with features beside:
method=adpo method.form=plackett_luce method.anchor=uniform on env=noisy_lists.

A finished run can judge what others sample: env.judge_run=FOLDER (envs/pairs/base.py).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.preference import forms
from methods.preference.dpo import DPO
from methods.preference.pairs import SIDES, plus
from methods.tokens import rewards, scoring
from runner.interface import knob


class RewardModel(DPO):
    @dataclasses.dataclass(frozen=True)
    class Config(DPO.Config):
        form: str = knob("head", "what rates a response: a function of its own, or the policy's log-ratio to the start",
                         choices=["head", "implicit"])
        beta: float = knob(0.1, "of the implicit reward: beta times the log-ratio", low=0.0, when={"form": "implicit"})
        likelihood: str = knob("plackett_luce", "of rankings of more than two responses", choices=[
            "plackett_luce", "all_pairs", "ends"], when={"form": "head"})
        center: float = knob(0.01, "weight of (r_w + r_l)^2", low=0.0, source="arXiv 2312.09244")
        micro_rows: int = knob(0, "rows that go through the policy at once, for memory; 0: all. The gradient is the same (a "
                               "table's to the bit)", low=0, when={"form": "implicit"})

    judges = True  # what it has learned is a judgement, and not a policy to sample from

    def setup(self, spec):
        super().setup(spec)
        self.headed = self.config.form == "head" and not spec.arms
        if self.headed:
            self.reward_head = nn.Parameter(torch.zeros(1, self.policy.shape.width))

    def make_optimizers(self):
        super().make_optimizers()
        if self.headed:
            self.optimizers["policy"].param_groups[0]["params"].append(self.reward_head)

    def needs_reference(self):
        return self.config.form == "implicit"

    def measures_more(self):
        return self.config.form == "head" or super().measures_more()

    def measure(self, logits, target):
        """Under log_prob: what a response is rated by. A head's output, or what is learned of an arm."""
        if self.config.form == "implicit":
            return super().measure(logits, target)
        return {"log_prob": logits[:, 0] if self.headed else logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)}

    def score(self, rows, measure=scoring.log_prob_and_entropy, temperature=1.0, policy=None, trunk=None, beside=None):
        if self.config.form == "head" and measure == self.measure:
            policy = rewards.Rater(self.policy, self.reward_head) if self.headed else self.policy.rater()
        return super().score(rows, measure, temperature, policy, trunk, beside)

    def longer(self, batch) -> dict[str, Tensor]:
        """The batch with one more place behind every response, and a mask of that place alone."""
        out = dict(batch)
        for s in SIDES:
            out[s], out[f"{s}_mask"], out[f"{s}_after"] = rewards.longer(batch[s], batch[f"{s}_mask"])
        return out

    def between(self, batch) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of the responses between the ends, (P - 2, b, T): tokens, mask, and where the reward is read; None of pairs."""
        if "between" not in batch or self.config.form == "implicit" or self.config.likelihood == "ends":
            return None
        response, mask = batch["between"].transpose(0, 1), batch["between_mask"].transpose(0, 1)
        if not self.headed:
            return response, mask, mask
        return tuple(t.view(*mask.shape[:2], -1) for t in rewards.longer(response.flatten(0, 1), mask.flatten(0, 1)))

    def rows(self, batch):
        """Of rankings: the best responses' rows, the next ones', …"""
        between, batch = self.between(batch), self.longer(batch) if self.headed else batch
        if between is None:
            return super().rows(batch)
        sides = [(batch[s], batch[f"{s}_mask"]) for s in SIDES]
        sides[1:1] = zip(*between[:2])
        return {**{k: batch[k].repeat(len(sides), 1) for k in ("prompt", "prompt_mask")},
                "response": torch.cat([r for r, _ in sides]), "mask": torch.cat([m for _, m in sides])}

    def pairs(self, batch):
        between, read = self.between(batch), batch
        if self.headed:
            batch = self.longer(batch)
            read = {**batch, **{f"{s}_mask": batch[f"{s}_after"] for s in SIDES}}
        pairs = super().pairs(read)
        if between is not None:
            pairs.places = torch.cat([pairs.mask[:1], between[2], pairs.mask[1:]])
        return pairs

    def see(self, pairs, now):
        """Of rankings: what is told of all (P b, T) to `ranked` (P, b), and the ends to where pairs have their sides."""
        places = getattr(pairs, "places", None)
        if places is not None:
            whole = {k: v.view(places.shape) for k, v in now.items()}
            pairs.ranked = (whole["log_prob"] * places).sum(-1)
            now = {k: torch.cat([v[:1], v[-1:]]).flatten(0, 1) for k, v in whole.items()}
        super().see(pairs, now)

    def loss(self, pairs):
        ranked = getattr(pairs, "ranked", None)
        if ranked is None:
            return super().loss(pairs)
        if self.config.likelihood == "plackett_luce":
            place = torch.arange(len(ranked), 0, -1, device=ranked.device).expand(ranked.shape[1], -1)
            return forms.plackett_luce(ranked.T, place).mean()
        first, second = torch.triu_indices(len(ranked), len(ranked), 1, device=ranked.device)
        return -F.logsigmoid(ranked[first] - ranked[second]).mean()

    def scale(self) -> float:
        return self.config.beta if self.config.form == "implicit" else 1.0

    def implicit_reward(self, rho):
        return self.scale() * rho

    def difference(self, pairs):
        if self.config.form == "implicit":
            return super().difference(pairs)
        s, margin = self.worth(pairs), self.margin(pairs)
        return s[0] - s[1] if margin is None else s[0] - s[1] - margin

    def penalty(self, pairs):
        penalty, c = super().penalty(pairs), self.config
        level = (self.scale() * self.worth(pairs)).sum(0).square().mean()
        pairs.told["level"] = level.detach()
        return plus(penalty, c.center * level) if c.center else penalty

    @torch.no_grad()
    def rate(self, rows: dict[str, Tensor]) -> Tensor:
        """r (b,) of responses; rows: prompt, prompt_mask, response, mask."""
        if self.headed:
            return rewards.rate(rewards.Rater(self.policy, self.reward_head), rows)
        told = self.score(rows, self.measure)["log_prob"]
        if self.config.form == "implicit":
            told = told - self.score_reference(rows)["log_prob"]
        return self.scale() * (told * rows["mask"]).sum(1)
