"""On-policy learning: the algorithm that PPO, TRPO, CPO and others change. One update is one iteration over a rollout of
T steps in n copies (kind of batch `rollouts`); all rows are flattened to N = T n.

    1. reward_transform   r' = r (T, n); what is learned from                        (additive)
    2. costs              c (T, n, C), as the world gives them                       (additive)
    3. advantage          GAE: delta_t = r_t + gamma (1-terminated) V(s') - V(s),
                          A_t = delta_t + gamma lambda (1-ended) A_{t+1}
    4. objective          what the policy climbs, from A and the costs' A; here A
    5. policy_loss        -mean rho A, rho = pi(a|s) / pi_old(a|s)
    6. penalty            added to the loss of the policy; none here                 (additive)
    7. value_loss         0.5 mean (V - R)^2, R = A + V_old
    8. optimise           `epochs` passes over the rollout in `minibatches` parts, one Adam on
                          policy_loss + penalty - entropy_weight entropy + value_weight value_loss

Between 2 and 3, r' is divided by the running standard deviation of its discounted sum. Observations are normalised by
running statistics which stand still during an iteration, so that pi_old is the policy that played; they take up the rollout
at its end (common code moves them at every step). An episode cut by time goes on in V(next_observation).

Costs (Spec.costs) are learned from by methods that have `limits`: one value network with a head per channel, its own Adam,
and two figures for the constraint in the unit of returns: `cost_return` (C,), the mean undiscounted cost of whole episodes,
and `episode_length`, which turns a mean over steps into a sum over an episode.

Sources: Sutton et al. 2000 (policy gradient), Schulman et al. 2016 (GAE), Mnih et al. 2016 (A2C); the settings are those
of the common PPO code (Huang et al. 2022).
"""

from __future__ import annotations

import dataclasses
import types

import torch
from torch import Tensor

from methods.common.networks import describe_mlp, mlp
from methods.control.stochastic import Categorical, Gaussian, Running, orthogonal
from runner.interface import Method, Spec, knob


def gae(reward: Tensor, value: Tensor, after: Tensor, terminated: Tensor, ended: Tensor, discount: float, trace: float):
    """All (T, …): advantages by generalised advantage estimation; `after` = V(next_observation)."""
    delta = reward + discount * (1 - terminated) * after - value
    keep = discount * trace * (1 - ended)
    out, carried = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        carried = delta[t] + keep[t] * carried
        out[t] = carried
    return out


