"""Placements of experts for tests: other experts, and another number of them, on each rank and in each block."""

import random
from itertools import pairwise
from pathlib import Path

from megapromoe.config.expert_placement import ExpertPlacement, placement_text


def uneven_placement(experts: int, ep: int, seed: int) -> ExpertPlacement:
    """Experts in random order, taken apart at random into a list for each rank, none of them empty."""
    draw = random.Random(seed)
    order = draw.sample(range(experts), experts)
    edges = [0, *sorted(draw.sample(range(1, experts), ep - 1)), experts]
    lists = (order[start:stop] for start, stop in pairwise(edges))
    return ExpertPlacement(tuple(tuple(sorted(owned)) for owned in lists))


def placement_file(folder: Path, experts: int, ep: int, blocks: tuple[int, ...] = (1, 3), seed: int = 0) -> Path:
    """A file for `parallel.placement` with another uneven placement in each block."""
    placements = {block: uneven_placement(experts, ep, 100 * seed + block) for block in blocks}
    path = folder / f"placement-{experts}-{ep}-{seed}.yaml"
    path.write_text(placement_text(placements))
    return path
