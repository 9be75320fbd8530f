"""Online experience: play, remember, sample. The stream of kind `transitions`.

Each next() plays `steps_per_update` steps in every copy of the environment and returns the method's `batches` (one, as a
rule) of `batch_size`, drawn uniformly, with replacement, from the last `capacity` transitions. The first next() plays
`start_steps` uniformly random steps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from runner.interface import Method, Stream


class Replay(Stream):
    lookahead = 1  # a step is played before every batch

    def __init__(self, copies, method: Method, config, seed: int, device: torch.device):
        self.copies, self.method, self.device, self.config = copies, method, device, config
        s, a = copies.observation_size, copies.action_size
        self.widths = [s, a, 1, 1, s]  # observation, action, reward, terminated, next observation
        # Growing chunks would move the data; the memory is only touched as it fills.
        self.rows = torch.empty(config.capacity, sum(self.widths), device=device)
        self.staged = torch.empty(len(copies.envs), sum(self.widths))
        self.total = 0          # transitions ever added
        self.env_steps = 0
        self.generator = torch.Generator().manual_seed(seed)
        # rows of the batch that is ready
        self.index = torch.zeros(config.batch_size * method.batches, dtype=torch.int64, device=device)
        self.taken = 0
        self.numbers = np.random.default_rng(seed)
        self.start = [int(x) for x in self.numbers.integers(2**31, size=len(copies.envs))]
        self.observation: np.ndarray | None = None  # (copies, S)
        self.episode_return = [0.0] * len(copies.envs)
        self.last_return = float("nan")

    def ready(self, number: int):
        if self.observation is None:
            self._begin(self.config.start_steps)
        for _ in range(self.config.steps_per_update):
            self._act()
        filled = min(self.total, self.config.capacity)
        self.index.copy_(torch.randint(filled, self.index.shape, generator=self.generator))

    def _begin(self, random_steps: int):
        """The first episodes; `random_steps` uniformly random steps."""
        self.observation = np.stack([self.copies.reset(i, s) for i, s in enumerate(self.start)])
        while self.env_steps < random_steps:
            shape = (len(self.copies.envs), self.copies.action_size)
            self._play(self.numbers.uniform(-1, 1, shape).astype(np.float32))

    def _act(self):
        """One step of the method's own in every copy."""
        seen = torch.from_numpy(self.observation).to(self.device, torch.float32)
        self._play(self.method.act(seen, explore=True).cpu().numpy())

    def _play(self, actions: np.ndarray):
        """One step in every copy; actions (copies, A)."""
        s, a = self.copies.observation_size, self.copies.action_size
        staged, scale = self.staged.numpy(), self.config.reward_scale
        for i, action in enumerate(actions):
            after, reward, terminated, truncated = self.copies.step(i, action)
            row = staged[i]
            row[:s], row[s:s + a], row[s + a], row[s + a + 1] = (
                self.observation[i], action, reward * scale, terminated)
            row[s + a + 2:] = after
            self.episode_return[i] += reward
            if terminated or truncated:
                self.last_return, self.episode_return[i] = self.episode_return[i], 0.0
                after = self.copies.reset(i)
            self.observation[i] = after
        self._remember(self.staged)
        self.env_steps += len(actions)

    def _remember(self, rows: Tensor):
        """rows (n, widths), the newest last; n up to the capacity."""
        n, capacity = len(rows), self.config.capacity
        begin = self.total % capacity
        if begin + n <= capacity:
            self.rows[begin:begin + n] = rows
        else:
            self.rows[(torch.arange(n) + begin) % capacity] = rows.to(self.device)
        self.total += n

    def take(self) -> dict[str, Tensor]:
        self.taken += 1
        return self._columns(self.rows.index_select(0, self.index))

    def _columns(self, rows: Tensor) -> dict[str, Tensor]:
        observation, action, reward, terminated, after = rows.split(self.widths, 1)
        return {"observation": observation, "action": action, "reward": reward.squeeze(1),
                "terminated": terminated.squeeze(1), "next_observation": after}

    def counters(self):
        return {"env_steps": self.env_steps, "train_return": self.last_return}

    # -- state: the rows go to the journal, everything else to every checkpoint
    def state_dict(self):
        return {
            "total": self.total, "env_steps": self.env_steps, "generator": self.generator.get_state(),
            "numbers": self.numbers.bit_generator.state, "episode_return": list(self.episode_return),
            "last_return": self.last_return,
            "observation": None if self.observation is None else torch.from_numpy(self.observation.copy()),
            "copies": self.copies.state_dict() if self.observation is not None else None,
        }

    def load_state_dict(self, state):
        self.total, self.env_steps = state["total"], state["env_steps"]
        self.generator.set_state(state["generator"])
        self.numbers.bit_generator.state = state["numbers"]
        self.episode_return, self.last_return = list(state["episode_return"]), state["last_return"]
        if state["observation"] is not None:
            self.observation = state["observation"].numpy().copy()
            self.copies.load_state_dict(state["copies"])

    def journal_size(self):
        return self.total

    def journal_first(self):
        return max(0, self.total - self.config.capacity)

    def journal_rows(self, begin, end):
        begin = max(begin, self.journal_first())
        index = torch.arange(begin, end) % self.config.capacity
        return self.rows[index.to(self.device)].cpu()

    def load_journal(self, rows, first):
        keep = rows[-self.config.capacity:]
        first += len(rows) - len(keep)
        index = (torch.arange(len(keep)) + first) % self.config.capacity
        self.rows[index.to(self.device)] = keep.to(self.device)
