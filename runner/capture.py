"""Updates recorded once in a CUDA graph and replayed: small networks are bound by launches, and a replay is one launch.

A graph holds `stream.lookahead` updates (at most a block of draws). It is recorded after WARM blocks have run as usual,
for every distinct course of updates (Method.period, Method.stage) once; recording executes nothing, so that captured and
usual updates are the same sequence. What an update reads from the host (random numbers, batch indices) is filled into
fixed places before a replay.
"""

from __future__ import annotations

import math

import torch

from runner.draws import BLOCK

WARM = 2 * BLOCK  # updates made as usual first: optimisers make their state, libraries their work space


def possible(method, stream, device: torch.device, settings) -> bool:
    return bool(settings.graph and device.type == "cuda" and method.capturable and stream.lookahead)


class Graphs:
    def __init__(self, method, stream, update=None):
        """`update`: method.update in the run's precision. Its context is entered anew for every update inside a graph, too:
        autocast keeps casts of the weights while it is open, and the optimiser changes them."""
        self.method, self.stream, self.update = method, stream, update or method.update
        self.length = min(stream.lookahead, BLOCK)
        self.graphs: dict[tuple, tuple] = {}
        self.pool = None
        self.warm: dict[int, int] = {}  # updates made as usual, by stage

    def advance(self, step: int, event: int):
        """Make updates from `step` on, at most to `event`. Returns (how many, metrics of the last)."""
        n, method = self.length, self.method
        method.updates = step
        stage = method.stage()
        aligned = step % n == 0 and step + n <= event and self._same_stage(step, n)
        if self.warm.get(stage, 0) < WARM or not aligned:
            self.warm[stage] = self.warm.get(stage, 0) + 1
            return 1, self.update(self.stream.next())
        self.stream.ready(n)
        method.draws.ready(step)
        key = (step % math.lcm(BLOCK, method.period), stage)
        if key not in self.graphs:
            self.graphs[key] = self._record(step, n)
        graph, metrics = self.graphs[key]
        graph.replay()
        self.stream.taken += n
        return n, metrics

    def _same_stage(self, step: int, n: int) -> bool:
        method = self.method
        if n == 1:
            return True
        first = method.stage()
        method.updates = step + n - 1
        same = first == method.stage()
        method.updates = step
        return same

    def _record(self, step: int, n: int):
        method, stream = self.method, self.stream
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        taken = stream.taken
        with torch.cuda.graph(graph, pool=self.pool):
            for i in range(n):
                method.updates = step + i
                metrics = self.update(stream.take())
        self.pool = graph.pool()
        stream.taken, method.updates = taken, step
        return graph, metrics
