"""Learning a policy from compared segments of behaviour: the algorithm that the methods for preferences change.

One update on pairs of segments sigma_1, sigma_2 of k steps and y, the probability that the second is preferred:

    log pi(a | s) := - |a - mu(s)|^2     mu a tanh MLP: a Gaussian of fixed width, the half and the constants dropped

    the first `bc_steps` updates
    1. imitation_loss      L = - mean log pi(a | s) over all steps of both segments
    from then on, with a new optimiser whose rate rises over `warmup` updates
    2. preference_loss     L = - mean log pi(a | s) over the preferred segments
    3. preference_penalty  added to L; zero here                                              (additive)

With `bc_steps` at the run's length this is behaviour cloning; with less, cloning and then supervised fine-tuning on what is
preferred. Actions are clipped to +-(1 - 1e-5). Dropout is on in updates only, and both segments pass in one batch.
Source: the supervised baseline of Hejna et al. (ICLR 2024, arXiv 2310.13639).
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from methods.common.networks import adam, describe_mlp, mlp
from runner.interface import Method, Spec, knob


class SegmentPolicy(Method):
    @dataclasses.dataclass(frozen=True)
    class Config:
        hidden: tuple[int, ...] = knob((512, 512), "widths of the policy's hidden layers", low=1, source="paper, app. D")
        learning_rate: float = knob(1e-4, "Adam's, in both phases", low=0.0, source="paper, app. D")
        bc_steps: int = knob(200_000, "updates of imitation before preferences are learned from", low=0,
                             source="paper, app. D")
        warmup: int = knob(10_000, "updates over which the second phase's learning rate rises", low=0, source="official code")
        dropout: float = knob(0.25, "share of hidden units left out in updates", low=0.0, high=0.9, source="paper, app. D")

    PARTS = ("imitation_loss", "preference_loss", "preference_penalty")
    ADDITIVE = ("preference_penalty",)
    batchable = True

    # -- networks
    def setup(self, spec: Spec):
        c = self.config
        self.policy = mlp(spec.observation_size, c.hidden, spec.action_size, squash=True, seeds=spec.seeds)
        for layer in self.policy:
            if isinstance(layer, nn.Linear):  # stacked seeds take the states of single ones
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)  # the policy as imitation left it

    def make_optimizers(self):
        """One for each phase: keeping Adam's moments from imitation destabilises what follows."""
        c = self.config
        self.optimizers = {name: adam(self.policy.parameters(), c.learning_rate) for name in ("imitation", "preference")}

    # -- the algorithm
    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: observation (…, B, 2, k, S), action (…, B, 2, k, A), preferred (…, B)."""
        c, number = self.config, self.updates - self.config.bc_steps
        if number == 0:
            self.reference.load_state_dict(self.policy.state_dict())
        log_prob = self.log_prob(batch["observation"], batch["action"], "dropout")
        if number < 0:
            loss, name = self.imitation_loss(batch, log_prob), "imitation"
        else:
            loss, name = self.preference_loss(batch, log_prob), "preference"
            penalty = self.preference_penalty(batch, log_prob)
            loss = loss if penalty is None else loss + penalty
            for group in self.optimizers[name].param_groups:
                group["lr"] = self.rate() * min(1.0, (number + 1) / max(1, c.warmup))
        self.minimise(loss, name)
        with torch.no_grad():
            first, second = log_prob.mean(-1).unbind(-1)  # (…, B)
            y = batch["preferred"]
            return {"loss": loss.detach(), "log_prob_preferred": (y * second + (1 - y) * first).mean(-1),
                    "log_prob_dispreferred": ((1 - y) * second + y * first).mean(-1),
                    "accuracy": (0.5 * (1 + (second - first).sign() * (2 * y - 1))).mean(-1)}

    def rate(self) -> float:
        """The second phase's peak learning rate."""
        return self.config.learning_rate

    def log_prob(self, observation: Tensor, action: Tensor, dropout: str = "", net: nn.Sequential | None = None) -> Tensor:
        """(…, S), (…, A) -> (…); `dropout` names this pass's random numbers, empty: none is left out."""
        action = action.clamp(-1 + 1e-5, 1 - 1e-5)
        return -(action - self._mean(observation, dropout, net or self.policy)).square().sum(-1)

    def _mean(self, observation: Tensor, dropout: str, net: nn.Sequential) -> Tensor:
        share, lead = self.config.dropout, 1 if hasattr(net[0], "weight") and net[0].weight.dim() == 3 else 0
        x = observation.flatten(lead, -2)  # (…seeds, rows, S)
        for i, layer in enumerate(net):
            x = layer(x)
            if dropout and share > 0 and isinstance(layer, nn.ReLU):
                kept = self.noise(f"{dropout}{i}", x.shape[-2:], "uniform") >= share
                x = x * kept / (1 - share)
        return x.view(*observation.shape[:-1], -1)

    # -- parts
    def imitation_loss(self, batch, log_prob: Tensor) -> Tensor:
        """log_prob (…, B, 2, k) -> (…)"""
        return -log_prob.mean((-3, -2, -1))

    def preference_loss(self, batch, log_prob: Tensor) -> Tensor:
        """log_prob (…, B, 2, k) -> (…)"""
        first, second = log_prob.mean(-1).unbind(-1)
        y = batch["preferred"]
        return -(y * second + (1 - y) * first).mean(-1)

    def preference_penalty(self, batch, log_prob: Tensor) -> Tensor | None:
        """Added to the second phase's loss; overriders add to super()'s (None counts as zero)."""
        return None

    # -- what a world asks for
    @torch.no_grad()
    def act(self, observation: Tensor, explore: bool) -> Tensor:
        """mu(s); there is no other exploration than what the data hold."""
        return self.policy(observation)

    @torch.no_grad()
    def score_segments(self, observation: Tensor, action: Tensor) -> Tensor:
        """How good the method thinks segments are: observation (n, k, S), action (n, k, A) -> (n,)"""
        return self.log_prob(observation, action).sum(-1)

    def export(self):
        return dict(self.policy.state_dict()), describe_mlp(self.policy)
