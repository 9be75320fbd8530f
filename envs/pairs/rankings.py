"""Rankings of lists as pairs: a bandit's batches `pairs` whose rows show P arms, drawn and ranked at once.

A row of P arms, different and random, is ranked by Plackett-Luce with utilities sharpness * r: sorting them with Gumbel noise
added draws from it, and any two of them alone are a pair with sigma(sharpness (r_i - r_j)). The first is chosen, the last
rejected; what is between them stands in columns that pairs do not have:

    between (b, P - 2, T), between_mask      the responses ranked between chosen and rejected, the better ones first
"""

from __future__ import annotations

import torch
from torch import Tensor

from envs.pairs.base import Stored, digest, encode_pairs
from envs.pairs.task import Pair
from runner.errors import UserError


def drawn(reward: Tensor, seen: int, number: int, size: int, sharpness: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """contexts (n,), arms (n, P), the best first; reward (X, K), of whose arms the first `seen` are shown."""
    x = torch.randint(len(reward), (number,), generator=g)
    arms = torch.rand(number, seen, generator=g).argsort(1)[:, :size]
    noise = -torch.log(-torch.log(torch.rand(number, size, generator=g).clamp(1e-20, 1 - 1e-7)))
    order = (sharpness * reward[x[:, None], arms] + noise).argsort(1, descending=True)
    return x, arms.gather(1, order)


def stored(world, method, name, context) -> Stored:
    """The stream of a bandit's rankings; name, context: texts of the number of an arm, of a context."""
    c, t = world.config, world.task
    if not hasattr(t, "probability"):
        raise UserError("rankings need rewards that order the arms (env=bandit); leave env.list_size at 2")
    if c.soft or c.flips != "none" or c.once or c.list_size > t.seen:
        raise UserError(f"env.list_size={c.list_size} shows rankings of as many of the {t.seen} arms, with their own noise\n"
                        "leave env.soft, env.flips and env.once as they are, or take env.list_size=2")
    g = torch.Generator().manual_seed(256 * t.seed + 15)
    x, arms = drawn(t.reward, t.seen, c.pairs, c.list_size, c.sharpness, g)
    rows = [(context(i), [name(a) for a in row]) for i, row in zip(x.tolist(), arms.tolist())][:c.limit or None]
    columns = encode_pairs(method, [Pair(prompt, row[0], row[-1]) for prompt, row in rows])
    middle, mask = method.encode_responses([a for _, row in rows for a in row[1:-1]])
    columns |= {"between": middle.view(len(rows), -1, middle.shape[1]),
                "between_mask": mask.view(len(rows), -1, mask.shape[1]).float()}
    world.told = {"lists": len(rows), "digest": digest(rows)}
    return Stored(columns, world._start(), c.batch_size, method.seed, method.processes)