def running_sum(x: Tensor, ended: Tensor, before: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Sums since the start of each episode: out_t = x_t + factor * out_{t-1} (T, n, …), 0 after an end; and what carries
    over into the next rollout (n, …), from `before`."""
    out = torch.empty_like(x)
    for t in range(len(x)):
        out[t] = before = x[t] + factor * before
        before = before * (1 - ended[t])
    return out, before


class OnPolicy(Method):
    @dataclasses.dataclass(frozen=True)
    class Config:
        hidden: tuple[int, ...] = knob((64, 64), "widths of the hidden layers of policy and value, tanh", low=1)
        learning_rate: float = knob(3e-4, "Adam's", low=0.0)
        anneal: bool = knob(True, "learning rate falls linearly to 0 over the run")
        epochs: int = knob(10, "passes over each rollout", low=1)
        minibatches: int = knob(32, "parts of a pass; fewer where they would hold less than two rows", low=1)
        discount: float = knob(0.99, "gamma", low=0.0, high=1.0)
        trace: float = knob(0.95, "lambda of GAE", low=0.0, high=1.0)
        entropy_weight: float = knob(0.0, "c_e: weight of the mean entropy", low=0.0)
        value_weight: float = knob(0.5, "c_v: weight of the value loss", low=0.0)
        gradient_norm: float = knob(0.5, "bound of the gradient's norm; 0: none", low=0.0)
        normalise_observations: bool = knob(True, "by running mean and deviation, clipped to +-10")
        scale_rewards: bool = knob(True, "by the running deviation of their discounted sum, clipped to +-10")
        normalise_advantages: bool = knob(True, "in every minibatch: (A - mean) / (std + 1e-8)")

    PARTS = ("reward_transform", "costs", "advantage", "objective", "policy_loss", "penalty", "value_loss", "optimise")
    ADDITIVE = ("reward_transform", "costs", "penalty")
    LOG_STD = 0.0  # initial log standard deviation of a Gaussian policy

    def setup(self, spec: Spec):
        c = self.config
        if spec.actions:
            self.policy = Categorical(spec.observation_size, c.hidden, spec.actions)
        else:
            self.policy = Gaussian(spec.observation_size, c.hidden, spec.action_size, self.LOG_STD)
        self.value = orthogonal(mlp(spec.observation_size, c.hidden, 1, "tanh"), 1.0)
        self.seen, self.returns = Running(spec.observation_size), Running()
        limits = self.limits(spec)
        self.constrained = bool(limits)
        self.carried: dict[str, Tensor] = {}  # sums of the episodes under way
        self.told: dict[str, Tensor] = {}     # further metrics, set by the parts
        if self.constrained:
            with torch.random.fork_rng(devices=[]):  # without costs the same seed gives the same networks
                self.cost_value = orthogonal(mlp(spec.observation_size, c.hidden, len(limits), "tanh"), 1.0)
            self.register_buffer("limit", torch.tensor(limits))
            self.register_buffer("cost_return", torch.zeros(len(limits)))
            self.register_buffer("episode_length", torch.zeros(()))

    def limits(self, spec: Spec) -> list[float]:
        """The bound of each cost channel, in cost per episode; none: costs are not looked at."""
        return []

    def make_optimizers(self):
        adam = {"lr": self.config.learning_rate, "eps": 1e-5, "fused": True}
        networks = [*self.policy.parameters(), *self.value.parameters()]
        self.optimizers = {"networks": torch.optim.Adam(networks, **adam)}
        if self.constrained:
            self.optimizers["cost_value"] = torch.optim.Adam(self.cost_value.parameters(), **adam)

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: see envs/control/rollouts.py; observation (T, n, S)."""
        c = self.config
        if c.anneal and self.planned:
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = self.initial_rate(group) * max(0.0, 1 - self.updates / self.planned)
        self.told = {}
        data = self.assess(batch)
        metrics = self.optimise(data)
        if c.normalise_observations:
            self.seen.see(batch["observation"].flatten(0, 1), self.average)
        return {**metrics, **self.told}

    def initial_rate(self, group) -> float:
        return group.setdefault("initial_lr", group["lr"])

    @torch.no_grad()
    def assess(self, batch) -> dict[str, Tensor]:
        """What is learned from, N rows: seen, action, log_prob, value, advantage, return; cost_value, cost_advantage and
        cost_return (N, C) under a constraint; and the old distribution, old_0, old_1, …"""
        seen, after = self.seen(batch["observation"]), self.seen(batch["next_observation"])
        old = self.policy(seen)
        ends = {k: batch[k] for k in ("terminated", "ended")}
        reward = self.scaled(self.reward_transform(batch), batch["ended"])
        value = self.value(seen).squeeze(-1)
        advantage = self.advantage(reward, value, self.value(after).squeeze(-1), **ends)
        data = {"seen": seen, "action": batch["action"], "log_prob": self.policy.log_prob(old, batch["action"]),
                "value": value, "advantage": advantage, "return": advantage + value,
                **{f"old_{i}": x for i, x in enumerate(old)}}
        if self.constrained:
            cost, ends = self.costs(batch), {k: v.unsqueeze(-1) for k, v in ends.items()}
            self.count(cost, ends["ended"])
            value = self.cost_value(seen)
            advantage = self.advantage(cost, value, self.cost_value(after), **ends)
            data |= {"cost_value": value, "cost_advantage": advantage, "cost_return": advantage + value}
        data["advantage"] = self.objective(data)
        return {k: v.flatten(0, 1).contiguous() for k, v in data.items()}

    def scaled(self, reward: Tensor, ended: Tensor) -> Tensor:
        if not self.config.scale_rewards:
            return reward
        before = self.carried.get("return", torch.zeros_like(reward[0]))
        sums, self.carried["return"] = running_sum(reward, ended, before, self.config.discount)
        self.returns.see(sums.flatten(), self.average)
        return (reward * self.returns.rate()).clamp(-10, 10)

    def count(self, cost: Tensor, ended: Tensor):
        """cost_return and episode_length from the episodes that ended in this rollout; where none did, they stay."""
        both = torch.cat([cost, torch.ones_like(cost[..., :1])], -1)
        before = self.carried.get("cost", torch.zeros_like(both[0]))
        sums, self.carried["cost"] = running_sum(both, ended, before, 1.0)
        figures = torch.cat([(sums * ended).sum((0, 1)), ended.sum().reshape(1), sums[-1].mean(0)])
        whole, number, under_way = self.average(figures).split([both.shape[-1], 1, both.shape[-1]])
        before = torch.cat([self.cost_return, self.episode_length.reshape(1)])
        before = torch.where(self.episode_length > 0, before, under_way)  # nothing has ended yet: what there is
        now = torch.where(number > 0, whole / number.clamp_min(1e-6), before)
        self.cost_return.copy_(now[:-1])
        self.episode_length.copy_(now[-1])

    # -- parts
    def reward_transform(self, batch) -> Tensor:
        """r' (T, n); overriders add to super()'s."""
        return batch["reward"]

    def costs(self, batch) -> Tensor:
        """(T, n, C), one channel per limit; overriders append to super()'s."""
        return batch["cost"]

    def advantage(self, reward, value, after, terminated, ended) -> Tensor:
        """All (T, n) for the reward, (T, n, C) for costs, where `terminated` and `ended` are (T, n, 1)."""
        return gae(reward, value, after, terminated, ended, self.config.discount, self.config.trace)

    def objective(self, data) -> Tensor:
        """(T, n): the advantage that the policy climbs."""
        return data["advantage"]

    def policy_loss(self, mini, ratio: Tensor) -> Tensor:
        """ratio (B,), with gradient -> scalar"""
        return -(mini["advantage"] * ratio).mean()

    def penalty(self, mini, distribution) -> Tensor | None:
        """Added to the loss; overriders add to super()'s (None counts as zero)."""
        return None

    def value_loss(self, mini, value: Tensor) -> Tensor:
        """value (B,), with gradient -> scalar"""
        return 0.5 * (value - mini["return"]).square().mean()

    def optimise(self, data) -> dict[str, Tensor]:
        """Train on N rows; returns metrics of the last minibatch."""
        c = self.config
        for mini in self.minibatches(data):
            if c.normalise_advantages:
                mini["advantage"] = standardised(mini["advantage"])
            distribution = self.policy(mini["seen"])
            log_ratio = self.policy.log_prob(distribution, mini["action"]) - mini["log_prob"]
            policy_loss = self.policy_loss(mini, log_ratio.exp())
            penalty = self.penalty(mini, distribution)
            value_loss = self.value_loss(mini, self.value(mini["seen"]).squeeze(-1))
            entropy = self.policy.entropy(distribution).mean()
            loss = policy_loss - c.entropy_weight * entropy + c.value_weight * value_loss
            self.minimise(loss if penalty is None else loss + penalty, "networks", c.gradient_norm)
            self.fit_cost_value(mini)
        kl = (log_ratio.exp() - 1 - log_ratio).mean()  # unbiased and never negative
        return {"policy_loss": policy_loss.detach(), "value_loss": value_loss.detach(), "entropy": entropy.detach(),
                "kl": kl.detach()}

    # -- helpers of the parts
    def minibatches(self, data):
        """`epochs` times all N rows in new orders, in parts of nearly the same size."""
        parts = max(1, min(self.config.minibatches, len(data["value"]) // 2))
        for _ in range(self.config.epochs):
            order = torch.randperm(len(data["value"]), device=data["value"].device)
            for rows in order.tensor_split(parts):
                yield {k: v[rows] for k, v in data.items()}

    def fit_cost_value(self, mini):
        if self.constrained:
            loss = 0.5 * (self.cost_value(mini["seen"]) - mini["cost_return"]).square().mean()
            self.minimise(loss, "cost_value", self.config.gradient_norm)

    def average(self, x: Tensor) -> Tensor:
        """The mean of x over processes, in place: the engine averages what it finds under `grad`."""
        self.engine.synchronise([types.SimpleNamespace(grad=x)])
        return x

    # -- state and what a world asks for
    def extra_state(self):
        return {"carried": dict(self.carried)}

    def load_extra_state(self, state):
        device = self.returns.mean.device
        self.carried = {k: v.to(device) for k, v in state["carried"].items()}

    @torch.no_grad()
    def act(self, observation: Tensor, explore: bool) -> Tensor:
        """explore: a draw from the policy, not clipped; else its mode."""
        distribution = self.policy(self.seen(observation))
        return self.policy.sample(distribution) if explore else self.policy.mode(distribution)

    def export(self):
        """The policy's network, the normalisation folded into its first layer (its clip at 10 deviations is left out)."""
        tensors = {k: v.detach().clone() for k, v in self.policy.net.state_dict().items()}
        weight = tensors["0.weight"] * self.seen.rate()
        tensors["0.bias"] = tensors["0.bias"] - weight @ self.seen.mean
        tensors["0.weight"] = weight
        return tensors, describe_mlp(self.policy.net)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.std() + 1e-8)
