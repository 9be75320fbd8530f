"""Worlds of many turns: episodes of an environment in which every turn is a prompt and a response.

Episodes are played in lock-step; one that has ended generates nothing more. A batch has a row for every turn (the columns of
envs/prompts/base.py), the turns of an episode next to each other, and besides

    group    number of the episode's beginning, of which `samples` episodes are played
    unit     number of the episode: the rows that count as one where rewards are compared (methods/reasoning/base.py)
    turn     number of the turn in its episode, from 0
    reward   the episode's reward, and where this turn's text was invalid, what that costs
    correct  whether the episode succeeded;  format: whether this turn's text was valid;  answer: -1

so that batches differ in their number of rows. Sampling is a function of (seed, name, number of the batch, turn).

A task of turns has, beside what Task asks of its single turns, `limit`, `episodes(held_out)` (beginnings), `observe(state)` (the
prompt) and `step(state, text)` -> (state, reward, over): positive at the end of a success, negative for an invalid text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.prompts.base import Prompts, PromptWorld, blamed, pass_at
from runner.interface import Completions, Metric


class Turn(NamedTuple):
    episodes: list[int]       # those that still ran
    out: Completions          # a row each
    cost: list[float]         # what an invalid text costs, else 0


class Played(NamedTuple):
    turns: list[Turn]
    reward: list[float]       # of every episode, without those costs
    length: list[int]         # turns of every episode


def play(task, states: list[Any], generate: Callable[[list[str], Tensor, int], Completions]) -> Played:
    """Play the episodes that begin in `states` to their ends. generate(texts, episodes, turn): a response to each text."""
    states, running, turns = list(states), list(range(len(states))), []
    reward, length = [0.0] * len(states), [0] * len(states)
    quarter = -(-len(states) // 4)
    while running:
        texts = [task.observe(states[i]) for i in running]
        spare = -len(texts) % quarter  # few numbers of rows: each is a shape, for which a GPU captures a graph
        out = generate(texts + texts[-1:] * spare, torch.tensor(running + running[-1:] * spare), len(turns))
        out = Completions(*(v[:len(running)] for v in out))
        cost, still = [], []
        for i, text in zip(running, out.texts):
            try:
                states[i], told, over = task.step(states[i], text)
            except Exception as error:
                raise blamed(f"{type(task).__name__}.step", error, task.observe(states[i]), text) from error
            reward[i] += max(told, 0.0)
            cost.append(min(told, 0.0))
            length[i] += 1
            still += [] if over else [i]
        turns.append(Turn(running, out, cost))
        running = still
    return Played(turns, reward, length)


class Turns(Prompts):
    """pool: beginnings of episodes."""

    def rollouts(self, problems: list[int], samples: int, temperature: float = 1.0, name: str = "rollout",
                 adjust=None) -> dict[str, Tensor]:
        if name in self.names:
            raise ValueError(f"rollouts named '{name}' were asked for twice in one batch")
        fresh, number = not self.names, len(problems) * samples
        self.names.add(name)
        width, device = self.method.response_length(), self.method.device()

        def generate(texts, episodes, turn):
            uniforms = self.draws(f"{name}/{turn}", (self.ranks * number, width), self.batch, "uniform")
            return self.method.generate(texts, 1, uniforms[self.rank * number + episodes].to(device), temperature, adjust,
                                        fresh=fresh and not turn)

        each = [i for i in problems for _ in range(samples)]
        played = play(self.world.task, [self.pool[i] for i in each], generate)
        rows = torch.tensor(float(sum(played.length)), device=device)
        self.responses += round(self.ranks * float(self.method.engine.mean(rows)))
        return rows_of_turns(played, each, samples, device)


def rows_of_turns(played: Played, problems: list[int], samples: int, device) -> dict[str, Tensor]:
    """One row a turn, the turns of an episode next to each other. problems: number of every episode's beginning."""
    episode = torch.tensor([i for turn in played.turns for i in turn.episodes])
    order = torch.argsort(episode, stable=True)
    episode = episode[order]
    turn = torch.tensor([t for t, turn in enumerate(played.turns) for _ in turn.episodes])[order]
    cost = torch.tensor([c for turn in played.turns for c in turn.cost])[order]
    reward, number = torch.tensor(played.reward)[episode], torch.tensor(problems)[episode]
    wide = max(turn.out.prompt.shape[1] for turn in played.turns)

    def column(name: str) -> Tensor:
        parts = [getattr(turn.out, name) for turn in played.turns]
        if name.startswith("prompt"):
            parts = [F.pad(v, (wide - v.shape[1], 0)) for v in parts]
        return torch.cat(parts)[order.to(device)]

    host = {"group": episode // samples, "unit": episode, "turn": turn, "problem": number, "answer": torch.full_like(episode, -1),
            "correct": (reward > 0).float(), "format": (cost == 0).float(), "reward": reward + cost}
    mask = column("mask").float()
    return {"prompt": column("prompt"), "prompt_mask": column("prompt_mask"), "response": column("response"), "mask": mask,
            "log_prob": column("log_prob"), "length": mask.sum(1), **{k: v.to(device) for k, v in host.items()}}


