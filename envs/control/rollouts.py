"""On-policy experience: play the current policy, hand the steps over in order, forget them. The stream of kind `rollouts`.

Each next() plays `rollout_steps` steps (T) in every copy (n) of the environment and returns, time first,

    observation, next_observation (T, n, S)     the observation of the action and the one after it, before any reset
    action            (T, n, A), or (T, n) where actions are numbers; as the policy drew it, not clipped
    reward            (T, n), times `reward_scale`
    terminated, ended (T, n)                    a true end; any end, time limits included
    cost              (T, n, C)                 only where the world has costs

A time limit is no end of the world: V(next_observation) continues such an episode, and so it does at the end of a rollout,
whose episodes go on in the next one. Worlds with a reference policy add steps of its own play, in the same number:
reference_observation (M, S), reference_action (M,) or (M, A), reference_reward (M,), and
reference_probability (T, n, actions), its distribution on the states that were visited.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from runner.interface import Method, Stream


class Player:
    """Copies of an environment in the middle of their episodes, stepped by one policy."""

    def __init__(self, copies, steps: int, scale: float, seed: int, device: torch.device):
        self.copies, self.steps, self.scale, self.device = copies, steps, scale, device
        self.numbers = np.random.default_rng(seed)
        self.start = [int(x) for x in self.numbers.integers(2**31, size=len(copies.envs))]
        self.observation: np.ndarray | None = None  # (n, S)
        self.episode = np.zeros((2, len(copies.envs)))  # return and cost so far
        self.last = [float("nan"), float("nan")]        # of the last whole episode
        self.env_steps = 0

    def play(self, policy) -> dict[str, Tensor]:
        """policy: observation (n, S) -> action."""
        copies, n = self.copies, len(self.copies.envs)
        actions, costs = getattr(copies, "actions", None), getattr(copies, "costs", 0)
        if self.observation is None:
            self.observation = np.stack([copies.reset(i, s) for i, s in enumerate(self.start)])
        shape = (self.steps, n)
        out = {"observation": torch.empty(*shape, copies.observation_size),
               "next_observation": torch.empty(*shape, copies.observation_size),
               "action": torch.empty(*shape, dtype=torch.long) if actions else torch.empty(*shape, copies.action_size),
               "reward": torch.empty(shape), "terminated": torch.zeros(shape), "ended": torch.zeros(shape)}
        if costs:
            out["cost"] = torch.empty(*shape, costs)
        rows = {k: v.numpy() for k, v in out.items()}
        for t in range(self.steps):
            seen = torch.from_numpy(self.observation).to(self.device, torch.float32)
            chosen = policy(seen).cpu().numpy()
            rows["observation"][t], rows["action"][t] = self.observation, chosen
            for i in range(n):
                after, reward, terminated, truncated = copies.step(i, chosen[i])
                rows["next_observation"][t, i], rows["reward"][t, i] = after, reward * self.scale
                rows["terminated"][t, i], rows["ended"][t, i] = terminated, terminated or truncated
                self.episode[0, i] += reward
                if costs:
                    rows["cost"][t, i] = copies.cost[i]  # (C,), of this step
                    self.episode[1, i] += copies.cost[i].sum()
                if terminated or truncated:
                    self.last, self.episode[:, i] = self.episode[:, i].tolist(), 0.0
                    after = copies.reset(i)
                self.observation[i] = after
        self.env_steps += self.steps * n
        return {k: v.to(self.device) for k, v in out.items()}

    def state_dict(self):
        started = self.observation is not None
        return {"env_steps": self.env_steps, "episode": self.episode.tolist(), "last": list(self.last),
                "observation": torch.from_numpy(self.observation.copy()) if started else None,
                "copies": self.copies.state_dict() if started else None}

    def load_state_dict(self, state):
        self.env_steps, self.episode, self.last = state["env_steps"], np.array(state["episode"]), list(state["last"])
        if state["observation"] is not None:
            self.observation = state["observation"].numpy().copy()
            self.copies.load_state_dict(state["copies"])


class Rollouts(Stream):
    """`reference`: a policy with act(observation), probability(observation) and its own `generator` that plays beside the
    method's, in copies of its own (`reference_copies`). `columns`: what data() offers, such as a simulator's log."""

    def __init__(self, copies, method: Method, config, seed: int, device, reference=None, reference_copies=None, columns=None):
        self.method, self.reference, self.columns = method, reference, columns
        self.player = Player(copies, config.rollout_steps, config.reward_scale, seed, device)
        self.other = None
        if reference is not None:
            self.other = Player(reference_copies, config.rollout_steps, config.reward_scale, seed + 1, device)

    def next(self) -> dict[str, Tensor]:
        batch = self.player.play(lambda o: self.method.act(o, explore=True))
        if self.other is not None:
            played = self.other.play(self.reference.act)
            batch |= {f"reference_{k}": played[k].flatten(0, 1) for k in ("observation", "action", "reward")}
            batch["reference_probability"] = self.reference.probability(batch["observation"])
        return batch

    def data(self):
        return self.columns

    def counters(self):
        told = {"env_steps": self.player.env_steps, "train_return": self.player.last[0]}
        return told | ({"train_cost": self.player.last[1]} if getattr(self.player.copies, "costs", 0) else {})

    def state_dict(self):
        return {"player": self.player.state_dict(), "other": self.other.state_dict() if self.other else None,
                "reference": self.reference.generator.get_state() if self.other else None}

    def load_state_dict(self, state):
        self.player.load_state_dict(state["player"])
        if self.other is not None:
            self.other.load_state_dict(state["other"])
            self.reference.generator.set_state(state["reference"])
