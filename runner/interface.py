"""The whole contract between methods, worlds and the loop, on one page.

A method holds networks, optimisers and one `update`; a world holds an environment or a data set, hands out batches
through a stream, and is the only one who evaluates; the loop (runner/loop.py) owns everything else: device,
precision, gradient synchronisation, logging, checkpoints, signals.

All state is: the method's nn.Module state, its optimisers, its `extra_state()`, the stream's `state_dict()` and the
random number generators. Nothing else may exist, or a killed run could not continue to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from runner.draws import Draws
from runner.errors import UserError
from runner.knobs import knob  # noqa: F401  (methods and worlds import it from here)
from runner.places import data_root, minari_root, own_id  # noqa: F401


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shapes that a method builds its networks from. Only what the world has is set."""

    observation_size: int | None = None   # length of an observation vector
    action_size: int | None = None        # length of an action vector; actions lie in [-1, 1]
    actions: int | None = None            # number of actions to choose from, where they are no vectors but 0, 1, 2, …
    costs: int = 0                        # cost channels beside the reward
    candidates: int | None = None         # length of a candidate list
    classes: int | None = None
    alphabet: str | None = None           # characters of prompts and responses; a policy with a tokeniser of its own ignores it
    end: str | None = None                # the character that ends a response, part of it
    prompt_length: int | None = None      # most tokens of a prompt, and of a response; characters where the alphabet counts
    response_length: int | None = None
    contexts: int | None = None           # where a prompt is one of so many contexts and a response one of so many arms:
    arms: int | None = None               # both one token of the alphabet, which names the arms first
    features: int | None = None           # numbers that describe an arm in a context
    sample_shape: tuple[int, ...] | None = None  # of what a generator makes; its condition is one of `classes` numbers, or none
    points: int = 1                       # samples that are rewarded together, as one
    exact: object | None = None           # where the world knows it: velocity(x, t, condition) of its own distribution
    proxies: tuple = ()                   # differentiable rewards f(x, condition) -> (n,), of what a generator makes
    turns: int | None = None              # most turns of an episode, where a prompt and its response are one of several
    seeds: int | None = None              # seeds trained at once: a leading axis of every tensor; None: no such axis


class Metric(NamedTuple):
    """What a gold metric means: which way is better, and in what unit."""

    direction: str  # "max", "min" or "none"
    unit: str = ""
    help: str = ""


class Feed(NamedTuple):
    """What a stream of kind `mixed` (a data set, then online play) does before the next update, and hands out for it."""

    steps: int = 0          # environment steps to play with the method's own actions
    stored: float = 1.0     # share of the batch that comes from the data set
    start: bool = False     # first play the env's `start_steps` uniformly random steps
    copied: int = 0         # transitions of the data set to put among the online ones


class Completions(NamedTuple):
    """Responses to P prompts, `samples` each, those of one prompt next to each other: B = P * samples rows."""

    texts: list[str]
    prompt: Tensor       # (B, Tp) int64
    prompt_mask: Tensor  # (B, Tp) bool
    response: Tensor     # (B, T) int64
    mask: Tensor         # (B, T) bool
    log_prob: Tensor     # (B, T), the sampler's


class Drawn(NamedTuple):
    """What a generator made of n noises."""

    x: Tensor                    # (n, *sample_shape)
    calls: Tensor                # (n,) network calls that each needed
    path: Tensor | None = None   # (steps + 1, n, *sample_shape), where asked for: from noise to x


class Engine:
    """How gradients are made and shared. The loop puts its own in place; this one serves a single process."""

    def backward(self, loss: Tensor):
        loss.backward()

    def synchronise(self, parameters: list[nn.Parameter]):
        """Average gradients over processes."""

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over processes, such as a loss's denominator."""
        return value


