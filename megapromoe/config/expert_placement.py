"""Which rank of an expert-parallel group has which experts, for each MoE block, and the files that list it. No torch.

A file of a placement is YAML or JSON. For each block with routed experts it lists the experts of every rank::

    blocks:
      1: [[0, 5, 7], [1, 2, 3], [4, 6, 8, 10], [9, 11]]
      3: [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]

The first list is that of rank 0 of each group. Ranks may have different numbers of experts.

Other ranks can have copies of popular experts, replicas. An optional section lists them with the share of the expert's
rows that each rank computes, its owner among them::

    replicas:
      1: {5: {0: 0.6, 2: 0.4}, 9: {1: 0.3, 3: 0.7}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from megapromoe.config.class_groups import SUFFIXES
from megapromoe.config.strict_yaml import UnreadableFile, read_yaml

CONTIGUOUS, AUTO = "contiguous", "auto"
SHARE_DIGITS = 4  # decimal digits of the shares in a file


class ReplicatedExpert(NamedTuple):
    """An expert of which other ranks have copies."""

    expert: int
    shares: tuple[tuple[int, float], ...]
    """(rank, share of the expert's rows that it computes), by ascending rank, the owner among them; the sum is 1."""


@dataclass(frozen=True)
class ExpertPlacement:
    """Which of E experts each rank of an ep group has, in the order of its slots. Each expert is owned by one rank.

    Every rank stores `slots` experts, as many as the rank with the most, so that all ranks run the same collectives
    with the same shapes. A spare slot is zero and gets neither tokens nor a gradient.

    Attributes:
        experts_of_rank: the experts that each rank owns: it has their parameters.
        replicas: the experts of which other ranks have copies, ascending. A rank's copies have the slots after `slots`.
    """

    experts_of_rank: tuple[tuple[int, ...], ...]
    replicas: tuple[ReplicatedExpert, ...] = ()

    @classmethod
    def contiguous(cls, experts: int, ep: int) -> ExpertPlacement:
        """Consecutive experts on each rank, as evenly as possible: the first E % ep ranks have one expert more."""
        base, extra = divmod(experts, ep)
        starts = [rank * base + min(rank, extra) for rank in range(ep + 1)]
        return cls(tuple(tuple(range(*span)) for span in pairwise(starts)))

    @property
    def experts(self) -> int:
        return sum(map(len, self.experts_of_rank))

    @property
    def ep(self) -> int:
        return len(self.experts_of_rank)

    @property
    def slots(self) -> int:
        """Experts that a rank stores, spare slots among them."""
        return max(map(len, self.experts_of_rank))

    def owned(self, rank: int) -> tuple[int, ...]:
        """The logical experts of a rank of the ep group; the i-th is in slot i."""
        return self.experts_of_rank[rank]

    @cached_property
    def copies_of_rank(self) -> tuple[tuple[int, ...], ...]:
        """The logical experts of other ranks of which each rank has a copy, by owner; the i-th has slot slots + i."""
        owner_E = self.rank_of_expert
        hosts = {expert: {rank for rank, _ in shares} - {owner_E[expert]} for expert, shares in self.replicas}
        by_owner = sorted(hosts, key=lambda expert: (owner_E[expert], expert))
        return tuple(tuple(expert for expert in by_owner if rank in hosts[expert]) for rank in range(self.ep))

    @property
    def copies(self) -> int:
        """Copies on all ranks of a group together."""
        return sum(map(len, self.copies_of_rank))

    @property
    def replica_slots(self) -> int:
        """Copies of the rank with the most."""
        return max(map(len, self.copies_of_rank))

    @property
    def dispatch_slots(self) -> int:
        """Experts to which a rank can get rows: its own and copies, each padded to those of the rank with the most."""
        return self.slots + self.replica_slots

    @cached_property
    def slot_of_expert(self) -> tuple[int, ...]:
        """Global slot (rank·dispatch_slots + index) of each logical expert on its owner."""
        index_of = {expert: index for owned in self.experts_of_rank for index, expert in enumerate(owned)}
        return tuple(rank * self.dispatch_slots + index_of[expert] for expert, rank in enumerate(self.rank_of_expert))

    @cached_property
    def rank_of_expert(self) -> tuple[int, ...]:
        """Rank of the ep group that owns each logical expert."""
        ranks = {expert: rank for rank, owned in enumerate(self.experts_of_rank) for expert in owned}
        return tuple(ranks[expert] for expert in range(self.experts))

    def shares_of_rank(self, rank: int) -> dict[int, tuple[int, float]]:
        """Slot of a rank, 0 to dispatch_slots - 1 -> (logical expert, share of the expert's rows)."""
        split = {expert: dict(shares) for expert, shares in self.replicas}
        slots = [*enumerate(self.owned(rank)), *enumerate(self.copies_of_rank[rank], self.slots)]
        return {slot: (expert, split[expert][rank] if expert in split else 1.0) for slot, expert in slots}

    def hosts_of(self, expert: int) -> tuple[tuple[int, float], ...]:
        """(global slot, share of its rows) of an expert on each of its ranks, by ascending rank."""
        for replicated, shares in self.replicas:
            if replicated == expert:
                return tuple((self._global_slot(expert, rank), share) for rank, share in shares)
        return ((self.slot_of_expert[expert], 1.0),)

    def _global_slot(self, expert: int, rank: int) -> int:
        if rank == self.rank_of_expert[expert]:
            return self.slot_of_expert[expert]
        return rank * self.dispatch_slots + self.slots + self.copies_of_rank[rank].index(expert)


Placements = Mapping[int, ExpertPlacement]
"""Index of a block -> placement of its routed experts."""


def smallest_slots(experts: int, ep: int) -> int:
    """Experts that a rank must at least store: ceil(E/ep), as with consecutive experts."""
    return -(-experts // ep)


def is_file(placement: str) -> bool:
    """Whether a value of `parallel.placement` names a file."""
    return placement.endswith(SUFFIXES)


def read_placements(
    path: Path, blocks: Sequence[int], experts: int, ep: int
) -> tuple[dict[int, ExpertPlacement], list[str]]:
    """The placements in a file, and a sentence for each thing that is wrong with it; then the placements are no use.

    Args:
        path: of a YAML or JSON file.
        blocks: indices of the blocks with routed experts.
        experts: routed experts E of a block.
        ep: ranks of an expert-parallel group.
    """
    try:
        status = path.stat()
        version = status.st_mtime_ns, status.st_size, status.st_ino
    except OSError:
        version = None
    placements, problems = _read(path, version, tuple(blocks), experts, ep)
    return dict(placements), list(problems)


@lru_cache(maxsize=8)  # a plan reads the file for each layout that it compares
def _read(
    path: Path, version: tuple | None, blocks: tuple[int, ...], experts: int, ep: int
) -> tuple[dict[int, ExpertPlacement], list[str]]:
    """`read_placements` of a version of the file."""
    try:
        content = read_yaml(path)
    except UnreadableFile as error:
        return {}, [f"the file {error}"]
    if not isinstance(content, Mapping) or not isinstance(content.get("blocks"), Mapping):
        return {}, ["the file must have the key blocks: a mapping from a block's index to the experts of each rank"]
    known = ("blocks", "replicas")
    problems = [f"{key!r} is not a key of the file; known: {', '.join(known)}" for key in content if key not in known]
    lists: dict[int, Any] = {}
    copies: dict[int, Any] = {}
    replicas = content.get("replicas", {})
    if not isinstance(replicas, Mapping):
        problems.append(f"replicas must be a mapping from a block's index to its copied experts, not {replicas!r:.60}")
        replicas = {}
    for section, values in ((content["blocks"], lists), (replicas, copies)):
        for key, value in section.items():
            if (number := _number(key)) not in blocks:
                problems.append(f"block {key!r}: has no routed experts; those with experts are {_listed(blocks)}")
            else:
                values[number] = value
    if missing := [block for block in blocks if block not in lists]:
        problems.append(f"{_of_blocks(missing)} missing; list the experts of each rank for every block with experts")
    for block, value in lists.items():
        problems += [f"block {block}: {problem}" for problem in _problems(value, experts, ep)]
    if problems:
        return {}, problems
    placements = {block: ExpertPlacement(tuple(tuple(sorted(rank)) for rank in lists[block])) for block in blocks}
    for block, value in copies.items():
        replicated, wrong = _replicated(value, placements[block])
        problems += [f"block {block}: replicas: {problem}" for problem in wrong]
        placements[block] = replace(placements[block], replicas=replicated)
    return ({}, problems) if problems else (placements, [])


def placement_text(placements: Placements, comments: Sequence[str] = ()) -> str:
    """The text of a file that `read_placements` reads, with lines of comment before it."""
    lines = [*(f"# {comment}" for comment in comments), "blocks:"]
    lines += [
        f"  {block}: [{', '.join(f'[{_listed(owned)}]' for owned in placement.experts_of_rank)}]"
        for block, placement in sorted(placements.items())
    ]
    copied = [(block, placement) for block, placement in sorted(placements.items()) if placement.replicas]
    lines += ["replicas:"] * bool(copied)
    lines += [f"  {block}: {{{', '.join(map(_replicated_text, placement.replicas))}}}" for block, placement in copied]
    return "\n".join(lines) + "\n"


def _replicated_text(replicated: ReplicatedExpert) -> str:
    shares = ", ".join(f"{rank}: {round(share, SHARE_DIGITS):g}" for rank, share in replicated.shares)
    return f"{replicated.expert}: {{{shares}}}"


def _problems(value: Any, experts: int, ep: int) -> Iterator[str]:
    """Sentences on what is wrong with the list of a block."""
    if not isinstance(value, list) or not all(isinstance(rank, list) for rank in value):
        yield f"must be a list of the experts of each rank, such as [[0, 2], [1, 3]], not {value!r:.60}"
        return
    if len(value) != ep:
        yield f"lists {len(value)} ranks; must list {ep}, one for each of parallel.ep = {ep}"
        return
    ranks_of: dict[int, list[int]] = {}
    for rank, owned in enumerate(value):
        if not owned:
            yield f"rank {rank} has no expert; give each rank at least one"
        for expert in owned:
            if type(expert) is not int or not 0 <= expert < experts:
                yield f"rank {rank}: expert {expert!r} does not exist; experts are 0..{experts - 1}"
            else:
                ranks_of.setdefault(expert, []).append(rank)
    for expert, ranks in sorted(ranks_of.items()):
        if len(ranks) > 1:
            yield f"expert {expert} is listed on ranks {_listed(ranks)}; list each expert once"
    if missing := [expert for expert in range(experts) if expert not in ranks_of]:
        yield f"expert{'s' * (len(missing) > 1)} {_listed(missing)} on no rank; list each expert once"


def _replicated(value: Any, placement: ExpertPlacement) -> tuple[tuple[ReplicatedExpert, ...], list[str]]:
    """The copied experts that the section `replicas` has for a block, and sentences on what is wrong with it."""
    result: list[ReplicatedExpert] = []
    problems: list[str] = []
    form = "such as {5: {0: 0.6, 2: 0.4}}"
    if not isinstance(value, Mapping):
        return (), [
            f"must be a mapping from an expert to the share of its rows on each rank, {form}, not {value!r:.60}"
        ]
    for key, of_ranks in value.items():
        expert = _number(key)
        if expert is None or not 0 <= expert < placement.experts:
            problems.append(f"expert {key!r} does not exist; experts are 0..{placement.experts - 1}")
            continue
        if not isinstance(of_ranks, Mapping):
            problems.append(f"expert {expert}: must be a mapping from ranks to shares, {form}, not {of_ranks!r:.60}")
            continue
        owner = placement.rank_of_expert[expert]
        shares = {
            rank: share for rank in range(placement.ep) for key, share in of_ranks.items() if _number(key) == rank
        }
        if wrong := [key for key in of_ranks if _number(key) not in range(placement.ep)]:
            problems.append(f"expert {expert}: rank {wrong[0]!r} does not exist; ranks are 0..{placement.ep - 1}")
        elif wrong := [s for s in shares.values() if type(s) not in (int, float) or not 0 <= s <= 1]:
            problems.append(f"expert {expert}: share {wrong[0]!r} must be a number from 0 to 1")
        elif owner not in shares or len(shares) < 2:
            problems.append(f"expert {expert}: must list its owner, rank {owner}, and at least one other rank")
        elif abs(sum(shares.values()) - 1) > 0.01:
            problems.append(f"expert {expert}: its shares add up to {sum(shares.values()):g}; they must add up to 1")
        else:
            total = sum(shares.values())
            result.append(ReplicatedExpert(expert, tuple((r, share / total) for r, share in sorted(shares.items()))))
    return tuple(sorted(result)), problems


def _number(key: Any) -> int | None:
    """The number that a key of YAML or JSON stands for; None if it is none."""
    number = int(key) if isinstance(key, str) and key.isdecimal() else key
    return number if type(number) is int else None


def _of_blocks(blocks: Sequence[int]) -> str:
    return f"block {blocks[0]} is" if len(blocks) == 1 else f"blocks {_listed(blocks)} are"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
