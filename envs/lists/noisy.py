"""Noisy lists: a contextual bandit on stored candidate lists whose rewards were corrupted once, before training.

    x ~ N(0, I_4),  six candidates phi_i ~ N(0, I_4),  r_i = v0 . phi_i + .8 x' W phi_i,  |v0| = 1.2,  W_kl ~ N(0, 1) / sqrt(4)

Rewards are z-scored per list (unbiased deviation), and those of the training lists then corrupted for good, so that noise
can be memorised:

| noise | training rewards | easy | medium | hard |
|---|---|---|---|---|
| none | R | | | |
| gaussian | R + s N(0, 1), and +-5 with probability p | s .5, p .05 | s 1, p .1 | s 2, p .2 |
| shift | R + .3 N(0, 1); test contexts (1 + d/2) x + 1.5 d / sqrt(4) | d .5 | d 1 | d 2 |
| flip | the whole list negated with probability p; + .1 N(0, 1) | p .1 | p .2 | p .35 |
| cauchy | R + g Cauchy | g .25 | g .5 | g 1 |

One seed gives one bandit, whatever the method, and the same clean lists whatever the noise. A policy scores a list; before
training it is fitted to the best items of clean lists for a few steps, which makes the reference. Gold metrics come from
clean test lists, validation from other clean lists with contexts like the training ones. The numbers are this project's
choice.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from runner.errors import UserError
from runner.interface import Metric, Spec, Stream, World, knob

LEVELS = {  # noise: level: its numbers, as in the table above
    "gaussian": {"easy": (0.5, 0.05), "medium": (1.0, 0.1), "hard": (2.0, 0.2)},
    "shift": {"easy": 0.5, "medium": 1.0, "hard": 2.0},
    "flip": {"easy": 0.1, "medium": 0.2, "hard": 0.35},
    "cauchy": {"easy": 0.25, "medium": 0.5, "hard": 1.0},
}
BANDIT, NOISE, BATCHES = 1, 2, 3  # what a generator is for


def generator(seed: int, use: int, device="cpu") -> torch.Generator:
    """One for each use. Not `seed` itself: the networks are drawn from that, and would be drawn like the bandit."""
    return torch.Generator(device).manual_seed(256 * seed + use)


def corrupt(reward: Tensor, noise: str, level: str, g: torch.Generator) -> Tensor:
    """Training rewards (n, P) from z-scored ones, by the table above."""
    def normal() -> Tensor:
        return torch.randn(reward.shape, generator=g)

    if noise == "none":
        return reward
    strength = LEVELS[noise][level]
    if noise == "gaussian":
        deviation, share = strength
        outlier = torch.rand(reward.shape, generator=g) < share
        return reward + deviation * normal() + 5 * outlier * normal().sign()
    if noise == "shift":
        return reward + 0.3 * normal()
    if noise == "flip":
        flipped = torch.rand(len(reward), 1, generator=g) < strength
        return torch.where(flipped, -reward, reward) + 0.1 * normal()
    return reward + strength * torch.empty_like(reward).cauchy_(generator=g)


@dataclasses.dataclass
class Lists:
    """n lists: context (n, S), candidates (n, P, S), reward (n, P), best (n,), by the clean reward."""

    context: Tensor
    candidates: Tensor
    reward: Tensor
    best: Tensor

    def to(self, device) -> Lists:
        return Lists(*(t.to(device) for t in (self.context, self.candidates, self.reward, self.best)))


class Bandit:
    """What one seed gives: the rewards' formula, four sets of lists, the batches of the reference's training."""

    def __init__(self, config, seed: int, device="cpu"):
        c, g = config, generator(seed, BANDIT)
        direction = torch.randn(c.features, generator=g)
        self.linear = 1.2 * direction / direction.norm()
        self.bilinear = torch.randn(c.features, c.features, generator=g) / c.features ** 0.5
        self.train, self.clean, self.validation = (self._lists(n, c, g) for n in (c.train, c.clean, c.validation))
        self.test = self._lists(c.test, c, g, shift=LEVELS["shift"][c.level] if c.noise == "shift" else 0.0)
        self.train.reward = corrupt(self.train.reward, c.noise, c.level, generator(seed, NOISE))
        self.reference_batches = torch.randint(c.clean, (c.reference_steps, c.reference_batch), generator=g).to(device)
        for name in ("train", "clean", "validation", "test"):
            setattr(self, name, getattr(self, name).to(device))

    def _lists(self, number: int, c, g, shift: float = 0.0) -> Lists:
        context = torch.randn(number, c.features, generator=g)
        context = (1 + shift / 2) * context + 1.5 * shift / c.features ** 0.5
        candidates = torch.randn(number, c.candidates, c.features, generator=g)
        reward = self.reward(context, candidates)
        centred = reward - reward.mean(-1, keepdim=True)
        return Lists(context, candidates, centred / (reward.std(-1, keepdim=True) + 1e-8), reward.argmax(-1))

    def reward(self, context: Tensor, candidates: Tensor) -> Tensor:
        """(n, S), (n, P, S) -> (n, P), neither normalised nor corrupted."""
        return candidates @ self.linear + 0.8 * torch.einsum("nk,kl,npl->np", context, self.bilinear, candidates)


class ListStream(Stream):
    """Stored lists, drawn with replacement."""

    def __init__(self, bandit: Bandit, config, seed: int):
        self.bandit, self.config, self.device = bandit, config, bandit.train.context.device
        self.generator = generator(seed, BATCHES, self.device)

    def data(self):
        clean = self.bandit.clean
        return {"context": self.bandit.train.context, "clean_context": clean.context, "clean_candidates": clean.candidates,
                "clean_best": clean.best, "reference_batches": self.bandit.reference_batches,
                "reference_learning_rate": self.config.reference_learning_rate}

    def next(self) -> dict[str, Tensor]:
        """context (B, S), candidates (B, P, S), reward (B, P), corrupted."""
        lists = self.bandit.train
        rows = torch.randint(len(lists.context), (self.config.batch_size,), generator=self.generator, device=self.device)
        return {"context": lists.context[rows], "candidates": lists.candidates[rows], "reward": lists.reward[rows]}

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"].cpu())


def figures(log_prob: Tensor, reference: Tensor, best: Tensor) -> dict[str, float]:
    """Gold metrics of a policy from its and the reference's log-probabilities (n, P)."""
    best, p = best.unsqueeze(1), log_prob.exp()
    first = (log_prob == log_prob.amax(-1, keepdim=True)).float()  # several where they are equal: they share the hit
    return {
        "win_mass": p.gather(1, best).mean().item(),
        "top1": (first / first.sum(-1, keepdim=True)).gather(1, best).mean().item(),
        "kl_to_reference": (p * (log_prob - reference)).sum(-1).mean().item(),
    }