class Method(nn.Module):
    """A learning rule. Subclass in methods/<family>/, override the named parts of the family's base algorithm.

    A method that sets `batchable` lets the loop train several seeds at once (hardware.seeds): every tensor then carries a
    leading axis of seeds, losses and metrics are (seeds,), and code counts axes from the end. One that sets `capturable`
    lets the loop record updates in a CUDA graph: `update` does the same device work whenever `updates % period` and
    `stage()` are the same, changes no Python state, and draws its random numbers by `noise`.
    """

    @dataclasses.dataclass(frozen=True)
    class Config:
        """The only schema and the only defaults (see runner/knobs.py)."""

    PARTS: tuple[str, ...] = ()      # the steps of the base algorithm that a method may override
    ADDITIVE: tuple[str, ...] = ()   # those that call super() and add, and therefore combine in `a+b`
    batchable = False
    capturable = False
    kind = ""                        # what the network tells ("velocity", …), for those who begin from the run's weights
    period = 1                       # the course of an update depends on its number modulo this (and on stage())
    seed = 0                         # the run's, and
    processes = (0, 1)               # (number of this process, how many train the run together): for streams that share work
    autocast = contextlib.nullcontext  # the run's precision, as a context, for work outside `update` such as sampling
    blueprint = None                 # what builds the policy, where it is chosen apart from the method (group `policy`)
    batches = 1                      # of the world's batch size that make up the next update's batch (its first axis of rows)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.updates = 0             # updates made so far; the loop counts and restores it
        self.planned = 0             # updates that the run will make; 0: not known. For schedules
        self.engine = Engine()
        self.draws = Draws()         # the loop puts in the run's own

    # -- what a method may define
    def setup(self, spec: Spec):
        """Build the networks from shapes."""
        raise NotImplementedError(f"{type(self).__name__}.setup")

    def make_optimizers(self):
        """Fill `self.optimizers`. Apart from setup, because between the two the loop may shard the networks."""
        raise NotImplementedError(f"{type(self).__name__}.make_optimizers")

    def prepare(self, data: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Host work before training on what the stream offers as `data()`: statistics, an index. Runs at every start.
        What it returns is handed out instead (Stream.replace): normalised observations, chosen rows, further columns."""

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step. Returns metrics as device tensors (scalars); never synchronises with the host."""
        raise NotImplementedError(f"{type(self).__name__}.update")

    def remembered(self, name: str, of: dict[str, Tensor], compute) -> dict[str, Tensor]:
        """compute() -> {name: tensor}, or what it gave in an earlier run of the same `of`. The loop may put in a store
        (runner/memory.py) for what is costly; `of` has to hold everything that the result depends on, but the run's precision."""
        return compute()

    def compile_networks(self):
        """hardware.compile: put torch.compile where it pays. UserError where there is nothing to compile."""
        raise UserError("hardware.compile=true compiles the blocks of a transformer, which this policy has none of\n"
                        "leave it out: small networks are captured in CUDA graphs already (hardware.graph)")

    def stage(self) -> int:
        """Number of the phase that the next update belongs to, for methods whose work changes in the course of training."""
        return 0

    def feed(self) -> Feed:
        """For streams of kind `mixed`: a function of `updates` and the settings alone."""
        raise NotImplementedError(f"{type(self).__name__} does not say how stored and online data mix")

    def inspect(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the method believes of given transitions (value, td_error, …), scalars; a world may log it."""
        return {}

    def act(self, observation: Tensor, explore: bool) -> Tensor:
        """observation (n, observation_size) -> action (n, action_size); the world clips it to [-1, 1]. Where actions
        are numbers (Spec.actions): (n,), whole numbers."""
        raise NotImplementedError(f"{type(self).__name__} does not act")

    def draw(self, noise: Tensor, condition: Tensor, more: torch.Generator | None = None, path: bool = False) -> Drawn:
        """Samples under `condition` (n,) that begin at `noise` (n, *sample_shape), standard normal; `more` gives a stochastic
        sampler its further noise; `path`: how they came about is wanted, too."""
        raise NotImplementedError(f"{type(self).__name__} generates nothing")

    def assess(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor] | None:
        """For worlds that know true values: Q(s, a) (critics, n) and the features below it (critics, n, width); None for a
        method without critics."""
        return None

    def extra_state(self) -> dict:
        """State besides modules and optimisers: plain values and tensors."""
        return {}

    def load_extra_state(self, state: dict):
        pass

    def export(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors, description) of what is used after training: no optimisers, no targets."""
        return dict(self.state_dict()), {"kind": "state_dict"}

    def export_folder(self, folder: Path):
        """Write what is used after training into the empty `folder`, in a layout that other programs read."""
        raise UserError("this method has no layout of several files; write: --to FILE.safetensors")

    # -- what it may use
    def noise(self, name: str, shape: tuple[int, ...], kind: str = "normal") -> Tensor:
        """Random numbers of this update (see runner/draws.py): (…seeds, *shape). A name is asked for once an update."""
        return self.draws(name, tuple(shape), self.updates, kind)

    def minimise(self, loss: Tensor, name: str, clip: float = 0.0):
        """One step of optimiser `name` on `loss`, () or (seeds,); `clip` > 0 bounds the gradient's norm, of each seed."""
        parameters = self.optimizers[name].param_groups[0]["params"]
        for p in parameters:  # zero_grad() costs more than it does
            p.grad = None
        self.engine.backward(loss.sum() if loss.dim() else loss)
        self._step(name, parameters, clip, bool(loss.dim()))

    def descend(self, gradients: list[Tensor], name: str):
        """One step of optimiser `name` along given gradients, one for each of its parameters."""
        parameters = self.optimizers[name].param_groups[0]["params"]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        self._step(name, parameters, 0.0, False)

    def _step(self, name, parameters, clip, several):
        self.engine.synchronise(parameters)
        if clip > 0:
            if several:
                norm = torch.stack([p.grad.flatten(1).square().sum(1) for p in parameters]).sum(0).sqrt()
                factor = (clip / (norm + 1e-6)).clamp(max=1.0)
                for p in parameters:
                    p.grad.mul_(factor.view(-1, *[1] * (p.dim() - 1)))
            else:
                nn.utils.clip_grad_norm_(parameters, clip)
        self.optimizers[name].step()


class Stream:
    """The batches of a run; the only thing that differs between replay, rollouts, images, prompts and bandits.

    Define `next`, or, where a batch is made by device work alone once the host has done its share, `ready` and `take`:
    then updates can be captured in a CUDA graph, `lookahead` of them at once (1: the host works before every batch).
    """

    lookahead = 0

    def next(self) -> dict[str, Tensor]:
        self.ready(1)
        return self.take()

    def ready(self, number: int):
        """The host's share of the next `number` batches."""
        raise NotImplementedError

    def take(self) -> dict[str, Tensor]:
        """The next of the batches made ready; device work only, no state of Python's but `taken`."""
        raise NotImplementedError

    def data(self) -> dict[str, Tensor] | None:
        """What a method may look at before training, or None."""

    def replace(self, data: dict[str, Tensor]):
        """Hand out this instead of `data()` from now on."""
        raise NotImplementedError(f"{type(self).__name__} has no data to replace")

    def counters(self) -> dict[str, int]:
        """Numbers logged with every line, such as env_steps."""
        return {}

    def state_dict(self) -> dict:
        """Nested dicts and lists of tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict):
        pass

    # Rows that are only ever added, such as a replay buffer's, are saved once and not with every checkpoint.
    def journal_size(self) -> int:
        return 0

    def journal_rows(self, begin: int, end: int) -> Tensor | None:
        """Rows [begin, end) of everything ever added, on the CPU; rows no longer needed may be left out by `begin`."""

    def journal_first(self) -> int:
        """The oldest row that is still needed."""
        return 0

    def load_journal(self, rows: Tensor, first: int):
        """Take back rows saved before; `first` is the number of the first of them."""


class Trained(NamedTuple):
    """A finished run as World.collect gets it: the method with its final weights, the stream as it stood at the end."""

    method: Method
    stream: Stream


class World:
    """An environment or a data set, and the yardstick: evaluation belongs to the world."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        """The only schema and the only defaults (see runner/knobs.py)."""

    metrics: dict[str, Metric] = {}

    def __init__(self, config, device: torch.device | str = "cpu"):
        self.config = config
        self.device = torch.device(device)

    def spec(self) -> Spec:
        raise NotImplementedError

    def stream(self, method: Method, kind: str, seed: int) -> Stream:
        """The batches of one kind (a method's card `needs` it, the env's card `provides` it)."""
        raise NotImplementedError

    def provenance(self) -> dict:
        """What a record should name beside the config, such as the data set that was read and its digest; plain values."""
        return {}

    def collect(self, runs: dict[str, Trained], folder: Path) -> dict:
        """Make a data set in the empty `folder` from the runs that the env's recipe names (runner/data.py); returns its
        statistics: transitions, episodes, digest, return."""
        raise NotImplementedError

    def validate(self, method: Method) -> dict[str, float]:
        """Held-out figures that may choose weights; never the gold metric. The first one decides; lower is better."""
        return {}

    def evaluate(self, method: Method, seed: int) -> dict[str, float]:
        """Gold metrics, the same yardstick for every method. Uses its own randomness only."""
        raise NotImplementedError

    def pictures(self, method: Method, seed: int) -> dict[str, Tensor]:
        """What a person would look at: {name: (H, W, 3) uint8}, put into the run's folder as PNG files after the evaluation."""
        return {}

    def references(self, seed: int) -> dict[str, dict[str, float]]:
        """Rows printed beside every result: {name: gold metrics}, such as a random policy's."""
        return {}


def compose_class(classes: list[type]) -> type:
    """The class of `a+b`: every method's parts over the common base, additive parts chained by super()."""
    if len(classes) == 1:
        return classes[0]
    kept = [c for c in classes if not any(o is not c and issubclass(o, c) for o in classes)]
    return type("+".join(c.__name__ for c in kept), tuple(kept), {}) if len(kept) > 1 else kept[0]


def make_config(config_classes: list[type], values: dict):
    """A frozen Config from plain values; lists become tuples."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if len(config_classes) == 1:
        return config_classes[0](**values)
    fields = [(k, object, dataclasses.field(default=None)) for k in values]
    return dataclasses.make_dataclass("Config", fields, frozen=True)(**values)