class TurnWorld(PromptWorld):
    """One task of turns. Demonstrations are single ones."""

    metrics = {
        "success": Metric("max", "", "share of the episodes that succeed"),
        "pass_1": Metric("max", "", "the same: an episode is one attempt"),
        "pass_4": Metric("max", "", "unbiased pass@4: a success among 4 episodes from one beginning"),
        "pass_16": Metric("max", "", "unbiased pass@16"),
        "pass_area": Metric("max", "", "mean of pass@1, 2, 4, 8, 16: the area under pass@k over log k"),
        "greedy": Metric("max", "", "share of successes with greedy responses"),
        "return": Metric("max", "", "success less what invalid texts cost"),
        "turns": Metric("min", "turns", "of an episode"),
        "invalid": Metric("min", "", "share of invalid texts"),
        "entropy": Metric("none", "nats", "exact entropy of a token, mean over all turns of episodes that still run"),
        "entropy_by_turn": Metric("none", "nats", "the same, mean over turn numbers"),
        "entropy_turn_0": Metric("none", "nats", "of the first turn"),
        "entropy_turn_8": Metric("none", "nats", "of the ninth turn"),
        "entropy_turn_16": Metric("none", "nats", "of the seventeenth turn"),
    }

    def spec(self):
        return dataclasses.replace(super().spec(), turns=self.task.limit)

    def stream(self, method, kind, seed):
        if kind == "demonstrations":
            return super().stream(method, kind, seed)
        return Turns(self, method, self.task.episodes(), self._start())

    def evaluate(self, method, seed):
        """Held-out beginnings, `eval_samples` episodes each at temperature 1, and one greedy."""
        c, width, device = self.config, method.response_length(), method.device()
        starts = [s for s, _ in zip(self.task.episodes(held_out=True), range(c.eval_prompts))]

        def played(states, temperature):
            generator = torch.Generator().manual_seed(seed)
            numbers: list[Tensor] = []

            def generate(texts, episodes, turn):
                numbers.append(torch.rand(len(states), width, generator=generator))
                return method.complete(texts, 1, numbers.pop()[episodes].to(device), temperature, fresh=not turn)

            return play(self.task, states, generate)

        sampled = played([s for s in starts for _ in range(c.eval_samples)], 1.0)
        won = [sum(r > 0 for r in sampled.reward[i:i + c.eval_samples]) for i in range(0, len(sampled.reward), c.eval_samples)]
        figures = {"success": sum(won) / len(sampled.reward)}
        at = {k: sum(pass_at(c.eval_samples, n, k) for n in won) / len(won) for k in (1, 2, 4, 8, 16) if k <= c.eval_samples}
        figures |= {f"pass_{k}": at[k] for k in (1, 4, 16) if k in at}
        if len(at) == 5:
            figures["pass_area"] = sum(at.values()) / 5
        costs = [cost for turn in sampled.turns for cost in turn.cost]
        figures["return"] = (sum(sampled.reward) + sum(costs)) / len(sampled.reward)
        figures["turns"] = sum(sampled.length) / len(sampled.length)
        figures["invalid"] = sum(cost < 0 for cost in costs) / len(costs)
        told = [self._entropy(method, turn.out) for turn in sampled.turns]
        figures["entropy"] = sum(e for e, _ in told) / sum(n for _, n in told)
        figures["entropy_by_turn"] = sum(e / n for e, n in told) / len(told)
        figures |= {f"entropy_turn_{t}": told[t][0] / told[t][1] for t in (0, 8, 16) if t < len(told)}
        figures["greedy"] = sum(r > 0 for r in played(starts, 0.0).reward) / len(starts)
        return figures

    @staticmethod
    def _entropy(method, out: Completions) -> tuple[float, float]:
        """(sum over tokens, tokens)"""
        total = 0.0
        for part in torch.arange(len(out.texts), device=out.mask.device).split(512):
            some = {k: getattr(out, k)[part] for k in ("prompt", "prompt_mask", "response", "mask")}
            with torch.no_grad():
                total += method.score(some)["entropy"].sum().item()
        return total, out.mask.sum().item()
