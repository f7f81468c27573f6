"""Norms of a checkpoint's tensors, and differences of two checkpoints, with one tensor of each in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megapromoe.conversion.state import State


@dataclass(frozen=True)
class Difference:
    """The difference of two checkpoints in one kind of one parameter.

    Attributes:
        largest: max |a - b|.
        relative: ‖a - b‖ / ‖a‖; ‖b‖ if a is zero.
    """

    name: str
    kind: str
    largest: float
    relative: float


def norms(state: State, progress: Callable[[int], object] | None = None) -> dict[str, dict[str, float]]:
    """The norms of all parameters: name -> kind -> norm, computed in float64.

    Args:
        progress: called with the number of bytes of each tensor that was read.
    """
    out: dict[str, dict[str, float]] = {}
    for name in state.shapes:
        out[name] = {}
        for kind in state.kinds:
            tensor = state.read(kind, name)
            out[name][kind] = float(tensor.double().norm())
            if progress:
                progress(tensor.nbytes)
    return out


def differences(
    first: State, second: State, progress: Callable[[int], object] | None = None
) -> tuple[list[Difference], list[str]]:
    """Compares two checkpoints.

    Args:
        progress: called with the number of bytes that were read.

    Returns:
        The differences of the tensors that both have, in the order of the first; and descriptions of parameters and
        kinds that only one has or whose shapes differ.
    """
    unmatched = [
        f"{name}: {first.shapes.get(name)} and {second.shapes.get(name)}"
        for name in {**first.shapes, **second.shapes}
        if first.shapes.get(name) != second.shapes.get(name)
    ]
    kinds = [kind for kind in first.kinds if kind in second.kinds]
    unmatched += [f"{kind}: only in one" for kind in (*first.kinds, *second.kinds) if kind not in kinds]
    result = []
    for name, shape in first.shapes.items():
        if second.shapes.get(name) != shape:
            continue
        for kind in kinds:
            a, b = first.read(kind, name), second.read(kind, name)
            difference = (a.double() - b.double()).flatten()
            size = float(a.double().norm()) or 1.0
            result.append(Difference(name, kind, float(difference.abs().max()), float(difference.norm()) / size))
            if progress:
                progress(2 * a.nbytes)
    return result, unmatched
