"""Gradient entanglement: why both sides of a pair move together, and two ways out (Yuan et al. 2024, arXiv 2410.13828).

A margin loss moves the weights along d_w g_w - d_l g_l, g = grad log pi(y), d the loss's slopes (for DPO d_w = d_l =
beta sigma(-z)). To first order

    change of log pi(y_w) ~ d_w |g_w|^2 - d_l <g_w, g_l>          of log pi(y_l) ~ d_w <g_w, g_l> - d_l |g_l|^2

so for d_w = d_l the chosen side rises and the rejected one falls if and only if c = <g_w, g_l> / min(|g_w|^2, |g_l|^2) < 1.

Measured every `every` updates at the weights before them, on the first `probes` pairs of the batch, each for itself (single.py):

    ratio      c, the median of pairs (means are ruled by tiny denominators);  cosine  of g_w and g_l;  entangled  share of c > 1
    norms      chosen_norm |g_w|, rejected_norm |g_l|, medians
    foretold   share of sides whose log pi moves the way the first order says in one plain step of size `rate` on the pair alone

`mitigation`
    normalised    the step is along D (G_w / |G_w| - G_l / |G_l|), D the mean of d over the batch, G = grad mean_b[ d log pi(y) ]
                  of a side, d without gradient: to first order the chosen side never falls, nor does the rejected one rise
    sparse        s(y) = sum over tokens that the two sides do not share (phrases.py): RRPO without its KL
    none          DPO

d is what the loss asks of each log-probability, by automatic differentiation (`pull` in single.py): also of another method's loss
(`gradient_entanglement+cdpo`), its penalties left out of what is measured.

The first order holds for plain SGD (optimizer=sgd), not for Adam's preconditioned step, and for the pair alone: other pairs of a
batch move it, too. Both mitigations are reconstructions from the paper's summary; learned sparse masks with an L1 penalty are not
built. The official code's aggregate divides by min(|g_w|^2, |g_w|^2), a slip.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.preference.pairs import SIDES, PairPolicy
from methods.preference.phrases import differing
from methods.preference.single import Singles, by_side, combined, condition_ratio, inner, pull
from runner.interface import knob

TOLD = ("ratio", "cosine", "entangled", "chosen_norm", "rejected_norm", "foretold")
LEAST = 1e-12


class GradientEntanglement(PairPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(PairPolicy.Config):
        mitigation: str = knob("normalised", "what is changed about the step", choices=["none", "normalised", "sparse"],
                               source="paper; formulas reconstructed")
        every: int = knob(10, "updates between measurements; 0: none", low=0)
        probes: int = knob(8, "pairs that are measured", low=1, when={"every": 1})
        rate: float = knob(0.01, "size of the step by which the first order is tried", low=0.0, when={"every": 1})

    def setup(self, spec):
        super().setup(spec)
        self.register_buffer("measured", torch.zeros(len(TOLD)))

    @property
    def capturable(self):
        return super().capturable and not self.config.every

    def forks(self, rows):
        return self.config.mitigation != "normalised" and super().forks(rows)

    def worth(self, pairs):
        if self.config.mitigation != "sparse":
            return super().worth(pairs)
        return torch.where(differing(pairs.batch), pairs.ratio, 0.0).sum(-1)

    def update(self, batch):
        c = self.config
        if c.every and self.updates % c.every == 0:
            self.measured.copy_(self.entanglement({k: v[:c.probes] for k, v in batch.items()}))
        out = super().update(batch)
        return {**out, **dict(zip(TOLD, self.measured.clone().unbind()))} if c.every else out

    @torch.no_grad()
    def entanglement(self, columns: dict[str, Tensor]) -> Tensor:
        """The metrics TOLD of some pairs."""
        singles = Singles(self.policy, columns, [k for k, v in self.policy.named_parameters() if v.requires_grad])
        first = singles.log_probs()
        own, other = (singles.gradients(w) for w in by_side(torch.stack([columns[f"{s}_mask"] for s in SIDES])))
        weights = pull(self, columns, first)
        along, against = (singles.gradients(w) for w in by_side(weights))
        ones = torch.ones_like(first[0, :, 0])
        if self.config.mitigation == "normalised":
            step = combined(along, against, *(p / inner(g, g).sqrt().clamp(min=LEAST)
                                              for p, g in zip(pace(weights, columns), (along, against))))
        else:
            step = combined(along, against, ones, ones)
        expected = torch.stack([inner(own, step), inner(other, step)])
        singles.move(step, self.config.rate)
        moved = (singles.log_probs() - first).sum(-1)
        ratio, norms = condition_ratio(own, other), [inner(g, g).sqrt() for g in (own, other)]
        cosine = inner(own, other) / (norms[0] * norms[1]).clamp(min=LEAST)
        return torch.stack([ratio.median(), cosine.median(), (ratio > 1).float().mean(), *(n.median() for n in norms),
                            (expected.sign() == moved.sign()).float().mean()])

    def fit(self, rows, measure, temperature, loss, beside=None):
        """One step along the two sides' gradients, each divided by its norm; the gradient of each is made apart."""
        if self.config.mitigation != "normalised":
            return super().fit(rows, measure, temperature, loss, beside)
        number = len(rows["response"]) // len(SIDES)
        parameters = self.optimizers["policy"].param_groups[0]["params"]
        parts = [[(j + i * number, part) for j, part in self.pieces({k: v[i * number:(i + 1) * number] for k, v in rows.items()})]
                 for i in range(len(SIDES))]
        leaves = self._measured_parts([piece for side in parts for piece in side], measure, temperature, beside)
        value = loss(leaves)
        self.engine.backward(value)
        slopes = {k: v.grad for k, v in leaves.items() if v.grad is not None}
        mask = rows["mask"].unflatten(0, (len(SIDES), -1))
        paces = pace(slopes["log_prob"].view_as(mask), dict(zip((f"{s}_mask" for s in SIDES), mask)))
        gradients = [self.gradient(side, slopes, measure, temperature, beside, parameters) for side in parts]
        for p, *both in zip(parameters, *gradients):
            p.grad = sum(amount.sum() * g for amount, g in zip(paces, both))
        self._step("policy", parameters, self.config.gradient_norm, False)
        return value.detach()

    def gradient(self, pieces, slopes, measure, temperature, beside, parameters) -> list[Tensor]:
        """Of one side, divided by its norm."""
        for p in parameters:
            p.grad = None
        for index, part in pieces:
            again = self.score(part, measure, temperature, beside=beside)
            self.engine.backward(sum((again[k] * g[index]).sum() for k, g in slopes.items()))
        self.engine.synchronise(parameters)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        norm = torch.stack([g.square().sum() for g in found]).sum().sqrt().clamp(min=LEAST)
        return [g / norm for g in found]

    def pieces(self, rows: dict[str, Tensor]):
        """(numbers, tokens) of what goes through the policy at once."""
        return self._parts(rows) or [(torch.arange(len(rows["response"]), device=rows["response"].device), rows)]


def pace(weights: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """(2, b): how much the loss asks of each response, as a mean over its tokens."""
    mask = torch.stack([columns[f"{s}_mask"] for s in SIDES])
    return (weights.abs() * mask).sum(-1) / mask.sum(-1).clamp(min=1)
