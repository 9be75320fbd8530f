"""Lists of candidate actions on a teacher's states: the stream of kind `candidates`, and the yardsticks for it.

Per state s the list holds actions drawn from the teacher, from the student as it is now, and uniformly; the reward of
an action is log pi_T(a | s). Of the held-out states one half validates (it may choose weights), the other is gold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from runner.errors import UserError
from runner.interface import Method, Stream

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def normal_log_prob(action: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """log N(action; mean, diag std^2), summed over the last dimension."""
    std = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
    return (-0.5 * ((action - mean) / std).square() - std.log() - LOG_SQRT_2PI).sum(-1)


def normal_kl(mean_p: Tensor, std_p, mean_q: Tensor, std_q) -> Tensor:
    """KL(N_p || N_q) of diagonal Gaussians in nats; closed form, summed over the last dimension."""
    std_p = torch.as_tensor(std_p, dtype=mean_p.dtype, device=mean_p.device)
    std_q = torch.as_tensor(std_q, dtype=mean_q.dtype, device=mean_q.device)
    ratio = (std_p / std_q).square()
    kl = 0.5 * (ratio + ((mean_p - mean_q) / std_q).square() - 1 - ratio.log())
    return kl.sum(-1)


class Distillation:
    """The teacher's states, split, with the teacher's means on them."""

    def __init__(self, states: Tensor, teacher, config, generator: torch.Generator):
        """states (n, S) on the training device; `config` names the counts of candidates (see Simulator.Config)."""
        self.teacher, self.config, self.device = teacher, config, states.device
        order = torch.randperm(len(states), generator=generator).to(states.device)
        held = max(2, int(len(states) * config.held_out))
        self.validation, self.held_out = states[order[:held // 2]], states[order[held // 2:held]]
        self.train = states[order[held:]]
        self.train_mean = teacher.mean(self.train)

    def stream(self, method: Method, seed: int) -> Candidates:
        return Candidates(self, method, seed)


class Candidates(Stream):
    def __init__(self, data: Distillation, method: Method, seed: int):
        self.source, self.method, c = data, method, data.config
        self.counts = (c.from_teacher, c.from_student, c.from_uniform)
        if sum(self.counts) < 2:
            raise UserError("a candidate list needs at least 2 actions: raise env.from_teacher, env.from_student or "
                            "env.from_uniform")
        self.batch_size, self.passes, self.pass_ = c.batch_size, c.passes, 0
        self.generator = torch.Generator(data.device).manual_seed(seed)
        self.batch: dict[str, Tensor] = {}

    def data(self):
        return {"context": self.source.train}

    @torch.no_grad()
    def next(self) -> dict[str, Tensor]:
        """context (B, S), candidates (B, P, A), reward = teacher_log_prob (B, P), behaviour_log_prob (B, P): the
        student's log-probabilities when the list was drawn."""
        if not self.batch or self.pass_ == self.passes:
            self.batch, self.pass_ = self._draw(), 0
        self.pass_ += 1
        return self.batch

    def _draw(self):
        data, g, (n_teacher, n_student, n_uniform) = self.source, self.generator, self.counts
        std, size = data.teacher.std, data.train_mean.shape[-1]
        index = torch.randint(len(data.train), (self.batch_size,), generator=g, device=g.device)
        context, mean = data.train[index], data.train_mean[index].unsqueeze(1)
        shape = (self.batch_size, n_teacher, size)
        lists = [mean + std * torch.randn(shape, generator=g, device=g.device)]
        if n_student:
            lists.append(self.method.sample(context, n_student))
        lists.append(torch.rand(self.batch_size, n_uniform, size, generator=g, device=g.device) * 2 - 1)
        candidates = torch.cat(lists, 1)
        log_prob = normal_log_prob(candidates, mean, std)
        batch = {"context": context, "candidates": candidates, "reward": log_prob, "teacher_log_prob": log_prob}
        if self.method.records_behaviour:
            batch["behaviour_log_prob"] = self.method.log_prob(context, candidates)
        return batch

    def state_dict(self):
        return {"generator": self.generator.get_state(), "batch": self.batch, "pass": self.pass_}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"].cpu())
        self.batch = {k: v.to(self.source.device) for k, v in state["batch"].items()}
        self.pass_ = state["pass"]


@torch.no_grad()
def divergences(method: Method, teacher, states: Tensor) -> dict[str, float]:
    """KL both ways between teacher and student, mean over `states` (n, S), in nats; and the student's mean std."""
    mean, std = method.distribution(states)
    taught = teacher.mean(states)
    return {
        "kl_teacher_student": normal_kl(taught, teacher.std, mean, std).mean().item(),
        "kl_student_teacher": normal_kl(mean, std, taught, teacher.std).mean().item(),
        "student_std": std.mean().item(),
    }


@torch.no_grad()
def ndcg(method: Method, teacher, states: Tensor, seed: int, candidates: int = 32) -> float:
    """How well the student ranks fresh candidates, half from the teacher and half uniform; 1 is the teacher's order."""
    generator = torch.Generator().manual_seed(seed)
    mean = teacher.mean(states).unsqueeze(1)
    shape = (len(states), candidates // 2, mean.shape[-1])
    drawn = mean + teacher.std * torch.randn(shape, generator=generator).to(mean.device)
    lists = torch.cat([drawn, torch.rand(shape, generator=generator).to(mean.device) * 2 - 1], 1)
    relevance = normal_log_prob(lists, mean, teacher.std).softmax(-1)
    discount = 1 / torch.log2(torch.arange(lists.shape[1], device=mean.device) + 2.0)
    order = method.log_prob(states, lists).argsort(-1, descending=True)
    gained = (relevance.gather(1, order) * discount).sum(-1)
    ideal = (relevance.sort(-1, descending=True).values * discount).sum(-1)
    return (gained / ideal).mean().item()
