"""A data set first, then online play: the stream of kind `mixed`.

Before every batch the method's `feed()` says how many environment steps are played and which share of the batch is drawn
from the data set; the rest comes from the online transitions. Both are drawn uniformly, with replacement, as a function of
(seed, number of the batch): a batch of the data set alone is the one that kind `offline` would hand out, all its columns
included. With several `batches` each has the same share. Before online transitions are handed out, steps are played until
there are as many as one batch takes.

From the first online step on (the switch) a probe is made every `probe_steps` steps, the first before that step: the return
of the deterministic policy, and what the method believes of PROBE fixed stored transitions and of the newest online ones.
A probe touches no random state; its figures are logged with every line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from envs.control.replay import Replay
from envs.control.stored import Stored
from runner.draws import Draws

PROBE = 256


class Mixed(Replay):
    """`columns`: the data set, rewards scaled; `evaluate`: method -> return of its deterministic policy."""

    def __init__(self, copies, columns: dict[str, Tensor], method, config, seed: int, device, evaluate):
        super().__init__(copies, method, config, seed, device)
        self.stored = Stored(columns, config.batch_size, seed, device)
        self.draws, self.evaluate = Draws(seed, device), evaluate
        self.probes: list[dict] = []
        self.sizes = (0, 0, 1)                  # of the next batch: rows of a part, stored and online; parts
        self.places: dict[tuple, tuple] = {}    # sizes -> the rows, stored and online, at fixed addresses

    def data(self):
        return self.stored.data()

    def replace(self, data):
        self.stored.replace(data)

    def ready(self, number: int):
        feed, parts, size = self.method.feed(), self.method.batches, self.config.batch_size
        stored = round(feed.stored * size)
        if self.observation is None and (feed.steps or feed.copied or stored < size):
            self._begin(self.config.start_steps if feed.start else 0)
            self._probe()
        if feed.copied:
            index = self.draws("copied", (feed.copied,), self.taken, "bits") % len(self.stored)
            for part in index.split(self.config.capacity):
                self._remember(self._plain(part))
        for _ in range(feed.steps):
            self._act()
        while self.total < size - stored:
            self._act()
        self.sizes = (stored, size - stored, parts)
        if self.sizes not in self.places:
            self.places[self.sizes] = tuple(torch.zeros(parts * n, dtype=torch.int64, device=self.device)
                                            for n in self.sizes[:2])
        rows = len(self.stored), min(self.total, self.config.capacity)
        for name, place, among in zip(("batch", "online"), self.places[self.sizes], rows):
            if len(place):
                torch.remainder(self.draws(name, tuple(place.shape), self.taken, "bits"), among, out=place)

    def take(self):
        self.taken += 1
        stored, online, parts = self.sizes
        first, second = self.places[self.sizes]
        if not online:
            return self.stored._split(self.stored.rows.index_select(0, first))
        rows = self.rows.index_select(0, second)
        if stored:
            width = rows.shape[1]
            rows = torch.cat([self._plain(first).view(parts, stored, width), rows.view(parts, online, width)], 1).flatten(0, 1)
        return self._columns(rows)

    def _plain(self, index: Tensor) -> Tensor:
        """Stored rows as the replay holds them."""
        columns = self.stored._split(self.stored.rows.index_select(0, index))
        names = ("observation", "action", "reward", "terminated", "next_observation")
        return torch.cat([columns[n].reshape(len(index), -1) for n in names], 1)

    # -- probes
    def _act(self):
        super()._act()
        every, n = self.config.probe_steps, len(self.copies.envs)
        if every and self.env_steps // every > (self.env_steps - n) // every:
            self._probe()

    def _probe(self):
        if not self.config.probe_steps:
            return
        index = torch.arange(PROBE, device=self.device) * len(self.stored) // PROBE
        figures = {"return": self.evaluate(self.method)}
        figures |= {f"stored_{k}": v.item() for k, v in self.method.inspect(self._columns(self._plain(index))).items()}
        newest = torch.arange(max(0, self.total - PROBE), self.total) % self.config.capacity
        if len(newest):
            batch = self._columns(self.rows[newest.to(self.device)])
            figures |= {f"online_{k}": v.item() for k, v in self.method.inspect(batch).items()}
        self.probes.append({"env_steps": self.env_steps, **figures})

    def summary(self) -> dict[str, float]:
        """Gold metrics of the course of online play; empty without probes."""
        if not self.probes:
            return {}
        returns = [p["return"] for p in self.probes]
        out = {"dip": returns[0] - min(returns), "online_return": sum(returns) / len(returns)}
        values = [p["stored_value"] / self.config.reward_scale for p in self.probes if "stored_value" in p]
        return out | ({"value_fall": values[0] - min(values)} if values else {})

    def counters(self):
        last = self.probes[-1] if self.probes else {}
        return {**super().counters(), **{f"probe/{k}": v for k, v in last.items()}}

    # -- state
    def state_dict(self):
        return {**super().state_dict(), "taken": self.taken, "probes": [dict(p) for p in self.probes]}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.taken, self.probes = state["taken"], [dict(p) for p in state["probes"]]
