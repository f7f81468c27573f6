"""AdamW's moments from a state dict of torch.optim.AdamW, which identifies parameters by their order."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megapromoe.config.options import Config
from megapromoe.conversion.state import FLOATS, model_shapes, place
from megapromoe.conversion.stream import ConversionError, Stored


def moments(
    path: Path,
    optimizer: Mapping[str, Any],
    names: list[str],
    places: Mapping[str, tuple[str | None, int | None]],
    pieces: dict[tuple[str, str], Any],
    notes: list[str],
    config: Config,
    not_ours: Collection[str] = (),
) -> int | None:
    """Adds AdamW's moments to `pieces`; returns the number of its steps, or None (with a note) for another optimizer.

    Args:
        path: of the file, for messages.
        optimizer: the state dict.
        names: parameters in the optimizer's order; not used if its groups list names (`param_names`).
        places: name -> our name (None: not a parameter of ours) and the expert's row in it.
        pieces: (kind, our name) -> stored tensors; see `state.place`.
        notes: messages for the user are appended.
        config: of the model.
        not_ours: those of `names` that are omitted.

    Raises ConversionError if the state is malformed or belongs to other parameters.
    """
    groups, states = groups_and_states(path, optimizer)
    held = {key for state in states.values() for key in state}
    if held and not held & {"exp_avg", "exp_avg_sq"}:
        notes.append(
            f"its optimizer is not AdamW (it holds {', '.join(sorted(map(str, held))[:4])}): moments start at zero"
        )
        return None
    indices = [index for group in groups for index in group["params"]]
    listed = [name for group in groups for name in group.get("param_names", [])]
    if listed:
        names = listed
    elif len(indices) == len(names) - 1:
        names = [
            name for name in names if name != "pos_embed"
        ]  # constant; some scripts do not pass it to the optimizer
    if unknown := [name for name in names if name not in places and name not in not_ours]:
        raise ConversionError(f"{path}: its optimizer has {unknown[0]}, which is not in the config's model")
    if len(indices) != len(names):
        raise ConversionError(
            f"{path}: its optimizer has {len(indices)} parameters, its model {len(names)}; they are of different models"
        )
    if len(set(indices)) < len(indices) or len(set(names)) < len(names):
        raise ConversionError(f"{path}: a parameter is listed twice in its optimizer's groups; it is not of AdamW")
    steps, missing, shapes = set(), [], model_shapes(config.model)[0]
    for index, name in zip(indices, names, strict=True):
        ours, row = places.get(name, (None, None))
        state = states.get(index)
        if ours is None:
            continue
        if state is None:
            missing.append(name)
        else:
            steps.add(whole_steps(path, f"optimizer's step of {name}", state.get("step")))
        for kind in ("exp_avg", "exp_avg_sq"):
            stored = None if state is None else state.get(kind)
            shape = shapes[ours][row is not None :]
            fits = isinstance(stored, Stored) and stored.shape == shape and stored.dtype in FLOATS
            if state is not None and not fits:
                raise ConversionError(
                    f"{path}: the {kind} of {name} is missing or has another shape; the optimizer state is not of AdamW"
                )
            place(pieces, (kind, ours), row, stored)
    given = set(names)
    for name, (ours, row) in places.items():
        if ours in shapes and name not in given:
            missing.append(name)
            for kind in ("exp_avg", "exp_avg_sq"):
                place(pieces, (kind, ours), row, None)
    if missing:
        notes.append(
            f"{len(missing)} parameters ({missing[0]} ...) have no moments, because they had no gradient yet: zeros"
        )
    if len(steps) > 1:
        notes.append(f"AdamW counts {min(steps)} to {max(steps)} steps; {max(steps)} is used for all")
    if any(group.get("amsgrad") for group in groups):
        notes.append("its AdamW uses amsgrad, whose maxima of the second moments are omitted")
    note_settings(groups[0], config, notes)
    return max(steps, default=0)


def note_settings(group: Mapping[str, Any], config: Config, notes: list[str]) -> None:
    """Adds notes on a group's settings that differ from the config's."""
    train = config.train
    constants = {"lr": train.lr, "betas": [train.beta1, train.beta2], "eps": train.eps}
    for key, value in (constants | {"weight_decay": train.weight_decay}).items():
        stored_value = group.get(key, value)
        if stored_value != value:
            notes.append(f"its AdamW has {key} = {stored_value}, the config has {value}, which will be used")


def groups_and_states(path: Path, optimizer: Any) -> tuple[list[Mapping[str, Any]], Mapping[Any, Mapping[str, Any]]]:
    """The parameter groups and the states of a torch.optim.AdamW. Raises ConversionError if they are malformed."""
    bad = f"{path}: its optimizer state is not that of torch.optim.AdamW"
    if not isinstance(optimizer, Mapping) or not {"param_groups", "state"} <= optimizer.keys():
        raise ConversionError(f"{bad} (it has no param_groups, or no state)")
    groups, states = optimizer["param_groups"], optimizer["state"]
    if not isinstance(groups, list) or not groups or not all(isinstance(group, Mapping) for group in groups):
        raise ConversionError(f"{bad} (its param_groups are not a list of mappings)")
    for group in groups:
        for key, kind, default in (("params", int, None), ("param_names", str, [])):
            values = group.get(key, default)
            if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
                raise ConversionError(f"{bad} ({key} of a group is not a list of {kind.__name__})")
    if not isinstance(states, Mapping) or not all(isinstance(state, Mapping) for state in states.values()):
        raise ConversionError(f"{bad} (its state is not a mapping of mappings)")
    return groups, states


def whole_steps(path: Path, name: str, value: Any) -> int:
    """A number of steps, stored as a number or as a tensor of one element. Raises ConversionError."""
    if isinstance(value, Stored):
        value = value.read().item() if math.prod(value.shape) == 1 else None
    if type(value) not in (int, float) or not 0 <= value < 1 << 53 or value != int(value):
        raise ConversionError(f"{path}: its {name} is not a whole number, 0 or more")
    return int(value)
