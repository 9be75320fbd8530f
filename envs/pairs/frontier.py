"""What a bandit's tables say of rewards and their price: the best reward at a KL, and the reward that pairs are fitted by.

Of all policies whose KL(pi || pi_ref), mean over contexts, is k, the greatest true reward has pi_ref exp(r / b) / Z with one b
for all contexts (the optimum of RLHF); its KL falls with b. Policies of different KL can be compared by what share of that gain
they reach.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 1e-4  # nats: below it nothing was gained that could be shared


def best_reward(base: Tensor, reward: Tensor, kl: float) -> float:
    """Mean over contexts of the true reward of the best policy at that KL. base: logits of pi_ref, reward (X, K)."""
    base, reward = base.double().log_softmax(-1), reward.double()
    low, high = torch.tensor(-12.0).double(), torch.tensor(12.0).double()  # of log 1/b
    for _ in range(60):
        middle = (low + high) / 2
        log_p = (base + middle.exp() * reward).log_softmax(-1)
        far = (log_p.exp() * (log_p - base)).sum(-1).mean() > kl
        low, high = torch.where(far, low, middle), torch.where(far, middle, high)
    p = (base + low.exp() * reward).softmax(-1)
    return float((p * reward).sum(-1).mean())


def share(log_p: Tensor, base: Tensor, reward: Tensor) -> float | None:
    """What a policy (X, K) gains over the reference, as a share of what the best one at its KL does; None near the reference."""
    ref, log_p = base.double().log_softmax(-1), log_p.double()
    kl = float((log_p.exp() * (log_p - ref)).sum(-1).mean())
    if kl < LEAST:
        return None
    start = float((ref.exp() * reward).sum(-1).mean())
    return (float((log_p.exp() * reward).sum(-1).mean()) - start) / (best_reward(base, reward, kl) - start)


def fitted_reward(pairs: list[tuple[int, int, int, float]], shape: tuple[int, int], ridge: float = 0.01) -> Tensor:
    """r (X, K) of greatest Bradley-Terry likelihood of pairs (context, chosen, rejected, label), less ridge (r_w + r_l)^2; 0 for
    arms that none shows. What method=reward_model learns of arms, to its end."""
    x, i, j, label = (torch.tensor(column) for column in zip(*pairs))
    label, table = label.double(), torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        w, l = table[x, i], table[x, j]
        value = -(label * F.logsigmoid(w - l) + (1 - label) * F.logsigmoid(l - w)) + ridge * (w + l).square()
        value = value.mean()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return table.detach().float()
