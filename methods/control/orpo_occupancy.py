"""ORPO: regularised occupancy measures against reward hacking (Laidlaw et al. 2025, "Correlated Proxies", arXiv 2403.03185).

PPO learns from the proxy reward less a penalty for visiting (s, a) where the reference policy seldom goes (part
reward_transform):

    d = argmin  mean_pi softplus(-d) + mean_ref softplus(d)         a network; at its optimum d = log(mu_pi / mu_ref)
    r' = r - lambda clip(p, +-C),   lambda = strength x sigma
    p = (e^d - 1) / sqrt(X)   sqrt_chi2, the paper's; X = trimmed mean over the rollout of e^d - 1; where X <= 0: e^d - 1
        e^d - 1               chi2
        d                     kl
        sign(d)               tv

| symbol | name |
|---|---|
| lambda / sigma | strength |
| sigma | deviation of the proxy reward under the reference, over all its steps so far |
| C | bound (on lambda p, in the unit of the reward) |
| d | discriminator |

mu is the undiscounted visitation frequency of a rollout, over (s, a), or over s alone (`over: state`). The theory's lambda
is sigma sqrt(1 - r^2), r the proxy's correlation with the truth under the reference. strength = 0 is PPO.

Differences from the official code (cassidylaidlaw/orpo, on RLlib): the mean is trimmed only where 1 % of the rows is a row
(there, with fewer than 100, it is NaN and the penalty vanishes silently: `official_trimmed_mean`); lambda is in units of
sigma; PPO is this house's. Plain `chi2` lacks the factor 2 of the divergence's gradient, as there, so equal strengths of it
and sqrt_chi2 differ. Left out: the Wasserstein critic.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.common.networks import mlp
from methods.control.ppo import PPO
from methods.control.stochastic import Running
from runner.interface import knob


class ORPOOccupancy(PPO):
    @dataclasses.dataclass(frozen=True)
    class Config(PPO.Config):
        strength: float = knob(0.1, "lambda in units of sigma; 0: no penalty", low=0.0, source="paper: 0.01 to 1")
        divergence: str = knob("sqrt_chi2", "of the visited from the reference's states and actions", source="paper",
                               choices=["sqrt_chi2", "chi2", "kl", "tv"])
        over: str = knob("state_action", "what is counted", choices=["state_action", "state"], source="paper")
        bound: float = knob(1000.0, "C: bound of lambda p", low=0.0, source="cassidylaidlaw/orpo, tomato")
        minus_one: bool = knob(True, "e^d - 1 rather than e^d: without it a step more is never free",
                               source="cassidylaidlaw/orpo; the paper's formula has e^d", when={"divergence": "chi2"})
        official_trimmed_mean: bool = knob(False, "as released: with fewer than 100 rows it is NaN and the penalty is 0",
                                           source="cassidylaidlaw/orpo", when={"divergence": "sqrt_chi2"})
        discriminator_hidden: tuple[int, ...] = knob((256, 256), "widths of its hidden layers, leaky ReLU", low=1, source="paper")
        discriminator_rate: float = knob(1e-3, "its Adam's learning rate", low=0.0, source="project's choice")
        discriminator_epochs: int = knob(4, "its passes over each rollout", low=1, source="project's choice")

    def setup(self, spec):
        super().setup(spec)
        self.actions = spec.actions
        size = 0 if self.config.over == "state" else spec.actions or spec.action_size
        with torch.random.fork_rng(devices=[]):  # PPO's networks and draws stay those of PPO alone
            self.discriminator = mlp(spec.observation_size + size, self.config.discriminator_hidden, 1, "leaky_relu")
        self.proxy = Running()

    def make_optimizers(self):
        super().make_optimizers()
        self.optimizers["discriminator"] = torch.optim.Adam(self.discriminator.parameters(), lr=self.config.discriminator_rate)

    def reward_transform(self, batch):
        reward = super().reward_transform(batch)
        if self.config.strength == 0:
            return reward
        visited = self.pairs(batch["observation"], batch["action"])
        reference = self.pairs(batch["reference_observation"], batch["reference_action"])
        with torch.enable_grad():
            loss = self.discriminate(visited.flatten(0, 1), reference)
        self.proxy.see(batch["reference_reward"], self.average)
        d, other = self.discriminator(visited).squeeze(-1), self.discriminator(reference).squeeze(-1)
        c = self.config
        p = torch.nan_to_num(penalties(d, c.divergence, c.minus_one, c.official_trimmed_mean), 0.0, 0.0, 0.0)
        term = (c.strength * self.proxy.var.sqrt() * p).clamp(-c.bound, c.bound)
        self.told |= {"discriminator_loss": loss.detach(), "auc": auc(d.flatten(), other), "occupancy_penalty": term.mean()}
        return reward - term

    def pairs(self, observation: Tensor, action: Tensor) -> Tensor:
        """The discriminator's inputs."""
        seen = self.seen(observation)
        if self.config.over == "state":
            return seen
        return torch.cat([seen, F.one_hot(action, self.actions).to(seen) if self.actions else action], -1)

    def discriminate(self, visited: Tensor, reference: Tensor) -> Tensor:
        """Train d on rows of both; both are shuffled and cut into `minibatches` parts. Returns the last loss."""
        parts = max(1, min(self.config.minibatches, len(visited), len(reference)))
        for _ in range(self.config.discriminator_epochs):
            orders = [torch.randperm(len(x), device=x.device).tensor_split(parts) for x in (visited, reference)]
            for a, b in zip(*orders):
                loss = F.softplus(-self.discriminator(visited[a])).mean() + F.softplus(self.discriminator(reference[b])).mean()
                self.minimise(loss, "discriminator")
        return loss


def penalties(d: Tensor, divergence: str, minus_one: bool = True, official: bool = False) -> Tensor:
    """d of any shape -> p of that shape; `official`: with the released trimmed mean."""
    if divergence == "kl":
        return d
    if divergence == "tv":
        return d.sign()
    excess, offset = d.exp() - 1, 0.0 if minus_one else 1.0
    if divergence == "chi2":
        return excess + offset
    mean = trimmed_mean(excess.flatten(), official)
    return (excess + offset) * torch.where(mean <= 0, 1.0, mean.clamp_min(1e-12).rsqrt())


def trimmed_mean(x: Tensor, official: bool = False) -> Tensor:
    """x (N,) without its lowest and highest 1 %; where that is less than a row the plain mean, or, officially, NaN."""
    cut = len(x) // 100
    return x.sort().values[cut:0 if official and cut == 0 else len(x) - cut].mean()


def auc(above: Tensor, below: Tensor, most: int = 1000) -> Tensor:
    """How often a row of `above` (N,) exceeds one of `below` (M,); ties count half. On at most `most` rows of each."""
    a, b = above[:most, None], below[None, :most]
    return ((a > b).float() + 0.5 * (a == b).float()).mean()
