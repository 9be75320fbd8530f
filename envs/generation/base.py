"""Worlds of things to generate: samples under conditions, a proxy reward that can be hacked, gold metrics that cannot.

Kinds of batches, each a dict of tensors; shape = Spec.sample_shape, P = Spec.points (samples rewarded together, as one):

    samples     x (n, *shape), condition (n,): drawn from the data, a share `flips` of the conditions false
    rewarded    what the method's part `collect` makes of the stream's `conditions` and `reward`: generation under reinforcement
    preferred   chosen, rejected (n, *shape), condition, chosen_reward, rejected_reward, tie (n,): pairs of the start's own
                samples, the winner drawn by Bradley-Terry of the proxy at `label_temperature`; a share `ties`, those of the
                closest rewards, is called ties and ordered by a coin

Everything drawn is a function of (seed, name, number of the batch): only counters are saved, and the start's samples.
A subclass defines the data (`sample`), the proxy (`reward`) and the gold metrics (`judge`). With `judge_run` a finished run of a
reward model rewards and labels in the proxy's place (`rated`), while the proxy is still measured: how far a learned reward is
over-optimised can be seen. A method that has learned to judge is itself judged by held-out pairs (`on_ratings`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from envs.generation.metrics import calibration_error, rank_correlation
from runner import starts
from runner.draws import BLOCK, Draws
from runner.errors import UserError
from runner.interface import Metric, Spec, Stream, World, knob

STARTS = Path(__file__).with_name("starts")


class Drawing(Stream):
    """Batches made by device work alone, so that updates can be captured."""

    lookahead = BLOCK

    def __init__(self, world, method, seed: int, start: dict[str, Tensor]):
        self.world, self.method, self.start, self.taken = world, method, start, 0
        self.numbers, self.classes = Draws(seed, world.device), world.spec().classes

    def ready(self, number: int):
        self.numbers.ready(self.taken)

    def draw(self, name: str, shape: tuple[int, ...], kind: str = "normal") -> Tensor:
        """Numbers of this batch."""
        return self.numbers(name, shape, self.taken, kind)

    def conditions(self, number: int, name: str = "conditions") -> Tensor:
        return (self.draw(name, (number,), "uniform") * self.classes).long().clamp(max=self.classes - 1)

    def data(self):
        return {f"start/{k}": v for k, v in self.start.items()} or None

    def replace(self, data):
        pass

    def counters(self):
        return {}

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


class Samples(Drawing):
    def take(self):
        world, rows = self.world, self.world.config.batch_size
        condition = self.conditions(rows)
        x = world.sample(condition, self.draw)
        if world.config.flips:
            false = self.draw("flips", (rows,), "uniform") < world.config.flips
            other = (condition + 1 + (self.draw("other", (rows,), "uniform") * (self.classes - 1)).long()) % self.classes
            condition = torch.where(false, other, condition)
        self.taken += 1
        return {"x": x, "condition": condition}


class Rewarded(Drawing):
    def take(self):
        out = self.method.collect(self)
        self.taken += 1
        return out

    def reward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The proxy, or what was learned of it, of x (n, P, *shape) under condition (n,): the mean over the P samples, (n,)."""
        n, p = x.shape[:2]
        return self.world.rated(x.flatten(0, 1), condition.repeat_interleave(p)).view(n, p).mean(1)

    def real(self, condition: Tensor, name: str) -> Tensor:
        """Samples of the data under these conditions (n,): reference examples, for methods that compare with some."""
        return self.world.sample(condition, lambda what, shape, kind="normal": self.draw(f"{name}/{what}", shape, kind))


class Preferred(Drawing):
    """Pairs of samples of the start's, made once."""

    def __init__(self, world, method, seed, start):
        super().__init__(world, method, seed, start)
        self.pairs: dict[str, Tensor] = {}

    def ready(self, number):
        if not self.pairs:
            self.pairs = self.world.compared(self.method, self.world.config.pairs, self.method.seed + 77)
        super().ready(number)

    def take(self):
        rows = (self.draw("rows", (self.world.config.batch_size,), "uniform") * len(self.pairs["condition"])).long()
        self.taken += 1
        return {k: v[rows] for k, v in self.pairs.items()}

    def state_dict(self):
        return {**super().state_dict(), "pairs": self.pairs}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.pairs = {k: v.to(self.world.device) for k, v in state["pairs"].items()}


