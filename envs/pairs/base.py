"""Worlds of preferences: prompts, each with a preferred and a dispreferred response.

Kinds of batches beside those of envs/prompts/base.py and envs/pairs/duels.py, dicts of tensors with b rows:

    pairs     prompt, prompt_mask (b, Tp); chosen, chosen_mask, rejected, rejected_mask (b, T); label (b,): the probability that
              chosen beats rejected, 1 unless the data knows it; pair (b,): number of the pair; and, where the task's pairs have
              them, chosen_phrase, rejected_phrase (b, T): number of the phrase that a token belongs to, 0 for what both
              sides share; chosen_score, rejected_score (b,): further rewards that the data has of both

Stored rows are handed out in shuffled epochs, a function of (seed, epoch); `batch_size` 0 hands out all of them at once.
Pairs whose two sides are the same tokens (written so, or cut to the same response_length) say nothing of a preference: they are
dropped, and the record of a run tells how many (`provenance`).
Gold metrics look at responses that the policy samples to held-out prompts, beside those that it sampled at its start (the
reference), and at held-out pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from envs.pairs.duels import Duels
from envs.pairs.task import Pair, PairTask
from envs.prompts.base import Prompts, PromptWorld
from runner.errors import UserError
from runner.interface import Metric, Stream, knob

SIDES = ("chosen", "rejected")
AT_ONCE = 512  # rows that are scored at once in evaluation


class Stored(Stream):
    """Rows of a data set, `rows` a batch and process; 0: all of them."""

    lookahead = 10  # as many updates as a captured graph may hold

    def __init__(self, columns: dict[str, Tensor], start: dict[str, Tensor], rows: int, seed: int, processes=(0, 1),
                 more: dict[str, Tensor] | None = None):
        """`more`: what a method may look at before training besides, under names with a slash."""
        self.columns, self.start, self.seed, self.taken, self.more = columns, start, seed, 0, more or {}
        self.rank, self.ranks = processes
        self.rows = rows
        self.replace(columns)
        self.device = next(iter(columns.values())).device
        self.places = torch.zeros(self.lookahead, max(rows, 1), dtype=torch.int64, device=self.device)

    def data(self):
        return {**{f"start/{k}": v for k, v in self.start.items()}, **self.more, **self.columns}

    def replace(self, data):
        self.columns, self.size = data, len(next(iter(data.values())))
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        if self.rows * self.ranks > self.size:
            raise UserError(f"env.batch_size={self.rows} on {self.ranks} process(es), but there are {self.size} rows to train "
                            f"on\ntake at most {self.size // self.ranks}, or 0 for all of them at once")

    def ready(self, number):
        if self.rows:
            index = torch.stack([self._index(self.taken + i) for i in range(number)])
            places = torch.arange(self.taken, self.taken + number) % self.lookahead
            self.places.index_copy_(0, places.to(self.device), index.to(self.device))

    def take(self):
        index = self.places[self.taken % self.lookahead]
        self.taken += 1
        return {k: v[index] for k, v in self.columns.items()} if self.rows else dict(self.columns)

    def _index(self, batch: int) -> Tensor:
        """Rows of a batch, on the host."""
        batches = self.size // (self.rows * self.ranks)  # of an epoch; what is left over changes with the order
        epoch, place = divmod(batch, batches)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self._order = epoch, torch.randperm(self.size, generator=generator)
        first = (place * self.ranks + self.rank) * self.rows
        return self._order[1][first:first + self.rows]

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


class Rated(Prompts):
    """Prompts whose responses are rewarded by a fitted reward model; `correct` stays the judge's."""

    def verified(self, written, out, samples):
        batch = super().verified(written, out, samples)
        batch["reward"] = self.rater(batch)
        return batch


