"""A2PR: adaptive advantage-guided policy regularisation (Liu et al., ICML 2024, arXiv 2405.19909).

TD3+BC whose anchor action is the better of the logged action and of what a VAE makes of the policy's own; the VAE learns
only from logged actions with a positive advantage. With v = V(s) before its step:

    critics   as TD3
    V         L_V = mean (V(s) - t)^2,  t = min( r + gamma (1-d) min_i Q_i'(s',a'),  r + gamma (1-d) min_i Q_i(s',a') ), the
              critics just updated, a' the target's smoothed action
    VAE       L = mean w e (a_hat - a)^2 + 0.5 KL,  e = 1[Q_1(s,a) > v]; the KL is averaged over all samples, not masked
    anchor    a* = a_vae if Q_1(s,a_vae) >= Q_1(s,a) else a,  a_vae = decode(s, z ~ encode(s, pi(s)))
    actor     -lambda mean Q_1(s,pi(s)) + m mean M (pi(s) - a*)^2,  M = 1[ Q_1(s,a_vae) >= v or Q_1(s,a) > v ]

| symbol | name |
|---|---|
| m | anchor_weight (halfcheetah 1, hopper 0.4, walker2d 1) |
| w | vae_weight (1, 1, 1.5) |
| alpha in lambda | alpha (40, 2.5, 2.5) |
| e, M and the choice of a* | masked; false: e = M = 1 and a* = a_vae, the paper's ablation |
| warm-up | warmup: updates before the actor's first (project's choice: early on V and Q are near 0 and the mask is noise) |

Differences from the official code (ltlhuuu/A2PR): there a* carries gradient through the VAE into the policy
(`detach_anchor: false`); hopper is trained with gamma .995, an advantage over baselines at .99.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from methods.common.networks import adam, mlp
from methods.control.base import Sample
from methods.control.td3_bc import TD3BC
from runner.interface import Spec, knob


class ActionVAE(nn.Module):
    """q(z|s, a) and a = tanh(g(s, z)); latent of twice the action's size, log standard deviation in [-4, 15]."""

    def __init__(self, spec: Spec, hidden: tuple[int, ...]):
        super().__init__()
        s, a = spec.observation_size, spec.action_size
        self.latent = 2 * a
        self.encoder = mlp(s + a, hidden, 2 * self.latent, seeds=spec.seeds)
        self.decoder = mlp(s + self.latent, hidden, a, squash=True, seeds=spec.seeds)

    def forward(self, observation: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """-> reconstructed action (…, B, A), KL(q || N(0, I)), the mean over latent dimensions (…, B)"""
        mean, log_std = self.encoder(torch.cat([observation, action], -1)).chunk(2, -1)
        log_std = log_std.clamp(-4, 15)
        z = mean + log_std.exp() * noise
        divergence = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean(-1)
        return self.decoder(torch.cat([observation, z], -1)), divergence


class A2PR(TD3BC):
    @dataclasses.dataclass(frozen=True)
    class Config(TD3BC.Config):
        guided: bool = knob(True, "false: the logged action, which is td3_bc")
        vae_hidden: tuple[int, ...] = knob((750, 750), "widths of the VAE's hidden layers", low=1, source="official code")
        vae_learning_rate: float = knob(1e-3, "Adam's, for the VAE", low=0.0, source="official code")
        vae_weight: float = knob(1.0, "w: weight of the reconstruction", low=0.0, source="official code")
        masked: bool = knob(True, "only actions with a positive advantage train the VAE and anchor the policy")
        detach_anchor: bool = knob(True, "no gradient through a*; false: as the official code")
        warmup: int = knob(0, "updates of critics, V and VAE before the actor's first", low=0, source="project's choice")

    def setup(self, spec: Spec):
        super().setup(spec)
        self.value = mlp(spec.observation_size, self.config.hidden, 1, seeds=spec.seeds)
        self.vae = ActionVAE(spec, self.config.vae_hidden)

    def make_optimizers(self):
        super().make_optimizers()
        self.optimizers["value"] = adam(self.value.parameters(), self.config.learning_rate)
        self.optimizers["vae"] = adam(self.vae.parameters(), self.config.vae_learning_rate)

    def stage(self):
        return int(self.updates >= self.config.warmup)

    # -- parts
    def next_action(self, batch) -> Sample:
        batch["next_sample"] = super().next_action(batch)
        return batch["next_sample"]

    def target(self, batch) -> Tensor:
        batch["target"] = super().target(batch)
        return batch["target"]

    def update_models(self, batch):
        told, c = super().update_models(batch) or {}, self.config
        if not c.guided:
            return told
        observation, action = batch["observation"], batch["action"]
        with torch.no_grad():
            values = self.pessimism(self.critics(batch["next_observation"], batch["next_sample"].action)[0])
            target = torch.minimum(batch["target"], batch["reward"] + c.discount * (1 - batch["terminated"]) * values)
            batch["q"] = self.critics.first(observation, action)
        value = self.value(observation).squeeze(-1)
        loss = (value - target).square().mean(-1)
        self.minimise(loss, "value")
        batch["v"] = value.detach()
        kept = (batch["q"] > batch["v"]).float() if c.masked else torch.ones_like(batch["q"])
        again, divergence = self.vae(observation, action, self.noise("vae", (action.shape[-2], self.vae.latent)))
        vae_loss = (c.vae_weight * kept * (again - action).square().mean(-1)).mean(-1) + 0.5 * divergence.mean(-1)
        self.minimise(vae_loss, "vae")
        return {**told, "value_loss": loss.detach(), "vae_loss": vae_loss.detach(), "advantageous": kept.mean(-1)}

    def anchor(self, batch, sample: Sample):
        c = self.config
        if not c.guided:
            return super().anchor(batch, sample)
        pi = sample.action.detach() if c.detach_anchor else sample.action
        with torch.set_grad_enabled(not c.detach_anchor):
            made = self.vae(batch["observation"], pi, self.noise("anchor", (pi.shape[-2], self.vae.latent)))[0]
        if not c.masked:
            return made, None
        q = self.critics.first(batch["observation"], made).detach()
        positive = ((q >= batch["v"]) | (batch["q"] > batch["v"])).float()
        return torch.where((q >= batch["q"]).unsqueeze(-1), made, batch["action"]), positive

    def update_actor(self, batch):
        return super().update_actor(batch) if self.updates >= self.config.warmup else {}
