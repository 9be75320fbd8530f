"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

Three changes make the regression loss of DMD unnecessary:

    fake_loss   two time scales: `ratio` updates of the fake score for one of the generator (a knob of the base); and a classifier
                of real and generated samples at random levels of noise, on the fake score's features, trained with it:
                + head_weight (softplus(l_fake) + softplus(-l_real))
    gan         the generator's part of that: gan_weight softplus(-l(x_t)), through the frozen features
    generate    K = sampler_steps > 1: the generator's own states of a random step (backward simulation). It is run without a
                gradient, each prediction is given noise of the next level, and one step is trained from where a sample stands

| knob | |
|---|---|
| gan_weight | 0.003 in the paper (ImageNet); 0: no classifier |
| simulate   | own: as above; data: real samples with noise stand in for the generator's states (what the paper argues against) |

Differences from the official code: every sample of a batch draws its own step; features are the network's last hidden layer and
the head has one layer more; all steps are computed for all samples, so that an update's work does not depend on what is drawn.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.common.parts import add
from methods.diffusion import flow
from methods.diffusion.distillation import Distillation
from runner.errors import UserError
from runner.interface import Spec, knob


class DMD2(Distillation):
    @dataclasses.dataclass(frozen=True)
    class Config(Distillation.Config):
        ratio: int = knob(5, "updates of the fake score for one of the generator", low=1, source="paper")
        gan_weight: float = knob(3e-2, "of the classifier in the generator's loss; 0: no classifier", low=0.0)
        head_weight: float = knob(1e-2, "of the classifier in the fake score's loss", low=0.0, source="paper")
        simulate: str = knob("own", "states that later steps are trained on: the generator's own, or noised data",
                             choices=["own", "data"], when={"sampler_steps": 4})

    def setup(self, spec: Spec):
        super().setup(spec)
        self.head = None
        if self.config.gan_weight:
            if not hasattr(self.fake, "hidden"):
                raise UserError("method.gan_weight: this policy has no hidden layer to look at\nchoose another, or gan_weight=0")
            with torch.no_grad():
                none = torch.zeros(1, *spec.sample_shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
                width = self.fake.hidden(*none).shape[1]
            self.head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def followers(self):
        return [*super().followers(), *(self.head.parameters() if self.head is not None else ())]

    def follows(self):
        return super().follows() or self.head is not None

    def logit(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """l (n,) of samples with noise: log of real over generated."""
        return self.head(self.hidden(x, t, condition)).squeeze(1).float()

    # -- parts
    def generate(self, rows) -> Tensor:
        if self.config.sampler_steps == 1:
            return super().generate(rows)
        times = self.grid()[:-1]
        x, n = self.noise("start", tuple(rows.real.shape)), len(rows.real)
        step = (self.noise("step", (n,), "uniform") * len(times)).long()
        states = [x]
        with torch.no_grad():
            for j in range(1, len(times)):
                if self.config.simulate == "own":
                    data = self.denoise(self.network, x, times[j - 1].expand(n), rows.condition)
                else:
                    data = rows.real
                x = (1 - times[j]) * data + times[j] * self.noise(f"state{j}", tuple(x.shape))
                states.append(x)
        x = torch.stack(states).gather(0, flow.rows(step, x).expand_as(x)[None])[0]
        return self.denoise(self.network, x, times[step], rows.condition)

    def gan(self, rows) -> Tensor | None:
        other = super().gan(rows)
        if self.head is None:
            return other
        x_t, t, _ = self.noised("gan", rows.x)
        own = self.config.gan_weight * F.softplus(-self.logit(x_t, t, rows.condition)).mean()
        return add(other, own)

    def fake_loss(self, rows) -> Tensor:
        loss = super().fake_loss(rows)
        if self.head is None:
            return loss
        made, t_made, _ = self.noised("generated", rows.x)
        real, t_real, _ = self.noised("real", rows.real)
        apart = F.softplus(self.logit(made, t_made, rows.condition)) + F.softplus(-self.logit(real, t_real, rows.condition))
        return loss + self.config.head_weight * apart.mean()
