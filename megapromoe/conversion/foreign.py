"""Opens DeepSpeed's folders: weights, the separate files of experts, and the float32 shards of ZeRO-1 and ZeRO-2."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megapromoe.checkpoint.format import KINDS
from megapromoe.config.model_options import PUBLISHED_ROUTERS, ModelConfig
from megapromoe.config.options import Config
from megapromoe.conversion.adamw import groups_and_states, moments, note_settings, whole_steps
from megapromoe.conversion.containers import check_tensors, strip_wrappers
from megapromoe.conversion.conventions import assumed_objective, in_our_sign, with_objective
from megapromoe.conversion.published_names import published_names
from megapromoe.conversion.starting_run import StartingRun
from megapromoe.conversion.state import (
    State,
    check_floats,
    check_positions,
    check_same,
    model_shapes,
    needed,
    place,
    reader,
    stored_config,
)
from megapromoe.conversion.stream import ConversionError, Stored
from megapromoe.conversion.torch_files import read_pickle
from megapromoe.conversion.zero_shards import Shards, read_shards

EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
Places = dict[str, tuple[str, "int | None"]]
_TABLES = ("pos_embed", "ema.pos_embed")
Pieces = dict[tuple[str, str], Any]


def deepspeed_folder(path: Path, step: int | None) -> Path:
    """The folder of a step: `path` itself, or its subfolder of `step` or of the tag in `latest`.

    Raises ConversionError if there is no such folder.
    """
    if list(path.glob("*mp_rank_*_model_states.pt")):
        if step is not None and path.name != f"global_step{step}":
            raise ConversionError(f"step = {step}: {path} is a single checkpoint; leave the step out")
        return path
    tag = (path / "latest").read_text(encoding="utf-8").strip() if step is None else f"global_step{step}"
    if not (path / tag).is_dir() or Path(tag).name != tag:
        existing = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())) or "none"
        raise ConversionError(f"{path / tag}: there is no such checkpoint; there are: {existing}")
    return path / tag


def open_deepspeed(
    path: Path,
    config: Config | None,
    step: int | None,
    objective: str | None = None,
    run: StartingRun | None = None,
) -> State:
    """Opens a DeepSpeed folder without tensor parallelism and ZeRO-3; see `formats.open_state`.

    Masters and moments are read from ZeRO's shards if there are any. Otherwise moments are read if the optimizer state
    lists the names of its parameters, as in folders that megapromoe writes.
    """
    folder = deepspeed_folder(path, step)
    file, main = _read_main(folder)
    description = main.get("megapromoe") or {}
    if not isinstance(description, Mapping):
        raise ConversionError(f"{file}: its megapromoe is not a mapping")
    tensors = _read_weights(folder, file, main)
    config = config or (stored_config(description["config"], run) if "config" in description else None)
    config = needed(config, path, run, {name: stored.shape for name, stored in tensors.items()})
    notes: list[str] = []
    if objective and description:
        raise ConversionError(f"--objective {objective}: {path} contains its objective; leave --objective out")
    if objective:
        config = with_objective(config, objective)
    elif not description:
        notes.append(assumed_objective(config, run is not None))
    shapes, buffer_shapes = model_shapes(config.model)
    places = _places(tensors, [*shapes, *buffer_shapes], config.model)
    averages = {strip_wrappers(name)[0]: stored for name, stored in (main.get("ema_module") or {}).items()}
    if not averages:
        notes.append("it has no averaged weights: the weights are used for them")
    shards = read_shards(folder, main)
    pieces: Pieces = {}
    both = {**shapes, **buffer_shapes}
    expected = {theirs: both[ours][row is not None :] for theirs, (ours, row) in places.items()}
    for kind, source in (("master", tensors), ("ema", averages or tensors)):
        with_buffers = kind == "master" or source is tensors
        check_same(
            folder,
            {name: stored.shape for name, stored in source.items() if name != "pos_embed"},
            {name: shape for name, shape in expected.items() if with_buffers or places[name][0] in shapes},
        )
        parameters = {theirs: source[theirs] for theirs, (ours, _) in places.items() if ours in shapes}
        if source is averages or (kind == "master" and shards is None):
            notes += [note for note in check_floats(folder, parameters) if note not in notes]
        for theirs, (ours, row) in places.items():
            if ours in shapes:
                place(pieces, (kind, ours), row, source[theirs])
    kinds: tuple[str, ...] = ("master", "ema")
    if shards is not None:
        updates = _from_shards(folder, shards, places, shapes, pieces, notes, config, not averages)
    else:
        updates = _from_optimizer(folder, main, places, pieces, notes, config)
    if updates is not None:
        kinds = KINDS
    buffers = {ours: tensors[theirs] for theirs, (ours, _) in places.items() if ours in buffer_shapes}
    kept = {name: stored.read() for name, stored in (buffers | dict(main.get("megapromoe_buffers") or {})).items()
            if name not in _TABLES}  # fmt: skip
    for name, tables in (("pos_embed", tensors), *((n, main.get("megapromoe_buffers") or {}) for n in _TABLES)):
        if (value := check_positions(folder, name, tables.get(name), config.model)) is not None:
            kept[name] = value
    read = reader(pieces, shapes)
    return State(
        folder,
        "deepspeed",
        config,
        whole_steps(file, "global_steps", main.get("global_steps", 0)),
        updates or 0,
        kinds,
        shapes,
        kept,
        read if description else in_our_sign(read, config),
        layout=f"{len(list(folder.glob('*.pt')))} files",
        notes=notes,
    )


def _read_main(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """The file of weights and its content, whose mappings of tensors are checked."""
    files = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if [file.name for file in files] != ["mp_rank_00_model_states.pt"]:
        names = ", ".join(p.name for p in files[:3]) or "only ZeRO-3 shards"
        raise ConversionError(
            f"{folder}: is split by tensor parallelism or ZeRO-3 ({names}); merge it with DeepSpeed first"
        )
    main = read_pickle(files[0])
    if not isinstance(main, Mapping) or "module" not in main:
        raise ConversionError(f"{files[0]}: has no module, so it is not a checkpoint of DeepSpeed")
    for key in ("module", "ema_module", "megapromoe_buffers"):
        check_tensors(files[0], key, main[key] if main.get(key) is not None or key == "module" else {})
    return files[0], main


def _read_weights(folder: Path, file: Path, main: Mapping[str, Any]) -> dict[str, Stored]:
    """All weights, including those of the experts' files, by name without wrappers."""
    tensors: dict[str, Stored] = {}
    sources = [(file, main["module"])]
    sources += [(path, read_pickle(path)) for path in sorted(folder.iterdir()) if EXPERT_FILE.fullmatch(path.name)]
    for path, content in sources:
        for name, stored in check_tensors(path, "content", content).items():
            bare = strip_wrappers(name)[0]
            if bare in tensors:
                raise ConversionError(
                    f"{path}: {name} is in {tensors[bare].file.name} too, so the choice is ambiguous; remove one of the"
                    " files"
                )
            tensors[bare] = stored
    return tensors


