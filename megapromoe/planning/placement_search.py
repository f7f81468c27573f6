"""Chooses which rank has which experts, such that the fullest rank has as few rows as possible.

All ranks wait for the fullest one in each layer and step, so a placement is judged by the rows of the fullest rank over
the mean, averaged over the records of a trace (1: all ranks have equally many). If an expert-parallel group spans
several nodes, the same number for nodes is added: the rows of a node are what its network receives and sends.

The search takes the experts one by one, the one with the most rows first, and gives each to the rank with the fewest
(longest processing time first). Then it exchanges two experts, or moves one to a spare slot, as long as that helps. It
does so from some more starting points and keeps the best result.

Source: Graham, "Bounds on multiprocessing timing anomalies", 1969, for the greedy start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megapromoe.config.expert_placement import ExpertPlacement, smallest_slots

MAX_RECORDS = 16  # consecutive records are added up until there are at most so many, for speed
RANDOM_STARTS = 3
_GAIN = 1e-9  # a change must improve the cost by so much


def rank_loads(count_RE: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """Rows of each rank of the group, (records, ep). Args: rows of each expert, (records, E).

    Copies of an expert get their shares of its rows.
    """
    if not placement.replicas:
        return np.stack([count_RE[:, list(owned)].sum(axis=1) for owned in placement.experts_of_rank], axis=1)
    share_rE = np.zeros((placement.ep, placement.experts))
    for rank in range(placement.ep):
        for expert, share in placement.shares_of_rank(rank).values():
            share_rE[rank, expert] = share
    return count_RE @ share_rE.T


def fullest_over_mean(count_RLE: np.ndarray, placements: Sequence[ExpertPlacement]) -> float:
    """Rows of the fullest rank over the mean of all ranks, both summed over records and layers; 1 without any rows.

    Args:
        count_RLE: rows of each record, layer and expert.
        placements: of the layers.
    """
    return fullest_over_mean_of_records(count_RLE, placements)[0]


def fullest_over_mean_of_records(
    count_RLE: np.ndarray, placements: Sequence[ExpertPlacement]
) -> tuple[float, np.ndarray]:
    """`fullest_over_mean`, and the same of each record with rows, both summed over layers alone."""
    loads = [rank_loads(count_RLE[:, layer], placement) for layer, placement in enumerate(placements)]
    mean_R, fullest_R = (np.sum([f(load, axis=1) for load in loads], axis=0) for f in (np.mean, np.max))
    has_rows_R = mean_R > 0
    mean = float(np.sum(mean_R))
    return float(np.sum(fullest_R)) / mean if mean else 1.0, fullest_R[has_rows_R] / mean_R[has_rows_R]


def relative_loads(count_NE: np.ndarray, ep: int) -> np.ndarray:
    """Rows of each expert over the mean of `ep` ranks, in at most `MAX_RECORDS` records, of those that have rows."""
    rows_NE = count_NE[count_NE.sum(axis=1) > 0].astype(np.float64)
    if len(rows_NE) > MAX_RECORDS:
        rows_NE = np.stack([part.sum(axis=0) for part in np.array_split(rows_NE, MAX_RECORDS)])
    # The maximum over ranks is then at least 1.
    return rows_NE / rows_NE.sum(axis=1, keepdims=True) * ep


def place_experts(
    count_RLE: np.ndarray, ep: int, slots: int | None = None, nodes: int = 1
) -> tuple[ExpertPlacement, ...]:
    """The best placement that is found for each layer.

    Args:
        count_RLE: rows of each record, layer and expert; a record is a step or a sum over some steps.
        ep: ranks of an expert-parallel group.
        slots: experts that a rank stores at most; None: ceil(E/ep), as with consecutive experts.
        nodes: over which a group is spread, with consecutive ranks on each.

    Returns:
        a placement for each layer, never worse for these counts than consecutive experts.

    Raises ValueError if the slots do not hold all experts, or the nodes do not divide the group.
    """
    experts = count_RLE.shape[2]
    slots = slots or smallest_slots(experts, ep)
    if not ep <= experts <= slots * ep:
        raise ValueError(f"{experts} experts over {ep} ranks: a rank must have at least 1 and at most {slots}")
    if nodes < 1 or ep % nodes:
        raise ValueError(f"{nodes} nodes: must divide the {ep} ranks of an expert-parallel group")
    return tuple(_Search(count_RLE[:, layer], ep, slots, nodes).best() for layer in range(count_RLE.shape[1]))


class _Search:
    """The search for one layer. Letters: N records, r ranks (of a group), n nodes."""

    def __init__(self, count_NE: np.ndarray, ep: int, slots: int, nodes: int) -> None:
        self.ep, self.slots, self.nodes = ep, slots, nodes
        self.share_NE = relative_loads(count_NE, ep)
        self.experts = count_NE.shape[1]

    def best(self) -> ExpertPlacement:
        """The best placement from all starting points; the first of equal ones, consecutive experts before others."""
        consecutive = ExpertPlacement.contiguous(self.experts, self.ep)
        if not len(self.share_NE):
            return consecutive
        mean_E = self.share_NE.mean(axis=0)
        draw = np.random.default_rng(0)
        starts = [self._greedy(mean_E)]
        starts += [self._greedy(mean_E * draw.uniform(0.5, 1.5, self.experts)) for _ in range(RANDOM_STARTS)]
        results = [consecutive.experts_of_rank, *map(self._improved, starts)]
        chosen = min(results, key=lambda owned: round(self.cost(owned), 9))
        return ExpertPlacement(tuple(tuple(sorted(experts)) for experts in chosen))

    def cost(self, owned: Sequence[Sequence[int]]) -> float:
        """What the search minimises. Args: the experts of each rank."""
        load_Nr = np.stack([self.share_NE[:, experts].sum(axis=1) for experts in owned], axis=1)
        cost = load_Nr.max(axis=1).mean()
        if self.nodes > 1:
            cost += self._node_loads(load_Nr).max(axis=1).mean()
        return float(cost)

    def _node_loads(self, load_Nr: np.ndarray) -> np.ndarray:
        """The mean load of the ranks of each node, (N, n)."""
        return load_Nr.reshape(len(load_Nr), self.nodes, -1).mean(axis=2)

    def _greedy(self, load_E: np.ndarray) -> list[list[int]]:
        """Gives each expert, by descending load, to the rank with the least, of the node with the least."""
        owned: list[list[int]] = [[] for _ in range(self.ep)]
        load_r, per_node = np.zeros(self.ep), self.ep // self.nodes
        for number, expert in enumerate(np.argsort(-load_E, kind="stable")):
            empty = [rank for rank in range(self.ep) if not owned[rank]]
            needed = len(empty) == self.experts - number  # each rank must have an expert
            free = empty if needed else [rank for rank in range(self.ep) if len(owned[rank]) < self.slots]
            load_n = load_r.reshape(self.nodes, per_node).sum(axis=1)
            rank = min(free, key=lambda rank: (load_n[rank // per_node], load_r[rank], rank))
            owned[rank].append(int(expert))
            load_r[rank] += load_E[expert]
        return owned

    def _improved(self, owned: list[list[int]]) -> list[list[int]]:
        """Exchanges two experts, or moves one, as long as that helps."""
        owned = [list(experts) for experts in owned]
        cost = self.cost(owned)
        while (change := self._change(owned, cost)) is not None:
            cost, moves = change
            for expert, source, target in moves:
                owned[source].remove(expert)
                owned[target].append(expert)
        return owned

    def _change(self, owned: list[list[int]], cost: float) -> tuple[float, list[tuple[int, int, int]]] | None:
        """The cost after a change that helps, and its moves (expert, from rank, to rank); None if no change helps.

        It is the best change of the first rank that has one, of those that are the fullest in most records.
        """
        load_Nr = np.stack([self.share_NE[:, experts].sum(axis=1) for experts in owned], axis=1)
        load_Nn, per_node = self._node_loads(load_Nr), self.ep // self.nodes
        # A change between ranks that are never the fullest, on nodes that are never the fullest, cannot help.
        times_r = np.bincount(load_Nr.argmax(axis=1), minlength=self.ep).astype(float)
        if self.nodes > 1:
            times_r += np.bincount(load_Nn.argmax(axis=1), minlength=self.nodes).repeat(per_node) / (2 * per_node)
        rank_E = np.empty(self.experts, dtype=np.int64)
        for owner, experts in enumerate(owned):
            rank_E[experts] = owner
        # What another rank gives: an expert, or with a free slot nothing, which is expert E.
        free = [rank for rank in range(self.ep) if len(owned[rank]) < self.slots]
        given_J = np.concatenate([np.arange(self.experts), np.full(len(free), self.experts)])
        rank_J = np.concatenate([rank_E, np.array(free, dtype=np.int64)])
        share_NE = np.concatenate([self.share_NE, np.zeros((len(self.share_NE), 1))], axis=1)
        for rank in sorted(np.flatnonzero(times_r).tolist(), key=lambda rank: -times_r[rank]):
            given_I = np.array(owned[rank] + [self.experts] * (rank in free))
            moved_NIJ = share_NE[:, given_I, None] - share_NE[:, None, given_J]
            after_IJ = _maximum(load_Nr, rank, rank_J, moved_NIJ).mean(axis=0)
            if self.nodes > 1:
                moved_NIJ = moved_NIJ / per_node
                after_IJ = after_IJ + _maximum(load_Nn, rank // per_node, rank_J // per_node, moved_NIJ).mean(axis=0)
            size_I, size_J = len(owned[rank]) - (given_I < self.experts), np.array([len(e) for e in owned])[rank_J]
            after_IJ[:, rank_J == rank] = np.inf
            after_IJ[np.ix_(size_I == 0, given_J == self.experts)] = np.inf  # it would give its only expert
            after_IJ[np.ix_(given_I == self.experts, (size_J == 1) | (given_J == self.experts))] = np.inf
            i, j = divmod(int(after_IJ.argmin()), after_IJ.shape[1])
            if after_IJ[i, j] < cost - _GAIN:
                moves = [(int(given_I[i]), rank, int(rank_J[j])), (int(given_J[j]), int(rank_J[j]), rank)]
                return float(after_IJ[i, j]), [move for move in moves if move[0] < self.experts]
        return None


def _maximum(load_Nr: np.ndarray, first: int, second_J: np.ndarray, moved_NIJ: np.ndarray) -> np.ndarray:
    """The largest load after `moved_NIJ` has moved from the rank (or node) `first` to each of `second_J`, (N, I, J)."""
    records = np.arange(len(load_Nr))
    rest_Nr = load_Nr.copy()
    rest_Nr[:, first] = 0
    largest_N = rest_Nr.argmax(axis=1)
    largest = rest_Nr[records, largest_N]
    rest_Nr[records, largest_N] = 0
    # Of the others than `first` and the second.
    rest_NJ = np.where(largest_N[:, None] == second_J, rest_Nr.max(axis=1)[:, None], largest[:, None])
    moved_NIJ = np.where(second_J == first, 0, moved_NIJ)
    pair = np.maximum(load_Nr[:, first, None, None] - moved_NIJ, load_Nr[:, None, second_J] + moved_NIJ)
    return np.maximum(rest_NJ[:, None, :], pair)
