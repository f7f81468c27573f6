"""Chooses copies of popular experts on other ranks, and which share of their rows each rank computes.

It begins with a placement of the experts and moves rows of an expert from one of its ranks to another, which may need a
copy there: always the move that lowers the sum of the squared rank loads over all records the most. The sum of squares
is smooth and convex in the shares, and for one record its minimum is also that of the fullest rank. A record is a step
or a sum over some steps (`placement_search.MAX_RECORDS`).

Letters: N records, E experts, r ranks of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megapromoe.config.expert_placement import SHARE_DIGITS, ExpertPlacement, ReplicatedExpert
from megapromoe.planning.placement_search import fullest_over_mean, relative_loads

TARGET = 1.05  # fullest over mean rows that `auto` is to reach
_GAIN = 1e-5  # of the squared loads, relative to the mean: a smaller gain ends the search
_WORTH_A_COPY = 1e-4  # a copy must gain so much
_TRIES = 100  # exchanges of copies for others that are tried in a layer
_BETTER = 1e-4  # an exchange must lower the fullest over the mean by so much
_SMALLEST_SHARE = 0.01  # of a copy; rows of a smaller one go back to the owner


def replicate_experts(
    count_RLE: np.ndarray, placements: Sequence[ExpertPlacement], replicas: int
) -> tuple[ExpertPlacement, ...]:
    """The placements with copies of experts.

    Args:
        count_RLE: rows of each record, layer and expert.
        placements: of the layers; copies that they have are replaced.
        replicas: copies that a rank holds at most in each layer.

    Returns:
        a placement for each layer, never worse for these counts than without copies.
    """
    chosen = []
    for layer, placement in enumerate(placements):
        plain = replace(placement, replicas=())
        copied = _Search(count_RLE[:, layer], plain, replicas).best()
        count_R1E = count_RLE[:, [layer]]
        better = fullest_over_mean(count_R1E, [copied]) < fullest_over_mean(count_R1E, [plain])
        chosen.append(copied if better else plain)
    return tuple(chosen)


def fewest_replicas(
    count_RLE: np.ndarray, placements: Sequence[ExpertPlacement], fits: Callable[[int], bool] = lambda number: True
) -> tuple[ExpertPlacement, ...]:
    """The placements with as few copies on a rank as bring the fullest rank to `TARGET` times the mean rows.

    If none do, or more do not fit into memory, those with the least rows of the fullest rank.

    Args:
        count_RLE, placements: see `replicate_experts`.
        fits: whether so many copies on each rank fit into memory.
    """
    best = tuple(replace(placement, replicas=()) for placement in placements)
    lowest = fullest_over_mean(count_RLE, best)
    number = 1
    while lowest > TARGET and fits(number):
        copied = replicate_experts(count_RLE, placements, number)
        fullest = fullest_over_mean(count_RLE, copied)
        if fullest < lowest:
            best, lowest = copied, fullest
        if max(placement.replica_slots for placement in copied) < number:
            break  # more would be left over
        number += 1
    return best


class _Search:
    """The search for one layer."""

    def __init__(self, count_NE: np.ndarray, placement: ExpertPlacement, replicas: int) -> None:
        self.placement, self.replicas, self.ep = placement, replicas, placement.ep
        self.rows_NE = relative_loads(count_NE, placement.ep)
        owner_E, experts = np.array(placement.rank_of_expert), np.arange(placement.experts)
        self.owner_E = owner_E
        self.share_rE = np.zeros((self.ep, placement.experts))
        self.share_rE[owner_E, experts] = 1
        self.has_rE = self.share_rE > 0

    def best(self) -> ExpertPlacement:
        """The placement with the copies that are found."""
        if not len(self.rows_NE) or self.ep == 1 or not self.replicas:
            return self.placement
        self._settle()
        self._exchange_copies()
        return self._result()

    @property
    def cost(self) -> float:
        """Rows of the fullest rank over the mean, the mean over the records."""
        return float((self.rows_NE @ self.share_rE.T).max(axis=1).mean())

    def _settle(self, not_at: tuple[int, int] | None = None) -> None:
        """Moves rows and makes copies as long as that helps; `not_at`: (rank, expert) of a copy that is not made."""
        self._descend(may_copy=True, not_at=not_at)
        self._remove_small_copies()
        self._descend(may_copy=False)

    def _exchange_copies(self) -> None:
        """Tries for each copy, the one with the fewest rows first, whether others in its place are better."""
        tries = _TRIES
        improved = True
        while improved and tries:
            improved, cost = False, self.cost
            is_copy_rE = self.has_rE.copy()
            is_copy_rE[self.owner_E, np.arange(len(self.owner_E))] = False
            rows_rE = self.share_rE * self.rows_NE.mean(axis=0)
            for rank, expert in sorted(
                zip(*map(list, np.nonzero(is_copy_rE)), strict=True), key=lambda at: rows_rE[at]
            ):
                if not tries:
                    return
                tries -= 1
                before = self.share_rE.copy(), self.has_rE.copy()
                self._remove(rank, expert)
                self._settle(not_at=(rank, expert))
                if self.cost < cost - _BETTER:
                    improved = True
                    break
                self.share_rE, self.has_rE = before

    def _descend(self, may_copy: bool, not_at: tuple[int, int] | None = None) -> None:
        """Moves rows between ranks as long as that helps; the arguments are those of `_settle`."""
        square_E = (self.rows_NE**2).sum(axis=0)
        for _ in range(200 * self.ep * (self.replicas + 1)):  # far more than it needs; a bound against endless rounding
            load_Nr = self.rows_NE @ self.share_rE.T
            with_rank_Er = self.rows_NE.T @ load_Nr
            r, e = np.nonzero(self.share_rE > 0)
            difference_It = with_rank_Er[e, r][:, None] - with_rank_Er[e]
            square_I1 = np.maximum(square_E[e], 1e-12)[:, None]
            moved_It = np.clip(difference_It / (2 * square_I1), 0, self.share_rE[r, e][:, None])
            gain_It = 2 * moved_It * (difference_It - moved_It * square_I1) / len(self.rows_NE)
            is_there_It = self.has_rE[:, e].T
            free_t = (self._copies_r() < self.replicas) & may_copy
            threshold_It = np.where(is_there_It, _GAIN, np.where(free_t[None], _WORTH_A_COPY, np.inf))
            if not_at is not None:
                threshold_It[e == not_at[1], not_at[0]] = np.inf
            gain_It = np.where(gain_It >= threshold_It, gain_It, 0)
            i, t = np.unravel_index(int(gain_It.argmax()), gain_It.shape)
            if gain_It[i, t] <= 0:
                return
            self.share_rE[r[i], e[i]] -= moved_It[i, t]
            self.share_rE[t, e[i]] += moved_It[i, t]
            self.has_rE[t, e[i]] = True
            if self.share_rE[r[i], e[i]] <= 1e-9 and self.owner_E[e[i]] != r[i]:
                self.share_rE[t, e[i]] += self.share_rE[r[i], e[i]]
                self.share_rE[r[i], e[i]] = 0
                self.has_rE[r[i], e[i]] = False

    def _copies_r(self) -> np.ndarray:
        """Copies that each rank holds."""
        own_r = np.bincount(self.owner_E, minlength=self.ep)
        return self.has_rE.sum(axis=1) - own_r

    def _remove_small_copies(self) -> None:
        for rank, expert in zip(*np.nonzero(self.has_rE), strict=True):
            owner = self.owner_E[expert]
            if rank != owner and self.share_rE[rank, expert] < _SMALLEST_SHARE:
                self._remove(rank, expert)

    def _remove(self, rank: int, expert: int) -> None:
        """Removes a copy, whose rows go back to the owner."""
        self.share_rE[self.owner_E[expert], expert] += self.share_rE[rank, expert]
        self.share_rE[rank, expert] = 0
        self.has_rE[rank, expert] = False

    def _result(self) -> ExpertPlacement:
        """The placement, its shares rounded as in a file."""
        replicas = []
        for expert, owner in enumerate(self.owner_E.tolist()):
            hosts = np.flatnonzero(self.has_rE[:, expert]).tolist()
            shares = {rank: round(float(self.share_rE[rank, expert]), SHARE_DIGITS) for rank in hosts}
            shares = {rank: share for rank, share in shares.items() if share > 0 or rank == owner}
            if len(shares) > 1:
                total = sum(shares.values())
                exact = tuple((rank, share / total) for rank, share in sorted(shares.items()))
                replicas.append(ReplicatedExpert(expert, exact))
        return replace(self.placement, replicas=tuple(replicas))