def _places(tensors: Mapping[str, Stored], names: list[str], model: ModelConfig) -> Places:
    """Name in the files -> our name and expert's row, for the naming (deepspeed.moe or published) that fits best."""
    schemes: list[Places] = [{theirs: (ours, row) for theirs, ours, row in deepspeed_names(names, model)}]
    if model.router in PUBLISHED_ROUTERS:
        published = published_names(names, model)
        schemes.append({theirs: (ours, row) for theirs, ours, row in published if ours is not None})
    return max(schemes, key=lambda scheme: sum(name in tensors for name in scheme))


def _from_shards(
    folder: Path,
    shards: Shards,
    places: Places,
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Pieces,
    notes: list[str],
    config: Config,
    averages_too: bool,
) -> int | None:
    """Replaces the weights in `pieces` by ZeRO's float32 index ranges; returns AdamW's steps, None without moments."""
    parameters = {theirs: place for theirs, place in places.items() if place[0] in shapes}
    check_same(
        folder,
        {name: shape for name, shape in shards.shapes.items() if name != "pos_embed"},
        {theirs: shapes[ours][row is not None :] for theirs, (ours, row) in parameters.items()},
    )
    for kind, vectors in shards.pieces.items():
        for theirs, (ours, row) in parameters.items():
            place(pieces, (kind, ours), row, vectors[theirs])
            if kind == "master" and averages_too:
                place(pieces, ("ema", ours), row, vectors[theirs])
    notes.append("masters are read from ZeRO's float32 shards, not from the half-precision weights")
    if "exp_avg" not in shards.pieces:
        notes.append("the shards have no moments of AdamW: moments start at zero")
        return None
    note_settings(shards.settings, config, notes)
    return shards.updates


def _from_optimizer(
    folder: Path, main: Mapping[str, Any], places: Places, pieces: Pieces, notes: list[str], config: Config
) -> int | None:
    """Adds the moments of an optimizer state with parameter names; returns its steps, None without moments."""
    states = folder / "expp_rank_0_mp_rank_00_optim_states.pt"
    optimizer = main.get("optimizer")
    if states.is_file():
        content = read_pickle(states)
        if not isinstance(content, Mapping) or "optimizer" not in content:
            raise ConversionError(f"{states}: has no optimizer, so it is not an optimizer state of DeepSpeed")
        optimizer = content["optimizer"]
    if (
        isinstance(optimizer, Mapping)
        and {"param_groups", "state"} <= optimizer.keys()
        and all("param_names" in group for group in groups_and_states(folder, optimizer)[0])
    ):
        return moments(folder, optimizer, [], places, pieces, notes, config)
    notes.append("it has no optimizer state with parameter names: moments start at zero")
    return None


def deepspeed_names(names: Iterable[str], config: ModelConfig) -> list[tuple[str, str, int | None]]:
    """(name in DeepSpeed's files, our name, expert's row) of each tensor; experts are named as in deepspeed.moe."""
    out: list[tuple[str, str, int | None]] = []
    for name in names:
        prefix, inside, rest = name.partition(".mlp.experts.")
        if inside:
            experts = f"{prefix}.mlp.deepspeed_moe.experts.deepspeed_experts"
            out += [(f"{experts}.{e}.{rest}", name, e) for e in range(config.num_experts)]
        else:
            out.append((name, name, None))
    return out
