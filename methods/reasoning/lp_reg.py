"""Lp-Reg: low-probability tokens that are plausible are kept alive (Huang et al. 2025, arXiv 2510.03222).

Of the tokens with a negative advantage, the rarest but plausible ones are punished too hard and die. They are pulled to a
cleaned copy of the policy that sampled:

    q(v)  = p_old(v) 1[p_old(v) >= kappa max p_old] / sum        proxy "min_p"; "fixed": 1[p_old(v) >= floor]
    S     = the `share` of the tokens with A < 0 whose lp is lowest, of those the ones with lp < lq = log q(o_t)
    l     = -A rho + beta (exp(d) - d - 1),  d = lq - lp         on S, in place of the clipped loss
          = the clipped loss with a wide range, rho in [0, 10]   elsewhere

A token that the proxy leaves out has lq = -1e4 and is never in S; one that has risen above the proxy leaves S. At rho = 1 the
pull is (1 - 1/kept mass) beta, about a hundredth of |A|: strictly on-policy the method does next to nothing, it acts as the
policy drifts from the one that sampled. For A = -1, beta = 1 and kept mass 1 the balance is at rho = 0.618.

Differences from the official code: it chooses S in every micro-batch (at share 0.01 nothing below 200 negative tokens, since one
token alone is left out), here in the minibatch; it bounds the pull at 10, where the gradient of tokens 13 times below the proxy
vanishes (`pull_cap`), here there is no bound but d's own of 20. The paper's 256 prompts, 14B policy and 1000 steps are not
reproduced: in 150 steps on countdown its strength shows nothing, share 0.1 and beta 10 little.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from methods.reasoning.base import GroupPolicy, kl
from runner.interface import knob

OUT = -1e4  # log-probability of what the proxy leaves out


@torch.no_grad()
def proxy_log_prob(logits: Tensor, target: Tensor, proxy: str, kappa: float, floor: float) -> Tensor:
    """lq (n,) of the targets."""
    lp = logits.log_softmax(-1)
    keep = lp.exp() >= (kappa * lp.exp().amax(-1, keepdim=True) if proxy == "min_p" else floor)
    mass = torch.where(keep, lp, -torch.inf).logsumexp(-1)  # -inf where nothing is kept
    at = target[:, None]
    return torch.where(keep.gather(-1, at), lp.gather(-1, at), OUT).squeeze(-1) - torch.where(keep.any(-1), mass, 0.0)


class LpReg(GroupPolicy):
    @dataclasses.dataclass(frozen=True)
    class Config(GroupPolicy.Config):
        share: float = knob(0.01, "of the tokens with a negative advantage that are looked at; 0: none", low=0.0, high=1.0,
                            source="paper")
        pull: float = knob(1.0, "beta: weight of the pull to the proxy", low=0.0, source="paper", when={"share": 0.3})
        proxy: str = knob("min_p", "what the proxy keeps: tokens above a share of the highest probability, or above a fixed one",
                          choices=["min_p", "fixed"], when={"share": 0.3, "kappa": 0.2})
        kappa: float = knob(0.02, "that share", low=0.0, high=1.0, source="paper", when={"share": 0.3})
        floor: float = knob(0.02, "that fixed probability", low=0.0, high=1.0, source="project's choice",
                            when={"share": 0.3, "proxy": "fixed"})
        recomputed: bool = knob(False, "the proxy is the current policy's, at every step", when={"share": 0.3, "kappa": 0.2})
        pull_cap: float = knob(0.0, "bound of the pull per token, in the official code 10; 0: none", low=0.0,
                               when={"share": 0.3, "learning_rate": 0.01})

    def measure(self, logits, target):
        c, told = self.config, super().measure(logits, target)
        if c.share:
            told["proxy"] = proxy_log_prob(logits, target, c.proxy, c.kappa, c.floor)
        return told

    def measures_more(self):
        return self.config.share > 0 or super().measures_more()

    @torch.no_grad()
    def endangered(self, rows, proxy: Tensor) -> Tensor:
        """S as (b, T) of bool."""
        negative = (rows.advantage < 0) & (rows.mask > 0)
        number = (self.config.share * negative.sum()).long()
        rank = torch.where(negative, rows.log_prob, torch.inf).flatten().argsort().argsort().view_as(proxy)
        return negative & (rank < number) & (number > 1) & (rows.log_prob < proxy)

    def surrogate(self, rows):
        c, loss = self.config, super().surrogate(rows)
        if not c.share:
            return loss
        proxy = (rows.now if c.recomputed else rows.old)["proxy"].detach()
        chosen = self.endangered(rows, proxy)
        rows.told["pulled"] = (chosen * rows.mask).sum() / rows.mask.sum()
        pull = kl(rows.log_prob, proxy, "k3", c.pull_cap)
        return torch.where(chosen, -rows.advantage * rows.ratio + c.pull * pull, loss)
