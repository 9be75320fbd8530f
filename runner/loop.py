"""The one training loop: next -> update -> log -> validate -> evaluate -> save -> stop.

It owns device, precision, gradient synchronisation, logging, checkpoints and the random state; it knows no method and
no world. Between two events (a log line, a checkpoint, …) a step costs one comparison beyond the method's own work.
"""

from __future__ import annotations

import contextlib
import math
import random
import time

import numpy as np
import torch

from runner import capture
from runner.checkpoint import Checkpoints, Corrupt
from runner.interface import Engine, Method, Stream, World
from runner.record import Record


class Preempted(Exception):
    """The run was asked to stop; its state is saved."""


class NonFinite(Exception):
    """A metric of the method is NaN or infinite: the run has diverged, and going on would only spend time."""


def rng_state() -> dict:
    numpy_state = np.random.get_state()
    version, words, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss],
             "numpy": [numpy_state[0], numpy_state[1].tolist(), *map(float, numpy_state[2:])]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict):
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, words, position, has, cached = state["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), int(position), int(has), cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def seed_everything(seed: int):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def aside():
    """Work that must not touch the run's randomness: evaluation, validation."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def whole(state):
    """Sharded tensors gathered: what is saved does not depend on the number of processes. All ranks must call it."""
    if isinstance(state, dict):
        return {k: whole(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(v) for v in state)
    return state.full_tensor() if hasattr(state, "full_tensor") else state


def load_whole(current, saved):
    """`saved` (whole tensors) laid out like `current` (maybe sharded)."""
    if isinstance(saved, dict):
        return {k: load_whole(current.get(k) if isinstance(current, dict) else None, v) for k, v in saved.items()}
    if hasattr(current, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(saved.to(current.device), current.device_mesh, current.placements)
    return saved


class FabricEngine(Engine):
    """Backward through Fabric's precision plugin; gradients averaged over ranks in one flat message."""

    def __init__(self, fabric):
        self.fabric = fabric
        self.backward = fabric.backward if "16" in fabric._precision.precision else Engine.backward.__get__(self)

    def synchronise(self, parameters):
        if self.fabric.world_size == 1:
            return
        from torch.distributed.tensor import DTensor
        gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if gradients:
            flat = torch.cat([g.reshape(-1) for g in gradients])
            flat = self.fabric.all_reduce(flat, reduce_op="mean")
            for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
                g.copy_(part.view_as(g))

    def mean(self, value):
        return value if self.fabric.world_size == 1 else self.fabric.all_reduce(value, reduce_op="mean")


class Loop:
    """Trains one method on one stream. `record` is None on ranks above 0 and in unit tests, which may also do without
    `checkpoints` and `fabric`. With a `stack` (runner/seeds.py) the method holds several seeds; `records` then holds one
    record for each, of which the first also keeps the state."""

    def __init__(self, method: Method, world: World, stream: Stream, settings, *, seed: int, record: Record | None = None,
                 checkpoints: Checkpoints | None = None, fabric=None, progress=None, loggers=(), stop=None, stack=None,
                 records: list[Record] = (), graph: bool = False):
        self.method, self.world, self.stream, self.settings, self.seed = method, world, stream, settings, seed
        self.record, self.fabric, self.progress, self.loggers = record, fabric, progress, loggers
        self.stack, self.records = stack, list(records) or ([record] if record else [])
        self.graphs = capture.Graphs(method, stream) if graph else None
        self.stop = stop or (lambda: False)
        self.step = 0
        self.best: dict | None = None       # {"step", "value", "weights"} of the best validation
        self.diverged: dict[int, list] = {}  # [step, what was said] by place in the stack: those seeds have ended
        self.checkpoints = checkpoints
        self.saved = time.monotonic()
        self.autocast = None
        if fabric is not None:
            method.engine = FabricEngine(fabric)
            if fabric._precision.precision != "32-true":
                self.autocast = method.autocast = fabric.autocast

    # -- state
    def state(self) -> dict:
        method = self.method
        return {
            "step": self.step,
            "modules": whole(dict(method.state_dict())),
            "optimizers": whole({n: o.state_dict() for n, o in method.optimizers.items()}),
            "extra": method.extra_state(),
            "stream": self.stream.state_dict(),
            "rng": rng_state(),
            "best": self.best,
            "diverged": self.diverged,
            "metrics_size": [r.metrics_size() for r in self.records],
        }

    def load_state(self, state: dict):
        self.step = self.method.updates = state["step"]
        self._load_modules(state["modules"])
        for name, optimizer in self.method.optimizers.items():
            saved = state["optimizers"][name]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for index, values in saved["state"].items():
                saved["state"][index] = {k: load_whole(parameters[index] if v.dim() else None, v) if torch.is_tensor(v)
                                         else v for k, v in values.items()}
            optimizer.load_state_dict(saved)
        self.method.load_extra_state(state["extra"])
        self.stream.load_state_dict(state["stream"])
        self.best, self.diverged = state["best"], state.get("diverged", {})
        set_rng_state(state["rng"])

    def _load_modules(self, saved: dict):
        self.method.load_state_dict(load_whole(dict(self.method.state_dict()), saved))

    def resume(self) -> list[str]:
        """Continue from the newest checkpoint that every rank can read. Returns what a person should be told."""
        told = []
        for step in self._agree(self.checkpoints.steps()):
            state = None
            try:
                state = self.checkpoints.load(step, self.stream)
            except Corrupt as error:
                told.append(f"checkpoint of step {step} cannot be used: {error}; falling back to the previous one")
            if not self._all(state is not None):
                continue
            self.load_state(state)
            self._open_metrics(state["metrics_size"])
            return [*told, f"continuing from step {step}"]
        self._open_metrics([0] * len(self.records))
        return [*told, "no usable checkpoint: starting again"] if told else told

    def _open_metrics(self, sizes: list[int]):
        for record, size in zip(self.records, sizes):
            record.open_metrics(size)

    def _agree(self, value):
        """Rank 0's value, on every rank: a decision that hangs on the clock or a signal must be one decision."""
        return value if self.fabric is None or self.fabric.world_size == 1 else self.fabric.broadcast(value, 0)

    def _all(self, flag: bool) -> bool:
        if self.fabric is None or self.fabric.world_size == 1:
            return flag
        return bool(self.fabric.all_reduce(torch.tensor(float(flag), device=self.fabric.device), reduce_op="sum")
                    == self.fabric.world_size)

    def save(self):
        if self.checkpoints and (self.step not in self.checkpoints.steps()[:1]):
            self.checkpoints.save(self.step, self.state(), self.stream)
            if self.record:
                self.record.event("saved", step=self.step)
        self.saved = time.monotonic()

    # -- training
    def run(self):
        """Train to `settings.steps`, or until every seed of a stack has diverged. Raises Preempted after saving when asked
        to stop, NonFinite when a run of one seed diverges."""
        s, method, stream = self.settings, self.method, self.stream
        update = method.update
        if self.autocast:
            inner = method.update

            def update(batch):
                with self.autocast():
                    return inner(batch)

        if self.graphs:
            self.graphs.update = update
        method.train()
        batch = None
        while self.step < s.steps and not (self.stack and len(self.diverged) == len(self.stack.seeds)):
            event = self._next_event()
            if self.graphs:
                while self.step < event:
                    made, metrics = self.graphs.advance(self.step, event)
                    self.step = method.updates = self.step + made
            else:
                while self.step < event:
                    batch = stream.next()
                    metrics = update(batch)
                    self.step = method.updates = self.step + 1
            self._at_event(metrics, batch)

    def _next_event(self) -> int:
        """The next step at which the loop has to do more than train."""
        s, step = self.settings, self.step
        every = [n for n in (s.log_every, s.eval_every, s.validate_every, s.save_steps) if n]
        return min([step - step % n + n for n in every] + [s.steps])

    def _at_event(self, metrics, batch):
        s, step, last = self.settings, self.step, self.step == self.settings.steps
        lines = [{} for _ in self.stack.seeds] if self.stack else [{}]
        if step % s.log_every == 0 or last:
            for i, (line, numbers) in enumerate(zip(lines, self._numbers(metrics))):
                if i in self.diverged:
                    continue
                line.update(self.stream.counters())
                line.update(numbers)
                wrong = [k for k in metrics if not math.isfinite(line[k])]
                if wrong:
                    self._diverged(i, wrong, line, batch)
        if s.validate_every and (step % s.validate_every == 0 or last) and not self.stack:
            lines[0].update(self._validate())
        if s.eval_every and step % s.eval_every == 0 and not last:
            for line, figures in zip(lines, self._evaluations()):
                line.update({f"eval/{k}": v for k, v in figures.items()})
        if any(lines):
            self._log([{"step": step, **line} if line else {} for line in lines])
        late = bool(s.save_seconds) and time.monotonic() - self.saved > s.save_seconds
        stop, late = self._agree((bool(self.stop()), late))
        if late or s.save_steps and step % s.save_steps == 0:
            self.save()
        if stop:
            self.save()
            raise Preempted

    def _diverged(self, place: int, wrong: list[str], line: dict, batch: dict | None):
        """Leave the batch of this step in the folder of the run that diverged. A single run ends here, by NonFinite; one seed
        of several does not end the others: it is kept in `diverged`, and nothing more is logged or evaluated of it.
        Only log lines are looked at: it may have begun up to `log_every` updates earlier."""
        told = f"non-finite at step {self.step:,}: " + ", ".join(f"{k} = {line[k]}" for k in wrong)
        line.update(dict.fromkeys(wrong))
        if not self.stack:
            self._log([{"step": self.step, **line}])
        if batch is None and self.graphs:  # it was read inside a graph: take it once more
            self.stream.taken -= 1
            batch = self.stream.take()
        if self.records and batch is not None:
            from safetensors.torch import save_file
            own = {k: v[place] if self.stack else v for k, v in batch.items() if torch.is_tensor(v)}
            tensors = {k: v.detach().cpu().contiguous().clone() for k, v in own.items()}
            save_file(tensors, self.records[place].folder / "nonfinite.safetensors", metadata={"step": str(self.step)})
            told += "; its batch lies in nonfinite.safetensors"
        if not self.stack:
            raise NonFinite(told)
        self.diverged[place] = [self.step, told]
        if self.progress:
            self.progress.say(f"seed {self.stack.seeds[place]}: {told}")

    def _numbers(self, metrics: dict) -> list[dict[str, float]]:
        """Metrics on the host, in one transfer, of each seed; the mean over ranks."""
        if self.stack:
            seeds = len(self.stack.seeds)
            values = torch.stack([v.detach().float().expand(seeds) for v in metrics.values()])
            return [dict(zip(metrics, column)) for column in values.T.tolist()]
        values = torch.stack([whole(v.detach()).float().reshape(()) for v in metrics.values()])
        return [self._mean(dict(zip(metrics, values.tolist())))]

    def _mean(self, figures: dict[str, float]) -> dict[str, float]:
        """The mean over ranks."""
        if self.fabric is None or self.fabric.world_size == 1:
            return figures
        values = torch.tensor(list(figures.values()), device=self.fabric.device)
        return dict(zip(figures, self.fabric.all_reduce(values, reduce_op="mean").tolist()))

    def _validate(self) -> dict:
        with aside():
            figures = self.world.validate(self.method)
        if figures:
            figures = self._mean(figures)  # one figure, and so one decision, for all ranks
            value = next(iter(figures.values()))
            if self.best is None or value < self.best["value"]:
                weights = {k: v.detach().clone() for k, v in whole(dict(self.method.state_dict())).items()}
                self.best = {"step": self.step, "value": value, "weights": weights}
        return figures

    def _log(self, lines: list[dict]):
        """One line for each record; an empty one stands for a seed that has ended."""
        lines = [{k: (v if not isinstance(v, float) or v == v else None) for k, v in line.items()}  # NaN is not json
                 for line in lines]
        for record, line in zip(self.records, lines):
            if line:
                record.log(line)
        for logger in self.loggers:
            if lines[0]:
                logger.log(lines[0])
        if self.progress:
            self.progress.update(next(line for line in lines if line))

    # -- the end
    def select(self):
        """Put the weights that are to be evaluated into the method (see Loop.select in runner/settings.py)."""
        if self.settings.select == "best" and self.best is not None:
            self._load_modules(self.best["weights"])
            return self.best["step"]
        return self.step

    def evaluate(self) -> list[dict[str, float]]:
        """Gold metrics of every seed; none of one that has diverged, whose actions no simulator might take."""
        self.method.eval()
        return self._evaluations()

    def pictures(self) -> dict[str, torch.Tensor]:
        with aside():
            return self.world.pictures(self.method, self.seed)

    def _evaluations(self) -> list[dict[str, float]]:
        with aside():
            if not self.stack:
                return [self.world.evaluate(self.method, self.seed)]
            return [{} if i in self.diverged else self.world.evaluate(self.stack.member(i), seed)
                    for i, seed in enumerate(self.stack.seeds)]
