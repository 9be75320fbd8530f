"""A reward of samples: a network that rates x under condition c by one number. What reward models of this family train, and what
a world asks that is to reward by a finished run of one (env.judge_run)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from methods.common.networks import mlp
from runner.errors import UserError
from runner.interface import Spec

LABEL = 16  # width of the condition's embedding


class Rater(nn.Module):
    """(x (n, *shape), condition (n,)) -> r (n,). Points and images of up to 8 pixels a side go through hidden layers of `widths`,
    larger images through three strided convolutions first, as the world's classifiers do."""

    def __init__(self, shape: tuple[int, ...], classes: int, widths: tuple[int, ...]):
        super().__init__()
        layers, shape = [], list(shape)
        if len(shape) == 3 and shape[1] > 8:
            for channels in (16, 32, 32):
                layers += [nn.Conv2d(shape[0], channels, 3, stride=2, padding=1), nn.SiLU()]
                shape = [channels, *((side + 1) // 2 for side in shape[1:])]
        self.look = nn.Sequential(*layers, nn.Flatten())
        self.label = nn.Embedding(classes, LABEL)
        self.body = mlp(math.prod(shape) + LABEL, widths, 1, "silu")

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.body(torch.cat([self.look(x), self.label(condition)], 1)).squeeze(1)


def rater_of(weights: dict[str, Tensor], spec: Spec) -> Rater:
    """A frozen rater from the weights of a finished run of a reward model, or from what `export` wrote of it; its sizes are
    theirs. The moving average, where there is one.

    UserError: no rater there, or one of other samples."""
    part = next((p for p in ("smoothed.", "rating.") if any(k.startswith(p) for k in weights)), "")
    held = {k.removeprefix(part): v for k, v in weights.items() if k.startswith(part)}
    layers = sorted((k for k in held if k.startswith("body.") and k.endswith(".weight")), key=lambda k: int(k.split(".")[1]))
    if not layers or "label.weight" not in held:
        raise UserError("no reward model of samples is there\n"
                        "train one on the same env: python -m runner method=sample_reward_model env=…")
    rater = Rater(spec.sample_shape, spec.classes, tuple(len(held[k]) for k in layers[:-1]))
    mine = rater.state_dict()
    wrong = [k for k, v in mine.items() if k not in held or held[k].shape != v.shape]
    if wrong:
        there = tuple(held[wrong[0]].shape) if wrong[0] in held else "missing"
        raise UserError(f"its reward model rates other samples than this env's: {wrong[0]} is {there}, and {spec.classes} "
                        f"conditions of shape {tuple(spec.sample_shape)} need {tuple(mine[wrong[0]].shape)}\n"
                        "train one on the same env: python -m runner method=sample_reward_model env=…")
    rater.load_state_dict({k: held[k] for k in mine})
    return rater.requires_grad_(False)
