"""Preference pairs: the algorithm that this family's methods on pairs change. As it stands it is DPO.

For a prompt x with a preferred response y_w and a dispreferred one y_l, with log-probabilities of tokens under the policy and
under the reference (the policy as it was at the start; its own are computed once, before training):

    0. select        which of the stored pairs are trained on, told once before training; all here   (additive: what all keep)
    1. measure       numbers of every response token from its logits: log_prob                        (additive)
    2. worth         s(y) (2, b) of both sides: rho(y) = sum_t [ log pi(y_t) - log pi_ref(y_t) ]
    3. margin        g (b,) that is taken off; none here                                             (additive)
    4. link          phi(z) (b,), z = beta (s_w - s_l) - g:  -p log sigma(z) - (1-p) log sigma(-z), p = P(y_w beats y_l),
                     1 where the data has no such probability
    5. weigh         w (b,), without gradient; 1 here                                                (additive: multiply)
    6. loss          L = mean_b[ w phi ]
    7. penalty       added to L; none here                                                           (additive)
    8. after_update  upkeep after the optimiser's step                                               (additive)

Both sides go through the policy in one pass. Log-probabilities are float32 sums over response tokens, prompts left out.
Policies over arms (policy=arms) are policies whose responses have one token: every method of this family runs on both.

Source: Rafailov et al. 2023 (DPO, arXiv 2305.18290).
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.tokens import scoring
from methods.tokens.base import TokenMethod
from methods.tokens.graphed import SMALL
from runner.interface import knob

SIDES = ("chosen", "rejected")
TIE = 1e-5  # nats: what differs by less is rounding
AT_ONCE = 256  # rows whose reference log-probabilities are computed at once, before training


class Pairs(SimpleNamespace):
    """A batch of b pairs on its way through the parts; every tensor with a leading axis of the two sides, chosen first:

    now          what `measure` told, {name: (2, b, T)}, with gradient;  log_prob = now["log_prob"]
    reference    log-probabilities under the reference, (2, b, T); zeros where the method needs none
    mask         (2, b, T);  length = mask.sum(-1)
    ratio        log_prob - reference (2, b, T);  rho = its sum over tokens (2, b)
    label        (b,) P(chosen beats rejected);  batch: the batch's own columns;  told: metrics, parts add theirs
    """


class PairPolicy(TokenMethod):
    @dataclasses.dataclass(frozen=True)
    class Config(TokenMethod.Config):
        beta: float = knob(0.1, "strength of the tie to the reference: beta rho is the implicit reward", low=0.0, source="paper")
        optimizer: str = knob("adamw", "plain sgd takes steps along the gradient itself", choices=["adamw", "sgd", "rmsprop"])

    PARTS = ("select", "measure", "worth", "margin", "link", "weigh", "loss", "penalty", "after_update")
    ADDITIVE = ("select", "measure", "margin", "weigh", "penalty", "after_update")

    _large: bool | None = None  # whether the policy is one whose passes over prompts are worth sharing
    own_samples = False         # whether an update samples responses, or looks at the host's numbers otherwise

    @property
    def capturable(self):
        """Small policies at a constant learning rate: an update is the same device work every time."""
        c = self.config
        return not (self.own_samples or c.warmup or c.decay != "constant" or c.micro_rows) and hasattr(self, "policy") and \
            not self.large()

    def needs_reference(self):
        return True

    def make_optimizers(self):
        c = self.config
        if c.optimizer == "adamw":
            return super().make_optimizers()
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        kind, more = torch.optim.SGD, {}
        if c.optimizer == "rmsprop":
            kind, more = torch.optim.RMSprop, {"capturable": True} if self.capturable and parameters[0].is_cuda else {}
        self.optimizers = {"policy": kind(parameters, lr=c.learning_rate, weight_decay=c.weight_decay, **more)}

    def prepare(self, data):
        """The pairs that are selected, and the reference's log-probability of each of their response tokens, as columns beside
        it: nothing of it is computed again. (N, T) float32 a side."""
        super().prepare(data)
        if "chosen" not in data:
            return None
        columns = {k: v for k, v in data.items() if "/" not in k}
        kept = self.select(columns)
        if kept is not None:
            columns = {k: v[kept] for k, v in columns.items()}
        if not self.needs_reference():
            return None if kept is None else columns
        asked = {k: columns[k] for k in ("prompt", "prompt_mask", *SIDES, *(f"{s}_mask" for s in SIDES))}
        return {**columns, **self.remembered("reference", {**asked, **self.reference_weights()},
                                             lambda: self.reference_columns(columns))}

    def reference_columns(self, columns) -> dict[str, Tensor]:
        """{side_reference: (N, T)}, the reference's log-probabilities of the stored pairs' tokens."""
        out = {}
        for side in SIDES:
            rows = {"prompt": columns["prompt"], "prompt_mask": columns["prompt_mask"], "response": columns[side],
                    "mask": columns[f"{side}_mask"]}
            parts = torch.arange(len(columns[side])).split(AT_ONCE)
            with self.autocast():  # in the precision that the policy's will have
                told = [self.score_reference({k: v[i] for k, v in rows.items()})["log_prob"] for i in parts]
            out[f"{side}_reference"] = torch.cat(told)
        return out

    def reference_weights(self) -> dict[str, Tensor]:
        """What the reference's log-probabilities depend on, beside the pairs. Adapters start as nothing."""
        policy = self.reference if self.reference is not None else self.policy
        return {f"weights/{k}": v for k, v in policy.state_dict().items() if "lora_" not in k}

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: prompt, prompt_mask (b, Tp); chosen, rejected, their _mask and _reference (b, T); label (b,)."""
        self.schedule(self.updates, self.planned)
        rows, pairs = self.rows(batch), self.pairs(batch)

        def loss(now: dict[str, Tensor]) -> Tensor:
            self.see(pairs, now)
            value, penalty = self.loss(pairs), self.penalty(pairs)
            return value if penalty is None else value + penalty

        value = self.fit(rows, self.measuring(), 1.0, loss, self.beside())
        with torch.no_grad():
            told = {"loss": value, **self.summary(pairs), **pairs.told}
        self.after_update(pairs)
        return told

    # -- the two sides of a pair as rows of one batch
    def rows(self, batch) -> dict[str, Tensor]:
        """chosen rows, then rejected ones: prompt, prompt_mask, response, mask (2 b, …). Where arithmetic takes the time, their
        prompts stay (b, …): both sides then share one pass over them."""
        b = len(batch["prompt"])
        times = 1 if self.forks(2 * b) else 2
        return {"prompt": batch["prompt"].repeat(times, 1), "prompt_mask": batch["prompt_mask"].repeat(times, 1),
                "response": torch.cat([batch[s] for s in SIDES]), "mask": torch.cat([batch[f"{s}_mask"] for s in SIDES])}

    def large(self) -> bool:
        if self._large is None:
            self._large = sum(p.numel() for p in self.policy.parameters()) > SMALL
        return self._large

    def forks(self, rows: int) -> bool:
        return self.large() and hasattr(self.policy, "model") and not 0 < self.config.micro_rows < rows

    def score(self, rows, measure=scoring.log_prob_and_entropy, temperature=1.0, policy=None, trunk=None, beside=None):
        texts = rows["prompt"], rows["prompt_mask"], rows["response"], rows["mask"].bool()
        if self.capturable and rows["prompt"].is_cuda:
            return scoring.score(policy or self.policy, *texts, measure, temperature, waits=False, beside=beside)
        if len(rows["prompt"]) == len(rows["response"]):
            return super().score(rows, measure, temperature, policy, trunk, beside)
        return scoring.score_forked(policy or self.policy, *texts, measure, temperature, beside)

    def pairs(self, batch) -> Pairs:
        mask = torch.stack([batch[f"{s}_mask"] for s in SIDES]).float()
        known = "chosen_reference" in batch
        reference = torch.stack([batch[f"{s}_reference"] for s in SIDES]) if known else torch.zeros_like(mask)
        return Pairs(batch=batch, mask=mask, length=mask.sum(-1), reference=reference, label=batch["label"], told={})

    def see(self, pairs: Pairs, now: dict[str, Tensor]):
        """Put what was measured of the rows (2 b, T) beside its pairs."""
        pairs.now = {k: v.view(pairs.mask.shape) for k, v in now.items()}
        pairs.log_prob = pairs.now["log_prob"]
        pairs.ratio = (pairs.log_prob - pairs.reference) * pairs.mask
        pairs.rho = pairs.ratio.sum(-1)

    def measuring(self):
        """The part `measure`, or, where it adds nothing, the quicker way of scoring.py."""
        return self.measure if self.measures_more() else scoring.log_prob

    def compares(self) -> bool:
        """Whether `measure` sees the logits of the policy at the start, too, at these settings; overriders ask super()."""
        return False

    def beside(self):
        """What fit and score want for that."""
        return self.start_policy() if self.compares() else None

    def measures_more(self) -> bool:
        """See methods/reasoning/base.py: whether `measure` has more to tell at these settings than the base."""
        return any("measure" in vars(c) and "measures_more" not in vars(c) for c in type(self).__mro__ if c is not PairPolicy)

    def summary(self, pairs: Pairs) -> dict[str, Tensor]:
        """Metrics: how far the log-probabilities of both sides have moved, the margin in them, the implicit accuracy."""
        chosen, rejected = pairs.rho.detach()
        gap = chosen - rejected
        return {"chosen": chosen.mean(), "rejected": rejected.mean(), "margin": gap.mean(), "fallen": (chosen < 0).float().mean(),
                "accuracy": (torch.sign(gap).where(gap.abs() > TIE, 0.0) / 2 + 0.5).mean()}

    def implicit_reward(self, rho: Tensor) -> Tensor:
        """What the policy's log-ratios say of rewards, up to a constant of the prompt; for worlds that know the true ones."""
        return self.config.beta * rho

    def difference(self, pairs: Pairs) -> Tensor:
        """z (b,) = beta (s_w - s_l) - g, as the parts worth and margin say."""
        s, margin = self.worth(pairs), self.margin(pairs)
        z = self.config.beta * (s[0] - s[1])
        return z if margin is None else z - margin

    # -- parts
    def select(self, columns: dict[str, Tensor]) -> Tensor | None:
        """Which of the N stored pairs are trained on, (N,) bool; overriders take them from among super()'s (None: all)."""
        return None

    def measure(self, logits: Tensor, target: Tensor, first: Tensor | None = None) -> dict[str, Tensor]:
        """logits (n, V), target (n,), for a method that `compares` the logits of the policy at the start (n, V) -> {name: (n,)};
        overriders add to super()'s."""
        return scoring.log_prob(logits, target)

    def worth(self, pairs: Pairs) -> Tensor:
        """s (2, b)"""
        return pairs.rho

    def margin(self, pairs: Pairs) -> Tensor | None:
        """g (b,), without gradient; overriders add to super()'s (None counts as zero)."""
        return None

    def link(self, z: Tensor, pairs: Pairs) -> Tensor:
        """phi (b,)"""
        return logistic(z, pairs.label)

    def weigh(self, z: Tensor, pairs: Pairs) -> Tensor | None:
        """w (b,), without gradient; overriders multiply super()'s (None counts as one)."""
        return None

    def loss(self, pairs: Pairs) -> Tensor:
        """L, a scalar"""
        z = self.difference(pairs)
        with torch.no_grad():
            weight = self.weigh(z.detach(), pairs)
        losses = self.link(z, pairs)
        return losses.mean() if weight is None else (weight * losses).mean()

    def penalty(self, pairs: Pairs) -> Tensor | None:
        """Added to the loss; overriders add to super()'s (None counts as zero)."""
        return None

    def after_update(self, pairs: Pairs):
        """After the optimiser's step; overriders call super()'s."""


def logistic(z: Tensor, p: Tensor) -> Tensor:
    """-p log sigma(z) - (1 - p) log sigma(-z), elementwise."""
    return -(p * F.logsigmoid(z) + (1 - p) * F.logsigmoid(-z))


def preferred(x: Tensor, p: Tensor) -> Tensor:
    """Of numbers x (2, b) of both sides that of the preferred one, (b,): x_w, and in between where p is."""
    return p * x[0] + (1 - p) * x[1]


def plus(penalty: Tensor | None, more: Tensor) -> Tensor:
    """A part's own term beside super()'s."""
    return more if penalty is None else penalty + more


def times(weight: Tensor | None, more: Tensor) -> Tensor:
    """A part's own weight beside super()'s."""
    return more if weight is None else weight * more
