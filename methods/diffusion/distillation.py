"""Distillation by matching distributions: a generator of one or few steps, a frozen teacher, and a score that follows the
generator. The algorithm that this family's distillers change; as it stands it is DMD without its regression loss.

One update on conditions c (n,) and real samples (which only a GAN looks at), by its parts. D(x_t, t) are denoisers, x_t = (1 - t)
x + t e; the generator is asked at t = 1, where x_t is noise:

     1. generate      x = G(e, c)
   of every `ratio`-th update, the generator's step:
     2. levels        where in Karras' grid of levels the distributions are compared, u (n,) in [0, 1]: [0.02, 0.98] of it
     3. direction     g = D_fake(x_t) - D_real(x_t), (n, …), no gradient: that of the reverse KL
     4. weight        w (n,): 1 / mean_d |x - D_real| (DMD's normaliser), or 1 (Diff-Instruct)
     5. match         0.5 mean_d (x - stopgrad(x - w g))^2, (n,): its gradient in x is w g / D
     6. gan           scalar, or None: a further loss of the generator's                                   (additive)
     7. reward        -reward_weight mean R(x, c): the world's proxies, differentiable
   of every update, on the same x, detached:
     8. fake_loss     mean (1 / sigma^2 + 1 / sd^2) (D_fake(x_t) - x)^2 over all levels                    (additive)
   and of both
     9. velocity      v = (x_t - D) / t of a network; `guide` of generation: methods/diffusion/base.py
    10. after_update  the moving average of the generator's weights; after its steps only                  (additive)

Generation with `sampler_steps` > 1 predicts x and puts noise on it anew, which is flow.py's step `cps` at a = 1.
The teacher is the world's exact distribution, or the network that the world offers to start from, as a velocity; the latter may
also be the generator's and the fake score's first weights (`initial=start`): they are velocities then, else EDM's preconditioned
denoisers (methods/diffusion/edm.py).

Differences from the official code: levels are drawn from the continuous grid, not from 1,000 of its points; the one-step
generator begins at t = 1, not at sigma = 80. Not reproduced: DMD's regression loss on pairs of noise and the teacher's samples.
Sources: Yin et al. 2023 (DMD, arXiv 2311.18828), 2024 (DMD2, arXiv 2405.14867); Luo et al. 2023 (Diff-Instruct, arXiv
2305.18455).
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from methods.common.networks import CosineRate, adam, frozen
from methods.diffusion import edm, flow
from methods.diffusion.base import Generator
from methods.diffusion.teacher import Taught
from runner.errors import UserError
from runner.interface import Spec, knob


class Distillation(Taught, Generator):
    @dataclasses.dataclass(frozen=True)
    class Config(Generator.Config):
        learning_rate: float = knob(3e-4, "the generator's", low=0.0)
        decay: str = knob("constant", "course of the generator's learning rate over the run", choices=["constant", "cosine"])
        sampler: str = knob("cps", "steps of generation (methods/diffusion/flow.py)",
                            choices=["ode", "flow", "dance", "cps", "ddim"])
        sampler_noise: float = knob(1.0, "a: noise level of a stochastic sampler; cps at 1 predicts and puts noise on anew",
                                    low=0.0, when={"sampler_steps": 4})
        sampler_steps: int = knob(1, "K: steps of generation", low=1)
        ratio: int = knob(1, "updates of the fake score for one of the generator", low=1)
        fake_learning_rate: float = knob(1e-3, "the fake score's", low=0.0, when={"match_weight": 1.0})
        momentum: float = knob(0.0, "beta1 of both optimisers", low=0.0, high=0.999)
        teacher: str = knob("auto", "the world's exact distribution, the network that it offers to start from, or the first "
                            "where there is one", choices=["auto", "exact", "start"], when={"match_weight": 1.0})
        teacher_guidance: float = knob(1.0, "w: classifier-free guidance of the teacher; 1: none", when={"match_weight": 1.0})
        initial: str = knob("random", "first weights of generator and fake score", choices=["random", "start"])
        deviation: float = knob(1.0, "sd: of the data's coordinates", low=1e-3, when={"initial": ["random"]})
        lowest: float = knob(0.02, "sigma of the lowest level", low=1e-4, when={"match_weight": 1.0})
        highest: float = knob(10.0, "sigma of the highest level", low=1e-2, when={"match_weight": 1.0})
        match_weight: float = knob(1.0, "of the teacher's part in the loss; 0: none, and no score follows the generator", low=0.0)
        normaliser: str = knob("dmd", "w: DMD's, or 1", choices=["dmd", "none"], when={"match_weight": 1.0})
        reward_weight: float = knob(0.0, "of the world's differentiable proxies in the loss", low=0.0)

    PARTS = ("generate", "levels", "direction", "weight", "match", "gan", "reward", "fake_loss", "velocity", "guide",
             "after_update")
    ADDITIVE = ("gan", "fake_loss", "after_update")
    MARGIN = 0.02  # of the grid of levels that the comparison leaves out at either end

    @property
    def kind(self):
        return "velocity" if self.config.initial == "start" else "edm_denoiser"

    begins_as = "velocity"

    @property
    def asks_teacher(self):
        return self.config.match_weight > 0

    @property
    def starts(self):
        return self.config.initial == "start" or self.learns_from_start

    @property
    def keeps_start(self):
        return self.learns_from_start

    @property
    def period(self):
        return self.config.ratio

    def setup(self, spec: Spec):
        super().setup(spec)
        c = self.config
        if c.lowest >= c.highest:
            raise UserError(f"method.lowest={c.lowest} is no level below method.highest={c.highest}")
        self.fake = self.blueprint.build(spec)
        self.find_teacher()
        if self.begun and c.initial == "random":
            raise UserError("policy.path brings weights, with which the generator and the fake score then begin\n"
                            "set method.initial=start; the teacher is that network, too, unless method.teacher=exact")
        if c.reward_weight and not spec.proxies:
            raise UserError("method.reward_weight: this env has no differentiable reward\nleave it at 0, or choose another env")
        for name in ("told_match", "told_gan", "told_reward"):  # of the generator's latest step
            self.register_buffer(name, torch.zeros(()))

    def make_optimizers(self):
        c, betas = self.config, (self.config.momentum, 0.99)
        self.optimizers = {
            "network": adam(self.network.parameters(), c.learning_rate, weight_decay=c.weight_decay, betas=betas),
            "fake": adam(self.followers(), c.fake_learning_rate, weight_decay=c.weight_decay, betas=betas)}
        if c.decay == "cosine" and self.planned:
            self.rate = CosineRate(c.learning_rate, -(-self.planned // c.ratio)).to(self.device())

    def followers(self) -> list[nn.Parameter]:
        """What the fake score's optimiser trains."""
        return list(self.fake.parameters())

    def load_start(self, start: dict[str, Tensor]):
        if self.config.initial == "start":
            super().load_start(start)
            self.fake.load_state_dict(self.network.state_dict())
        elif start and self.learns_from_start:
            self.fill(self.reference, start)
            self.begun = True

    # -- denoisers
    def hidden(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The fake score's last hidden layer at x_t, (n, width)."""
        seen = x if self.config.initial == "start" else edm.scaled(x, t, self.config.deviation)
        return self.fake.hidden(seen, t, condition)

    def denoise(self, network: nn.Module, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """D(x_t, t) of the generator's or the fake score's network."""
        if self.config.initial == "start":
            return flow.to_data(x, network(x, t, condition).float(), t)
        sd = self.config.deviation
        return edm.to_data(x, network(edm.scaled(x, t, sd), t, condition), t, sd)

    def noised(self, name: str, x: Tensor, whole: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, u) of x at drawn levels."""
        u = self.levels(name, len(x), whole)
        t = edm.to_time(edm.karras(u, self.config.lowest, self.config.highest))
        at = flow.rows(t, x)
        return (1 - at) * x + at * self.noise(f"{name}/noise", tuple(x.shape)), t, u

    # -- learning
    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: x (n, *shape) real, condition (n,) int64."""
        self.require_start()
        moves = self.updates % self.config.ratio == 0
        rows = SimpleNamespace(real=batch["x"], condition=batch["condition"], told={})
        with torch.set_grad_enabled(moves):
            rows.x = self.generate(rows)
        if moves:
            self.improve(rows)
        rows.x = rows.x.detach()
        if self.follows():
            loss = self.fake_loss(rows)
            self.minimise(loss, "fake", self.config.gradient_norm)
            rows.told["fake_loss"] = loss.detach()
        return {"match": self.told_match.clone(), "gan": self.told_gan.clone(), "reward": self.told_reward.clone(), **rows.told}

    def improve(self, rows):
        """The generator's step."""
        with frozen(self.followers()):
            terms = {"match": self.config.match_weight * self.match(rows).mean() if self.config.match_weight else None,
                     "gan": self.gan(rows), "reward": self.reward(rows)}
        kept = [term for term in terms.values() if term is not None]
        if not kept:
            raise UserError("nothing is left in the generator's loss\nset method.match_weight or method.reward_weight")
        self.advance(sum(kept))
        self.after_update(rows)
        for name, term in terms.items():
            if term is not None:
                getattr(self, f"told_{name}").copy_(term.detach())

    def follows(self) -> bool:
        """Whether anything asks the fake score."""
        return self.config.match_weight > 0

    # -- parts
    def generate(self, rows) -> Tensor:
        x = self.noise("start", tuple(rows.real.shape))
        return self.denoise(self.network, x, torch.ones(len(x), device=x.device), rows.condition)

    def levels(self, name: str, number: int, whole: bool) -> Tensor:
        u = self.noise(f"{name}/level", (number,), "uniform")
        return u if whole else self.MARGIN + (1 - 2 * self.MARGIN) * u

    def direction(self, rows) -> Tensor:
        return self.denoise(self.fake, rows.x_t, rows.t, rows.condition) - rows.data

    def weight(self, rows) -> Tensor:
        if self.config.normaliser == "none":
            return torch.ones_like(rows.t)
        return 1 / (rows.x - rows.data).abs().flatten(1).mean(1).clamp(min=1e-6)

    def match(self, rows) -> Tensor:
        with torch.no_grad():
            rows.x_t, rows.t, rows.u = self.noised("match", rows.x, whole=False)
            rows.data = self.teach(rows.x_t, rows.t, rows.condition)
            step = flow.rows(self.weight(rows), rows.x) * self.direction(rows)
            aim = rows.x - step
        return 0.5 * (rows.x - aim).square().flatten(1).mean(1)

    def gan(self, rows) -> Tensor | None:
        return None

    def reward(self, rows) -> Tensor | None:
        if not self.config.reward_weight:
            return None
        return -self.config.reward_weight * sum(of(rows.x, rows.condition) for of in self.spec.proxies).mean()

    def fake_loss(self, rows) -> Tensor:
        x_t, t, _ = self.noised("fake", rows.x)
        error = (self.denoise(self.fake, x_t, t, rows.condition) - rows.x).square().flatten(1).mean(1)
        return (edm.loss_weight(t, self.config.deviation) * error).mean()

    def velocity(self, network: nn.Module, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return flow.from_data(x, self.denoise(network, x, t, condition), t)

    def export(self):
        tensors, kind = super().export()
        return tensors, kind if self.config.initial == "start" else {**kind, "deviation": str(self.config.deviation)}
