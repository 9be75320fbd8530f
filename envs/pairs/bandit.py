"""Bandits with preferences: X contexts, K arms, everything can be enumerated (testbed A0 of the preference family).

    r(x, y) ~ reward_scale N(0, 1), or v . phi(x, y) standardised where arms have features
    pi_ref(. | x) = softmax(base),  base ~ base_scale N(0, 1), and -3 on `unseen` arms (their reward: unseen_reward)
    pairs: a context and two different seen arms at random; label ~ sigma(sharpness (r_i - r_j))

| flips | what corrupts the labels |
|---|---|
| symmetric | each is turned with probability p_flip |
| adversarial | the share p_flip with the largest true margin is turned |
| dependent | turned with probability sigma(3 c_x - 2), c_x ~ N(0, 1) a number of the context |

`soft` gives every pair of seen arms once, with its exact probability as the label: the population, not a sample.
`once` adds that many arms with reward -1, each in exactly one pair, as the winner: the spurious arms of testbed [33].
`scored` batches are logged arms with rewards: a share `poor` of them from a softmax of -2 r, the others from one of r; rewards
are squashed by a sigmoid, those of a share `noisy` get noise of 0.3 and are cut to [0, 1]. The policy that such training begins
from, pi_ref, is the maximum-likelihood fit of the log: an arm's share of its context's rows, `smoothing` added to every count.

Batches of kind `prompts` reward a sampled arm with its true reward, or (rewarded=fitted) with the one that is fitted to the
pairs: the two stages of RLHF. Duels are judged as pairs are labelled: arm i beats j with sigma(sharpness (r_i - r_j)).

Batches of kind `arms` hold everything: prompt, prompt_mask (X, Tp), arms (X, K): their tokens, reward (X, K); `batch_size`
contexts, 0: all.

One seed is one bandit; the run's seed chooses it. Gold metrics are exact sums over arms.
"""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

from envs.pairs import decoding, frontier, rankings
from envs.pairs.base import PairWorld, Stored
from envs.pairs.scored import Scored
from envs.pairs.task import Pair, PairTask
from envs.prompts.task import Problem, Verdict
from runner.errors import UserError
from runner.interface import Metric, Spec, knob

ARM, CONTEXT = 0x4E00, 0x5E00  # characters that name them


def arm(i: int) -> str:
    return chr(ARM + i)


def context(i: int) -> str:
    return chr(CONTEXT + i)


