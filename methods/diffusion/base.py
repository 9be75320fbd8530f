"""Generators: a network of velocities, and how samples are drawn with it. The learning rules of this family build on it
(regression.py: flow matching; policy_gradient.py: Flow-GRPO).

Generation walks `grid` from noise to data by steps of `sampler` (methods/diffusion/flow.py); at each of them

    velocity     v(x_t, t, c) of the network, c = `classes` stands for no condition
    guide        v = v_c + (w - 1) (v_c - v_u), w = `guidance` (classifier-free; at 1 the null condition is not asked)
    follow       what generation goes by: the guided velocity

Sources: Lipman et al. 2023, Liu et al. 2022; Ho & Salimans 2022 (guidance).
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from methods.common.networks import CosineRate, adam
from methods.diffusion import flow
from methods.diffusion.graphed import Graphed
from methods.diffusion.rater import rater_of
from runner.errors import UserError
from runner.interface import Drawn, Method, Spec, knob


@dataclasses.dataclass
class Walk:
    """One generation on its way, for `guide`."""

    x: Tensor               # (n, …)
    condition: Tensor       # (n,)
    network: nn.Module      # the one asked
    calls: Tensor           # (n,) network calls so far, for each sample
    memory: dict            # what a guider keeps between steps
    t: Tensor | None = None  # (), or (n,) in training
    step: int = 0
    steps: int = 0
    velocity: object = None  # in generation on a GPU: the network's, recorded in a CUDA graph


class Generator(Method):
    @dataclasses.dataclass(frozen=True)
    class Config:
        learning_rate: float = knob(2e-3, "AdamW's", low=0.0)
        weight_decay: float = knob(0.0, "AdamW's", low=0.0)
        decay: str = knob("cosine", "course of the learning rate over the run", choices=["constant", "cosine"])
        gradient_norm: float = knob(0.0, "bound of the gradient's norm; 0: none", low=0.0)
        average: float = knob(0.0, "rate of the moving average of the weights that generation uses; 0: the weights themselves",
                              low=0.0, high=1.0)
        sampler: str = knob("ode", "steps of generation (methods/diffusion/flow.py)",
                            choices=["ode", "flow", "dance", "cps", "ddim"])
        sampler_noise: float = knob(0.7, "a: noise level of a stochastic sampler", low=0.0,
                                    when={"sampler": ["flow", "dance", "cps", "ddim"]})
        sampler_steps: int = knob(40, "steps of generation", low=1)
        shift: float = knob(1.0, "S: of the time grid; above 1 more steps are spent on noise", low=1e-3)
        guidance: float = knob(1.0, "w: scale of classifier-free guidance; 1: none")

    capturable = True
    kind = "velocity"    # what the network tells
    starts = False       # whether samples come with the weights that the world offers to start from
    records = True       # whether generation on a GPU may record the network's velocity in a CUDA graph
    keeps_start = False  # whether the network as it was at the start is asked, as `self.reference`

    def setup(self, spec: Spec):
        c = self.config
        self.spec, self.exact = spec, None
        self.network = self.blueprint.build(spec)
        self.begun = self.blueprint.own_weights  # whether there are weights to start from
        self.check_network()
        self.averaged = copy.deepcopy(self.network).requires_grad_(False) if c.average else None
        self.reference = copy.deepcopy(self.network).requires_grad_(False) if self.keeps_start else None
        self.rate = self.graphed = None

    def check_network(self):
        """Refuse what a network made elsewhere (methods/diffusion/diffusers.py) can't do."""
        c, network = self.config, self.network
        begun_as = getattr(network, "begun_as", "")
        if begun_as and begun_as != self.begins_as:
            raise UserError(f"policy.path: the network of that run tells another thing ({begun_as}) than this method begins from "
                            f"({self.begins_as})\ntake a run of a method of the same kind, such as flow_matching for a velocity")
        if getattr(network, "latent", False) and getattr(c, "model", "") != "given":
            raise UserError("this pipeline's samples are latents, and this env's are images: it is not trained here\nsample with "
                            "it as it is: method.model=given (flow_matching, cfg, apg, adaptive_guidance)")
        for name in ("guidance", "teacher_guidance"):
            if getattr(c, name, 1) != 1 and not getattr(network, "guided", True):
                lacks = "class that stands for none (policy.null)" if network.labelled else "classes"
                raise UserError(f"method.{name}={getattr(c, name)}: this pipeline has no {lacks}\nwithout guidance: "
                                f"method.{name}=1")
        if getattr(network, "grid", None):
            self.grid()  # refuses more steps than its schedule has

    @property
    def begins_as(self) -> str:
        """The kind of network that it may begin from."""
        return self.kind

    def make_optimizers(self):
        c = self.config
        self.optimizers = {"network": adam(self.network.parameters(), c.learning_rate, weight_decay=c.weight_decay)}
        if c.decay == "cosine" and self.planned:
            self.rate = CosineRate(c.learning_rate, self.planned * self.steps_of_update()).to(self.device())

    def steps_of_update(self) -> int:
        """Optimiser steps that an update makes."""
        return 1

    def compile_networks(self):
        if not getattr(self.network, "compiles", False):
            return super().compile_networks()
        for network in (self.network, self.averaged, self.reference):
            if network is not None:
                network.compile_blocks()

    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def prepare(self, data: dict[str, Tensor]):
        """Start from the weights that the world offers (`start/NAME`), unless the policy brings its own; they are the
        reference's, too."""
        self.load_start({k.removeprefix("start/"): v for k, v in data.items() if k.startswith("start/")})

    def load_start(self, start: dict[str, Tensor]):
        if start and not self.blueprint.own_weights:
            self.fill(self.network, start)
            self.begun = True
        for copied in (self.averaged, self.reference):
            if copied is not None:
                copied.load_state_dict(self.network.state_dict())

    def fill(self, network: nn.Module, start: dict[str, Tensor]):
        """Load the weights that the world offers."""
        own = network.state_dict()
        wrong = [k for k in {**own, **start} if k not in own or k not in start or start[k].shape != own[k].shape]
        if wrong:
            raise UserError(f"the env's starting weights are of another shape than this network ({wrong[0]})\nleave policy "
                            "and its sizes as they are; or name a finished run: policy.path=FOLDER; or, if nothing has to be "
                            "learned from them, begin at random: env.start=none")
        network.load_state_dict(start)

    def use_exact(self):
        """Put the world's exact velocity in the network's place (method.model=exact)."""
        if self.spec.exact is None:
            raise UserError("method.model=exact: this env knows no exact velocity\nenvs of mixtures do, such as ring; "
                            "or train the network: method.model=trained")
        self.exact = self.spec.exact

    def rater(self, weights: dict[str, Tensor]):
        """A function (x (n, *shape), condition (n,)) -> reward (n,), differentiable: what a finished run of a reward model of
        such samples has learned."""
        return rater_of(weights, self.spec).to(self.device())

    def advance(self, loss: Tensor, scale: Tensor | None = None):
        """One step of the optimiser; scale (): of its learning rate."""
        optimizer = self.optimizers["network"]
        if self.rate is not None:
            self.rate.drive(optimizer)
        if scale is not None:
            for group in optimizer.param_groups:
                group["lr"] = scale * (self.config.learning_rate if self.rate is None else self.rate.rate)
        self.minimise(loss, "network", self.config.gradient_norm)

    # -- parts
    def velocity(self, network: nn.Module, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """v (n, *shape); t (n,)."""
        return network(x, t, condition)

    @torch.no_grad()  # else the averages would carry the graph of every update so far
    def after_update(self, rows):
        if self.averaged is not None:
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - self.config.average)

    def guide(self, walk: Walk, conditional: Tensor) -> Tensor:
        """The velocity to follow from the conditional one; `self.ask(walk, condition)` asks for others."""
        w = self.config.guidance
        if w == 1:
            return conditional
        return conditional + (w - 1) * (conditional - self.unconditional(walk))

    def follow(self, walk: Walk) -> Tensor:
        """The velocity (n, …) of generation's next step; rollouts of reinforcement go by `guide` alone."""
        return self.guide(walk, self.ask(walk, walk.condition))

    # -- generation
    def grid(self, steps: int | None = None) -> Tensor:
        """Times from the first to 0, (steps + 1,); a network may offer its own, which begins at its largest t."""
        c, own = self.config, getattr(self.network, "grid", None)
        steps = steps or c.sampler_steps
        return own(steps, c.shift) if own else flow.grid(steps, c.shift, self.device())

    def begin(self, noise: Tensor) -> Tensor:
        """Standard normal `noise` as x at the grid's first time: itself, at t = 1."""
        return self.network.begin(noise) if hasattr(self.network, "begin") else noise

    def finish(self, x: Tensor) -> Tensor:
        """x (…, n, *shape) as the world is shown it: of a network over latents, what they decode to."""
        return self.network.finish(x) if hasattr(self.network, "finish") else x

    def ask(self, walk: Walk, condition: Tensor, network=None, counted=None) -> Tensor:
        """The velocity at the walk's place. counted (n,): which samples this call is needed for (all)."""
        walk.calls = walk.calls + (1.0 if counted is None else counted.float())
        t = walk.t.expand(len(walk.x))
        if self.exact is not None and network is None:
            return self.exact.velocity(walk.x, t, condition)
        return (walk.velocity or self.velocity)(network or walk.network, walk.x, t, condition).float()

    def unconditional(self, walk: Walk, network=None, counted=None) -> Tensor:
        return self.ask(walk, torch.full_like(walk.condition, self.spec.classes), network, counted)

    def walk(self, noise: Tensor, condition: Tensor, network=None) -> Walk:
        """A generation about to start at `noise`."""
        return Walk(noise, condition, network or (self.network if self.averaged is None else self.averaged),
                    torch.zeros(len(noise), device=noise.device), {})

    def stride(self, walk: Walk, times: Tensor, j: int, kind: str, amount: float) -> flow.Step:
        """Step j of a generation: from times[j] to times[j + 1]."""
        walk.t, walk.step, walk.steps = times[j], j, len(times) - 1
        return flow.step(kind, walk.x, self.follow(walk), times[j], times[j + 1], amount, times[1])

    @torch.no_grad()
    def draw(self, noise: Tensor, condition: Tensor, more: torch.Generator | None = None, path: bool = False) -> Drawn:
        """Samples from `noise` (n, *shape); `more` gives a stochastic sampler its further noise."""
        c, times = self.config, self.grid()
        with self.autocast():
            walk = self.walk(self.begin(noise), condition)
            if noise.is_cuda and self.records:
                self.graphed = self.graphed or Graphed(self.velocity)
                walk.velocity = self.graphed
            passed = [walk.x]
            for j in range(len(times) - 1):
                at = self.stride(walk, times, j, c.sampler, c.sampler_noise)
                walk.x = at.mean
                if c.sampler != "ode":
                    fresh = torch.randn(walk.x.shape, generator=more, device=more.device if more else noise.device)
                    walk.x = walk.x + at.std * fresh.to(noise.device)
                if path:
                    passed.append(walk.x)
            return Drawn(self.finish(walk.x), walk.calls, self.finish(torch.stack(passed)) if path else None)

    def export(self):
        kind = {"kind": self.kind, "class": type(self.network).__name__, "shape": ",".join(map(str, self.spec.sample_shape))}
        source = self.network if self.averaged is None else self.averaged
        return dict(source.state_dict()), kind
