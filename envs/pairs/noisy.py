"""Noisy pairs: the lists of envs/lists/noisy.py as pairs, for methods on pairs.

A prompt is the number of a list, a response one of its six candidates; the policy scores a candidate by an MLP on the list's
context and the candidate (policy.kind=mlp), so that what is learned of one list moves others. Every two candidates of a training
list are a pair, stored once; the one of greater corrupted reward is preferred (labels=hard), or with probability
sigma((R_i - R_j) / 0.5) (soft). A share `p_flip` of the pairs is turned besides, for good: flips that no list agrees on, unlike
noise=flip, which negates whole lists.

The policy starts as the reference: weights N(0, 1) / sqrt(inputs), then the cross-entropy of clean lists' best candidates for
`reference_steps` steps. Gold metrics as there, on clean test lists, all exact. One seed is one bandit.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.lists.noisy import Bandit, Lists, NoisyLists, figures, generator
from envs.pairs.bandit import arm, context
from envs.pairs.base import PairWorld
from envs.pairs.task import Pair, flip
from runner.errors import UserError
from runner.interface import Metric, Spec, knob

WEIGHTS = 4  # what a generator is for, beside those of the lists
SOFTNESS = 0.5


class NoisyPairs(NoisyLists, PairWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(NoisyLists.Config, PairWorld.Config):
        labels: str = knob("hard", "the better candidate is preferred, or with a probability", choices=["hard", "soft"])
        p_flip: float = knob(0.0, "share of pairs that are turned", low=0.0, high=1.0)

    metrics = {
        "accuracy": Metric("max", "", "share of pairs on clean test lists whose better candidate gained more log-probability"),
        **NoisyLists.metrics,
    }

    def make_task(self):
        return None  # it depends on the run's seed

    def spec(self):
        c = self.config
        lists = c.train + c.clean + c.test
        alphabet = "".join(map(arm, range(c.candidates))) + "".join(map(context, range(lists)))
        return Spec(alphabet=alphabet, end=None, prompt_length=1, response_length=1, contexts=lists, arms=c.candidates,
                    features=2 * c.features)

    def stream(self, method, kind, seed):
        if getattr(method.policy, "kind", "") == "table":
            raise UserError("noisy_pairs is judged on lists that no pair is of, of which a table learns nothing\n"
                            "take policy.kind=mlp, or linear")
        self.method, self.bandit = method, Bandit(self.config, method.seed)
        self.weights = self.pretrained(method.policy)
        return self.stored(method, self.pairs(self.bandit.train))

    def pairs(self, lists: Lists, first: int = 0) -> list[Pair]:
        """Every two candidates of each list, the one of greater reward chosen, and a share of them turned."""
        out, c = [], self.config
        for x, rewards in enumerate(lists.reward.tolist(), first):
            for i in range(c.candidates):
                for j in range(i):
                    w, l = (i, j) if rewards[i] > rewards[j] else (j, i)
                    gap = (rewards[w] - rewards[l]) / SOFTNESS
                    label = float(torch.sigmoid(torch.tensor(gap))) if c.labels == "soft" else 1.0
                    out.append(Pair(context(x), arm(w), arm(l), label))
        return flip(out, c.p_flip, f"{self.method.seed}/turned pairs")[0] if not first else out

    def features(self) -> Tensor:
        """(X, P, 2 S): of training, clean and test lists, one after the other."""
        parts = [torch.cat([s.context.unsqueeze(1).expand(-1, self.config.candidates, -1), s.candidates], -1)
                 for s in (self.bandit.train, self.bandit.clean, self.bandit.test)]
        return torch.cat(parts)

    def pretrained(self, policy: nn.Module) -> dict[str, Tensor]:
        """The reference's weights; a function of the seed."""
        c, policy, g = self.config, copy.deepcopy(policy).cpu(), generator(self.method.seed, WEIGHTS)
        policy.base.zero_()
        policy.features.copy_(self.features())
        with torch.no_grad():
            for p in policy.parameters():
                p.zero_() if p.dim() == 1 else p.copy_(torch.randn(p.shape, generator=g) * p.shape[1] ** -0.5)
        adam = torch.optim.AdamW(policy.parameters(), lr=c.reference_learning_rate)
        for rows in self.bandit.reference_batches:
            adam.zero_grad()
            F.nll_loss(policy.scores(c.train + rows).log_softmax(-1), self.bandit.clean.best[rows]).backward()
            adam.step()
        with torch.no_grad():
            self.reference_table = policy.scores(self.tested()).log_softmax(-1)
        return policy.state_dict()

    def tested(self) -> Tensor:
        """The numbers of the test lists."""
        return torch.arange(self.config.test) + self.config.train + self.config.clean

    def _start(self):
        return {k: v.to(self.device) for k, v in self.weights.items()}

    def evaluate(self, method, seed):
        with torch.no_grad():
            log_p = method.policy.scores(self.tested().to(method.device())).log_softmax(-1).cpu()
        return self.exact(log_p)

    def validate(self, method):
        return {}

    def exact(self, log_p: Tensor) -> dict[str, float]:
        """Gold metrics of log-probabilities of the test lists (n, P)."""
        t, rho = self.bandit.test, log_p - self.reference_table
        better = t.reward[:, :, None] > t.reward[:, None]
        gained = torch.sign(rho[:, :, None] - rho[:, None]) / 2 + 0.5
        return {**figures(log_p, self.reference_table, t.best), "accuracy": gained[better].mean().item()}

    def references(self, seed):
        uniform = torch.zeros_like(self.reference_table).log_softmax(-1)
        return {"reference": self.exact(self.reference_table), "uniform policy": self.exact(uniform)}