def encode_pairs(method, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The columns of a batch `pairs`, for all of them."""
    prompt, prompt_mask = method.encode([p.prompt for p in pairs])
    out = {"prompt": prompt, "prompt_mask": prompt_mask}
    for side in SIDES:
        ids, mask = method.encode_responses([getattr(p, side) for p in pairs])
        out |= {side: ids, f"{side}_mask": mask.float()}
    device = prompt.device
    out |= {"label": torch.tensor([float(p.label) for p in pairs], device=device),
            "pair": torch.arange(len(pairs), device=device)}
    if all(p.phrases for p in pairs):
        for side, column in zip(SIDES, zip(*(p.phrases for p in pairs))):
            phrase = torch.zeros_like(out[side])
            for i, row in enumerate(column):
                phrase[i, :len(row)] = torch.tensor(row, device=device)[:phrase.shape[1]]
            out[f"{side}_phrase"] = phrase
    if all(p.scores for p in pairs):
        for side, column in zip(SIDES, zip(*(p.scores for p in pairs))):
            out[f"{side}_score"] = torch.tensor(column, device=device, dtype=torch.float32)
    return out


class PairWorld(PromptWorld):
    """Subclasses define make_task() -> PairTask."""

    task: PairTask

    @dataclasses.dataclass(frozen=True)
    class Config(PromptWorld.Config):
        batch_size: int = knob(64, "pairs a batch; 0: all of them", low=0)
        limit: int = knob(0, "pairs to learn from at most, the first ones; 0: all", low=0)
        judge_run: str = knob("", "folder of a finished run of method=reward_model on this env, whose ratings of sampled "
                              "responses are rewarded in the place of the true judge's")

    told: dict | None = None  # of the pairs that were handed out

    metrics = {
        "reward": Metric("max", "", "true reward of a sampled response to a held-out prompt"),
        "win_rate": Metric("max", "", "share of sampled responses that are truly better than the reference's; ties count half"),
        "kl": Metric("none", "nats", "KL(policy || reference) of a response, from the policy's samples"),
        "kl_from_reference": Metric("none", "nats", "KL(reference || policy) of a response, from the reference's samples"),
        "accuracy": Metric("max", "", "share of held-out pairs whose chosen response has gained more log-probability, or is "
                           "rated higher"),
        "chosen": Metric("max", "nats", "change of a held-out chosen response's log-probability"),
        "rejected": Metric("none", "nats", "change of a held-out rejected response's log-probability"),
        "drift": Metric("min", "nats", "KL(reference || policy) of a token, exact, on old responses that no preference is about"),
        "entropy": Metric("none", "nats", "exact entropy of a token, mean over all response tokens"),
        "length": Metric("none", "tokens", "of a response"),
        "distinct": Metric("max", "", "share of different responses among those sampled to a prompt"),
        "format": Metric("max", "", "share of the required form"),
    }

    def stream(self, method, kind, seed):
        self.method = method
        if kind == "pairs":
            return self.stored(method, self.task.pairs())
        if kind == "duels":
            return Duels(self, method, self.task.train(), self._start())
        stream = super().stream(method, kind, seed)
        if self.config.judge_run and kind in ("prompts", "unlabelled"):
            stream = Rated(self, method, stream.pool, stream.start)
            stream.rater = method.rater(self.judging_weights())
        return stream

    def judging_weights(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        path = Path(self.config.judge_run) / "weights.safetensors"
        if not path.is_file():
            raise UserError(f"env.judge_run={self.config.judge_run} is no folder of a finished run: {path.name} is not there\n"
                            "runs and their folders: python -m runner results method=reward_model")
        return load_file(path)

    def stored(self, method, pairs: Sequence[Pair]) -> Stored:
        """The stream of these pairs, without those whose sides are the same."""
        pairs = pairs[:self.config.limit or None]
        if not pairs:
            raise UserError("this env has no training pairs")
        columns = encode_pairs(method, pairs)
        differ = ((columns["chosen"] != columns["rejected"]) | (columns["chosen_mask"] != columns["rejected_mask"])).any(1)
        number = int(differ.sum())
        self.told = {"pairs": number, "identical": len(pairs) - number, "digest": digest(pairs)}
        if not number:
            raise UserError(f"none of the {len(pairs)} pairs has two different responses\n"
                            "allow longer ones (env.response_length) if they are cut off before they differ")
        columns = {k: v[differ] for k, v in columns.items()}
        return Stored(columns, self._start(), self.config.batch_size, method.seed, method.processes)

    def provenance(self):
        return {} if self.told is None else self.told

    def preferred(self, problem, response: str, other: str) -> float:
        """The probability that `response` is preferred to `other`: here the one of greater true reward wins."""
        mine, theirs = self.true_reward(problem, response), self.true_reward(problem, other)
        return 0.5 if mine == theirs else float(mine > theirs)

    def starts(self):
        return Path(__file__).with_name("starts")

    # -- gold metrics
    def reference(self, method):
        """The method with its policy as it was at the start; None where that is not known."""
        start = {} if method.blueprint.own_weights else self._start()
        if start:
            return method.with_weights({k: v.to(method.device()) for k, v in start.items()})
        return method.with_weights()

    def evaluate(self, method, seed):
        with torch.no_grad():
            if getattr(method, "judges", False):
                return self.on_ratings(method)
            reference = self.reference(method)
            problems = [p for p, _ in zip(self.judged_problems(method), range(self.config.eval_prompts))]
            out = self.sampled(method, reference, problems, seed) if problems else {}
            if getattr(method, "draws_of_one", 0):  # it chooses among draws: no token has a probability of its own
                return {k: v for k, v in out.items() if k not in ("kl", "kl_from_reference", "entropy")} | self.on_ratings(method)
            return {**out, **self.on_pairs(method, reference), **self.on_old(method, reference)}

    def judged_problems(self, method):
        """The held-out problems that responses are sampled to."""
        return self.task.held_out()

    def judged_pairs(self, method) -> Sequence[Pair]:
        """The held-out pairs."""
        return self.task.held_out_pairs()

    def true_reward(self, problem, response: str) -> float:
        verdict = self.judge(problem, response)
        return verdict.correct if verdict.score is None else verdict.score

    def sampled(self, method, reference, problems, seed) -> dict[str, float]:
        n, width = self.config.eval_samples, method.response_length()
        uniforms = torch.rand(2, len(problems) * n, width, generator=torch.Generator().manual_seed(seed)).to(method.device())
        prompts = [p.prompt for p in problems]
        own = method.complete(prompts, n, uniforms[0])
        verdicts = [self.judge(problems[i // n], t) for i, t in enumerate(own.texts)]
        rewards = torch.tensor([v.correct if v.score is None else v.score for v in verdicts])
        rows = rows_of(own)
        scored, mask = in_parts(method, rows), own.mask.float()
        out = {"reward": rewards.mean().item(), "length": mask.sum(1).mean().item(),
               "entropy": ((scored["entropy"] * mask).sum() / mask.sum()).item(),
               "format": sum(v.format for v in verdicts) / len(verdicts),
               "distinct": sum(len(set(own.texts[i * n:(i + 1) * n])) for i in range(len(problems))) / len(own.texts)}
        out |= self.details(problems, [list(zip(own.texts[i * n:(i + 1) * n], verdicts[i * n:(i + 1) * n]))
                                       for i in range(len(problems))])
        if reference is not None:
            theirs = reference.complete(prompts, n, uniforms[1])
            others = torch.tensor([self.true_reward(problems[i // n], t) for i, t in enumerate(theirs.texts)])
            gaps = rewards.view(len(problems), n, 1) - others.view(len(problems), 1, n)
            back = rows_of(theirs)
            out |= {"win_rate": (torch.sign(gaps) / 2 + 0.5).mean().item(),
                    "kl": total(scored, own).sub(total(in_parts(reference, rows), own)).mean().item(),
                    "kl_from_reference": total(in_parts(reference, back), theirs)
                    .sub(total(in_parts(method, back), theirs)).mean().item()}
        return out

    def on_pairs(self, method, reference) -> dict[str, float]:
        pairs = self.judged_pairs(method)
        if not pairs or reference is None:
            return {}
        columns, change = encode_pairs(method, pairs), {}
        for side in SIDES:
            rows = {"prompt": columns["prompt"], "prompt_mask": columns["prompt_mask"], "response": columns[side],
                    "mask": columns[f"{side}_mask"]}
            change[side] = (in_parts(method, rows)["log_prob"] - in_parts(reference, rows)["log_prob"]).sum(1)
        gap = change["chosen"] - change["rejected"]
        return {"accuracy": (torch.sign(gap) / 2 + 0.5).mean().item(), "chosen": change["chosen"].mean().item(),
                "rejected": change["rejected"].mean().item()}

    def on_ratings(self, method) -> dict[str, float]:
        """Of a method that has learned to judge: held-out pairs that it rates as they should be."""
        columns = encode_pairs(method, self.task.held_out_pairs())
        rated = [method.rate({"prompt": columns["prompt"], "prompt_mask": columns["prompt_mask"], "response": columns[side],
                              "mask": columns[f"{side}_mask"]}) for side in SIDES]
        gap = rated[0] - rated[1]
        return {"accuracy": (torch.sign(gap) / 2 + 0.5).mean().item(), "chosen": rated[0].mean().item(),
                "rejected": rated[1].mean().item()}

    def on_old(self, method, reference) -> dict[str, float]:
        old = self.task.old()
        if not old or reference is None:
            return {}
        prompt, prompt_mask = method.encode([p for p, _ in old])
        response, mask = method.encode_responses([r for _, r in old])
        rows = Rows(prompt, prompt_mask, response, mask)
        theirs, mine = (m.distributions(rows) for m in (reference, method))
        kl = (theirs.exp() * (theirs - mine)).sum(-1)
        return {"drift": ((kl * mask).sum() / mask.sum()).item()}


@dataclasses.dataclass
class Rows:
    """Rows as `distributions` wants them."""

    prompt: Tensor
    prompt_mask: Tensor
    response: Tensor
    mask: Tensor


def rows_of(out) -> dict[str, Tensor]:
    return {"prompt": out.prompt, "prompt_mask": out.prompt_mask, "response": out.response, "mask": out.mask.float()}


def in_parts(method, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """method.score of any number of rows: held-out sets of files have thousands, of hundreds of tokens each."""
    index = torch.arange(len(rows["response"]), device=rows["response"].device).split(AT_ONCE)
    told = [method.score({k: v[i] for k, v in rows.items()}) for i in index]
    return {k: torch.cat([t[k] for t in told]) for k in told[0]}


def total(scored: dict[str, Tensor], out) -> Tensor:
    """log pi(y) (B,) of whole responses."""
    return (scored["log_prob"] * out.mask).sum(1)


def digest(pairs: Sequence[Pair]) -> str:
    """What names a set of pairs, for records."""
    return hashlib.sha256("\n".join(map(repr, pairs)).encode()).hexdigest()[:16]
