"""Batches of kind `scored`: prompts, responses that somebody gave, and a reward for each.

    prompt (b, Tp), prompt_mask, response (b, T), mask, reward (b,), value (b,), and whatever columns a method's `prepare` adds

`value` is what the policy is worth at the prompt before training: the mean reward of some of its own responses, sampled once,
before the first update, as the judge sees them. All rows stand in `data()`. Batches are drawn from them with replacement, in
proportion to the column `draw` (N,) where a method adds one, else uniformly; what is drawn is a function of (seed, number of the
batch), so that nothing but a counter is saved. Several processes hold the same rows and share a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runner.draws import Draws
from runner.errors import UserError
from runner.interface import Stream

AT_ONCE = 4096  # responses sampled at once


class Scored(Stream):
    def __init__(self, method, rows: list[tuple[str, str, float]], batch_size: int, judge: Callable[[str, str], float],
                 samples: int, start: dict[str, Tensor] | None = None, values: dict[str, float] | None = None):
        """rows: (prompt, response, reward). judge(prompt, response) -> reward of a sampled one; `samples` of each prompt. values:
        of the prompts, where they are known better than by sampling. start: weights to begin from."""
        if not rows:
            raise UserError("there are no scored responses to learn from")
        wrong = next(((i, r) for i, (_, _, r) in enumerate(rows, 1) if not 0 <= r <= 1), None)  # NaN, too
        if wrong:
            raise UserError(f"row {wrong[0]} of {len(rows)} has the reward {wrong[1]}; rewards lie between 0 and 1\n"
                            "squash them, by a sigmoid for example")
        self.method, self.rows, self.batch_size, self.judge, self.samples = method, rows, batch_size, judge, samples
        self.start, self.values, self.columns, self.batch = start or {}, values, {}, 0
        self.draws = Draws(method.seed, "cpu")

    def data(self):
        """All rows, (N, …), and the weights to begin from under `start/`."""
        self.method.load_start(self.start)  # values are those of the policy that training begins with
        prompts, responses, rewards = zip(*self.rows)
        prompt, prompt_mask = self.method.encode(list(prompts))
        response, mask = self.method.encode_responses(list(responses))
        known = self.values if self.values is not None else self.sampled_values()
        told = torch.tensor([[r, known[p]] for p, r in zip(prompts, rewards)]).to(prompt.device)
        self.columns = {"prompt": prompt, "prompt_mask": prompt_mask, "response": response, "mask": mask.float(),
                        "reward": told[:, 0], "value": told[:, 1]}
        return {**self.columns, **{f"start/{k}": v for k, v in self.start.items()}}

    def replace(self, data):
        self.columns = {k: v for k, v in data.items() if not k.startswith("start/")}

    def sampled_values(self) -> dict[str, float]:
        """Mean reward of the policy's own responses to every prompt."""
        prompts, out = list(dict.fromkeys(p for p, _, _ in self.rows)), {}
        uniforms = self.draws("values", (len(prompts) * self.samples, self.method.response_length()), 0, "uniform")
        size = max(1, AT_ONCE // self.samples)
        for begin in range(0, len(prompts), size):
            some, numbers = prompts[begin:begin + size], uniforms[begin * self.samples:(begin + size) * self.samples]
            texts = self.method.complete(some, self.samples, numbers.to(self.method.device()), fresh=not begin).texts
            for i, prompt in enumerate(some):
                own = texts[i * self.samples:(i + 1) * self.samples]
                out[prompt] = sum(self.judge(prompt, text) for text in own) / self.samples
        return out

    def next(self) -> dict[str, Tensor]:
        (rank, ranks), number = self.method.processes, self.batch_size
        u = self.draws("rows", (ranks * number,), self.batch, "uniform")[rank * number:(rank + 1) * number].double()
        device = self.columns["reward"].device
        weight = self.columns.get("draw")
        sums = torch.ones(len(self.rows), device=device).double().cumsum(0) if weight is None else weight.double().cumsum(0)
        index = torch.searchsorted(sums, u.to(device) * sums[-1], right=True).clamp_(max=len(sums) - 1)
        self.batch += 1
        return {k: v[index] for k, v in self.columns.items() if k != "draw"}

    def state_dict(self):
        return {"batch": self.batch}

    def load_state_dict(self, state):
        self.batch = state["batch"]