class NoisyLists(World):
    @dataclasses.dataclass(frozen=True)
    class Config:
        noise: str = knob("gaussian", "what corrupts the training rewards (shift: and moves the test contexts)",
                          choices=["none", "gaussian", "shift", "flip", "cauchy"])
        level: str = knob("medium", "how much", choices=["easy", "medium", "hard"], source="project's choice",
                          when={"noise": ["gaussian", "shift", "flip", "cauchy"]})
        features: int = knob(4, "length of a context and of a candidate", low=1, source="project's choice")
        candidates: int = knob(6, "candidates of a list", low=2, source="project's choice")
        train: int = knob(256, "lists with corrupted rewards, to train on", low=1, source="project's choice")
        clean: int = knob(512, "clean lists that the reference is trained on", low=1, source="project's choice")
        validation: int = knob(256, "clean lists kept for validation", low=1, source="project's choice")
        test: int = knob(512, "clean lists for the gold metrics", low=1, source="project's choice")
        batch_size: int = knob(64, "lists of a batch", low=1, source="project's choice")
        reference_steps: int = knob(30, "AdamW's steps that make the reference", low=0, source="paper")
        reference_batch: int = knob(64, "lists of a batch of these steps", low=1, source="project's choice")
        reference_learning_rate: float = knob(3e-3, "AdamW's, for these steps", low=0.0, source="project's choice")

    metrics = {
        "win_mass": Metric("max", "", "probability of the truly best candidate, mean over clean test lists"),
        "top1": Metric("max", "", "share of clean test lists whose best candidate is the policy's first"),
        "kl_to_reference": Metric("none", "nats", "KL(policy || reference) on clean test lists"),
    }

    def spec(self):
        c = self.config
        return Spec(observation_size=c.features, action_size=c.features, candidates=c.candidates)

    def stream(self, method, kind: str, seed: int):
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise UserError("noisy_lists runs in one process (hardware.devices=1): each would hold another bandit")
        self.method, self.bandit = method, Bandit(self.config, seed, self.device)
        return ListStream(self.bandit, self.config, seed)

    def evaluate(self, method, seed: int):
        lists = self.bandit.test
        return figures(method.log_prob(lists.context, lists.candidates), self._reference(), lists.best)

    def validate(self, method):
        lists = self.bandit.validation
        return {"validation_loss": F.nll_loss(method.log_prob(lists.context, lists.candidates), lists.best).item()}

    def references(self, seed: int):
        reference = self._reference()
        uniform = torch.zeros_like(reference).log_softmax(-1)
        return {"reference": figures(reference, reference, self.bandit.test.best),
                "uniform policy": figures(uniform, reference, self.bandit.test.best)}

    def _reference(self) -> Tensor:
        """Log-probabilities of the test lists before training; the method keeps that policy."""
        return self.method.reference_log_prob(self.bandit.test.context, self.bandit.test.candidates)
