"""CHES: pairs whose responses are too similar to a policy are left out (Razin et al. 2024, arXiv 2410.08847).

Training on a pair often lowers log pi(y_w), too; its probability moves to other responses, perhaps of opposite meaning. By the
paper's analysis of the gradient that is due to similar hidden states, which can be seen before training. With h_k, k of y, the
last layer's hidden states that predict the response's tokens (from the prompt's last token to the response's last but one) and
H = sum_k h_k:

    ches             <H_w, H_l> - |H_w|^2
    ches_normalised  <H_w, H_l> / (n_w n_l) - |H_w|^2 / n_w^2                       n the number of tokens
    edit_distance    minus the edit distance of the two, over the length of the longer one
    last_hidden      <h(y_w), h(y_l)>, the hidden states behind the last tokens
    gradient_ratio   <g_w, g_l> / min(|g_w|^2, |g_l|^2), g the gradients of log-likelihoods (2410.13828), for small policies
    random           a number; the control

Larger is more similar. Of the pairs, sorted by `score` as the policy at the start has it, those from the share `low` to the share
`high` are trained on; equal ones stand in a random order. What follows is any method's loss: `ches+ipo` and so on.

`inspect` is the study behind it: each of the given pairs is trained alone (STEPS steps of plain gradient descent at RATE from the
start, all at once), and what it tells is the rank correlation of score and change of log pi(y_w).

Differences: on padded batches the official code sums over padding and divides by its width; here response tokens alone count.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.preference.pairs import AT_ONCE, SIDES, PairPolicy
from methods.preference.single import Singles, by_side, condition_ratio, pull
from runner.errors import UserError
from runner.interface import knob

SCORES = ("ches_normalised", "ches", "edit_distance", "last_hidden", "gradient_ratio", "random")
STEPS, RATE, TOGETHER = 30, 0.05, 64  # of the study
NUMBERS = 2 ** 24  # of gradients that exist at once


class CHES(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        score: str = knob("ches_normalised", "what pairs are sorted by", source="paper", choices=[
            "ches_normalised", "ches", "edit_distance", "last_hidden", "gradient_ratio", "random"])
        low: float = knob(0.0, "share of the pairs, those of the lowest scores, that is left out", low=0.0, high=1.0,
                          when={"high": 1.0})
        high: float = knob(0.05, "share up to which they are kept", low=0.0, high=1.0, source="paper: 5 % for safety")

    def select(self, columns):
        c, kept = self.config, super().select(columns)
        if c.low == 0 and c.high == 1:
            return kept
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + 17)
        number = len(columns["chosen"])
        mixed = torch.randperm(number, generator=generator).to(columns["chosen"].device)
        place = torch.empty_like(mixed)
        place[mixed[self.scores(columns)[mixed].argsort(stable=True)]] = torch.arange(number, device=mixed.device)
        own = (place >= c.low * number) & (place < c.high * number)
        kept = own if kept is None else own & kept
        if not kept.any():
            raise UserError(f"none of the {number} pairs is kept: method.low={c.low}, method.high={c.high}\n"
                            "those from the share low to the share high of the sorted pairs are, so low must be less")
        return kept

    @torch.no_grad()
    def scores(self, columns: dict[str, Tensor]) -> Tensor:
        """(N,) of every pair, under the policy at the start."""
        name = self.config.score
        if name == "random":
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + 13)
            return torch.rand(len(columns["chosen"]), generator=generator).to(columns["chosen"].device)
        if name == "edit_distance":
            chosen, rejected = (columns[s].where(columns[f"{s}_mask"].bool(), -1 - i) for i, s in enumerate(SIDES))
            lengths = [columns[f"{s}_mask"].sum(1).long() for s in SIDES]
            return -edit_distance(chosen, rejected, *lengths) / torch.maximum(*lengths)
        size = AT_ONCE
        if name == "gradient_ratio":
            size = max(1, NUMBERS // sum(p.numel() for p in self.policy.parameters()))
        parts = torch.arange(len(columns["chosen"])).split(size)
        told = self.ratio if name == "gradient_ratio" else self.similarity
        return torch.cat([told({k: v[i] for k, v in columns.items()}) for i in parts])

    def similarity(self, columns: dict[str, Tensor]) -> Tensor:
        """CHES or its like of some pairs."""
        name = self.config.score
        (own, mine, last), (other, theirs, behind) = (self.hidden_sums(columns, side) for side in SIDES)
        if name == "last_hidden":
            return (last * behind).sum(-1)
        if name == "ches_normalised":
            own, other = own / mine, other / theirs
        return (own * other).sum(-1) - own.square().sum(-1)

    def hidden_sums(self, columns, side: str) -> tuple[Tensor, Tensor, Tensor]:
        """Of one side: H (b, width), n (b, 1), the hidden state behind the last token (b, width)."""
        prompt, mask = columns["prompt"], columns[f"{side}_mask"]
        whole = torch.cat([columns["prompt_mask"].bool(), mask.bool()], 1)
        with self.autocast():
            hidden = self.start().hidden(torch.cat([prompt, columns[side]], 1), whole).float()
        length = mask.sum(1, keepdim=True)
        predicting, at = hidden[:, prompt.shape[1] - 1:-1], hidden[:, prompt.shape[1]:]
        last = (length.long() - 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return (predicting * mask.unsqueeze(-1)).sum(1), length, at.gather(1, last).squeeze(1)

    def ratio(self, columns: dict[str, Tensor]) -> Tensor:
        singles = self.singles(columns)
        mask = torch.stack([columns[f"{s}_mask"] for s in SIDES])
        return condition_ratio(*(singles.gradients(w) for w in by_side(mask)))

    def start(self):
        """The policy as it was at the start, which it still is before training."""
        return self.reference if self.reference is not None else self.policy

    def singles(self, columns) -> Singles:
        return Singles(self.start(), columns, [k for k, v in self.policy.named_parameters() if v.requires_grad])

    # -- the study
    @torch.no_grad()
    def inspect(self, batch):
        """{rank_correlation} of the score of given pairs with the change of log pi(y_w) when each is trained alone, and the share
        of them whose log pi(y_w) falls; nothing where there is no copy of the start."""
        if self.reference is None:
            return {}
        parts = torch.arange(len(batch["chosen"])).split(TOGETHER)
        changes = torch.cat([self.alone({k: v[i] for k, v in batch.items()}) for i in parts])
        return {"rank_correlation": correlation(ranks(self.scores(batch)), ranks(changes)),
                "displaced": (changes < 0).float().mean()}

    def alone(self, columns: dict[str, Tensor]) -> Tensor:
        """(n,): the change of log pi(y_w) when each pair is trained alone."""
        singles = self.singles(columns)
        first = singles.log_probs()
        columns = {**columns, **{f"{s}_reference": first[i] for i, s in enumerate(SIDES)}}
        for _ in range(STEPS):
            singles.move(singles.gradients(pull(self, columns, singles.log_probs())), RATE)
        return (singles.log_probs() - first)[0].sum(-1)


def edit_distance(one: Tensor, other: Tensor, lengths: Tensor, others: Tensor) -> Tensor:
    """Levenshtein's (N,) of rows of numbers (N, T), of which the first `lengths` and `others` (N,) count."""
    number, width = one.shape
    place = torch.arange(width + 1, device=one.device)
    row = place.expand(number, -1)
    told = torch.where(lengths == 0, others, 0)
    for i in range(width):
        changed = torch.minimum(row[:, 1:] + 1, row[:, :-1] + (one[:, i:i + 1] != other))
        free = torch.cat([torch.full_like(row[:, :1], i + 1), changed], 1)
        row = (free - place).cummin(1).values + place  # insertions, one after the other
        told = torch.where(lengths == i + 1, row.gather(1, others.unsqueeze(1)).squeeze(1), told)
    return told


def ranks(x: Tensor) -> Tensor:
    """(N,) from 1 on; equal values share the mean of theirs."""
    return (x.unsqueeze(1) > x).sum(1) + ((x.unsqueeze(1) == x).sum(1) + 1) / 2


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's, a scalar; 0 if one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-12)
