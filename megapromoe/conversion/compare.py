"""What a checkpoint's tensors are like, and how two checkpoints differ; one tensor is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megapromoe.conversion.state import State


@dataclass(frozen=True)
class Difference:
    """Of one kind of one parameter: the largest |a - b|, and ‖a - b‖ / ‖a‖ (the plain norm of b where a is zero)."""

    name: str
    kind: str
    largest: float
    relative: float


def norms(state: State, seen: Callable[[int], object] | None = None) -> dict[str, dict[str, float]]:
    """The norm of each parameter and kind, name -> kind -> norm, summed in float64. `seen` is told bytes as they go."""
    out: dict[str, dict[str, float]] = {}
    for name in state.shapes:
        out[name] = {}
        for kind in state.kinds:
            tensor = state.read(kind, name)
            out[name][kind] = float(tensor.double().norm())
            if seen:
                seen(tensor.nbytes)
    return out


def differences(
    one: State, other: State, seen: Callable[[int], object] | None = None
) -> tuple[list[Difference], list[str]]:
    """Differences over what both have, in the order of the first; and, in words, what only one has or shapes apart."""
    apart = [
        f"{name}: {one.shapes.get(name)} and {other.shapes.get(name)}"
        for name in {**one.shapes, **other.shapes}
        if one.shapes.get(name) != other.shapes.get(name)
    ]
    kinds = [kind for kind in one.kinds if kind in other.kinds]
    apart += [f"{kind}: of one alone" for kind in (*one.kinds, *other.kinds) if kind not in kinds]
    found = []
    for name, shape in one.shapes.items():
        if other.shapes.get(name) != shape:
            continue
        for kind in kinds:
            a, b = one.read(kind, name), other.read(kind, name)
            gap = (a.double() - b.double()).flatten()
            size = float(a.double().norm()) or 1.0
            found.append(Difference(name, kind, float(gap.abs().max()), float(gap.norm()) / size))
            if seen:
                seen(2 * a.nbytes)
    return found, apart
