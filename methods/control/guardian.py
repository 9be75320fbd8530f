"""The guardian of OGSRL: the region of (s, a) that a log supports, as a sublevel set of a kernel density; and what OGSRL
does with it, whichever constrained method it stands on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from methods.control.onpolicy import running_sum
from runner.interface import knob


class Guardian(nn.Module):
    """dens(x) = mean_i exp(-|x - x_i|^2 / (2 h^2)), x = (s, a) with every feature scaled to [-1, 1] by the log; outside:
    dens(x) below the `share` quantile of the log's own densities. bandwidth 0: the sharpest h for which a fifth of the log,
    held out, has no more than `share` of its rows outside (within two standard errors; or no more than for any other h).
    Nothing in here is trained or saved: fit() runs at every start, on the same log."""

    def __init__(self, share: float, bandwidth: float):
        super().__init__()
        self.share, self.h = share, bandwidth
        for name in ("keys", "low", "width", "threshold", "bandwidth"):
            self.register_buffer(name, torch.zeros(()), persistent=False)

    def fit(self, observation: Tensor, action: Tensor):
        """observation (N, S), action (N, A): the log."""
        rows = torch.cat([observation, action.clamp(-1, 1)], 1)
        self.low, self.width = rows.amin(0), (rows.amax(0) - rows.amin(0)).clamp_min(1e-9)
        scaled = self.scaled(rows)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(rows.device)
        held_out, kept = scaled[order[: len(rows) // 5]], scaled[order[len(rows) // 5:]]
        own, other = (torch.cdist(x[:1000], kept).square() for x in (kept, held_out))

        def outside(h) -> tuple[Tensor, Tensor]:
            threshold = (own * (-0.5 / h ** 2)).exp().mean(1).quantile(self.share)
            return threshold, ((other * (-0.5 / h ** 2)).exp().mean(1) < threshold).float().mean()

        h = torch.tensor(self.h, device=rows.device)
        if self.h == 0:  # too sharp a kernel sees only the log's own rows, and finds everything else outside
            grid = torch.logspace(-2, 0.5, 16, device=rows.device)
            shares = torch.stack([outside(x)[1] for x in grid])
            most = shares.min().clamp_min(self.share) + 2 * (self.share * (1 - self.share) / len(other)) ** 0.5
            h = grid[(shares <= most).float().argmax()]  # the first
        self.keys, self.bandwidth, self.threshold = kept, h, outside(h)[0]

    def scaled(self, rows: Tensor) -> Tensor:
        return (rows - self.low) / self.width * 2 - 1

    def outside(self, observation: Tensor, action: Tensor) -> Tensor:
        """observation (…, S), action (…, A), clipped to the box -> (…,) of 0 and 1"""
        rows = self.scaled(torch.cat([observation, action.clamp(-1, 1)], -1)).flatten(0, -2)
        parts = [(torch.cdist(p, self.keys).square() * (-0.5 / self.bandwidth ** 2)).exp().mean(1) for p in rows.split(4000)]
        return (torch.cat(parts) < self.threshold).to(observation.dtype).view(observation.shape[:-1])

    def watch(self, batch: dict[str, Tensor], carried: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with `outside` (T, n) of 0 and 1, and `left`: whether the episode has been outside by now. What carries
        over into the next rollout stands in `carried`."""
        outside = self.outside(batch["observation"], batch["action"])
        before = carried.get("outside", torch.zeros_like(outside[0]))
        sums, carried["outside"] = running_sum(outside, batch["ended"], before, 1.0)
        return {**batch, "outside": outside, "left": sums > 0}


class Guarded:
    """What OGSRL adds to a constrained method on the on-policy base (methods/control/onpolicy.py), named before it:
    `class OGSRL(Guarded, CPO)`, and so in its Config."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        guardian: str = knob("constraint", "how the support is kept to", choices=["constraint", "penalty", "none"])
        guardian_limit: float = knob(1.0, "d_g: unsupported steps allowed per episode", low=0.0,
                                     source="project's choice: the log's own share of 20 steps", when={"guardian": "constraint"})
        penalty: float = knob(-25.0, "reward of every step once the support is left", source="released code",
                              when={"guardian": "penalty"})
        support_share: float = knob(0.05, "share of the log below the threshold", low=0.0, high=0.5, source="paper")
        bandwidth: float = knob(0.0, "h of the kernel, features in [-1, 1]; 0: fitted to the log", low=0.0,
                                source="released code: 0.535")
        official_costs: bool = knob(False, "costs with the released code's sign: the constraint never binds")

    def limits(self, spec):
        c = self.config
        return super().limits(spec) + ([c.guardian_limit] if c.guardian == "constraint" else [])

    def setup(self, spec):
        super().setup(spec)
        self.guardian = Guardian(self.config.support_share, self.config.bandwidth)

    def prepare(self, data):
        """data: the log, observation (N, S) and action (N, A)."""
        super().prepare(data)
        if self.config.guardian != "none":
            self.guardian.fit(data["observation"], data["action"])

    @torch.no_grad()
    def assess(self, batch):
        if self.config.guardian == "none":
            return super().assess(batch)
        batch = self.guardian.watch(batch, self.carried)
        self.told["outside"] = batch["outside"].mean()
        return super().assess(batch)

    def reward_transform(self, batch):
        reward = super().reward_transform(batch)
        return torch.where(batch["left"], self.config.penalty, reward) if self.config.guardian == "penalty" else reward

    def costs(self, batch):
        """(T, n, channels): the world's where there is a limit for them, then the guardian's"""
        c, cost = self.config, super().costs(batch)
        channels = [cost] if c.cost_limit >= 0 else []
        if c.guardian == "penalty":
            channels = [torch.where(batch["left"].unsqueeze(-1), 1.0, x) for x in channels]
        elif c.guardian == "constraint":
            channels.append(batch["outside"].unsqueeze(-1))
        out = torch.cat(channels, -1)
        return -out if c.official_costs else out
