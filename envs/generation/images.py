"""Images: digits (8 x 8), MNIST (32 x 32), drawn shapes, a folder on disk (testbed T2 of the family).

The images are divided by a fixed order: a sixth to train the proxy, half for generators, a sixth as references, a sixth for gold
classifiers; shapes are drawn anew for each.

    proxy    margin of the condition's logit, of a small classifier trained on the first part with a fifth of the labels wrong:
             it can be hacked. Without conditions: minus the distance from mid-grey, of the mean pixel
    accuracy the condition is what an ensemble of three gold classifiers sees
    frechet  between Gaussian fits of the gold classifier's 32 features, generated and reference images; without conditions of
             the 32 first principal components of pixels
    energy   energy distance of pixels to the references, mean over conditions
    outside  share of pixels beyond [-1.05, 1.05]: saturation
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch

from envs.generation import drawing, pictures
from envs.generation.base import GenerationWorld
from envs.generation.classifier import fitted, margin
from envs.generation.metrics import energy_distance, frechet
from runner.errors import UserError
from runner.interface import Metric, Spec, knob

_LOADED: dict[tuple, dict] = {}


class Images(GenerationWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(GenerationWorld.Config):
        source: str = knob("digits", "which images", choices=["digits", "mnist", "shapes", "folder"])
        path: str = knob("", "the folder of source=folder: images, or folders of images, one a class")
        side: int = knob(16, "pixels along a side, of drawn shapes and of a folder's images", low=4)
        batch_size: int = knob(256, "rows a batch", low=1)
        eval_samples: int = knob(1000, "generated samples that are judged", low=8)

    metrics = {
        **GenerationWorld.metrics,
        "accuracy": Metric("max", "", "share in which gold classifiers see the condition"),
        "frechet": Metric("min", "", "Frechet distance of gold features to reference images"),
        "outside": Metric("min", "", "share of pixels beyond [-1.05, 1.05]"),
    }

    def __init__(self, config, device="cpu"):
        super().__init__(config, device)
        key = (config.source, config.path, config.side)
        if key not in _LOADED:
            _LOADED.clear()
            _LOADED[key] = load(config)
        held = _LOADED[key]
        self.followed = held["classes"]
        self.classes, self.skipped, self.digest = held["classes"], held["skipped"], held["digest"]
        self.parts = {k: (x.to(self.device), y.to(self.device)) for k, (x, y) in held["parts"].items()}
        self.proxy = held["proxy"] and held["proxy"].to(self.device)
        self.gold = [g.to(self.device) for g in held["gold"]]
        self.shape = tuple(self.parts["generator"][0].shape[1:])
        count = torch.bincount(self.parts["generator"][1], minlength=self.classes)
        self.count, self.first = count, count.cumsum(0) - count  # rows are sorted by label

    def spec(self):
        return Spec(sample_shape=self.shape, classes=self.classes, proxies=self.proxies((self.reward,)))

    def provenance(self):
        return {**super().provenance(), "images": {k: len(x) for k, (x, _) in self.parts.items()}, "digest": self.digest,
                **({"skipped": len(self.skipped), "skipped_first": self.skipped[:5]} if self.skipped else {})}

    def sample(self, condition, draw):
        n = len(condition)
        if self.config.source == "shapes":
            return pictures.shapes(condition, draw("place", (n, 4), "uniform"), self.config.side)
        count = self.count[condition]
        place = torch.minimum((draw("image", (n,), "uniform") * count).long(), count - 1)
        return self.parts["generator"][0][self.first[condition] + place]

    def show(self, x, condition, way):
        order = condition.argsort(stable=True)
        columns, scale = max(1, len(x) // self.classes), max(1, 24 // self.shape[1])
        out = {"samples": drawing.tiles(x[order], columns, scale)}
        if way is None:
            return out
        stages = way[torch.linspace(0, len(way) - 1, 10).long()]  # one of each condition, in ten stages
        return {**out, "paths": drawing.tiles(stages.transpose(0, 1).flatten(0, 1), 10, scale)}

    def reward(self, x, condition):
        if self.proxy is None:
            return -x.flatten(1).mean(1).abs()
        return margin(self.proxy(x), condition)

    def judge(self, x, true, condition):
        reference, label = self.parts["reference"]
        flat, held = x.flatten(1), reference.flatten(1)
        energy = [energy_distance(flat[condition == c], held[label == c]).item() for c in range(self.classes)
                  if (condition == c).sum() > 1 and (label == c).sum() > 1]
        out = {"energy": sum(energy) / max(len(energy), 1), "outside": (x.abs() > 1.05).float().mean().item()}
        if not self.gold:
            _, _, directions = torch.pca_lowrank(held, q=min(32, *held.shape))
            return {**out, "frechet": frechet(flat @ directions, held @ directions).item()}
        seen = sum(g(x).softmax(1) for g in self.gold).argmax(1)
        return {**out, "accuracy": (seen == condition).float().mean().item(),
                "frechet": frechet(self.gold[0].features(x), self.gold[0].features(reference)).item()}


def load(c) -> dict:
    """Parts, classifiers, digest: everything of a source that does not depend on a run."""
    skipped: list[str] = []
    if c.source == "shapes":
        classes, parts = 4 * pictures.SHAPES, {}
        for i, (name, number) in enumerate((("proxy", 800), ("generator", 16), ("reference", 1600), ("gold", 3200))):
            label = torch.arange(number) % classes
            place = torch.rand(number, 4, generator=torch.Generator().manual_seed(i))
            parts[name] = (pictures.shapes(label, place, c.side), label)
    else:
        if c.source == "folder":
            x, label, kinds, skipped = pictures.folder(c.path, c.side)
            classes = len(kinds)
        else:
            x, label = {"digits": pictures.digits, "mnist": pictures.mnist}[c.source]()
            classes, kinds = 10, "0123456789"
        n = len(x)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1)) if c.source == "folder" else torch.arange(n)
        edges = {"proxy": (0, n // 6), "generator": (n // 6, n * 4 // 6), "reference": (n * 4 // 6, n * 5 // 6),
                 "gold": (n * 5 // 6, n)}
        parts = {k: (x[order[a:b]], label[order[a:b]]) for k, (a, b) in edges.items()}
        missing = [(k, y) for k, (_, held) in parts.items() for y in range(classes) if not (held == y).any()]
        if missing:
            part, y = missing[0]
            raise UserError(f"env.path={c.path}: too few images of some class: '{kinds[y]}' has {(label == y).sum()} of {n}, and "
                            f"the part for '{part}' none of them\ngive every class some tens of images, or leave it out")
    digest = hashlib.sha256()
    for name, (x, label) in parts.items():
        place = label.argsort(stable=True)
        parts[name] = (x[place], label[place])
        digest.update(x.numpy().tobytes())
    gold = []
    if classes > 1:
        gold = [fitted(*parts["gold"], (128, 32), classes, seed=s) for s in range(3)]
    proxy = fitted(*parts["proxy"], (64, 64), classes, seed=9, false=0.2) if classes > 1 else None
    return {"classes": classes, "parts": parts, "proxy": proxy, "gold": gold, "skipped": skipped, "digest":
    digest.hexdigest()[:16]}
