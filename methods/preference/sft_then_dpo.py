"""SFT, then DPO from its result, in one run: what the rate of the first does to the second (Wang et al. 2025, arXiv 2507.00018).

    updates 1 … sft_steps      imitation of the preferred responses at the rate sft_rate:
                                   sft         L = - sum_it m_it log pi(y_it) / sum_it m_it
                                   pearson, …  L = - mean_i phi(imitation_beta rho_i),   rho = log pi(y_w) - log pi_0(y_w)
    the rest                   pi_ref <- pi, and DPO:  L = - log sigma(beta (rho(y_w) - rho(y_l))),   rho = log pi - log pi_ref

phi as in methods/preference/f_sft.py, where a concave one holds imitation near pi_0, the policy as it was at the start. Imitation
as such has no such hold (its KL to pi_0 cancels against its reward); the paper's cheaper remedy is a learning rate of a quarter
to a tenth. A smaller rate is also less training at equal steps: compare it with fewer steps at the usual rate, too.

The two stages have optimisers of their own, both AdamW unless `optimizer` says otherwise of DPO's. The reference after SFT is
scored anew in every batch; before, its log-probabilities are the stored ones of pi_0. Gold metrics look back to where the run
began, to pi_0, as long as the env knows it. sft_steps=0 is DPO. Not reproduced: language models; demonstrations other than the
pairs'.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.preference.dpo import DPO
from methods.preference.f_sft import phi
from methods.preference.pairs import preferred
from methods.tokens import scoring
from methods.tokens.base import BETAS
from runner.errors import UserError
from runner.interface import knob


class SFTThenDPO(DPO):
    @dataclasses.dataclass(frozen=True)
    class Config(DPO.Config):
        sft_steps: int = knob(300, "updates of imitation before DPO begins; 0: DPO alone", low=0, source="project's choice")
        sft_rate: float = knob(1e-3, "AdamW's learning rate in them", low=0.0, source="project's choice; paper: 5e-6 or 2e-6 in "
                               "the place of 2e-5")
        imitation: str = knob("sft", "its objective: the likelihood, or phi of an f-divergence",
                              choices=["sft", "pearson", "hellinger", "kl"], source="paper")
        imitation_beta: float = knob(0.1, "z = imitation_beta rho", low=1e-6, source="project's choice",
                                     when={"imitation": "pearson", "sft_steps": 3})

    def stage(self):
        return int(self.updates >= self.config.sft_steps)

    def setup(self, spec):
        super().setup(spec)
        if self.config.sft_steps and self.reference is None:
            raise UserError("after SFT its result is the reference, which adapters cannot keep beside themselves\n"
                            "train all weights (policy.lora_rank=0), or the two stages as two runs: method.sft_steps=0")

    def make_optimizers(self):
        super().make_optimizers()
        if self.config.sft_steps:
            own = self.optimizers["policy"].param_groups[0]["params"]
            on_gpu = {"capturable": True} if self.capturable and own[0].is_cuda else {}
            self.optimizers["imitation"] = torch.optim.AdamW(own, lr=self.config.sft_rate, betas=BETAS, fused=True,
                                                             weight_decay=self.config.weight_decay, **on_gpu)

    def schedule(self, step, total):
        """Of DPO's steps alone."""
        super().schedule(step - self.config.sft_steps, max(total - self.config.sft_steps, 0))

    def update(self, batch):
        if not self.stage():
            return self.imitate(batch)
        if self.updates == self.config.sft_steps > 0:
            self.reference.load_state_dict(self.policy.state_dict())
        return super().update(batch)

    def pairs(self, batch):
        pairs = super().pairs(batch)
        if self.config.sft_steps and self.stage():
            pairs.reference = self.score_reference(self.rows(batch))["log_prob"].view(pairs.mask.shape)
        return pairs

    def imitate(self, batch) -> dict[str, torch.Tensor]:
        """One step on the preferred responses. Both sides are scored: where a pair is preferred with probability p, either side
        counts in that measure."""
        pairs, parameters = self.pairs(batch), self.optimizers["imitation"].param_groups[0]["params"]
        rows, told = self.rows(batch), {}
        for p in parameters:
            p.grad = None
        size = self.config.micro_rows or len(rows["mask"])
        for index in torch.arange(len(rows["mask"]), device=rows["mask"].device).split(size):
            whole = size >= len(rows["mask"])
            part = rows if whole else {k: v[index] for k, v in rows.items()}
            value = self.imitation(self.score(part, scoring.log_prob)["log_prob"], pairs, index)
            self.engine.backward(value)
            told["loss"] = told.get("loss", 0.0) + value.detach()
        self._step("imitation", parameters, self.config.gradient_norm, False)
        return told

    def imitation(self, log_prob, pairs, index) -> torch.Tensor:
        """The share of the loss that the rows `index` of (2 b,) have, of log-probabilities (n, T)."""
        c, share = self.config, torch.stack([pairs.label, 1 - pairs.label])
        mask, reference = (t.flatten(0, 1)[index] for t in (pairs.mask, pairs.reference))
        if c.imitation == "sft":
            tokens = self.engine.mean(preferred(pairs.length, pairs.label).sum()).clamp(min=1)
            return -(share.flatten()[index] * (log_prob * mask).sum(1)).sum() / tokens
        z = c.imitation_beta * ((log_prob - reference) * mask).sum(1)
        return -(share.flatten()[index] * phi(z, c.imitation)).sum() / len(pairs.label)