class Bandit(PairTask):
    """The tables of one seed: reward, base (X, K), features (X, K, D) or None; which arms are seen."""

    eos, prompt_length, response_length = None, 1, 1

    def __init__(self, c, seed: int):
        g = torch.Generator().manual_seed(256 * seed + 11)
        arms = c.arms + c.once
        self.seed, self.size, self.arms = seed, c.contexts, arms
        self.alphabet = "".join(map(arm, range(arms))) + "".join(map(context, range(c.contexts)))
        self.features = torch.randn(c.contexts, arms, c.features, generator=g) if c.features else None
        if c.features:
            raw = self.features @ torch.randn(c.features, generator=g)
            reward = c.reward_scale * (raw - raw.mean(-1, keepdim=True)) / raw.std(-1, keepdim=True)
        elif c.ladder:
            reward = torch.linspace(0, 1, c.arms + c.once).repeat(c.contexts, 1) * (c.arms + c.once - 1) / max(c.arms - 1, 1)
        else:
            reward = c.reward_scale * torch.randn(c.contexts, arms, generator=g)
        if c.scales > 1:
            apart = torch.Generator().manual_seed(256 * seed + 14)
            reward = reward * c.scales ** (2 * torch.rand(c.contexts, 1, generator=apart) - 1)
        self.base = c.base_scale * torch.randn(c.contexts, arms, generator=g)
        self.seen = c.arms - c.unseen
        if c.unseen:
            self.base[:, self.seen:c.arms] -= 3
            reward[:, self.seen:c.arms] = c.unseen_reward
        if c.once:
            reward[:, c.arms:] = -1.0
        self.reward, self.config = reward, c
        self.lean = torch.randn(c.contexts, generator=g)

    def train(self):
        return [Problem(context(x), x) for x in range(self.size)]

    held_out = train  # every context is known; what is judged is what the policy makes of them

    def verify(self, problem, response):
        if not response:
            return Verdict(0.0, None, 0.0, score=float(self.reward[problem.answer].min()))
        reward = self.reward[problem.answer]
        y = ord(response[0]) - ARM
        return Verdict(float(y == int(reward.argmax())), response, score=float(reward[y]))

    def demonstrate(self, problem, rng: random.Random):
        """An arm drawn from the reference."""
        p = self.base[problem.answer].softmax(-1).tolist()
        return arm(rng.choices(range(self.arms), p)[0])

    def probability(self, x, i, j) -> Tensor:
        """P(arm i beats arm j) in context x."""
        return torch.sigmoid(self.config.sharpness * (self.reward[x, i] - self.reward[x, j]))

    def pairs(self) -> list[Pair]:
        c, g = self.config, torch.Generator().manual_seed(256 * self.seed + 12)
        if c.soft:
            every = [(x, i, j) for x in range(self.size) for i in range(self.seen) for j in range(i)]
            return [Pair(context(x), arm(i), arm(j), float(self.probability(x, i, j))) for x, i, j in every]
        n = c.pairs
        x = torch.randint(self.size, (n,), generator=g)
        i = torch.randint(self.seen, (n,), generator=g)
        j = (i + 1 + torch.randint(self.seen - 1, (n,), generator=g)) % self.seen
        first = torch.rand(n, generator=g) < self.probability(x, i, j)
        first ^= self.flipped(x, i, j, g)
        i, j = torch.where(first, i, j), torch.where(first, j, i)
        out = list(zip(x.tolist(), i.tolist(), j.tolist()))
        for spurious in range(c.arms, self.arms):
            for k in range(self.size):
                out.append((k, spurious, int(torch.randint(self.seen, (1,), generator=g))))
        return [Pair(context(x), arm(i), arm(j)) for x, i, j in out]

    def flipped(self, x, i, j, g) -> Tensor:
        """Which labels are turned, (n,) bool."""
        c, draw = self.config, torch.rand(len(x), generator=g)
        if c.flips == "symmetric":
            return draw < c.p_flip
        if c.flips == "dependent":
            return draw < torch.sigmoid(3 * self.lean[x] - 2)
        if c.flips == "adversarial":
            gap = (self.reward[x, i] - self.reward[x, j]).abs()
            return gap >= gap.quantile(1 - c.p_flip) if c.p_flip else torch.zeros_like(draw, dtype=torch.bool)
        return torch.zeros_like(draw, dtype=torch.bool)

    def numbered(self) -> list[tuple[int, int, int, float]]:
        """The pairs as (context, chosen, rejected, label)."""
        return [(ord(p.prompt) - CONTEXT, ord(p.chosen) - ARM, ord(p.rejected) - ARM, p.label) for p in self.pairs()]

    def held_out_pairs(self):
        """A thousand pairs of all arms, the truly better one chosen."""
        rng, out = random.Random(f"{self.seed}/held out"), []
        for _ in range(1000):
            x, (i, j) = rng.randrange(self.size), rng.sample(range(self.arms), 2)
            i, j = (i, j) if self.reward[x, i] >= self.reward[x, j] else (j, i)
            out.append(Pair(context(x), arm(i), arm(j)))
        return out

    def logged(self) -> list[tuple[str, str, float]]:
        """(prompt, response, reward in [0, 1]) of the behaviour policies."""
        c, g = self.config, torch.Generator().manual_seed(256 * self.seed + 13)
        x = torch.randint(self.size, (c.logged,), generator=g)
        poor = torch.rand(c.logged, 1, generator=g) < c.poor
        y = torch.multinomial(torch.where(poor, -2 * self.reward[x], self.reward[x]).softmax(-1), 1, generator=g).squeeze(1)
        value = torch.sigmoid(self.reward[x, y])
        noise = 0.3 * torch.randn(c.logged, generator=g) * (torch.rand(c.logged, generator=g) < c.noisy)
        value = (value + noise).clamp(0, 1)
        return [(context(a), arm(b), float(r)) for a, b, r in zip(x.tolist(), y.tolist(), value)]

    def fitted(self, rows: list[tuple[str, str, float]]) -> Tensor:
        """log of the arms' smoothed shares of each context's rows, (X, K)."""
        count = torch.full_like(self.base, self.config.smoothing)
        for prompt, response, _ in rows:
            count[ord(prompt) - CONTEXT, ord(response) - ARM] += 1
        return (count / count.sum(-1, keepdim=True)).log()


