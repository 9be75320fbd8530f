"""Where the two responses of a pair differ."""

from __future__ import annotations

import torch
from torch import Tensor

SIDES = ("chosen", "rejected")


def differing(batch: dict[str, Tensor]) -> Tensor:
    """(2, b, T) bool, chosen first: the tokens that the two sides do not share.

    By the numbers of phrases that the data has (chosen_phrase, rejected_phrase; 0: shared), else all that is left when the
    longest common beginning and the longest common end are taken away. A side to which nothing is left, because the other has
    something inserted or the data gives it no phrase, keeps the token before that place (its first, if it stands there)."""
    mask = torch.stack([batch[f"{s}_mask"] for s in SIDES]).bool()
    if "chosen_phrase" in batch:
        theirs = torch.stack([batch[f"{s}_phrase"] for s in SIDES]) > 0
        begin = theirs.flip(0).long().argmax(-1)
    else:
        theirs, begin = between(torch.stack([batch[s] for s in SIDES]), mask)
    theirs = theirs & mask
    empty = ~theirs.any(-1, keepdim=True) & theirs.any(-1, keepdim=True).flip(0)
    place = torch.arange(mask.shape[-1], device=mask.device)
    neighbour = place == (torch.minimum(begin, mask.sum(-1)) - 1).clamp(min=0).unsqueeze(-1)
    return torch.where(empty, neighbour & mask, theirs)


def between(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(what stands between the common beginning and the common end of two rows, (2, b, T) bool; where it begins, (2, b))."""
    length = mask.sum(-1)
    both = length.amin(0)  # (b,)
    begin = common(ids, mask)
    reverse = (length.unsqueeze(-1) - 1 - torch.arange(ids.shape[-1], device=ids.device)) % ids.shape[-1]
    end = torch.minimum(common(ids.gather(-1, reverse), mask), both - begin)  # what is common at both ends counts once
    place = torch.arange(ids.shape[-1], device=ids.device)
    return (place >= begin.unsqueeze(-1)) & (place < (length - end).unsqueeze(-1)), begin.expand(2, -1)


def common(ids: Tensor, mask: Tensor) -> Tensor:
    """(b,): how many tokens the two rows (2, b, T) have in common from their left end on."""
    return ((ids[0] == ids[1]) & mask[0] & mask[1]).long().cumprod(-1).sum(-1)
