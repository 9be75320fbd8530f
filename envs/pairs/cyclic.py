"""Cyclic preferences: a game of one context and K arms in which who beats whom is no order (testbed of INPO, arXiv 2407.00617).

    P(i > j) = .5 + cycle sin(2 pi (j - i) / K) + noise A_ij + transitive (q_i - q_j),   clipped to [.02, .98]

A antisymmetric from N(0, 1), q equally spaced over arms in random order, from -1/2 to 1/2; pi_ref uniform but for logits
base_scale N(0, 1). The run's seed chooses the game. Gold metric: the duality gap of the game with weight `tau` on the KL,

    gap(pi) = 2 [ max_pi' ( pi' P pi - tau KL(pi' || ref) ) - ( pi P pi - tau KL(pi || ref) ) ],

0 at the Nash policy alone; the maximum is tau log sum_i ref_i exp((P pi)_i / tau). A reward of arms is their win rate against
the reference. `pairs` are drawn from pi_ref, labelled by P.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from envs.pairs.bandit import ARM, BanditWorld, arm, context
from envs.pairs.task import Pair, PairTask
from envs.prompts.task import Problem, Verdict
from runner.interface import Metric, Spec, knob


class Game(PairTask):
    """P (K, K), base (1, K) and what follows from them."""

    eos, prompt_length, response_length = None, 1, 1

    def __init__(self, c, seed: int):
        g = torch.Generator().manual_seed(256 * seed + 21)
        k = self.arms = self.seen = c.arms
        self.alphabet = "".join(map(arm, range(k))) + context(0)
        i = torch.arange(k)
        raw = torch.randn(k, k, generator=g)
        quality = torch.randperm(k, generator=g) / (k - 1) - 0.5
        p = 0.5 + c.cycle * torch.sin(2 * math.pi * (i[None] - i[:, None]) / k) + c.noise * (raw - raw.T) / 2 ** 0.5 \
            + c.transitive * (quality[:, None] - quality[None])
        self.beats = p.clamp(0.02, 0.98).fill_diagonal_(0.5)
        self.base = c.base_scale * torch.randn(1, k, generator=g)
        self.features = None
        self.reward = (self.beats @ self.base.softmax(-1).T).T
        self.count, self.seed = c.pairs, seed

    def train(self):
        return [Problem(context(0), 0)]

    held_out = train

    def verify(self, problem, response):
        y = ord(response[0]) - ARM if response else int(self.reward.argmin())
        return Verdict(float(y == int(self.reward.argmax())), response or None, float(bool(response)), float(self.reward[0, y]))

    def demonstrate(self, problem, rng):
        return arm(rng.choices(range(self.arms), self.base[0].softmax(-1).tolist())[0])

    def pairs(self):
        g = torch.Generator().manual_seed(256 * self.seed + 22)
        both = torch.multinomial(self.base[0].softmax(-1), 2 * self.count, replacement=True, generator=g).view(-1, 2)
        both = both[both[:, 0] != both[:, 1]]
        first = torch.rand(len(both), generator=g) < self.beats[both[:, 0], both[:, 1]]
        both = torch.where(first[:, None], both, both.flip(1))
        return [Pair(context(0), arm(i), arm(j)) for i, j in both.tolist()]

    def gap(self, log_p: Tensor, tau: float) -> float:
        """The duality gap of log pi (K,), in float64."""
        log_p, ref, beats = log_p.double(), self.base[0].double().log_softmax(-1), self.beats.double()
        p = log_p.exp()
        wins = beats @ p  # of each arm against pi
        best = tau * torch.logsumexp(ref + wins / tau, 0)
        return float(2 * (best - (p @ wins - tau * (p * (log_p - ref)).sum())))


class CyclicWorld(BanditWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(BanditWorld.Config):
        tau: float = knob(0.1, "weight of the KL in the game that is judged", low=1e-4)
        cycle: float = knob(0.35, "size of the cycle", low=0.0, high=0.5, source="project's choice")
        noise: float = knob(0.12, "size of random antisymmetric preferences", low=0.0, source="project's choice")
        transitive: float = knob(0.15, "size of the order among arms", low=0.0, source="project's choice")
        base_scale: float = knob(0.5, "deviation of the reference's logits", low=0.0, source="project's choice")

    metrics = {
        "gap": Metric("min", "", "duality gap of the regularised preference game: 0 at its Nash policy"),
        "reward": Metric("max", "", "win rate against the reference"),
        "kl": Metric("none", "nats", "KL(policy || reference), exact"),
        "entropy": Metric("none", "nats", "of the policy over arms, exact"),
    }

    def spec(self):
        task = Game(self.config, 0)
        return Spec(alphabet=task.alphabet, end=None, prompt_length=1, response_length=1, contexts=1, arms=task.arms)

    def make(self, seed):
        return Game(self.config, seed)

    def size(self):
        return 1

    def preferred(self, problem, response, other):
        return float(self.task.beats[ord(response[0]) - ARM, ord(other[0]) - ARM])

    def exact(self, log_p, method=None):
        ref, p, r = self.task.base.log_softmax(-1), log_p.exp(), self.task.reward
        return {"gap": self.task.gap(log_p[0], self.config.tau), "reward": float((p * r).sum()),
                "kl": float((p * (log_p - ref)).sum()), "entropy": float(-(p * log_p).sum())}

    def references(self, seed):
        return {"reference": self.exact(self.task.base.log_softmax(-1))}
