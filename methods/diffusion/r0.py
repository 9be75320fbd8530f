"""R0, later Reward-Instruct (Luo et al. 2025, arXiv 2503.13070): a pre-trained model becomes a generator of few steps by
maximising rewards alone.

No teacher is matched (match_weight = 0), nothing follows the generator. It starts as the pre-trained velocity, and three parts of
the family's base keep it from fooling its rewards:

    generate      K = sampler_steps; one step of each sample, drawn at random, is trained, those before it are run without a
                  gradient. Between steps x' = (1 - t') x^ + t' (sqrt(1 - eta^2) e^ + eta z) with eta ~ U[0, 1] anew for every
                  sample and step: good samples are asked for under every sampler between DDIM and full renoising
    reward        -reward_weight sum_i w_i R_i(x^), w_i = 1 / |dR_i / dx^| of each sample: no reward outweighs another
    after_update  theta <- theta - learning_rate anchor (theta - theta_0) + sqrt(2 learning_rate temperature) noise: towards the
                  weights of the start; with a temperature it samples exp(R / temperature) N(theta; theta_0, …)

| knob | |
|---|---|
| random_eta  | off: steps are those of generation (sampler_noise) |
| supervise   | random: as above; last: the last step alone |
| balance     | off: w_i = 1 |
| teacher_guidance | w other than 1 adds the implicit reward (w - 1) (D_c - D_u)^T x^_t of the teacher at a random level |

The code was announced and has not appeared: this follows the paper's statements; strengths, the distribution of eta's use and
the normalisation's constants are a reading of it. Not reproduced: the high-resolution guidance loss of the "+" version.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.common.parts import add
from methods.diffusion import flow
from methods.diffusion.distillation import Distillation
from runner.errors import UserError
from runner.interface import Spec, knob


class R0(Distillation):
    @dataclasses.dataclass(frozen=True)
    class Config(Distillation.Config):
        sampler_steps: int = knob(4, "K: steps of generation", low=1, source="paper")
        initial: str = knob("start", "first weights of generator and fake score", choices=["random", "start"],
                            when={"anchor": [0.0]})
        deviation: float = knob(1.0, "sd: of the data's coordinates", low=1e-3, when={"initial": ["random"], "anchor": [0.0]})
        match_weight: float = knob(0.0, "of the teacher's part in the loss; 0: none, and no score follows the generator", low=0.0,
                                   source="paper")
        teacher_guidance: float = knob(1.0, "w: classifier-free guidance of the teacher, as a reward; 1: none")
        reward_weight: float = knob(1.0, "of the world's differentiable proxies in the loss", low=0.0)
        anchor: float = knob(200.0, "lambda: pull towards the weights of the start", low=0.0)
        temperature: float = knob(0.0, "of the noise on the weights", low=0.0)
        random_eta: bool = knob(True, "noise between steps: a random share of it is fresh", source="paper",
                                when={"sampler_steps": 4})
        supervise: str = knob("random", "which step of a sample is trained", choices=["random", "last"],
                              when={"sampler_steps": 4})
        balance: bool = knob(True, "each reward's gradient is brought to length 1", source="paper")

    @property
    def asks_teacher(self):
        return super().asks_teacher or self.config.teacher_guidance != 1

    @property
    def keeps_start(self):
        return bool(super().keeps_start or self.config.anchor)

    def setup(self, spec: Spec):
        super().setup(spec)
        if self.config.anchor and self.config.initial == "random":
            raise UserError("method.anchor holds weights where they started, which is at random\n"
                            "set method.initial=start, or anchor=0")

    # -- parts
    def generate(self, rows) -> Tensor:
        if self.config.sampler_steps == 1:
            return super().generate(rows)
        c, n, times = self.config, len(rows.real), self.grid()[:-1]
        states = [self.noise("start", tuple(rows.real.shape))]
        with torch.no_grad():
            for j, (t, to) in enumerate(zip(times[:-1], times[1:])):
                v = self.velocity(self.network, states[-1], t.expand(n), rows.condition)
                fresh = self.noise(f"state{j}", tuple(rows.real.shape))
                states.append(self.passed(states[-1], v, t, to, fresh, j))
        last = torch.full((n,), len(times) - 1, device=times.device)
        step = last if c.supervise == "last" else (self.noise("step", (n,), "uniform") * len(times)).long()
        x = torch.stack(states).gather(0, flow.rows(step, states[0]).expand_as(states[0])[None])[0]
        return self.denoise(self.network, x, times[step], rows.condition)

    def passed(self, x: Tensor, v: Tensor, t: Tensor, to: Tensor, fresh: Tensor, j: int) -> Tensor:
        """The state at `to`, from that at `t`."""
        if not self.config.random_eta:
            at = flow.step(self.config.sampler, x, v, t, to, self.config.sampler_noise, self.grid()[1])
            return at.mean + at.std * fresh
        eta = flow.rows(self.noise(f"eta{j}", (len(x),), "uniform"), x)
        return (1 - to) * flow.to_data(x, v, t) + to * ((1 - eta ** 2).sqrt() * flow.to_noise(x, v, t) + eta * fresh)

    def reward(self, rows) -> Tensor | None:
        c = self.config
        if not c.balance or not c.reward_weight:
            return add(super().reward(rows), self.implicit(rows))
        looked, terms = rows.x.detach().requires_grad_(), []
        for proxy in self.spec.proxies:
            slope, = torch.autograd.grad(proxy(looked, rows.condition).sum(), looked)
            terms.append(proxy(rows.x, rows.condition) / slope.flatten(1).norm(dim=1).clamp(min=1e-6))
        return add(-c.reward_weight * sum(terms).mean(), self.implicit(rows))

    def implicit(self, rows) -> Tensor | None:
        """Guidance as a reward."""
        w = self.config.teacher_guidance
        if w == 1 or self.config.match_weight:
            return None
        x_t, t, _ = self.noised("implicit", rows.x)
        with torch.no_grad():
            null = torch.full_like(rows.condition, self.spec.classes)
            lean = self.taught(x_t, t, rows.condition) - self.taught(x_t, t, null)
        return -(w - 1) * (lean * x_t).flatten(1).mean(1).mean()

    def after_update(self, rows):
        super().after_update(rows)
        c, own = self.config, list(self.network.parameters())
        with torch.no_grad():
            if c.anchor:
                torch._foreach_lerp_(own, list(self.reference.parameters()), min(c.learning_rate * c.anchor, 1.0))
            if c.temperature:
                scale = (2 * c.learning_rate * c.temperature) ** 0.5
                for number, p in enumerate(own):
                    p.add_(scale * self.noise(f"langevin{number}", tuple(p.shape)))
