"""AEPO: entropy held at a target by correct samples of another temperature (Wang et al. 2025, arXiv 2510.08141).

Instead of an entropy bonus, a REINFORCE term on correct responses that were drawn hotter (entropy rises) or colder (it falls):

    grad J = grad J_GRPO + alpha E_{o ~ pi^T} [ R(o) grad log pi(o) ],   T = hot if h <= target else cold

    1. main rollout; control rollout of the first `control_prompts` of the problems at T; its responses with a GRPO advantage
       above 0.05 within their own groups are candidates
    2. K of them replace rows of the main batch with advantage `control_advantage`; K = min(`replaced` of the rows, candidates),
       half of that above the target. The advantages of the main rows, and the batch's metrics, are those of before
    3. one clipped update; lp_old is taken at T = 1, without correction for the tempered proposal

h is the entropy of the previous batch, 0 before the first. No candidates: GRPO. variant=blend (the repository's later "DCPO")
needs no second rollout:  A <- (1 - a) A + a c_i exp(lp_T - lp) per token,  a = a0 / (1 + a0),  a0 = min(|target - h|,
blend_limit) / share of correct responses.

Differences from the official code: candidates and replaced rows are random (choice=first: the first prompts); h is the exact
entropy of the main rows before the update (reading=sample: -mean lp over all rows, a sample estimate of a mixed batch; theirs
is taken during the updates); it crashes without candidates. proposal=plain draws the control at the main temperature: the
control that has to be worse. On small, sharp policies the thermostat hardly acts: on countdown neither the paper's values hold
a target, nor T = 3 with half of the rows (too few of such responses are correct to fill them), nor T = 1.5 with advantage 5.
The paper's top-p of 0.99 is not reproduced.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from methods.reasoning.base import GroupPolicy
from methods.reasoning.batches import join, rows_of
from runner.interface import knob

SAMPLED = ("prompt", "prompt_mask", "response", "mask", "log_prob")  # what is replaced; figures stay those of the main rows


class AEPO(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        entropy_target: float = knob(0.5, "nats a token", low=0.0, source="official code")
        hot: float = knob(1.2, "temperature that raises entropy", low=1e-3, source="paper")
        cold: float = knob(0.8, "temperature that lowers it", low=1e-3, source="paper", when={"entropy_target": 0.0})
        replaced: float = knob(0.0234375, "largest share of the rows that is replaced; 0: none", low=0.0, high=1.0,
                               source="paper")
        control_prompts: float = knob(0.25, "share of the problems that are sampled again, one at least", low=0.0, high=1.0,
                                      source="paper", when={"replaced": 0.5})
        control_advantage: float = knob(1.0, "of the rows that come in", source="paper")
        choice: str = knob("random", "which candidates and rows are exchanged", choices=["random", "first"])
        reading: str = knob("exact", "of the entropy: of the main rows; or -mean lp of all", choices=["exact", "sample"],
                            when={"variant": "blend", "entropy_target": 0.2})
        proposal: str = knob("thermostat", "temperature of the control rollout; plain: the main one's", choices=[
            "thermostat", "plain"])
        variant: str = knob("replace", "rows are replaced, or advantages blended (DCPO)", choices=["replace", "blend"])
        blend_limit: float = knob(0.1, "bound of |target - h|", low=0.0, source="official code", when={"variant": "blend"})

    def setup(self, spec):
        super().setup(spec)
        self.register_buffer("entropy_reading", torch.zeros(()))

    def control_temperature(self) -> Tensor:
        c = self.config
        if c.proposal == "plain":
            return torch.full_like(self.entropy_reading, c.temperature)
        return torch.where(self.entropy_reading <= c.entropy_target, c.hot, c.cold)

    def temperature_of(self, logits: Tensor) -> Tensor:
        """Logits (B, V) -> temperatures (B, 1)."""
        return self.control_temperature().expand(len(logits), 1)

    def collect(self, source):
        c = self.config
        if not c.replaced or c.variant == "blend":
            return super().collect(source)
        problems = source.problems(c.prompts)
        main = source.rollouts(problems, c.samples, c.temperature)
        again = problems[:max(1, round(c.control_prompts * c.prompts))]
        control = source.rollouts(again, c.samples, c.temperature, "control", self.temperature_of)
        return self.mixed(main, control)

    def mixed(self, main: dict[str, Tensor], control: dict[str, Tensor]) -> dict[str, Tensor]:
        """The main batch with some rows' samples replaced; `control` (B,) marks them."""
        c, reward = self.config, self.reward(control)
        mean, deviation, _ = self.compare(reward, control)
        good = (reward - mean) / (deviation + 1e-6) > 0.05
        number, rows, device = len(good), len(main["group"]), good.device
        most = min(math.ceil(c.replaced * rows - 1e-6), number)
        if c.choice == "random":
            key = self.noise("candidates", (number,), "uniform")
            place = self.noise("replaced", (rows,), "uniform").argsort()[:most]
        else:
            key, place = torch.arange(number, device=device) / number, torch.arange(most, device=device)
        count = good.sum().clamp(max=most)
        count = torch.where(self.entropy_reading <= c.entropy_target, count, count // 2)
        candidate = torch.where(good, key, 2.0).argsort()[:most] + rows
        source = torch.arange(rows, device=device)
        source[place] = torch.where(torch.arange(most, device=device) < count, candidate, place)
        both = join([main, control])
        out = rows_of(both, torch.arange(rows, device=device))
        return {**out, **{k: both[k][source] for k in SAMPLED}, "control": (source >= rows).float()}

    def advantage(self, batch, old):
        advantage = super().advantage(batch, old)
        if "control" not in batch:
            return advantage
        self.told["replaced"] = batch["control"].mean()
        return torch.where(batch["control"] > 0, self.config.control_advantage, advantage)

    def measure(self, logits, target):
        c, told = self.config, super().measure(logits, target)
        if c.variant == "blend":
            with torch.no_grad():
                lp = (logits * (c.temperature / self.control_temperature())).log_softmax(-1)
                told["control_log_prob"] = lp.gather(-1, target[:, None]).squeeze(-1)
        return told

    def measures_more(self):
        return self.config.variant == "blend" or super().measures_more()

    def observe(self, batch, old):
        super().observe(batch, old)
        c, mask, values = self.config, batch["mask"], old["entropy"]
        distance = (c.entropy_target - self.entropy_reading).abs().clamp(max=c.blend_limit)
        share = self.engine.mean((batch["correct"] > 0).float().mean())
        ratio = torch.where(share > 0, distance / share, 0.0)
        self.blended = ratio / (1 + ratio)
        if c.reading == "sample":
            values = -old["log_prob"]
        elif "control" in batch:
            mask = mask * (1 - batch["control"])[:, None]
        self.next_reading = self.engine.mean((values * mask).sum() / mask.sum().clamp(min=1))
        self.told |= {"entropy_reading": self.next_reading, "control_temperature": self.control_temperature()}

    def weigh(self, rows):
        super().weigh(rows)
        if self.config.variant == "blend":
            tilt = (rows.correct > 0)[:, None] * (rows.old["control_log_prob"] - rows.old["log_prob"]).exp()
            rows.advantage = (1 - self.blended) * rows.advantage + self.blended * tilt

    def after_update(self, batch):
        super().after_update(batch)
        self.entropy_reading.copy_(self.next_reading)
