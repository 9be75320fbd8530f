"""Two objectives with a known front (testbed of MODPO, arXiv 2310.03708): a bandit whose arms have two true rewards.

    r1 ~ N(0, 1),  r2 = -.6 r1 + .8 N(0, 1), both scaled to deviation .5;  pi_ref = softmax(base_scale N(0, 1))
    pairs of objective 1, and as many others of objective 2, labelled with sigma(sharpness (r_i - r_j)) of their objective

A prompt is a context together with one of `weights` weights w = 0, …, 1 of the first objective (so that one run trains the
whole front); every weight sees the same pairs. On the scale of the labels the optimum of weight w is

    pi_w ~ pi_ref exp( sharpness (w r1 + (1 - w) r2) / beta ).

Batches `pairs` have a column weight (b,); those of kind `objectives` besides offer the second objective's pairs in `data()`,
under other/… . Gold metrics: value and
regret of the regularised weighted reward, and the hypervolume of the points (E r1, E r2) that the policies of all weights reach,
beside that of the exact front; reference point: the front's minima less 0.1.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from envs.pairs.bandit import BanditWorld, arm, context
from envs.pairs.base import Stored, encode_pairs
from envs.pairs.task import Pair, PairTask
from envs.prompts.task import Problem, Verdict
from runner.interface import Metric, Spec, knob


class Fronts(PairTask):
    """rewards (2, X, K), base (W * X, K): prompt number w * X + x."""

    eos, prompt_length, response_length = None, 1, 1

    def __init__(self, c, seed: int):
        g = torch.Generator().manual_seed(256 * seed + 31)
        x, k = c.contexts, c.arms
        first = torch.randn(x, k, generator=g)
        second = -0.6 * first + 0.8 * torch.randn(x, k, generator=g)
        self.rewards = torch.stack([0.5 * first / first.std(), 0.5 * second / second.std()])
        self.table = c.base_scale * torch.randn(x, k, generator=g)
        self.base, self.features = self.table.repeat(c.weights, 1), None
        self.weights = torch.linspace(0, 1, c.weights)
        self.arms = self.seen = k
        self.alphabet = "".join(map(arm, range(k))) + "".join(map(context, range(x * c.weights)))
        self.config, self.seed, self.size = c, seed, x

    def train(self):
        return [Problem(context(i), (i // self.size, i % self.size)) for i in range(self.size * len(self.weights))]

    held_out = train

    def verify(self, problem, response):
        w, x = problem.answer
        reward = self.weights[w] * self.rewards[0, x] + (1 - self.weights[w]) * self.rewards[1, x]
        return Verdict(0.0, response or None, float(bool(response)), float(reward[ord(response[0]) - ord(arm(0))]) if response
                       else float(reward.min()))

    def pairs(self, objective: int = 0) -> list[Pair]:
        c, g = self.config, torch.Generator().manual_seed(256 * self.seed + 32 + objective)
        x = torch.randint(self.size, (c.pairs,), generator=g)
        i = torch.randint(c.arms, (c.pairs,), generator=g)
        j = (i + 1 + torch.randint(c.arms - 1, (c.pairs,), generator=g)) % c.arms
        gap = self.rewards[objective][x, i] - self.rewards[objective][x, j]
        first = torch.rand(c.pairs, generator=g) < torch.sigmoid(c.sharpness * gap)
        i, j = torch.where(first, i, j), torch.where(first, j, i)
        rows = list(zip(x.tolist(), i.tolist(), j.tolist()))
        return [Pair(context(w * self.size + x), arm(i), arm(j)) for w in range(len(self.weights)) for x, i, j in rows]


class FrontsWorld(BanditWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(BanditWorld.Config):
        weights: int = knob(11, "weights between the objectives, each with policies of its own", low=2, source="project's choice")
        arms: int = knob(16, "K", low=2, high=4000, source="project's choice")
        pairs: int = knob(5000, "of each objective", low=1, source="project's choice; the sheet's runs of one weight had 20,000")
        sharpness: float = knob(4.0, "s: labels are drawn with sigma(s (r_i - r_j))", low=0.0, source="project's choice")

    metrics = {
        "value": Metric("max", "", "s (w E r1 + (1-w) E r2) - beta KL(policy || reference), mean over weights"),
        "regret": Metric("min", "", "how much less that is than the best policies'"),
        "regret_middle": Metric("min", "", "the same, weights from 0.5 on"),
        "hypervolume": Metric("max", "", "of the points that are reached, as a share of the exact front's"),
        "distance": Metric("min", "", "from a reached point to the nearest one of the exact front, mean"),
        "kl": Metric("none", "nats", "KL(policy || reference), exact, mean over weights"),
    }

    def spec(self):
        task = Fronts(self.config, 0)
        return Spec(alphabet=task.alphabet, end=None, prompt_length=1, response_length=1, contexts=self.size(), arms=task.arms)

    def make(self, seed):
        return Fronts(self.config, seed)

    def size(self):
        return self.config.contexts * self.config.weights

    def stream(self, method, kind, seed):
        self.task, self.method = self.make(method.seed), method
        columns, other = (encode_pairs(method, self.task.pairs(i)) for i in (0, 1))
        weight = self.task.weights.repeat_interleave(self.config.pairs).to(method.device())
        more = {f"other/{k}": v for k, v in {**other, "weight": weight}.items()} if kind == "objectives" else {}
        return Stored({**columns, "weight": weight}, self._start(), self.config.batch_size, method.seed, method.processes, more)

    def exact(self, log_p, method=None):
        beta = getattr(getattr(method, "config", None), "beta", None) or 0.1
        value, points, kl = self.measured(log_p, beta)
        best, front, _ = self.measured(self.optimum(beta), beta)
        regret = best - value
        return {"value": value.mean().item(), "regret": regret.mean().item(),
                "regret_middle": regret[self.task.weights >= 0.5].mean().item(),
                "hypervolume": (hypervolume(points, front.amin(0) - 0.1) / hypervolume(front, front.amin(0) - 0.1)),
                "distance": torch.cdist(points, front).amin(1).mean().item(), "kl": kl.mean().item()}

    def optimum(self, beta: float) -> Tensor:
        """log of the exact optima (W * X, K)."""
        t, w = self.task, self.task.weights[:, None, None]
        reward = w * t.rewards[0] + (1 - w) * t.rewards[1]
        return (t.table + self.config.sharpness * reward / beta).log_softmax(-1).flatten(0, 1)

    def measured(self, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """value (W,), points (W, 2), KL (W,) of log-probabilities (W * X, K)."""
        t = self.task
        log_p = log_p.view(len(t.weights), t.size, -1)
        p = log_p.exp()
        points = torch.stack([(p * r).sum(-1).mean(-1) for r in t.rewards], -1)
        kl = (p * (log_p - t.table.log_softmax(-1))).sum(-1).mean(-1)
        weighted = t.weights * points[:, 0] + (1 - t.weights) * points[:, 1]
        return self.config.sharpness * weighted - beta * kl, points, kl

    def references(self, seed):
        return {"reference": self.exact(self.task.base.log_softmax(-1)), "exact front": self.exact(self.optimum(0.1))}


def hypervolume(points: Tensor, corner: Tensor) -> float:
    """Area that points (n, 2) dominate above `corner`."""
    area, height = 0.0, float(corner[1])
    for x, y in sorted(points.tolist(), reverse=True):
        if x > corner[0] and y > height:
            area += (x - float(corner[0])) * (y - height)
            height = y
    return area
