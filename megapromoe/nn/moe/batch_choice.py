"""Choices among the tokens of a whole batch, over all ranks of a group; DiffMoE and Expert Race share them.

A choice is a mask (T, E) of pairs of a token and an expert. Ties go to the first.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.distributed.mesh import Group


def gather_tokens(score_TE: Tensor, group: Group) -> Tensor:
    """The scores of the tokens of all ranks, in the order of the ranks, which have equal T. Collective."""
    if group.size == 1:
        return score_TE
    parts = [torch.empty_like(score_TE) for _ in range(group.size)]
    dist.all_gather(parts, score_TE.contiguous(), group=group.process_group)
    return torch.cat(parts)


def tokens_of_rank(group_TE: Tensor, group: Group) -> Tensor:
    """This rank's part of what `gather_tokens` has joined."""
    T = group_TE.shape[0] // group.size
    return group_TE[T * group.rank : T * (group.rank + 1)] if group.size > 1 else group_TE


def best_of_each_expert(score_TE: Tensor, count: int) -> Tensor:
    """The mask of the `count` tokens with the largest scores of each expert."""
    is_chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool)
    return is_chosen_TE.scatter_(0, score_TE.topk(count, dim=0).indices, True)


def best_pairs(score_TE: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mask of the `count` pairs with the largest scores of all, and the smallest score among them, (1,).

    The second result is empty without pairs.
    """
    best = score_TE.flatten().topk(count)
    is_chosen = torch.zeros(score_TE.numel(), dtype=torch.bool, device=score_TE.device)
    return is_chosen.scatter_(0, best.indices, True).view_as(score_TE), best.values[-1:]
