"""DPH-RL: diversity-preserving hybrid RL (Li et al. 2025, arXiv 2509.07430): rehearsal of what the start could do already.

The start pi_0 answers `survey` problems, n0 = `survey_samples` times each, before the first update. D_pef: the problems solved in
a share `solved` of them; D_exp: the others. RL is on D_exp only, without a KL; beside it, in every minibatch, a mass-covering
divergence on stored correct responses of pi_0, whose log-probabilities lp_0 are stored, too, so that no reference is run:

    L = L_RL(D_exp) + eta agg(f(u)),   u = exp(d), d = lp - lp_0, rows drawn anew from the store, `rehearsal` an update

    forward        f = u - 1 - ln u                                       E_0 f = KL(pi_0 || pi)
    js             f = u ln u - (u+1) ln((u+1)/2)                         E_0 f = KL(pi || M) + KL(pi_0 || M), M = (pi + pi_0) / 2
    alpha          f = (u^(1-a) - (1-a) u - a) / (a (a-1))                E_0 f = (1 - sum_v pi^(1-a) pi_0^a) / (a (1-a))
    js_definition  f = M/pi_0 - 1 - ln(M/pi_0), E_0 f = KL(pi_0 || M); in a share `online_share` of the minibatches also the same
                   estimate of KL(pi || M) on the RL rows, by an online reference. Its gradient takes the rows as given,
                   as the official code does: it is not the gradient of KL(pi || M)
    reverse        for contrast: k2 to pi_0 on the RL rows of all problems (gradient: KL(pi || pi_0)'s); no survey, no store
    nll            for contrast: f = -ln u, imitation of the store; unlike the others it has no minimum at u = 1

All have f(1) = f'(1) = 0 (but nll) and are made of d, never of log(exp(.)); |d| is cut at 20. store=all_correct keeps every
correct response, where few problems are solved throughout; D_exp stays what it is.

Differences from the official code: it concatenates RL rows and rehearsal rows, so that a step may see the divergence alone,
which Adam rescales; here each minibatch has both. Its k3 stops at 10. Its script stores one response a problem, by 4 samples.
Each process surveys its share of the problems, and explores and rehearses these. Not reproduced: Llama on SQL.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from methods.reasoning.base import GroupPolicy, kl, plus
from methods.reasoning.batches import join
from runner.errors import UserError
from runner.interface import knob

STORED = ("prompt", "prompt_mask", "response", "mask", "first_log_prob")


def generator(d: Tensor, divergence: str, alpha: float = 0.2) -> Tensor:
    """f(u) of d = ln u, elementwise."""
    d = d.clamp(-20, 20)
    if divergence == "forward":
        return torch.expm1(d) - d
    if divergence == "js":
        return d.exp() * d - (d.exp() + 1) * half_sum(d)
    if divergence == "alpha":
        return (((1 - alpha) * d).exp() - (1 - alpha) * d.exp() - alpha) / (alpha * (alpha - 1))
    if divergence == "js_definition":
        return torch.expm1(half_sum(d)) - half_sum(d)
    return -d


def half_sum(d: Tensor) -> Tensor:
    """ln((1 + u) / 2)"""
    return F.softplus(d) - math.log(2)


class DPHRL(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        eta: float = knob(0.01, "weight of the divergence", low=0.0, source="paper")
        divergence: str = knob("forward", "which, see above", source="paper",
                               choices=["forward", "js", "alpha", "js_definition", "reverse", "nll"])
        alpha: float = knob(0.2, "a", low=1e-3, high=0.999, source="paper", when={"divergence": "alpha"})
        online_share: float = knob(0.1, "minibatches that see KL(pi || M), too", low=0.0, high=1.0, source="official code",
                                   when={"divergence": "js_definition"})
        survey: int = knob(1024, "problems that the start is asked, over all processes; the paper asks all", low=1)
        survey_samples: int = knob(8, "n0: responses to each of them", low=1, source="paper")
        solved: float = knob(1.0, "share of correct responses from which a problem is not explored", low=0.0, high=1.0,
                             source="paper")
        store: str = knob("solved", "correct responses that are rehearsed: those to solved problems, or all",
                          choices=["solved", "all_correct"])
        explore_only: bool = knob(True, "no RL on solved problems")
        rehearsal: int = knob(256, "stored responses an update", low=1, source="paper")

    def setup(self, spec):
        super().setup(spec)
        self.surveyed: dict[str, Tensor] = {}

    def rehearses(self) -> bool:
        return self.config.eta > 0 and self.config.divergence != "reverse"

    def needs_reference(self):
        return super().needs_reference() or self.config.eta > 0 and self.config.divergence in ("reverse", "js_definition")

    # -- the survey, before the first update
    def collect(self, source):
        c = self.config
        explores = c.explore_only and c.divergence != "reverse"
        if (explores or self.rehearses()) and not self.surveyed:
            self.surveyed = self.ask(source)
        if not explores:
            return super().collect(source)
        known = self.surveyed["problem"][self.surveyed["explored"]].to("cpu")
        order = self.noise("explored", (len(known),), "uniform").argsort().to("cpu")
        chosen = known[order[torch.arange(c.prompts) % len(known)]]
        return source.rollouts([int(i) for i in chosen], c.samples, c.temperature)

    def ask(self, source) -> dict[str, Tensor]:
        """problem (n,), explored (n,): what was asked, and whether it lies in D_exp; STORED: the rows to rehearse."""
        c = self.config
        problems = source.problems(max(1, c.survey // self.processes[1]))
        parts = [problems[i:i + c.prompts] for i in range(0, len(problems), c.prompts)]
        batch = join([source.rollouts(part, c.survey_samples, c.temperature, f"survey{i}") for i, part in enumerate(parts)])
        right = batch["correct"] > 0
        solved = right.view(-1, c.survey_samples).sum(1) >= c.solved * c.survey_samples - 1e-6
        out = {"problem": batch["problem"][::c.survey_samples],
               "explored": ~solved if not solved.all() else torch.ones_like(solved)}
        if not self.rehearses():
            return out
        kept = right & solved[batch["group"]] if c.store == "solved" else right
        if not kept.any():
            raise UserError(f"nothing to rehearse: of {len(problems)} problems the start solved none in {c.solved:.0%} of "
                            f"{c.survey_samples} responses\nask less (method.solved=0.75), keep every correct response "
                            "(method.store=all_correct), or ask more problems (method.survey)")
        batch = {k: batch[k][kept.nonzero().squeeze(1)] for k in STORED[:-1]}
        with torch.no_grad():
            return {**out, **batch, "first_log_prob": self.log_prob(batch, c.prompts * c.samples)}

    def extra_state(self):
        return {**super().extra_state(), "surveyed": self.surveyed}

    def load_extra_state(self, state):
        super().load_extra_state(state)
        self.surveyed = {k: v.to(self.device()) for k, v in state["surveyed"].items()}

    # -- the divergence
    def log_prob(self, rows: dict[str, Tensor], most: int) -> Tensor:
        """(n, T), in parts of at most `most` and `micro_rows` rows, whose activations are made again for the backward pass."""
        def part(some):
            return self.score(some, temperature=self.config.temperature)["log_prob"]

        size = min(most, self.config.micro_rows or most)
        parts = [{k: v[i:i + size] for k, v in rows.items() if k in STORED} for i in range(0, len(rows["mask"]), size)]
        return part(parts[0]) if len(parts) == 1 else torch.cat([checkpoint(part, p, use_reentrant=False) for p in parts])

    def penalty(self, rows):
        c, penalty = self.config, super().penalty(rows)
        if not c.eta:
            return penalty
        if c.divergence == "reverse":
            return plus(penalty, c.eta * self.aggregate(kl(rows.log_prob, rows.old["reference_log_prob"], "k2"), rows))
        number = max(1, c.rehearsal // c.minibatches)
        drawn = (self.noise(f"rehearsal{rows.number}", (number,), "uniform") * len(self.surveyed["mask"])).long()
        old = SimpleNamespace(**{k: self.surveyed[k][drawn] for k in STORED})
        old.tokens, old.count = self.engine.mean(old.mask.sum()), number
        log_prob = self.log_prob(vars(old), number)
        value = self.aggregate(generator(log_prob - old.first_log_prob, c.divergence, c.alpha), old)
        if c.divergence == "js_definition":
            online = generator(rows.old["reference_log_prob"] - rows.log_prob, "js_definition")
            chosen = self.noise(f"online{rows.number}", (), "uniform") < c.online_share
            value = value + chosen * self.aggregate(online, rows)
        rows.told["divergence"] = value.detach()
        return plus(penalty, c.eta * value)
