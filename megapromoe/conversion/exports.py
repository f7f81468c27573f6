"""Writes a `State` in every format, tensor by tensor.

The destination gets its name when all of its data is on disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megapromoe.checkpoint.average import share_in_words
from megapromoe.checkpoint.format import all_kinds
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.tensor_writer import Progress
from megapromoe.checkpoint.weights import AVERAGE, MASTER, is_average
from megapromoe.conversion import diffusers_folder, export_formats
from megapromoe.conversion.diffusers_folder import FolderParts
from megapromoe.conversion.formats import detect
from megapromoe.conversion.state import State, check_published, checked, with_masters, with_one_average
from megapromoe.conversion.stream import ConversionError, write_pickle
from megapromoe.io import atomic_tree


def export(
    state: State,
    destination: Path,
    form: str,
    weights: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
    parts: FolderParts | None = None,
) -> list[str]:
    """Writes `state` to `destination`; returns notes for the user.

    Args:
        state: the checkpoint.
        destination: file or folder.
        form: one of `formats.FORMATS`. "ours" writes a run directory that `megapromoe train` resumes.
        weights: "master", "ema" or "ema=DECAY": write only these weights. None: "ema" for diffusers, the full state for
            safetensors. The formats published and deepspeed hold the trained weights and one average: "ema=DECAY"
            chooses it, None takes the first. "ours" holds all of them.
        overwrite: replace a destination that is a checkpoint.
        progress: called with the number of bytes of each tensor.
        allow_nonfinite: write NaN and infinity, with a note, in place of an error.
        parts: what a folder of diffusers holds besides the weights.

    Raises ConversionError if the destination exists or does not fit the format, or if a tensor is not finite;
    UnknownWeights if the source has no average of that decay.
    """
    destination = Path(destination)
    if weights is not None and form not in ("safetensors", "diffusers") and not _chooses_average(form, weights):
        raise ConversionError(f"weights = {weights}: the format {form} holds both weights; leave the weights out")
    parts = parts or FolderParts()
    if form == "diffusers":
        diffusers_folder.check_folder(state.config, parts)
    _check_destination(state, destination, form, overwrite)
    _check_room(state, destination, form, weights)
    notes: list[str] = []
    if weights is not None or not _holds_all_averages(form):
        if weights is None and state.further_averages:
            first, *others = state.averages
            notes.append(f"{form} holds one average: {first}; not written: {', '.join(others)}; see --weights")
        state = with_one_average(state, weights or AVERAGE)
        weights = AVERAGE if weights is not None and is_average(weights) else weights
    if MASTER not in state.kinds and form not in ("safetensors", "diffusers"):
        notes.append("the source is a snapshot with averages only: they are used for the trained weights too")
        state = with_masters(state)
    state = checked(state, notes if allow_nonfinite else None)
    with atomic_tree(destination, overwrite) as staging:
        if form == "ours":
            export_formats.write_ours(state, staging, notes, progress)
        elif form == "published":
            write_pickle(staging, export_formats.published_tree(state, notes), progress)
        elif form == "safetensors":
            export_formats.write_safetensors_file(state, staging, weights, progress)
        elif form == "diffusers":
            kind = weights or AVERAGE
            entries, facts = export_formats.weights_alone(state, kind), export_formats.description(state, kind)
            notes += diffusers_folder.write_folder(state.config, entries, facts, staging, parts, progress)
        elif form == "deepspeed":
            export_formats.write_deepspeed(state, staging, progress)
        else:
            raise ConversionError(f"{form!r} is not a known format")
    return notes


def _holds_all_averages(form: str) -> bool:
    """Whether a format can hold several averages."""
    return form in ("ours", "safetensors")


def _chooses_average(form: str, weights: str) -> bool:
    """Whether `weights` chooses the one average of a format that holds the trained weights too."""
    return not _holds_all_averages(form) and is_average(weights) and weights != AVERAGE


def written_weights(state: State, form: str, weights: str | None) -> str:
    """A description of the weights that `export` writes, with the share of the initial weights in averaged ones.

    Raises UnknownWeights if the source has no average of that decay.
    """
    alone = weights or (AVERAGE if form == "diffusers" else None)
    if alone == MASTER:
        return "weights as trained (master)"
    if alone is not None or not _holds_all_averages(form):
        state = with_one_average(state, alone or AVERAGE)
    share = share_in_words(state.average.initial_share if state.average and AVERAGE in state.kinds else None)
    if alone is not None and (form in ("safetensors", "diffusers")):
        return f"averaged weights ({alone}), {share}"
    if AVERAGE not in state.kinds:
        return f"all state ({', '.join(state.kinds)})"
    chosen = "" if alone is None else f" of {alone}"
    others = "".join(f"; {kind}, {average.in_words()}" for kind, average in state.further_averages.items())
    return f"all state ({', '.join(state.kinds)}); ema is the averaged weights{chosen}, {share}{others}"


def _check_destination(state: State, destination: Path, form: str, overwrite: bool) -> None:
    if form == "published":
        check_published(state.config, destination)
    suffixes = {"published": (".pth", ".pt"), "safetensors": (".safetensors",)}.get(form, ())
    if suffixes and destination.suffix not in suffixes:
        raise ConversionError(f"{destination}: {form} is one file; its name must end in {' or '.join(suffixes)}")
    if not suffixes and destination.suffix in (".pth", ".pt", ".safetensors"):
        raise ConversionError(f"{destination}: {form} is a folder; give the name of a folder")
    target, source = destination.resolve(), state.where.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise ConversionError(f"{destination}: is inside the source {state.where}, or contains it; choose another")
    if not destination.exists():
        return
    if not overwrite:
        raise ConversionError(f"{destination}: exists; choose another, or --overwrite")
    if destination.is_dir() and any(destination.iterdir()):
        if RunDirectory(destination).metrics.exists() or RunDirectory(destination).lock_file.exists():
            raise ConversionError(
                f"{destination}: is a run with training results, which is never overwritten; choose another"
            )
        detect(destination)  # raises if it is not a checkpoint: --overwrite does not replace other folders


def exported_bytes(state: State, form: str, weights: str | None = None) -> int:
    """The bytes of parameters that `export` writes with the same arguments; names and buffers add very little."""
    if form == "ours":
        kinds = len(all_kinds(state.averages))
    elif form == "diffusers" or (weights and form == "safetensors"):
        kinds = 1
    else:
        kinds = len(state.kinds) - (0 if _holds_all_averages(form) else len(state.further_averages))
    return kinds * (state.nbytes // len(state.kinds))


def _check_room(state: State, destination: Path, form: str, weights: str | None) -> None:
    needed = exported_bytes(state, form, weights)
    parent = next(p for p in destination.resolve().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < 1.01 * needed:
        raise ConversionError(
            f"{destination}: too little space, {needed:,} bytes needed, {free:,} free; choose another disk"
        )
