"""Which rank of an expert-parallel group has which experts, for each MoE block, and the files that list it. No torch.

A file of a placement is YAML or JSON. For each block with routed experts it lists the experts of every rank::

    blocks:
      1: [[0, 5, 7], [1, 2, 3], [4, 6, 8, 10], [9, 11]]
      3: [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]

The first list is that of rank 0 of each group. Ranks may have different numbers of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from megapromoe.config.class_groups import SUFFIXES
from megapromoe.config.strict_yaml import UnreadableFile, read_yaml

CONTIGUOUS, AUTO = "contiguous", "auto"


@dataclass(frozen=True)
class ExpertPlacement:
    """Which of E experts each rank of an ep group has, in the order of its slots. Each expert is on one rank.

    Every rank stores `slots` experts, as many as the rank with the most, so that all ranks run the same collectives
    with the same shapes. A spare slot is zero and gets neither tokens nor a gradient.
    """

    experts_of_rank: tuple[tuple[int, ...], ...]

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
    def slot_of_expert(self) -> tuple[int, ...]:
        """Global slot (rank·slots + index) of each logical expert."""
        slots = {
            expert: rank * self.slots + index
            for rank, owned in enumerate(self.experts_of_rank)
            for index, expert in enumerate(owned)
        }
        return tuple(slots[expert] for expert in range(self.experts))

    @cached_property
    def rank_of_expert(self) -> tuple[int, ...]:
        """Rank of the ep group that has each logical expert."""
        return tuple(slot // self.slots for slot in self.slot_of_expert)


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
    problems = [f"{key!r} is not a key of the file; known: blocks" for key in content if key != "blocks"]
    lists: dict[int, Any] = {}
    for key, value in content["blocks"].items():
        number = int(key) if isinstance(key, str) and key.isdecimal() else key
        if type(number) is not int or number not in blocks:
            problems.append(f"block {key!r}: has no routed experts; those with experts are {_listed(blocks)}")
        else:
            lists[number] = value
    if missing := [block for block in blocks if block not in lists]:
        problems.append(f"{_of_blocks(missing)} missing; list the experts of each rank for every block with experts")
    for block, value in lists.items():
        problems += [f"block {block}: {problem}" for problem in _problems(value, experts, ep)]
    if problems:
        return {}, problems
    return {block: ExpertPlacement(tuple(tuple(sorted(rank)) for rank in lists[block])) for block in blocks}, []


def placement_text(placements: Placements, comments: Sequence[str] = ()) -> str:
    """The text of a file that `read_placements` reads, with lines of comment before it."""
    lines = [*(f"# {comment}" for comment in comments), "blocks:"]
    lines += [
        f"  {block}: [{', '.join(f'[{_listed(owned)}]' for owned in placement.experts_of_rank)}]"
        for block, placement in sorted(placements.items())
    ]
    return "\n".join(lines) + "\n"


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


def _of_blocks(blocks: Sequence[int]) -> str:
    return f"block {blocks[0]} is" if len(blocks) == 1 else f"blocks {_listed(blocks)} are"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
