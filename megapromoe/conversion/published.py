"""Opens torch.save files: those of the ProMoE release, of DiT, SiT, REPA and DiffMoE, and bare state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megapromoe.checkpoint.format import KINDS
from megapromoe.config.options import Config
from megapromoe.conversion.adamw import moments, whole_steps
from megapromoe.conversion.containers import Container, unpack
from megapromoe.conversion.conventions import assumed_objective, describe, in_our_sign, with_objective
from megapromoe.conversion.published_names import constants, is_buffer, published_names
from megapromoe.conversion.starting_run import StartingRun
from megapromoe.conversion.state import (
    State,
    check_floats,
    check_positions,
    check_published,
    check_same,
    model_shapes,
    needed,
    place,
    reader,
)
from megapromoe.conversion.stream import ConversionError, Stored
from megapromoe.conversion.torch_files import read_pickle
from megapromoe.conversion.training_arguments import config_of, objective_of


def open_published(
    path: Path, config: Config | None, objective: str | None = None, run: StartingRun | None = None
) -> State:
    """Opens a torch.save file with published names; see `formats.open_state` and `containers`."""
    container = unpack(path, read_pickle(path))
    notes = list(container.notes)
    step = None if container.step is None else whole_steps(path, "step", container.step)
    config = _resolve_config(path, container, config, objective, notes, run)
    check_published(config, path)
    tensors_of = container.kinds
    if len(tensors_of) == 1:
        (only,) = tensors_of
        tensors_of = {kind: tensors_of[only] for kind in ("master", "ema")}
        notes.append(f"it has {container.keys[only]} only, which is used for the masters and for their average")

    shapes, buffer_shapes = model_shapes(config.model)
    order = published_names([*shapes, *buffer_shapes], config.model)
    fixed = constants(config.model)
    expected = {
        theirs: tuple(fixed[theirs].shape) if ours is None else ({**shapes, **buffer_shapes}[ours])[row is not None :]
        for theirs, ours, row in order
    }
    pieces: dict[tuple[str, str], object] = {}
    buffers: dict[str, Tensor] = {}
    for kind, tensors in tensors_of.items():
        # Buffers that only some versions of the release have, and positions, which are computed and checked separately.
        optional = {n for n in expected if is_buffer(n) and n not in tensors} | {"pos_embed"}
        check_same(
            path,
            {n: t.shape for n, t in tensors.items() if n != "pos_embed"},
            {n: shape for n, shape in expected.items() if n not in optional},
        )
        parameters = {theirs: tensors[theirs] for theirs, ours, _ in order if ours in shapes}
        notes += [note for note in check_floats(path, parameters) if note not in notes]
        for theirs, ours, row in order:
            if ours in shapes:
                place(pieces, (kind, ours), row, tensors[theirs])
        _keep_buffers(path, kind, tensors, order, fixed, expected, buffers, config)

    kinds, updates = tuple(tensors_of), None
    if container.optimizer:
        places = {theirs: (ours, row) for theirs, ours, row in order}
        names = [name for name in container.parameters if not is_buffer(name)]
        updates = moments(path, container.optimizer, names, places, pieces, notes, config, container.projectors)
        kinds = KINDS if updates is not None else kinds
    else:
        notes.append("it has no optimizer state: moments start at zero")
    if step is None and updates:
        step = updates
        notes.append(f"it does not contain its step; {step}, the step count of AdamW, is used")
    read = in_our_sign(reader(pieces, shapes), config)
    return State(path, "published", config, step or 0, updates or 0, kinds, shapes, buffers, read, "1 file", notes)


def _resolve_config(
    path: Path,
    container: Container,
    config: Config | None,
    objective: str | None,
    notes: list[str],
    run: StartingRun | None,
) -> Config:
    """The given config, or the one that the training arguments in the file determine; with the file's objective."""
    saved = objective_of(path, container.arguments)
    if objective and saved and objective != saved:
        raise ConversionError(
            f"{path}: --objective {objective}, but the args in the file are those of {saved}; leave --objective out"
        )
    if config is None and (config := config_of(path, container.arguments)) is not None:
        unknown = "" if run else "; its data set is not known: set data.source and data.path for training"
        notes.append(
            f"the model is {container.arguments['model']} with {describe(config)}, from the args in the file{unknown}"
        )
    (tensors, *_) = container.kinds.values()
    config = needed(config, path, run, {name: stored.shape for name, stored in tensors.items()})
    if objective or saved:
        return with_objective(config, objective or str(saved))
    if not container.is_release:
        notes.append(assumed_objective(config, run is not None))
    return config


def _keep_buffers(
    path: Path,
    kind: str,
    tensors: Mapping[str, Stored],
    order: list[tuple[str, str | None, int | None]],
    fixed: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    buffers: dict[str, Tensor],
    config: Config,
) -> None:
    """Adds the tensors that are not parameters to `buffers`: thresholds, and constants that differ by rounding.

    Raises ConversionError for a constant that differs from the one that the config determines.
    """
    for theirs, ours, _ in order:
        if theirs == "pos_embed":
            value = check_positions(path, theirs, tensors.get(theirs), config.model)
            ordinary = fixed[theirs]
        elif is_buffer(theirs):
            ordinary = fixed.get(theirs, torch.zeros(expected[theirs]))
            value = tensors[theirs].read().float() if theirs in tensors else None
            if ours is None and value is not None and not torch.allclose(value, ordinary, rtol=1e-3, atol=1e-3):
                values = ", ".join(f"{v:g}" for v in value.flatten()[:3].tolist())
                raise ConversionError(
                    f"{path}: {theirs} ({values} ...) is not the config's model.threshold_decay: set it to this value"
                )
        else:
            continue
        value = ordinary if value is None else value
        name = ours or theirs
        if kind == "ema":
            if not torch.equal(value, buffers.get(name, ordinary)):
                buffers[f"ema.{name}"] = value
        elif ours or not torch.equal(value, ordinary):
            buffers[name] = value
