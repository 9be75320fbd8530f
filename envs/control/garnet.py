"""Garnet: policy evaluation on a random Markov decision process (Archibald et al. 1995) where the true values are known.

50 states, 4 actions; each pair leads to 3 random states with Dirichlet(1) weights. Rewards U[0, 1] per pair (dense), or 1
with probability .03 and else 0 (sparse), times `reward_scale`. The policy that is valued is drawn from Dirichlet(1) in each
state. A pair is seen as 16 fixed standard normal features. Data: 2,000 transitions of uniform pairs, the next action drawn
from the policy. So the observation is the pair's features and there are no actions to choose (action_size 0): a critic's
target is r + discount Q'(s', a'). Nothing ends.

Gold: root mean squared error against Q = (I - discount P_pi)^-1 r over all 200 pairs, with the method's own discount, and the
effective rank of the critic's features: the number of singular values of Phi / sqrt(N) above 0.01.
"""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import torch
from torch import Tensor

from envs.control.stored import Stored
from runner.errors import UserError
from runner.interface import Metric, Spec, World, knob

RANK_EPS = 0.01
warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # the last layer of an actor of no actions


class Garnet(World):
    @dataclasses.dataclass(frozen=True)
    class Config:
        states: int = knob(50, "number of states", low=2, source="project's choice")
        actions: int = knob(4, "number of actions", low=1, source="project's choice")
        branches: int = knob(3, "states that a pair may lead to", low=1, source="project's choice")
        features: int = knob(16, "length of a pair's feature vector", low=1, source="project's choice")
        rewards: str = knob("dense", "dense: U[0, 1]; sparse: 1 with probability .03", choices=["dense", "sparse"])
        reward_scale: float = knob(1.0, "factor on rewards; the true values are scaled alike")
        instance: int = knob(0, "number of the random process: the same for every method and seed", low=0)
        rows: int = knob(2000, "transitions in the data", low=1, source="project's choice")
        batch_size: int = knob(128, "transitions of a batch", low=1, source="project's choice")

    metrics = {
        "rmse": Metric("min", "reward", "root mean squared error of the mean critic against the exact values"),
        "relative_rmse": Metric("min", "", "the same, divided by the standard deviation of the exact values"),
        "bias": Metric("none", "reward", "mean of the critic less the exact value"),
        "rank": Metric("none", "", "singular values of the first critic's features / sqrt(pairs) above 0.01"),
        "rank_share": Metric("none", "", "that rank, divided by the features' width"),
    }

    def __init__(self, config, device="cpu"):
        super().__init__(config, device)
        c, random = config, np.random.default_rng(config.instance)
        pairs = c.states * c.actions
        if c.branches > c.states:
            raise UserError(f"env.branches={c.branches}: a pair cannot lead to more than env.states={c.states} states")
        transition = np.zeros((pairs, c.states))
        for row in transition:
            row[random.choice(c.states, c.branches, replace=False)] = random.dirichlet(np.ones(c.branches))
        reward = random.uniform(0, 1, pairs) if c.rewards == "dense" else (random.uniform(0, 1, pairs) < 0.03).astype(float)
        self.reward, self.transition = reward * c.reward_scale, transition
        self.policy = random.dirichlet(np.ones(c.actions), c.states)
        self.pairs = random.standard_normal((pairs, c.features)).astype(np.float32)
        row, u = random.integers(pairs, size=c.rows), random.uniform(size=(2, c.rows, 1))
        after = (transition[row].cumsum(1) < u[0]).sum(1).clip(max=c.states - 1)
        action = (self.policy[after].cumsum(1) < u[1]).sum(1).clip(max=c.actions - 1)
        self.row, self.next_row = row, after * c.actions + action

    def spec(self):
        return Spec(observation_size=self.config.features, action_size=0)

    def exact(self, discount: float) -> np.ndarray:
        """Q of every pair, (states * actions,)"""
        c = self.config
        following = (self.transition[:, :, None] * self.policy[None]).reshape(len(self.reward), c.states * c.actions)
        return np.linalg.solve(np.eye(len(self.reward)) - discount * following, self.reward)

    def stream(self, method, kind, seed):
        return Stored(self.columns(), self.config.batch_size, seed, self.device)

    def columns(self) -> dict[str, Tensor]:
        n = self.config.rows
        return {"observation": torch.from_numpy(self.pairs[self.row]), "action": torch.zeros(n, 0),
                "reward": torch.from_numpy(self.reward[self.row]).float(), "terminated": torch.zeros(n),
                "next_observation": torch.from_numpy(self.pairs[self.next_row])}

    def evaluate(self, method, seed):
        pairs = torch.from_numpy(self.pairs).to(self.device)
        assessed = method.assess(pairs, pairs.new_zeros(len(pairs), 0))
        if assessed is None:
            raise UserError("env garnet judges critics, and this method has none\nchoose a method that learns Q(s, a)")
        values, features = (x.double().cpu() for x in assessed)
        exact = torch.from_numpy(self.exact(method.config.discount))
        error = values.mean(0) - exact
        rmse, rank = error.square().mean().sqrt().item(), effective_rank(features[0])
        return {"rmse": rmse, "relative_rmse": rmse / max(exact.std(correction=0).item(), 1e-12), "bias": error.mean().item(),
                "rank": float(rank), "rank_share": rank / features.shape[-1]}

    def references(self, seed):
        """The best constant is the mean of the exact values, here at discount 0.9; a critic above it has learned nothing."""
        exact = self.exact(0.9)
        return {"best constant (discount 0.9)": {"rmse": float(exact.std()), "relative_rmse": 1.0, "bias": 0.0}}


def effective_rank(features: Tensor) -> int:
    """features (n, width): the number of singular values of features / sqrt(n) above 0.01"""
    return int((torch.linalg.svdvals(features) / len(features) ** 0.5 > RANK_EPS).sum())
