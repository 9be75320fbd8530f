"""The guardian of OGSRL: the region of (s, a) that a log supports, as a sublevel set of a kernel density; and what a method
with the knobs of ogsrl does with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.control.onpolicy import running_sum


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


def guarded_limits(limits: list[float], config) -> list[float]:
    return limits + ([config.guardian_limit] if config.guardian == "constraint" else [])


def guarded_reward(reward: Tensor, batch, config) -> Tensor:
    return torch.where(batch["left"], config.penalty, reward) if config.guardian == "penalty" else reward


def guarded_costs(cost: Tensor, batch, config) -> Tensor:
    """cost (T, n, C), used where there is a limit for it -> (T, n, channels)"""
    channels = [cost] if config.cost_limit >= 0 else []
    if config.guardian == "penalty":
        channels = [torch.where(batch["left"].unsqueeze(-1), 1.0, c) for c in channels]
    elif config.guardian == "constraint":
        channels.append(batch["outside"].unsqueeze(-1))
    out = torch.cat(channels, -1)
    return -out if config.official_costs else out
