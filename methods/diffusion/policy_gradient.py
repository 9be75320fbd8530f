"""Reinforcement of a generator by rewards of finished samples: the algorithm that GRPO's descendants on flows change. As it
stands it is Flow-GRPO.

A denoising step is an action: x_{j+1} ~ N(mu_theta(x_j), s_j^2 I). One update is one batch of rollouts, gone through `passes`
times in `minibatches` steps of the optimiser. A sample is what is rewarded as one: P = Spec.points things generated apart, D
numbers in all.

     1. collect      Q = `prompts` conditions, G = `samples` rollouts each of `steps` steps, stochastic and trained in a window
                     (window = 0: all stochastic, and all but the last trained); x_j, log p_old and mu_old of the trained steps
                     are kept. `initial` draws where they begin
     2. reward       R_i of the finished sample, (N,); the world's proxy                                       (additive)
     3. advantage    A_i = (R_i - mean_g R) / (std + 1e-4), std of the group or the batch, cut to [-5, 5]; one for all steps
     4. transition   the Gaussian steps' coefficients over the grid (methods/diffusion/flow.py)
     5. log_prob     log p_j, the mean over D (`log_prob_over`), to which clip ranges belong; -mean (x - mu)^2 under cps
     6. log_ratio    log r = log p_theta - log p_old, (steps, n)
     7. surrogate    max(-A (r - 1), -A clip(r - 1, -eps, eps)), (steps, n): the usual one less a constant, exact for small eps
     8. step_weight  of each step's loss, (steps,); 1
     9. penalty      kl_weight times the KL to the generator as it was at the start                            (additive)
    10. after_update the moving average of the weights                                                         (additive)
    11. velocity, guide   as in generation; guidance acts in rollouts and in training. `follow` acts in generation alone

The loss is the mean over steps and samples, as gradient accumulation gives it in the official code. kl_kind, with mu, s of a
step:

    step      mean_d (mu - mu_ref)^2 / 2 s^2, the KL of the step
    flowgrpo  h times that, the official one (its std lacks sqrt(h))
    x, v      mean_d (mu - mu_ref)^2, mean_d (v - v_ref)^2

The defaults are for samples of some hundred numbers; the official ones for D = 65,536: eps 1e-4, two optimiser steps a batch, G
= 24, 48 prompts, std of the batch, kl_weight 0.04, grid_end 0.003. Samples of zero advantage are kept (officially dropped):
their gradient is zero. Sources: Liu et al. 2025 (Flow-GRPO, arXiv 2505.05470); Black et al. 2023 (DDPO).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.common.parts import add
from methods.diffusion import flow
from methods.diffusion.base import Generator
from runner.errors import UserError
from runner.interface import Spec, knob

TOLD = ("ratio_shift_first", "ratio_shift_middle", "ratio_shift", "clip_balance")  # of the ratios, for the world


@dataclasses.dataclass
class Rollouts:
    """Rows of a minibatch: n samples over the S trained steps."""

    x: Tensor                # (S, n, P, …) before the step, and
    next: Tensor             # after it
    log_prob: Tensor         # (S, n) under the policy that sampled, and
    mean: Tensor | None      # (S, n, P, …) its means, where the method keeps them
    condition: Tensor        # (n,)
    advantage: Tensor        # (n,)
    t: Tensor                # (S,)
    by: flow.Coefficients    # of the steps, (S,)
    v: Tensor | None = None  # the velocity now
    now: flow.Step | None = None

    @property
    def h(self) -> Tensor:
        return self.by.length

    @property
    def std(self) -> Tensor:
        return self.by.std


class FlowPolicy(Generator):
    @dataclasses.dataclass(frozen=True)
    class Config(Generator.Config):
        learning_rate: float = knob(5e-4, "AdamW's", low=0.0)
        weight_decay: float = knob(1e-4, "AdamW's", low=0.0, source="paper")
        decay: str = knob("constant", "course of the learning rate over the run", choices=["constant", "cosine"])
        gradient_norm: float = knob(1.0, "bound of the gradient's norm; 0: none", low=0.0, source="paper")
        shift: float = knob(3.0, "S: of the time grid; above 1 more steps are spent on noise", low=1e-3, source="paper")
        prompts: int = knob(4, "Q: conditions a batch", low=1)
        samples: int = knob(16, "G: rollouts of each", low=2)
        steps: int = knob(10, "T: of a rollout", low=2, source="paper")
        grid_end: float = knob(0.0, "where the linear time grid ends before its shift, 0.003 in SD3's scheduler, whose last step "
                               "is nearly empty; 0: all steps alike", low=0.0, high=0.5)
        noise_level: float = knob(0.7, "a: of the stochastic steps", low=1e-6, source="paper")
        sde: str = knob("flow", "kind of the stochastic steps", choices=["flow", "dance", "cps", "ddim"])
        log_prob_over: str = knob("mean", "how a step's log-probability is made of its D numbers' (with sum, no ratio is biased)",
                                  choices=["mean", "sum", "root"], source="paper")
        window: int = knob(0, "stochastic and trained steps; the others are an ODE's. 0: all but the last are trained", low=0)
        window_start: int = knob(0, "the first of them", low=0, when={"window": 1})
        minibatches: int = knob(4, "optimiser steps a pass", low=1)
        passes: int = knob(4, "over a batch", low=1)
        clip: float = knob(1e-2, "eps: of the ratio", low=0.0)
        scale: str = knob("group", "deviation that advantages are divided by", choices=["group", "batch"])
        stop_at: float | None = knob(None, "mean reward of a batch from which on the weights stay as they are (early stopping)")
        kl_weight: float = knob(0.0, "beta: of the KL to the generator as it was at the start", low=0.0)
        kl_kind: str = knob("step", "which distance", choices=["step", "flowgrpo", "x", "v"], when={"kl_weight": 10.0})

    PARTS = ("collect", "initial", "reward", "advantage", "transition", "log_prob", "log_ratio", "surrogate", "step_weight",
             "penalty", "after_update", "velocity", "guide", "follow")
    ADDITIVE = ("reward", "penalty", "after_update")
    starts = True
    keeps_mean = False  # whether `log_ratio` needs the means of the policy that sampled

    @property
    def keeps_start(self):
        return self.config.kl_weight > 0

    def setup(self, spec: Spec):
        self.check_sizes()
        super().setup(spec)
        self.register_buffer("ratio_sums", torch.zeros(len(TOLD)))  # over the run, of the last optimiser step of each batch
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("going", torch.ones(()))  # 0 once `stop_at` was reached
        for name, table in self.transition(self.grid(self.config.steps))._asdict().items():
            self.register_buffer(f"step_{name}", table, persistent=False)

    def check_sizes(self):
        c = self.config
        if c.minibatches > c.prompts * c.samples:
            raise UserError(f"method.minibatches={c.minibatches}: a batch has {c.prompts * c.samples} rollouts (method.prompts x "
                            "method.samples)\ntake at most that many")
        if c.window and c.window_start + c.window > c.steps - 1:
            raise UserError(f"method.window={c.window} from method.window_start={c.window_start}: of {c.steps} steps "
                            f"(method.steps) the first {c.steps - 1} can be trained\ntake a smaller window, or an earlier one")
        if c.sde == "cps" and c.noise_level > 1:
            raise UserError(f"method.noise_level={c.noise_level}: with sde=cps it is at most 1, where all noise is fresh")

    def steps_of_update(self):
        return self.config.minibatches * self.config.passes

    def compile_networks(self):
        """The objective as one: a small network's time is the number of its kernels. A larger network's blocks instead."""
        if getattr(self.network, "compiles", False):
            return super().compile_networks()
        self.objective = torch.compile(self.objective, dynamic=False)

    def trained(self) -> range:
        """Which steps of a rollout are trained: the last one is not (officially nearly empty, see `grid_end`; with the grid as it
        stands its noise stays in what is rewarded: a deviation of 0.2 at 10 steps, shift 3)."""
        c = self.config
        return range(c.window_start, c.window_start + c.window) if c.window else range(c.steps - 1)

    def grid(self, steps: int | None = None) -> Tensor:
        c = self.config
        if not c.grid_end:
            return super().grid(steps)
        if hasattr(self.network, "grid"):
            raise UserError("method.grid_end: this policy walks the times of its own schedule\nleave it at 0")
        return flow.grid(steps or c.sampler_steps, c.shift, self.device(), c.grid_end)

    # -- rollouts
    @torch.no_grad()
    def collect(self, stream) -> dict[str, Tensor]:
        """-> x (T + 1, N, P, …) along the way, condition, reward (N,), log_prob (S, N), and mean (S, N, P, …) if kept."""
        c, p = self.config, self.spec.points
        condition = stream.conditions(c.prompts).repeat_interleave(c.samples)
        n, shape, trained = len(condition), self.spec.sample_shape, self.trained()
        times = self.grid(c.steps)
        with self.autocast():
            walk = self.walk(self.begin(self.initial(n, p).flatten(0, 1)), condition.repeat_interleave(p), self.network)
            passed, log_prob, mean = [walk.x], [], []
            for j in range(c.steps):
                walk.t, walk.step, walk.steps = times[j], j, c.steps
                v = self.guide(walk, self.ask(walk, walk.condition))
                at = flow.move(walk.x, v, self.table().of(j))
                walk.x = at.mean
                if j in trained or not c.window:
                    walk.x = at.mean + at.std * self.noise(f"step{j}", (n, p, *shape)).flatten(0, 1)
                if j in trained:
                    told = at._replace(mean=at.mean.view(n, p, *shape))
                    log_prob.append(self.log_prob(walk.x.view(n, p, *shape), told, 1))
                    mean.append(told.mean)
                passed.append(walk.x)
        x = torch.stack(passed).view(c.steps + 1, n, p, *shape)
        out = {"x": x, "condition": condition, "log_prob": torch.stack(log_prob)}
        if self.keeps_mean:
            out["mean"] = torch.stack(mean)
        return {**out, "reward": self.reward(stream, x[-1], condition)}

    # -- learning
    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: what `collect` made."""
        c = self.config
        batch = {**batch, "advantage": self.advantage(batch)}
        told, pace = [], self.pace(batch)
        for number in range(c.passes):
            order = self.noise(f"order{number}", (len(batch["reward"]),), "uniform").argsort()
            for rows in order.tensor_split(c.minibatches):
                told.append(self.learn(batch, rows, pace, len(told) == self.steps_of_update() - 1))
        last = told[-1]
        with torch.no_grad():
            self.ratio_sums += torch.stack([last["shift_first"], last["shift_middle"], last["shift_last"],
                                            last["clip_high_last"] - last["clip_low_last"]])
            self.seen += 1
        return {"reward": batch["reward"].mean(), "reward_deviation": batch["reward"].std(),
                **{k: torch.stack([t[k] for t in told]).mean() for k in ("loss", "penalty") if k in last},
                **{k: v for k, v in last.items() if k not in ("loss", "penalty")}}

    def pace(self, batch) -> Tensor | None:
        """(): what the learning rate is multiplied by for this batch; None: 1."""
        if self.config.stop_at is None:
            return None
        self.going *= (self.engine.mean(batch["reward"].mean()) < self.config.stop_at).float()  # one decision for all processes
        return self.going

    def table(self) -> flow.Coefficients:
        """Of all steps of a rollout."""
        return flow.Coefficients(*(getattr(self, f"step_{name}") for name in flow.Coefficients._fields))

    def learn(self, batch, index: Tensor, pace: Tensor | None = None, telling: bool = True) -> dict[str, Tensor]:
        """One step of the optimiser on some samples and all trained steps; `telling`: statistics are wanted."""
        trained = self.trained()
        low, high = trained.start, trained.stop
        rows = Rollouts(x=batch["x"][low:high, index], next=batch["x"][low + 1:high + 1, index],
                        log_prob=batch["log_prob"][:, index], condition=batch["condition"][index],
                        mean=batch["mean"][:, index] if "mean" in batch else None,
                        advantage=batch["advantage"][index], t=self.grid(self.config.steps)[low:high],
                        by=self.table().of(slice(low, high)))
        loss, penalty, log_ratio = self.objective(rows)
        self.advance(add(loss, penalty), pace)
        self.after_update(rows)
        told = {"loss": loss.detach(), **(self.tell(log_ratio.detach(), rows) if telling else {})}
        return told if penalty is None else {**told, "penalty": penalty.detach()}

    def objective(self, rows: Rollouts) -> tuple[Tensor, Tensor | None, Tensor]:
        """(loss, penalty, log-ratios (S, n)) of a minibatch."""
        rows.v, rows.now = self.predict(rows, self.network)
        log_ratio = self.log_ratio(rows)
        each = self.surrogate(log_ratio, rows) * self.step_weight(rows)[:, None]
        return each.mean(), self.penalty(rows), log_ratio

    def predict(self, rows: Rollouts, network) -> tuple[Tensor, flow.Step]:
        """The velocity (S, n, P, …), and the steps that follow from it."""
        s, n, p = rows.x.shape[:3]
        flat = rows.x.flatten(0, 2)
        walk = self.walk(flat, rows.condition.repeat_interleave(p).repeat(s), network)
        walk.t = rows.t.repeat_interleave(n * p)
        v = self.guide(walk, self.ask(walk, walk.condition)).view_as(rows.x)
        return v, flow.move(rows.x, v, rows.by)

    def tell(self, log_ratio: Tensor, rows: Rollouts) -> dict[str, Tensor]:
        """Statistics of the ratios (S, n): shift (mean over deviation) and clipped shares at some steps."""
        deviation = log_ratio.std(1, unbiased=False)
        shift = torch.where(deviation > 0, log_ratio.mean(1) / deviation.clamp(min=1e-30), 0.0)
        moved = torch.expm1(log_ratio)
        high = ((rows.advantage > 0) & (moved > self.config.clip)).float().mean(1)
        low = ((rows.advantage < 0) & (moved < -self.config.clip)).float().mean(1)
        return {"shift_first": shift[0], "shift_middle": shift[len(shift) // 2], "shift_last": shift[-1],
                "ratio_deviation": deviation.median(), "ratio_deviation_last": deviation[-1],
                "clip_high": high.mean(), "clip_low": low.mean(), "clip_high_last": high[-1], "clip_low_last": low[-1]}

    def inspect(self, batch):
        told = dict(zip(TOLD, self.ratio_sums / self.seen.clamp(min=1)))
        return {**told, "ratio_bias": told["ratio_shift"].abs()}

    # -- parts
    def initial(self, number: int, points: int) -> Tensor:
        """Where `number` rollouts of `points` things each begin, (N, P, …)."""
        return self.noise("start", (number, points, *self.spec.sample_shape))

    def reward(self, stream, x: Tensor, condition: Tensor) -> Tensor:
        """x (N, P, …) finished."""
        return stream.reward(x, condition)

    def advantage(self, batch) -> Tensor:
        groups = batch["reward"].view(-1, self.config.samples)
        centred = groups - groups.mean(1, keepdim=True)
        deviation = groups.std(1, keepdim=True) if self.config.scale == "group" else groups.std()
        return (centred / (deviation + 1e-4)).clamp(-5, 5).flatten()

    def transition(self, times: Tensor) -> flow.Coefficients:
        """times (T + 1,) -> of each step, (T,)."""
        c = self.config
        moving = flow.coefficients(c.sde, times[:-1], times[1:], c.noise_level, times[1])
        if not c.window:
            return moving
        still = flow.coefficients("ode", times[:-1], times[1:])
        inside = torch.zeros(c.steps, dtype=torch.bool, device=times.device)
        inside[self.trained().start:self.trained().stop] = True
        return flow.Coefficients(*(torch.where(inside, a, b) for a, b in zip(moving, still)))

    def log_prob(self, x: Tensor, at: flow.Step, dims: int) -> Tensor:
        if self.config.sde == "cps":
            return flow.aggregate(-(x - at.mean).square(), dims, self.config.log_prob_over)
        return flow.log_prob(x, at, dims, self.config.log_prob_over)

    def log_ratio(self, rows: Rollouts) -> Tensor:
        return self.log_prob(rows.next, rows.now, 2) - rows.log_prob

    def surrogate(self, log_ratio: Tensor, rows: Rollouts) -> Tensor:
        moved, a, eps = torch.expm1(log_ratio), rows.advantage, self.config.clip
        return torch.maximum(-a * moved, -a * moved.clamp(-eps, eps))

    def step_weight(self, rows: Rollouts) -> Tensor:
        return torch.ones_like(rows.h)

    def penalty(self, rows: Rollouts) -> Tensor | None:
        c = self.config
        if not c.kl_weight:
            return None
        with torch.no_grad():
            v, at = self.predict(rows, self.reference)
        if c.kl_kind == "v":
            return c.kl_weight * (rows.v - v).square().mean()
        apart = (rows.now.mean - at.mean).square()
        if c.kl_kind != "x":
            variance = rows.now.std.square()
            apart = apart / (2 * (variance if c.kl_kind == "step" else variance / flow.rows(rows.h, apart)))
        return c.kl_weight * apart.mean()
