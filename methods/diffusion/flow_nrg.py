"""Flow-NRG (Liu et al. 2025, arXiv 2501.13918): rewards steer a flow at generation alone.

The target p_t(x) exp(w r_t(x, c)) has the velocity

    v' = v - w t / (1 - t) grad_x r_t(x_t, c)

with r_t a reward of noisy samples: a small head on the frozen generator's own features, trained with Bradley-Terry on noised
pairs (one t and one noise for both), L = - mean log sigmoid(r_w - r_l). With the exact r_t = log E[exp(w r(x0)) | x_t] (at w =
1) v' is the exact velocity of the tilted distribution; Bradley-Terry learns E-like rewards instead, which tilt a little too
much. A reward that has seen clean samples alone gives adversarial gradients at high t. t / (1 - t) is bounded by `most`.

Parts: `after_update` trains the head; `follow` adds the gradient. The generator itself stays as it started (`frozen`), or is
fine-tuned on winners besides; with that and reward_weight w = 0 this is flow_sft. The generator needs a last hidden layer
(`hidden`), as policy=mlp has.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.common.networks import adam
from methods.diffusion.preferences import PairRegression
from runner.errors import UserError
from runner.interface import Spec, knob


class FlowNRG(PairRegression):
    @dataclasses.dataclass(frozen=True)
    class Config(PairRegression.Config):
        reward_weight: float = knob(1.0, "w: of the reward's gradient at generation")
        most: float = knob(10.0, "bound of t / (1 - t)", low=0.0)
        head_width: int = knob(64, "hidden width of the reward head", low=1)
        learning_rate: float = knob(5e-4, "AdamW's, of the generator", low=0.0, when={"frozen": [False]})
        weight_decay: float = knob(0.0, "AdamW's, of the generator", low=0.0, when={"frozen": [False]})
        decay: str = knob("cosine", "course of the learning rate over the run", choices=["constant", "cosine"],
                          when={"frozen": [False]})
        gradient_norm: float = knob(0.0, "bound of the gradient's norm; 0: none", low=0.0, when={"frozen": [False]})
        head_rate: float = knob(2e-3, "learning rate of the head", low=0.0)
        frozen: bool = knob(True, "the generator stays as it started", source="paper")

    def setup(self, spec: Spec):
        super().setup(spec)
        if not hasattr(self.network, "hidden"):
            raise UserError("flow_nrg puts its reward head on the network's last hidden layer, which this policy does not offer\n"
                            "take policy=mlp")
        self.network.requires_grad_(not self.config.frozen)
        self.head = nn.Sequential(nn.Linear(self.network.leave.in_features, self.config.head_width), nn.SiLU(),
                                  nn.Linear(self.config.head_width, 1))

    def make_optimizers(self):
        super().make_optimizers()
        if self.config.frozen:
            self.optimizers = {}
        self.optimizers["head"] = adam(self.head.parameters(), self.config.head_rate)

    def reward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """r_t (n,)."""
        return self.head(self.network.hidden(x, t, condition)).squeeze(1)

    def advance(self, loss: Tensor):
        if not self.config.frozen:
            super().advance(loss)

    def after_update(self, rows):
        super().after_update(rows)
        with torch.no_grad():
            features = self.network.hidden(rows.x_t, rows.t, rows.condition)
        winner, loser = self.head(features).squeeze(1).chunk(2)
        loss = -F.logsigmoid(winner - loser).mean()
        rows.told |= {"head_loss": loss.detach(), "accuracy": (winner.detach() > loser.detach()).float().mean()}
        self.minimise(loss, "head")

    def follow(self, walk) -> Tensor:
        v = super().follow(walk)
        if not self.config.reward_weight:
            return v
        with torch.enable_grad():
            x = walk.x.detach().requires_grad_()
            r = self.reward(x, walk.t.expand(len(x)), walk.condition)
            gradient, = torch.autograd.grad(r.sum(), x)
        scale = (walk.t / (1 - walk.t).clamp(min=1e-6)).clamp(max=self.config.most)
        return v - self.config.reward_weight * scale * gradient
