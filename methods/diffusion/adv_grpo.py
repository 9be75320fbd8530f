"""Adv-GRPO: an adversarial reward from reference samples (2025, arXiv 2511.20256).

Flow-GRPO whose reward is re-fitted during reinforcement to prefer references (here: data of the same conditions) over what the
generator makes. phi are frozen features of a sample, normalised: g of the whole, q_1 … of patches (here random projections with
a ReLU, in place of DINOv2); H = Linear - GELU - Linear, one for g and q.

    features    R = 0.7 H(g) + 0.3 mean_q H(q) + proxy_weight times the proxy; H by the hinge loss, L_g + 0.3 L_q. Of `turns`
                updates all but the last train H alone, the last one the generator alone
    preference  R = proxy + H(g, c), H = 0 at the start; -log sigmoid(R(ref) - R(gen)). Where mean R(ref) < mean R(gen) the
                generator hacks, and H is trained; else the generator
    frozen      R = proxy: Flow-GRPO

The gate of `preference` compares the batch's means. Rewards of one batch come from one H; only advantages within groups make
its drifting scale harmless. The reward is not differentiated into the generator.

Differences from the official code: it trains H on tokens that are not normalised, and asks it with normalised ones (here
normalised in both); it trains the last block of the preference model (here a head beside a frozen proxy); a turn that trains
the reward skips the generator's step altogether, here the step has length 0 under `preference` (its moments move on).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.common.networks import adam
from methods.diffusion.policy_gradient import FlowPolicy
from runner.interface import Spec, knob

WHOLE, PATCHES = 0.7, 0.3  # shares of the reward; the loss of patches has 0.3 of the whole's, too (official)
SIDE = 4                   # of a patch


class Features(nn.Module):
    """Frozen random features, normalised: of whole samples (n, width), of patches (n, number, width); none of points."""

    def __init__(self, shape: tuple[int, ...], width: int):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        size = torch.Size(shape).numel()
        self.images = len(shape) == 3
        self.register_buffer("whole", torch.randn(size, width, generator=g) / size ** 0.5, persistent=False)
        self.register_buffer("offset", torch.rand(width, generator=g) - 0.5, persistent=False)
        if self.images:
            part = shape[0] * SIDE * SIDE
            self.register_buffer("part", torch.randn(part, width, generator=g) / part ** 0.5, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        g = F.normalize(F.relu(x.flatten(1) @ self.whole + self.offset), dim=-1)
        if not self.images:
            return g, None
        patches = F.unfold(x, SIDE, stride=SIDE // 2).mT
        return g, F.normalize(F.relu(patches @ self.part + self.offset), dim=-1)


class AdvGRPO(FlowPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(FlowPolicy.Config):
        mode: str = knob("features", "how the reward is made and fitted", choices=["features", "preference", "frozen"])
        turns: int = knob(10, "updates of which one trains the generator (features)", low=1, source="paper")
        proxy_weight: float = knob(0.0, "of the proxy beside the features' reward")
        reward_rate: float = knob(1e-4, "learning rate of the reward's head, Adam's with betas (0.5, 0.999)", low=0.0,
                                  source="paper")
        reward_width: int = knob(512, "hidden width of the head", low=1, source="paper")
        features: int = knob(256, "width of the frozen features", low=1)

    @property
    def period(self):
        return self.config.turns if self.config.mode == "features" else 1

    def setup(self, spec: Spec):
        super().setup(spec)
        c = self.config
        if c.mode == "frozen":
            return
        self.phi = Features(spec.sample_shape, c.features)
        more = spec.classes if c.mode == "preference" else 0
        self.head = nn.Sequential(nn.Linear(c.features + more, c.reward_width), nn.GELU(), nn.Linear(c.reward_width, 1))
        if c.mode == "preference":
            nn.init.zeros_(self.head[2].weight)
            nn.init.zeros_(self.head[2].bias)

    def make_optimizers(self):
        super().make_optimizers()
        if self.config.mode != "frozen":
            self.optimizers["reward"] = adam(self.head.parameters(), self.config.reward_rate, betas=(0.5, 0.999))

    def collect(self, stream):
        batch = super().collect(stream)
        if self.config.mode == "frozen":
            return batch
        x = batch["x"][-1]
        each = batch["condition"].repeat_interleave(x.shape[1])
        batch["real"] = stream.real(each, "real").view_as(x)
        if self.config.mode == "preference":
            batch["real_proxy"] = stream.reward(batch["real"], batch["condition"])
        return batch

    def scores(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """H of whole samples x (N, P, …), (N, P), and of their patches (N, P, number)."""
        n, p = x.shape[:2]
        whole, patches = self.phi(x.flatten(0, 1))
        if self.config.mode == "preference":
            label = F.one_hot(condition.repeat_interleave(p), self.spec.classes).to(whole.dtype)
            return self.head(torch.cat([whole, label], 1)).view(n, p), None
        return self.head(whole).view(n, p), None if patches is None else self.head(patches).view(n, p, -1)

    def reward(self, stream, x, condition):
        c = self.config
        if c.mode == "frozen":
            return super().reward(stream, x, condition)
        whole, patches = self.scores(x, condition)
        if c.mode == "preference":
            return super().reward(stream, x, condition) + whole.mean(1)
        out = whole if patches is None else WHOLE * whole + PATCHES * patches.mean(2)
        proxy = c.proxy_weight * super().reward(stream, x, condition) if c.proxy_weight else 0
        return out.mean(1) + proxy

    def update(self, batch):
        c = self.config
        if c.mode == "frozen":
            return super().update(batch)
        made, real, condition = batch["x"][-1], batch["real"], batch["condition"]
        if c.mode == "features":
            if self.updates % c.turns == c.turns - 1:
                return super().update(batch)
            loss = hinge(self.scores(real, condition), self.scores(made, condition))
            self.minimise(loss, "reward")
            return {"reward": batch["reward"].mean(), "reward_deviation": batch["reward"].std(), "reward_loss": loss.detach()}
        of_real, of_made = (self.scores(x, condition)[0].mean(1) for x in (real, made))
        proxy = batch["reward"] - of_made.detach()  # H is still the one that rewarded
        apart = batch["real_proxy"] - proxy + of_real - of_made
        hacks = (self.engine.mean(apart.detach().mean()) < 0).float()  # one decision for all processes
        told = super().update({**batch, "hacks": hacks})
        loss = -F.logsigmoid(apart).mean()
        self.optimizers["reward"].param_groups[0]["lr"] = hacks * c.reward_rate
        self.minimise(loss, "reward")
        return {**told, "reward_loss": loss.detach(), "hacks": hacks, "gap": apart.detach().mean()}

    def pace(self, batch):
        pace = super().pace(batch)
        if "hacks" not in batch:
            return pace
        return 1 - batch["hacks"] if pace is None else pace * (1 - batch["hacks"])


def hinge(real, made) -> Tensor:
    """0.5 [mean relu(1 - H(real)) + mean relu(1 + H(made))] of whole samples, and 0.3 of the same of patches."""
    def one(a, b):
        return 0.5 * (F.relu(1 - a).mean() + F.relu(1 + b).mean())

    loss = one(real[0], made[0])
    return loss if real[1] is None else loss + PATCHES * one(real[1], made[1])
