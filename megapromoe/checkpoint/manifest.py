"""The manifest of a checkpoint. Its hash and then its whole content are checked before any of it is used.

The entry `sha256` is the hash of all other entries as canonical JSON. So it stays valid if the folder is copied or the
file is reformatted. Format 1 had no such hash: its checkpoints are read with a notice, and checked by the same rules.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapromoe.config.renamed_options import present_sections
from megapromoe.errors import UserError
from megapromoe.io import sha256_of_json

logger = logging.getLogger(__name__)

FORMAT, UNHASHED = 2, 1
MANIFEST = "manifest.json"
FOLDER = re.compile(r"step-(\d{8,})")
SNAPSHOT_FOLDER = re.compile(r"average-(\d{8,})")  # averaged weights only, see `snapshots.py`
_FILE = re.compile(r"rank-\d{5,}\.safetensors")
_MAX_BYTES = 1 << 30
_MAX_CELLS = 1 << 20  # limit for the grid that `_coverage_problems` uses; a valid layout needs one cell for each region


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or cannot be written."""

    on_all_ranks = True  # all ranks raise it together, so it is printed once


def seal(content: Mapping[str, Any]) -> str:
    """The text of a manifest of the current format, with its hash.

    Args:
        content: the entries other than `format` and `sha256`.
    """
    content = {**content, "format": FORMAT}
    content.pop("sha256", None)
    return json.dumps(content | {"sha256": sha256_of_json(content)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks the manifest of a checkpoint or snapshot folder; its config has the present option names.

    Raises CheckpointError, naming the file, if it is missing or damaged, or has another format or another step than the
    name of the folder.
    """
    path = folder / MANIFEST
    content = _load(path)
    problem = next(_problems(content), None)
    if problem:
        raise CheckpointError(f"{path}: {problem}; the checkpoint is damaged, use another step")
    named = FOLDER.fullmatch(folder.name) or SNAPSHOT_FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != content["step"]:
        right = f"{folder.name.partition('-')[0]}-{content['step']:08d}"
        raise CheckpointError(
            f"{path}: is of step {content['step']}, its folder is named as {int(named[1])}: a copy is no checkpoint of"
            f" that step; remove the folder, or rename it to {right} where that is missing"
        )
    if content["format"] == UNHASHED:
        logger.info("%s: of format %d, whose manifest has no hash; damage to it may go unseen", path, UNHASHED)
    if "config" in content:
        content["config"] = present_sections(content["config"])
    return content


@dataclass(frozen=True)
class Summary:
    """The entries of a manifest that describe the whole checkpoint.

    Attributes:
        step: training step.
        updates: number of applied optimizer steps.
        run: identity of the run; None if not recorded.
        branch: name of the branch; None if not recorded.
        complete: False for a snapshot, which contains the averaged weights only.
    """

    step: int
    updates: int
    run: str | None
    branch: str | None
    complete: bool


def read_summary(folder: Path) -> Summary:
    """Reads the summary from the manifest of a folder without checking its list of parts. Raises CheckpointError."""
    path = folder / MANIFEST
    content = _load(path)
    problem = next(_summary_problems(content), None)
    if problem:
        raise CheckpointError(f"{path}: {problem}; the checkpoint is damaged, use another step")
    return Summary(
        content["step"], content["updates"], content.get("run"), content.get("branch"), "kinds" not in content
    )


def _load(path: Path) -> dict[str, Any]:
    """Reads a manifest and checks its format and, except in format 1, its hash. Raises CheckpointError."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is no regular file; the checkpoint is damaged, use another step")
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES:,} bytes")
        content = json.loads(data.decode("utf-8"))
    except OSError as problem:
        raise CheckpointError(f"{path}: {problem.strerror}; this is no complete checkpoint") from problem
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{path}: is not JSON; the checkpoint is damaged, use another step") from problem
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is no JSON object; the checkpoint is damaged, use another step")
    stored_format = content.get("format")
    hashed = stored_format == FORMAT or "sha256" in content
    if hashed and content.get("sha256") != sha256_of_json({key: v for key, v in content.items() if key != "sha256"}):
        raise CheckpointError(f"{path}: does not match its own hash; the checkpoint is damaged, use another step")
    if stored_format not in (FORMAT, UNHASHED) or type(stored_format) is not int:
        raise CheckpointError(f"{path}: format {stored_format!r}, this version reads {UNHASHED} and {FORMAT}")
    return content