def pick(first: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(first.view(-1, *[1] * (a.dim() - 1)), a, b)


class GenerationWorld(World):
    @dataclasses.dataclass(frozen=True)
    class Config:
        start: str = knob("shipped", "weights that alignment and distillation start from: those in the project (of policy as it "
                          "stands), those that `data build` made here, or none: random ones", choices=["shipped", "own", "none"])
        own: str = knob("", "name of the start that `data build` makes", source="project's choice")
        data_size: str = knob("claim", "size of its recipe", choices=["smoke", "claim", "paper"])
        batch_size: int = knob(512, "rows a batch", low=1)
        flips: float = knob(0.0, "share of the samples with a false condition", low=0.0, high=1.0)
        pairs: int = knob(4096, "pairs in the pool of preferences", low=2)
        label_temperature: float = knob(0.2, "of the Bradley-Terry labels", low=1e-6)
        ties: float = knob(0.0, "share of the pairs that are called ties: those of the closest rewards", low=0.0, high=1.0)
        judge_run: str = knob("", "folder of a finished run of method=sample_reward_model (or bradley_terry_ties) on this env, "
                              "which rewards and labels in the place of the proxy")
        eval_samples: int = knob(3000, "generated samples that are judged", low=8)

    learned = None  # the reward of `judge_run`
    drawn = 12      # samples of each condition that `pictures` shows
    followed = 12   # samples whose way from noise it shows

    metrics = {
        "energy": Metric("min", "", "energy distance to the true distribution, mean over conditions"),
        "proxy": Metric("max", "", "mean proxy reward of single samples"),
        "judged": Metric("max", "", "mean learned reward of single samples (env.judge_run)"),
        "pair_accuracy": Metric("max", "", "share of held-out pairs, ties apart, of which the preferred sample is rated higher"),
        "rank_agreement": Metric("max", "", "rank correlation of ratings and the proxy, mean over conditions"),
        "tie_error": Metric("min", "", "mean gap of predicted and true shares of ties, in ten bins of the prediction"),
        "calls": Metric("min", "calls", "network calls that a sample needed"),
        "ratio_shift": Metric("none", "std", "mean over deviation of the log-ratios at the last trained step, mean over the run"),
        "ratio_shift_first": Metric("none", "std", "the same at the first trained step"),
        "ratio_shift_middle": Metric("none", "std", "the same at the middle one"),
        "ratio_bias": Metric("min", "std", "absolute value of ratio_shift"),
        "clip_balance": Metric("none", "", "share clipped for being too likely less share clipped for being too unlikely, there"),
    }

    def spec(self) -> Spec:
        raise NotImplementedError

    def sample(self, condition: Tensor, draw) -> Tensor:
        """Data under condition (n,); draw(name, shape, kind) gives random numbers."""
        raise NotImplementedError

    def reward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The proxy, differentiable: (n, *shape), (n,) -> (n,)."""
        raise NotImplementedError

    def judge(self, x: Tensor, true: Tensor, condition: Tensor) -> dict[str, float]:
        """Gold metrics of generated x beside true samples of the same conditions."""
        raise NotImplementedError

    def stream(self, method, kind, seed):
        if self.config.judge_run:
            self.learned, self.learned_digest = self._judge(method)
        cls = {"samples": Samples, "rewarded": Rewarded, "preferred": Preferred}[kind]
        own = getattr(method.blueprint, "own_weights", False)  # then the start is the policy's business
        return cls(self, method, seed, self._start() if (kind != "samples" or method.starts) and not own else {})

    def _judge(self, method):
        """(the reward that `judge_run` has learned, the digest of its weights)"""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        told, place = f"env.judge_run={self.config.judge_run}", Path(self.config.judge_run).expanduser()
        file = place / "weights.safetensors" if place.is_dir() else place
        if not file.is_file():
            raise UserError(f"{told} is no folder of a finished run: {file} is not there\n"
                            "runs and their folders: python -m runner results method=sample_reward_model")
        try:
            return method.rater(load_file(file)), hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        except SafetensorError as error:
            raise UserError(f"{told}: {file.name} can't be read: {error}\ngive the folder of a finished run") from None
        except UserError as error:
            raise UserError(f"{told}: {error}") from None

    def provenance(self):
        return {"judge": self.learned_digest} if self.learned else {}

    def rated(self, x: Tensor, condition: Tensor) -> Tensor:
        """What methods are rewarded by, (n,): the proxy, or what `judge_run` has learned."""
        return self.learned(x, condition) if self.learned else self.reward(x, condition)

    def proxies(self, own: tuple) -> tuple:
        """Spec.proxies: the world's own ones, or the learned one alone, which comes with the stream."""
        return (self.rated,) if self.config.judge_run else own

    def compared(self, method, number: int, seed: int) -> dict[str, Tensor]:
        """`number` pairs of samples that the method draws, two a condition, labelled."""
        c, g, spec = self.config, torch.Generator().manual_seed(seed), self.spec()
        condition = torch.randint(spec.classes, (number,), generator=g)
        noise = torch.randn(2, number, *spec.sample_shape, generator=g)
        label = torch.rand(number, generator=g).to(self.device)
        condition = condition.to(self.device)
        a, b = (torch.cat([method.draw(n, k, g).x for n, k in zip(some.to(self.device).split(4096), condition.split(4096))])
                for some in noise)
        ra, rb = self.rated(a, condition), self.rated(b, condition)
        tie = (ra - rb).abs().argsort().argsort() < round(c.ties * number)
        first = label < torch.sigmoid((ra - rb) / c.label_temperature).masked_fill(tie, 0.5)
        return {"chosen": pick(first, a, b), "rejected": pick(first, b, a), "condition": condition, "tie": tie,
                "chosen_reward": pick(first, ra, rb), "rejected_reward": pick(first, rb, ra)}

    def starts(self) -> Path:
        return STARTS

    def _start(self) -> dict[str, Tensor]:
        return starts.load(self.config, self.starts())

    def collect(self, runs, folder):
        """The weights of the run `start`, and how good they are."""
        method = runs["start"].method
        figures = self.evaluate(method, 0)
        network = method.network if method.averaged is None else method.averaged
        return starts.keep(network, folder, figures, next(k for k in self.metrics if k in figures))

    def show(self, x: Tensor, condition: Tensor, way: Tensor | None) -> dict[str, Tensor]:
        """Pictures of generated x (n, …), and of how they came about."""
        return {}

    def pictures(self, method, seed):
        if getattr(method, "judges", False):
            return {}
        spec, g = self.spec(), torch.Generator().manual_seed(seed)
        number = min(self.config.eval_samples, self.drawn * spec.classes)
        condition = (torch.arange(number) % spec.classes).to(self.device)
        noise = torch.randn(number, *spec.sample_shape, generator=g).to(self.device)
        out = method.draw(noise, condition, g)
        few = method.draw(noise[:self.followed], condition[:self.followed], g, path=True)  # of all it would fill the memory
        return self.show(out.x, condition, few.path)

    def on_ratings(self, method, seed) -> dict[str, float]:
        """Of a method that has learned to judge: how it rates fresh pairs."""
        pairs = self.compared(method, self.config.eval_samples, 500_077 + seed)
        condition, tie = pairs["condition"], pairs["tie"]
        sides = [pairs["chosen"].float(), pairs["rejected"].float()]
        rated, proxy = ([of(x, condition) for x in sides] for of in (method.score, self.reward))
        gap = rated[0] - rated[1]
        right = (torch.sign(gap) / 2 + 0.5)[~tie]
        twice, rated, proxy = condition.repeat(2), torch.cat(rated), torch.cat(proxy)
        each = [rank_correlation(rated[twice == c], proxy[twice == c]) for c in twice.unique()]
        return {"pair_accuracy": right.mean().item() if len(right) else 0.5,
                "rank_agreement": torch.stack(each).mean().item(),
                "tie_error": calibration_error(method.tie_probability(gap), tie).item()}

    def evaluate(self, method, seed):
        """As many samples of every condition, from noise and beside true samples that are the same for every method; what the
        method tells of itself."""
        if getattr(method, "judges", False):
            return self.on_ratings(method, seed)
        spec, g = self.spec(), torch.Generator().manual_seed(seed)
        number = self.config.eval_samples
        condition = (torch.arange(number) % spec.classes).to(self.device)
        noise = torch.randn(number, *spec.sample_shape, generator=g)

        def fresh(name, shape, kind="normal"):
            return (torch.randn if kind == "normal" else torch.rand)(shape, generator=g).to(self.device)

        true = self.sample(condition, fresh)  # before the method draws numbers, so that they are the same for every method
        parts = [method.draw(n.to(self.device), c, g) for n, c in zip(noise.split(4096), condition.split(4096))]
        x, calls = torch.cat([p.x for p in parts]).float(), torch.cat([p.calls for p in parts])
        told = {k: v for k, v in method.inspect({}).items() if k in self.metrics}
        if self.learned:
            told["judged"] = self.learned(x, condition).mean()
        return {**self.judge(x, true, condition), "proxy": self.reward(x, condition).mean().item(), "calls": calls.mean().item(),
                **{k: v.item() for k, v in told.items()}}
