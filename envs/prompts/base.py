"""Worlds of prompts with a verifier: what turns a task (envs/prompts/task.py) into batches and gold metrics.

Kinds of batches, each a dict of tensors; B = prompts x samples rows, the samples of a prompt (a group) next to each other:

    prompts          prompt (B, Tp), prompt_mask, response (B, T), mask, log_prob (B, T) of the sampler; group (B,) number of the
                     prompt in the batch; correct, format, reward, length (B,); answer (B,) number of the final answer within
                     the batch, -1 where none can be read; problem (B,) number of the problem, which stays the same over the run
    unlabelled       the same over a small fixed pool, whose rewards a method has to make itself (`correct` is there for the
                     record; a method of this kind must not read it)
    demonstrations   prompt, prompt_mask, response, mask of the task's own demonstrations

What is sampled, and how often, is the method's part `collect`: it asks this stream for `problems` and for `rollouts` of them.
Problems come in a new random order every epoch. Everything drawn is a function of (seed, name, number of the batch), so that
nothing but counters is saved; several processes share a batch: each takes its part of the problems and of the numbers.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from envs.prompts.task import Problem, Task, Verdict
from runner import starts
from runner.draws import Draws
from runner.interface import Metric, Spec, Stream, World, knob

_TASKS: dict[tuple, Task] = {}
STARTS = Path(__file__).with_name("starts")


class Prompts(Stream):
    def __init__(self, world: PromptWorld, method, problems, start: dict[str, Tensor]):
        self.world, self.method, self.pool, self.start = world, method, problems, start
        self.rank, self.ranks = method.processes
        self.draws = Draws(method.seed, "cpu")
        self.batch = 0          # batches handed out
        self.asked = 0          # problems handed out, over all processes
        self.responses = 0      # sampled so far, by all processes
        self.order: list[int] = []
        self.epoch = -1

    def data(self):
        return {f"start/{k}": v for k, v in self.start.items()}

    def next(self):
        self.names: set[str] = set()
        out = self.method.collect(self)
        self.batch += 1
        return out

    # -- what a method asks for
    def problems(self, number: int) -> list[int]:
        """The numbers of the next `number` problems of this process; all processes must ask alike."""
        share = [self._number(self.asked + self.rank * number + i) for i in range(number)]
        self.asked += self.ranks * number
        return share

    def rollouts(self, problems: list[int], samples: int, temperature: float = 1.0, name: str = "rollout",
                 adjust=None) -> dict[str, Tensor]:
        """`samples` responses to each of the problems, verified. Ask under another `name` for every further set of one batch."""
        if name in self.names:
            raise ValueError(f"rollouts named '{name}' were asked for twice in one batch")
        fresh, rows = not self.names, len(problems) * samples
        self.names.add(name)
        width = self.method.response_length()
        uniforms = self.draws(name, (self.ranks * rows, width), self.batch, "uniform")[self.rank * rows:(self.rank + 1) * rows]
        texts = [self.pool[i].prompt for i in problems]
        out = self.method.generate(texts, samples, uniforms.to(self.method.device()), temperature, adjust, fresh=fresh)
        self.responses += self.ranks * rows
        each = [i for i in problems for _ in range(samples)]
        return self.verified(list(zip(each, out.texts)), out, samples)

    def verified(self, written: list[tuple[int, str]], out, samples: int) -> dict[str, Tensor]:
        """Verdicts beside what was sampled. written: (number of the problem, response) of every row."""
        device = out.response.device
        verdicts = [self.world.judge(self.pool[i], text) for i, text in written]
        rewards = [self.world.rewarded(self.pool[i], text, v) for (i, text), v in zip(written, verdicts)]
        answers: dict[str, int] = {}
        told = [-1 if v.answer is None else answers.setdefault(v.answer, len(answers)) for v in verdicts]
        numbers = torch.tensor([[v.correct, v.format, r] for v, r in zip(verdicts, rewards)]).to(device)
        whole = torch.tensor([[a, i] for a, (i, _) in zip(told, written)]).to(device)
        return {"prompt": out.prompt, "prompt_mask": out.prompt_mask, "response": out.response, "mask": out.mask.float(),
                "log_prob": out.log_prob, "group": torch.arange(len(written), device=device) // samples,
                "correct": numbers[:, 0], "format": numbers[:, 1], "reward": numbers[:, 2],
                "answer": whole[:, 0], "problem": whole[:, 1], "length": out.mask.sum(1).float()}

    # -- the order of the problems
    def _number(self, place: int) -> int:
        """The problem at `place` of the endless sequence of shuffled epochs; of a huge pool, simply the next one."""
        size = len(self.pool)
        if size > 1_000_000:
            return place
        if place // size != self.epoch:
            self.epoch, self.order = place // size, list(range(size))
            random.Random(f"{self.method.seed}/order/{self.epoch}").shuffle(self.order)
        return self.order[place % size]

    def counters(self):
        return {"responses": self.responses}

    def state_dict(self):
        return {"batch": self.batch, "asked": self.asked, "responses": self.responses}

    def load_state_dict(self, state):
        self.batch, self.asked, self.responses = state["batch"], state["asked"], state["responses"]


class Demonstrations(Stream):
    """Problems of the task with what it demonstrates, `rows` a batch, a function of (seed, number of the row)."""

    def __init__(self, world: PromptWorld, method, problems, rows: int, start: dict[str, Tensor] | None = None):
        self.world, self.method, self.pool, self.rows, self.batch = world, method, problems, rows, 0
        self.start = start or {}

    def data(self):
        return {f"start/{k}": v for k, v in self.start.items()} or None

    def next(self):
        rank, ranks = self.method.processes
        first = (self.batch * ranks + rank) * self.rows
        prompts, responses = [], []
        for i in range(first, first + self.rows):
            rng = random.Random(f"{self.method.seed}/demonstration/{i}")
            problem = self.pool[rng.randrange(len(self.pool))]
            prompts.append(problem.prompt)
            responses.append(self.world.task.demonstrate(problem, rng))
        self.batch += 1
        prompt, prompt_mask = self.method.encode(prompts)
        response, mask = self.method.encode_responses(responses)
        return {"prompt": prompt, "prompt_mask": prompt_mask, "response": response, "mask": mask.float()}

    def state_dict(self):
        return {"batch": self.batch}

    def load_state_dict(self, state):
        self.batch = state["batch"]


class PromptWorld(World):
    """One task. Subclasses define make_task()."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        start: str = knob("shipped", "weights that reinforcement starts from: those in the project (of a policy as it stands in "
                          "policy=small), those that `data build` made here, or none: random ones",
                          choices=["shipped", "own", "none"])
        own: str = knob("", "name of the start that `data build` makes", source="project's choice")
        data_size: str = knob("claim", "size of its recipe", choices=["smoke", "claim", "paper"])
        rows: int = knob(128, "demonstrations a batch", low=1)
        eval_prompts: int = knob(196, "held-out prompts that are evaluated", low=1)
        eval_samples: int = knob(32, "responses to each of them, at temperature 1", low=1)
        judged: str = knob("held_out", "what is evaluated: held-out prompts, or the pool that test-time training adapts to",
                           choices=["held_out", "unlabelled"])
        response_length: int = knob(0, "most tokens of a response; 0: the task's own", low=0)

    metrics = {
        "pass_1": Metric("max", "", "share of sampled responses that are correct"),
        "pass_4": Metric("max", "", "unbiased pass@4: a correct one among 4"),
        "pass_16": Metric("max", "", "unbiased pass@16"),
        "pass_area": Metric("max", "", "mean of pass@1, 2, 4, 8, 16: the area under pass@k over log k"),
        "maj_8": Metric("max", "", "the most common answer of 8 is correct"),
        "greedy": Metric("max", "", "share of greedy responses that are correct"),
        "coverage": Metric("max", "solutions", "distinct correct responses among 16, a prompt"),
        "entropy": Metric("none", "nats", "exact entropy of a token, mean over all response tokens"),
        "length": Metric("none", "tokens", "of a response"),
        "format": Metric("max", "", "share of the required form"),
        "invalid_mass": Metric("min", "", "probability given to tokens that no well-formed response has there"),
    }

    def __init__(self, config, device="cpu"):
        super().__init__(config, device)
        key = (type(self), dataclasses.astuple(config))  # a task never changes: worlds made alike share it
        if key not in _TASKS:
            while len(_TASKS) >= 8:
                _TASKS.pop(next(iter(_TASKS)))
            _TASKS[key] = self.make_task()
        self.task = _TASKS[key]

    def make_task(self) -> Task:
        raise NotImplementedError

    def spec(self) -> Spec:
        t = self.task
        return Spec(alphabet=t.alphabet, end=t.eos, prompt_length=t.prompt_length,
                    response_length=self.config.response_length or t.response_length)

    def stream(self, method, kind, seed):
        if kind == "demonstrations":
            return Demonstrations(self, method, self.task.train(), self.config.rows, self._start() if self.continues() else None)
        pool = self.task.unlabelled() if kind == "unlabelled" else self.task.train()
        return Prompts(self, method, pool, self._start())

    def judge(self, problem: Problem, response: str) -> Verdict:
        try:
            return self.task.verify(problem, response)
        except Exception as error:  # a verifier that raises is a bug of the task: say on what
            raise blamed(f"the verifier of {type(self.task).__name__}", error, problem.prompt, response) from error

    def rewarded(self, problem: Problem, response: str, verdict: Verdict) -> float:
        try:
            return float(self.reward(verdict))
        except Exception as error:
            raise blamed(f"the reward of {type(self).__name__}", error, problem.prompt, response) from error

    def reward(self, verdict: Verdict) -> float:
        """What is rewarded of a verdict."""
        return verdict.correct

    # -- starting weights
    def continues(self) -> bool:
        """Whether demonstrations go on from the starting weights, instead of making them."""
        return False

    def starts(self) -> Path:
        """The folder of the shipped ones."""
        return STARTS

    def _start(self) -> dict[str, Tensor]:
        return starts.load(self.config, self.starts())

    def collect(self, runs, folder):
        """The weights of the run `start`, and how good they are."""
        method = runs["start"].method
        figures = self.evaluate(method, 0)
        return starts.keep(method.policy, folder, figures, next(k for k in self.metrics if k in figures))

    # -- gold metrics
    def evaluate(self, method, seed):
        """Held-out prompts, `eval_samples` responses each at temperature 1, and one greedy."""
        pool = self.task.held_out() if self.config.judged == "held_out" else self.task.unlabelled()
        return self.assess(method, seed, [p for p, _ in zip(pool, range(self.config.eval_prompts))])

    def details(self, problems: list[Problem], responses: list[list[tuple[str, Verdict]]]) -> dict[str, float]:
        """Further gold metrics from the responses to each problem and their verdicts. What nothing was seen of is left out."""
        return {}

    def assess(self, method, seed: int, problems: list[Problem]) -> dict[str, float]:
        n, width = self.config.eval_samples, method.response_length()
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(problems) * n, width, generator=generator)
        parts = []  # some thousand responses at once
        size = max(1, 4096 // n)
        for begin in range(0, len(problems), size):
            some, numbers = problems[begin:begin + size], uniforms[begin * n:(begin + size) * n].to(method.device())
            parts.append((some, method.complete([p.prompt for p in some], n, numbers, fresh=not begin)))
        texts = [t for _, out in parts for t in out.texts]
        verdicts = [self.judge(problems[i // n], t) for i, t in enumerate(texts)]
        groups = [verdicts[i * n:(i + 1) * n] for i in range(len(problems))]
        correct = [sum(v.correct > 0 for v in g) for g in groups]
        figures = {"pass_1": sum(correct) / len(texts)}
        at = {k: sum(pass_at(n, c, k) for c in correct) / len(correct) for k in (1, 2, 4, 8, 16) if k <= n}
        figures |= {f"pass_{k}": at[k] for k in (4, 16) if k in at}
        if len(at) == 5:  # neither a sharp policy nor a broad one that never learned has the best of it
            figures["pass_area"] = sum(at.values()) / 5
        if n >= 8:
            figures["maj_8"] = sum(majority(g, 8, seed + i) for i, g in enumerate(groups)) / len(groups)
        figures["coverage"] = sum(len({c for t, v in zip(texts[i * n:i * n + min(n, 16)], g) if v.correct
                                       and (c := self.task.canonical(problems[i], t)) is not None})
                                  for i, g in enumerate(groups)) / len(groups)
        figures["format"] = sum(v.format for v in verdicts) / len(verdicts)
        figures |= self._tokens(method, parts)
        figures |= self.details(problems, [list(zip(texts[i * n:(i + 1) * n], g)) for i, g in enumerate(groups)])
        greedy = method.complete([p.prompt for p in problems], 1, uniforms[:len(problems)].to(method.device()), 0.0, fresh=False)
        figures["greedy"] = sum(self.judge(p, t).correct for p, t in zip(problems, greedy.texts)) / len(problems)
        return figures

    def _tokens(self, method, parts) -> dict[str, float]:
        """Entropy, length and invalid mass over all sampled tokens."""
        entropy = tokens = rows = invalid = known = 0.0
        for problems, out in parts:
            n = len(out.texts) // len(problems)
            for part in torch.arange(len(out.texts)).split(512):
                some = {k: getattr(out, k)[part.to(out.mask.device)] for k in ("prompt", "prompt_mask", "response", "mask")}
                with torch.no_grad():
                    entropy += method.score(some)["entropy"].sum().item()
            tokens, rows = tokens + out.mask.sum().item(), rows + len(out.texts)
            if rows <= 4096 and self.task.valid_next(problems[0], "") is not None and method.tokenizer.size <= 4096:
                keep = torch.arange(0, len(out.texts), n, device=out.mask.device)  # one response a prompt
                one = out._replace(texts=out.texts[::n], **{k: getattr(out, k)[keep] for k in out._fields if k != "texts"})
                mass, count = invalid_mass(self.task, problems, one, method)
                invalid, known = invalid + mass, known + count
        out = {"entropy": entropy / max(tokens, 1), "length": tokens / max(rows, 1)}
        return out | ({"invalid_mass": invalid / known} if known else {})


# ---- metrics ---------------------------------------------------------------------------------------------------------------

def blamed(what: str, error: Exception, prompt: str, response: str) -> RuntimeError:
    return RuntimeError(f"{what} raised {type(error).__name__}: {error}\nprompt {prompt!r}, completion {response!r}")


def share(values) -> float | None:
    """The mean of some numbers or truths; None of nothing."""
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else None


def known(**figures: float | None) -> dict[str, float]:
    """The figures that are there."""
    return {k: v for k, v in figures.items() if v is not None}


def pass_at(samples: int, correct: int, k: int) -> float:
    """Unbiased pass@k from `samples` responses of which `correct` are: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    if samples - correct < k:
        return 1.0
    missed = 1.0
    for j in range(samples - correct + 1, samples + 1):
        missed *= 1 - k / j
    return 1 - missed


def majority(verdicts: list[Verdict], k: int, seed: int, repeats: int = 8) -> float:
    """maj@k: mean over `repeats` random k-subsets of [the most common answer is correct], ties broken at random. Responses
    without an answer do not vote."""
    rng, right = random.Random(f"majority/{seed}"), 0.0
    for _ in range(repeats):
        votes = [v for v in rng.sample(verdicts, k) if v.answer is not None]
        if votes:
            count = Counter(v.answer for v in votes)
            best = max(count.values())
            winner = rng.choice([a for a, c in count.items() if c == best])
            right += float(next(v.correct for v in votes if v.answer == winner) > 0)
    return right / repeats


def invalid_mass(task: Task, problems: list[Problem], out, method) -> tuple[float, int]:
    """(sum over response tokens of the probability of characters that cannot follow, number of tokens looked at)."""
    probability = method.distributions(out).exp().cpu()
    tokens, total, count = {c: method.tokenizer.encode_response(c)[0] for c in task.alphabet}, 0.0, 0
    for problem, text, row in zip(problems, out.texts, probability):
        for t in range(len(text)):
            allowed = task.valid_next(problem, text[:t])
            if not allowed:  # the response has left the form already
                break
            total += 1 - row[t, [tokens[c] for c in allowed]].sum().item()
            count += 1
    return total, count