# ---- rules


def _summary_problems(content: dict[str, Any]) -> Iterator[str]:
    if not _is_count(content.get("step")) or not _is_count(content.get("updates")):
        yield f"step = {content.get('step')!r}, updates = {content.get('updates')!r}: must be whole numbers, 0 or more"
    for name in ("run", "branch", "data"):
        if content.get(name) is not None and not isinstance(content[name], str):
            yield f"{name} = {_short(content[name])}: must be a text"


def _problems(content: dict[str, Any]) -> Iterator[str]:
    """Yields a sentence for each violated rule. Each check assumes that the ones before it passed."""
    yield from _summary_problems(content)
    if not _is_count(content.get("skipped_in_a_row", 0)):
        yield f"skipped_in_a_row = {content['skipped_in_a_row']!r}: must be a whole number, 0 or more"
    elapsed = content.get("elapsed_seconds", 0)
    if type(elapsed) not in (int, float) or not math.isfinite(elapsed) or elapsed < 0:
        yield f"elapsed_seconds = {_short(elapsed)}: must be a finite number, 0 or more"
    kinds = content.get("kinds", ["ema"])
    if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, str) for kind in kinds):
        yield f"kinds = {_short(kinds)}: must be a list of names"
    share = content.get("ema_initial_share")
    if share is not None and not (type(share) in (int, float) and 0 <= share <= 1):
        yield f"ema_initial_share = {_short(share)}: must be a number from 0 to 1"
    yield from average_problems(content.get("ema_averages"))
    if type(content.get("ema_warmup", False)) is not bool:
        yield f"ema_warmup = {_short(content['ema_warmup'])}: must be true or false"
    norms = content.get("recent_norms", [])
    if not isinstance(norms, list) or not all(type(norm) in (int, float) and math.isfinite(norm) for norm in norms):
        yield "recent_norms: must be a list of finite numbers"
    buffers = content.get("buffers", [])
    if not isinstance(buffers, list) or not all(isinstance(name, str) for name in buffers):
        yield "buffers: must be a list of names"
    config = content.get("config", {})
    if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
        yield "config: must be a mapping of sections"
    with_momentum = content.get("with_momentum", [])
    if not isinstance(with_momentum, list) or not all(isinstance(name, str) for name in with_momentum):
        yield "with_momentum: must be a list of names"
        with_momentum = []
    shapes, ranks = content.get("shapes"), content.get("ranks")
    if not isinstance(shapes, dict) or not all(_is_shape(shape) for shape in shapes.values()):
        yield "shapes: must be a list of whole numbers for each parameter"
    elif not isinstance(ranks, list) or not ranks:
        yield "ranks: must be a list of the ranks' files"
    elif not set(with_momentum) <= set(shapes):
        yield f"with_momentum: {_short(sorted(set(with_momentum) - set(shapes))[0])} is no parameter"
    else:
        yield from _rank_problems(shapes, ranks)


def average_problems(averages: Any) -> Iterator[str]:
    """Yields a sentence for each violated rule of the entry `ema_averages`, which is None for a single average."""
    if averages is None:
        return
    if not isinstance(averages, list) or not averages or not all(isinstance(average, dict) for average in averages):
        yield f"ema_averages = {_short(averages)}: must be a list of averages"
        return
    for average in averages:
        decay, share = average.get("decay"), average.get("initial_share")
        if type(decay) not in (int, float) or not 0 <= decay < 1:
            yield f"ema_averages: decay = {_short(decay)}: must be a number from 0 to below 1"
            return
        if share is not None and not (type(share) in (int, float) and 0 <= share <= 1):
            yield f"ema_averages: initial_share = {_short(share)}: must be a number from 0 to 1"
        if not _is_count(average.get("updates")):
            yield f"ema_averages: updates = {_short(average.get('updates'))}: must be a whole number, 0 or more"
    if len({float(average["decay"]) for average in averages}) < len(averages):
        yield "ema_averages: the decays must be different"