class BanditWorld(PairWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(PairWorld.Config):
        contexts: int = knob(20, "X", low=1, high=4000, source="project's choice")
        arms: int = knob(12, "K", low=2, high=4000, source="project's choice")
        features: int = knob(0, "D: numbers that describe an arm in a context; 0: none", low=0)
        reward_scale: float = knob(1.0, "deviation of the true reward", low=0.0, source="project's choice")
        scales: float = knob(1.0, "rewards of a context are multiplied by a number of its own, log-uniform in [1/scales, scales]",
                             low=1.0)
        ladder: bool = knob(False, "rewards of arms rise in equal steps from 0 to 1 instead")
        base_scale: float = knob(0.5, "deviation of the reference's logits", low=0.0, source="project's choice")
        sharpness: float = knob(1.0, "s: labels are drawn with sigma(s (r_i - r_j))", low=0.0)
        pairs: int = knob(4000, "of the data set", low=1, when={"soft": False})
        list_size: int = knob(2, "P: arms that a row of the pairs shows; more than 2: ranked, see rankings.py", low=2)
        soft: bool = knob(False, "every pair of seen arms once, with its exact probability")
        unseen: int = knob(0, "arms that no pair shows, of low probability under the reference", low=0)
        unseen_reward: float = knob(-1.5, "their true reward", when={"unseen": 2})
        once: int = knob(0, "further arms of reward -1, each of which wins its only pair", low=0, when={"soft": False})
        flips: str = knob("none", "what corrupts the labels", choices=["none", "symmetric", "adversarial", "dependent"],
                          when={"soft": False})
        p_flip: float = knob(0.2, "how much", low=0.0, high=1.0, when={"flips": ["symmetric", "adversarial"]})
        logged: int = knob(3000, "rows of a scored data set", low=1)
        poor: float = knob(0.6, "share of them from a policy that prefers low rewards", low=0.0, high=1.0)
        noisy: float = knob(0.0, "share of them with noise in the reward", low=0.0, high=1.0)
        smoothing: float = knob(0.5, "rows of every arm that the fit of the log counts beside those it has", low=1e-6,
                                source="project's choice")
        values: str = knob("sampled", "what a prompt of the log is worth: the mean reward of sampled responses, or the exact one",
                           choices=["sampled", "exact"])
        samples_per_prompt: int = knob(5, "responses sampled for that", low=1, source="project's choice",
                                       when={"values": "sampled"})
        best_of: int = knob(4, "N of the decoding that win rates are told of", low=1)
        rewarded: str = knob("exact", "what batches of kind prompts reward: the true reward, or the fit of the pairs",
                             choices=["exact", "fitted"])

    metrics = {
        "reward": Metric("max", "", "true expected reward, exact, mean over contexts"),
        "value": Metric("max", "", "the same of rewards on the scale of the log, squashed to [0, 1]"),
        "win_rate": Metric("max", "", "probability that an arm of the policy is truly better than one of the reference"),
        "best_win_rate": Metric("max", "", "the same of the best of N (`best_of`) draws of each"),
        "worst_win_rate": Metric("max", "", "the same of the worst of N draws of each"),
        "kl": Metric("none", "nats", "KL(policy || reference), exact"),
        "kl_from_reference": Metric("none", "nats", "KL(reference || policy), exact"),
        "regularised": Metric("max", "", "true expected reward - beta_eval KL(policy || reference)"),
        "frontier": Metric("max", "", "gain of true reward over the reference, as a share of the best policy's at the same KL"),
        "entropy": Metric("none", "nats", "of the policy over arms, exact"),
        "accuracy": Metric("max", "", "share of held-out pairs whose better arm has gained more, in log-ratio to the reference"),
        "chosen": Metric("max", "nats", "change of a held-out better arm's log-probability"),
        "rejected": Metric("none", "nats", "change of a held-out worse arm's log-probability"),
        "unseen_mass": Metric("min", "", "probability given to arms that the data never, or only once, showed"),
        "tail_mass": Metric("none", "", "probability given to the worse half of the arms"),
        "best_mass": Metric("max", "", "probability given to the truly best arm"),
        "calibration": Metric("min", "", "expected calibration error of sigma(z), z a difference of implicit rewards, ten bins"),
        "slope": Metric("none", "", "of the implicit reward's r_i - r_j over the true one, least squares over all seen pairs"),
    }

    def make_task(self):
        return None  # it depends on the run's seed

    def spec(self):
        c = self.config
        if c.unseen > c.arms - 2:
            raise UserError(f"env.unseen={c.unseen} of {c.arms} arms leaves fewer than two that a pair can show")
        task = Bandit(c, 0)
        return Spec(alphabet=task.alphabet, end=None, prompt_length=1, response_length=1, contexts=c.contexts, arms=task.arms,
                    features=c.features or None)

    def stream(self, method, kind, seed):
        self.task, self.method = self.make(method.seed), method
        if kind == "pairs":
            return rankings.stored(self, method, arm, context) if self.config.list_size > 2 else \
                self.stored(method, self.task.pairs())
        if kind == "scored":
            return self.scored(method)
        if kind == "arms":
            prompt, mask = method.encode([context(x) for x in range(self.size())])
            tokens = method.encode_responses([arm(y) for y in range(self.task.arms)])[0][:, 0]
            columns = {"prompt": prompt, "prompt_mask": mask, "arms": tokens.expand(len(prompt), -1),
                       "reward": self.task.reward.to(prompt.device)}
            return Stored(columns, self._start(), self.config.batch_size, method.seed, method.processes)
        if kind == "prompts" and self.config.rewarded == "fitted":
            self.judgement = frontier.fitted_reward(self.task.numbered(), self.task.reward.shape)
        return super().stream(method, kind, seed)

    judgement: Tensor | None = None  # rewards (X, K) in the place of the true ones

    def rewarded(self, problem, response, verdict):
        if self.judgement is not None and response:
            return float(self.judgement[problem.answer, ord(response[0]) - ARM])
        return verdict.correct if verdict.score is None else verdict.score

    def preferred(self, problem, response, other):
        return float(self.task.probability(problem.answer, ord(response[0]) - ARM, ord(other[0]) - ARM))

    def scored(self, method) -> Scored:
        """Logged rows, and the policy that has been fitted to them."""
        t, rows = self.task, self.task.logged()
        t.base, worth = t.fitted(rows), torch.sigmoid(t.reward)
        exact = (t.base.exp() * worth).sum(-1).tolist()
        values = {context(x): v for x, v in enumerate(exact)} if self.config.values == "exact" else None
        return Scored(method, rows, self.config.batch_size or len(rows), lambda prompt, response: float(
            worth[ord(prompt) - CONTEXT, ord(response) - ARM]), self.config.samples_per_prompt, self._start(), values)

    def make(self, seed: int) -> PairTask:
        return Bandit(self.config, seed)

    def _start(self):
        """The bandit's own tables; what is learned starts at 0."""
        policy = self.method.policy
        start = {k: v for k, v in policy.state_dict().items() if k not in ("base", "features")}
        if not hasattr(self, "_zero"):
            self._zero = {k: v.clone() for k, v in start.items()}
        tables = {"base": self.task.base, "features": self.task.features if self.task.features is not None
                  else torch.zeros(self.size(), self.task.arms, 0)}
        return {**{k: v.to(self.device) for k, v in tables.items()}, **self._zero}

    def size(self) -> int:
        return self.config.contexts

    def table(self, method) -> Tensor:
        """log pi (X, K), exact: of a method that chooses one of n draws of the reference (`draws_of_one`), of what it chooses."""
        prompts = torch.arange(self.size(), device=method.device()) + self.task.arms + 1
        ids = prompts.unsqueeze(1)
        hidden = method.policy.hidden(ids, torch.ones_like(ids, dtype=torch.bool))[:, 0]
        scores = (hidden @ method.policy.head.T).float()[:, 1:]
        if n := getattr(method, "draws_of_one", 0):
            base = self.task.base.to(scores.device)
            return decoding.best_of(base.double().softmax(-1), (scores - base).double(), n).clamp(min=1e-30).log().float()
        return scores.log_softmax(-1)

    def evaluate(self, method, seed):
        with torch.no_grad():
            return self.exact(self.table(method).cpu(), method)

    def exact(self, log_p: Tensor, method=None) -> dict[str, float]:
        """Gold metrics of log-probabilities (X, K)."""
        t = self.task
        ref, r, p = t.base.log_softmax(-1), t.reward, log_p.exp()
        rho = log_p - ref
        n = self.config.best_of
        decoded = {name: decoding.wins(how(p.double(), r, n), how(ref.exp().double(), r, n), r).mean().item()
                   for name, how in (("best_win_rate", decoding.best_of), ("worst_win_rate", decoding.worst_of))}
        worse = r.argsort(-1).argsort(-1) < t.arms // 2
        expected = lambda table: (p * table).sum(-1).mean().item()  # noqa: E731
        kl = expected(rho)
        out = {"reward": expected(r), "value": expected(torch.sigmoid(r)), "kl": kl,
               "kl_from_reference": (ref.exp() * -rho).sum(-1).mean().item(),
               "win_rate": decoding.wins(p, ref.exp(), r).mean().item(), **decoded,
               "entropy": -expected(log_p), "tail_mass": expected(worse.float()),
               "unseen_mass": p[:, t.seen:].sum(-1).mean().item(),
               "best_mass": p.gather(1, r.argmax(-1, keepdim=True)).mean().item()}
        pairs = [(ord(q.prompt) - CONTEXT, ord(q.chosen) - ARM, ord(q.rejected) - ARM) for q in t.held_out_pairs()]
        x, i, j = torch.tensor(pairs).T
        gap = rho[x, i] - rho[x, j]
        out |= {"accuracy": (torch.sign(gap) / 2 + 0.5).mean().item(), "chosen": rho[x, i].mean().item(),
                "rejected": rho[x, j].mean().item()}
        if (part := frontier.share(log_p, t.base, r)) is not None:
            out["frontier"] = part
        beta = getattr(getattr(method, "config", None), "beta", None)
        if beta:
            out |= self._scale(method.implicit_reward(rho) if hasattr(method, "implicit_reward") else beta * rho, r)
            out["regularised"] = out["reward"] - beta * kl
        return out

    def _scale(self, implied, r) -> dict[str, float]:
        """How the implicit reward (X, K), beta rho or what a method takes for it, compares to the true one."""
        i, j = torch.triu_indices(self.task.seen, self.task.seen, 1)
        mine, true = (implied[:, i] - implied[:, j]).flatten().double(), (r[:, i] - r[:, j]).flatten().double()
        z, p = torch.sigmoid(mine), torch.sigmoid(self.config.sharpness * true)
        bins = (z * 10).long().clamp(max=9)
        error = sum((z[bins == b].mean() - p[bins == b].mean()).abs() * (bins == b).double().mean()
                    for b in range(10) if (bins == b).any())
        slope = (mine * true).sum() / (true * true).sum().clamp(min=1e-12)
        return {"calibration": float(error), "slope": float(slope)}

    def references(self, seed: int):
        t = self.task
        best = torch.full_like(t.reward, -1e4).scatter(1, t.reward.argmax(-1, keepdim=True), 0.0)
        n = self.config.best_of
        chosen = decoding.best_of(t.base.double().softmax(-1), t.reward, n).clamp(min=1e-30).log().float()
        return {"reference": self.exact(t.base.log_softmax(-1)), f"best of {n}": self.exact(chosen),
                "best arm": self.exact(best.log_softmax(-1))}


def optimum(base: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log of pi_ref exp(r / beta) / Z, (X, K)."""
    return (base + reward / beta).log_softmax(-1)
