"""Placements of experts for tests: other experts, copies, and numbers of them, on each rank and in each block."""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from megapromoe.config.expert_placement import ExpertPlacement, ReplicatedExpert, placement_text


def uneven_placement(experts: int, ep: int, seed: int) -> ExpertPlacement:
    """Experts in random order, taken apart at random into a list for each rank, none of them empty."""
    draw = random.Random(seed)
    order = draw.sample(range(experts), experts)
    edges = [0, *sorted(draw.sample(range(1, experts), ep - 1)), experts]
    lists = (order[start:stop] for start, stop in pairwise(edges))
    return ExpertPlacement(tuple(tuple(sorted(owned)) for owned in lists))


def with_replicas(placement: ExpertPlacement, seed: int) -> ExpertPlacement:
    """Copies of expert 0 and of about half of the others, with random shares. Of several ranks the last has no copy."""
    draw = random.Random(seed)
    replicas = []
    for expert, owner in enumerate(placement.rank_of_expert):
        others = [rank for rank in range(placement.ep - (placement.ep > 2)) if rank != owner]
        hosts = draw.sample(others, draw.randint(1, len(others)))
        if expert == 0 or draw.random() < 0.5:
            shares = [draw.choice((0.0, 0.1, 0.5, 1.0)), *(0.2 + draw.random() for _ in hosts)]
            pairs = zip((owner, *hosts), (share / sum(shares) for share in shares), strict=True)
            replicas.append(ReplicatedExpert(expert, tuple(sorted(pairs))))
    return replace(placement, replicas=tuple(replicas))


def placement_file(
    folder: Path, experts: int, ep: int, blocks: tuple[int, ...] = (1, 3), seed: int = 0, copies: bool = False
) -> Path:
    """A file for `parallel.placement` with another uneven placement in each block, and other `copies` of experts."""
    placements = {block: uneven_placement(experts, ep, 100 * seed + block) for block in blocks}
    if copies:
        placements = {block: with_replicas(placement, 7 * seed + block) for block, placement in placements.items()}
    path = folder / f"placement-{experts}-{ep}-{seed}{'-copies' * copies}.yaml"
    path.write_text(placement_text(placements))
    return path