def _rank_problems(shapes: dict[str, list[int]], ranks: list[Any]) -> Iterator[str]:
    files: set[str] = set()
    parts: dict[str, list[tuple[int, int, Any]]] = {name: [] for name in shapes}
    for entry in ranks:
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str) or not _FILE.fullmatch(entry["file"]):
            yield f"{_short(entry)}: must name a file rank-XXXXX.safetensors of this folder"
            return
        file = entry["file"]
        if file in files:
            yield f"{file}: is listed twice"
        files.add(file)
        if not _is_count(entry.get("size")) or not isinstance(entry.get("sha256"), str):
            yield f"{file}: its size and sha256 must be given"
            return
        if not isinstance(entry.get("parts"), list):
            yield f"{file}: its parts must be a list"
            return
        elements = 0
        for part in entry["parts"]:
            if not isinstance(part, list) or len(part) != 4 or not isinstance(part[0], str) or part[0] not in shapes:
                yield f"{file}: part {_short(part)}: must be [parameter, start, stop, view]"
                return
            name, start, stop, view = part
            if not _is_range([start, stop]) or not _is_view(view, shapes[name]):
                yield f"{file}: part {_short(part)}: its range or view is none of a tensor of shape {shapes[name]}"
                return
            elements += stop - start
            parts[name].append((start, stop, view))
        if 4 * elements > entry["size"]:
            yield f"{file}: {entry['size']} bytes do not hold its {elements} elements"
            return
    for name, shape in shapes.items():
        yield from _coverage_problems(name, shape, parts[name])


def _coverage_problems(name: str, shape: list[int], parts: list[tuple[int, int, Any]]) -> Iterator[str]:
    """Yields a sentence unless each element of the tensor is in exactly one part."""
    by_view: dict[str, list[tuple[int, int]]] = {}
    views: dict[str, Any] = {}
    for start, stop, view in parts:
        key = json.dumps(view)
        views[key] = view
        by_view.setdefault(key, []).append((start, stop))
    boxes = []
    for key, (local_shape, pairs) in views.items():
        regions = [logical for _, logical in pairs if all(stop > start for start, stop in logical)]
        if not regions:
            continue  # padding of the expert tensors: several ranks can have the same
        boxes += regions
        end = 0
        for start, stop in sorted(by_view[key]):
            if start != end:
                break
            end = stop
        if end != math.prod(local_shape) or sum(stop - start for start, stop in by_view[key]) != end:
            yield f"{name}: its parts do not cover each element of a slice of shape {local_shape} once"
            return
    edges = [sorted({0, n, *(edge for box in boxes for edge in box[dim])}) for dim, n in enumerate(shape)]
    if math.prod(len(e) - 1 for e in edges) > _MAX_CELLS:
        yield f"{name}: its parts overlap"
        return
    count = np.zeros([len(e) - 1 for e in edges], dtype=np.int64)
    places = [{edge: place for place, edge in enumerate(e)} for e in edges]
    for box in boxes:
        count[tuple(slice(place[a], place[b]) for place, (a, b) in zip(places, box, strict=True))] += 1
    if (count != 1).any():
        rule = "are missing" if (count == 0).any() else "are stored twice"
        yield f"{name}: elements {rule} in its parts"


def _is_view(view: Any, shape: list[int]) -> bool:
    """Whether `view` is [local shape, pairs of equal regions of the local and of the logical tensor]."""
    if not isinstance(view, list) or len(view) != 2 or not _is_shape(view[0]) or not isinstance(view[1], list):
        return False
    local_shape, pairs = view
    if len(local_shape) != len(shape) or not pairs:
        return False
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            return False
        for region, sizes in zip(pair, (local_shape, shape), strict=True):
            if not isinstance(region, list) or len(region) != len(sizes):
                return False
            if not all(_is_range(span) and span[1] <= size for span, size in zip(region, sizes, strict=True)):
                return False
        if any(a[1] - a[0] != b[1] - b[0] for a, b in zip(*pair, strict=True)):
            return False
    return True


def _is_range(span: Any) -> bool:
    return isinstance(span, list) and len(span) == 2 and all(map(_is_count, span)) and span[0] <= span[1]


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(map(_is_count, shape))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
