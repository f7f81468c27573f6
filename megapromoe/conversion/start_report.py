"""What a run that starts from a checkpoint takes, makes new, changes and leaves out: a short table, and the record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from megapromoe.checkpoint.average import share_in_words
from megapromoe.checkpoint.weights import AVERAGE, MASTER
from megapromoe.conversion.adapting import OUTPUT, changed_names, fresh_names
from megapromoe.conversion.class_mapping import SAME, names_of
from megapromoe.conversion.starting_weights import IMAGES, StartingWeights, source_names
from megapromoe.conversion.state import model_shapes
from megapromoe.number_text import share_of

Report = Mapping[str, Sequence[str]]
"""Heading -> sentences."""

_COMPUTED = ("time_frequency_shift", "mlp_norm_eps", "top_k", "score_function", "router")
_NOT_OF_WEIGHTS = ("moments", "AdamW", "used for the masters and for their average", "the weights are used for them")
_KIND_NAMES = {MASTER: "the weights as trained", AVERAGE: "the averaged weights", "exp_avg": "the moments of AdamW"}
_SHOWN = 4  # classes in a list


def report(start: StartingWeights) -> Report:
    """The table of a start; headings without a sentence are left out."""
    shapes, _ = model_shapes(start.config.model)
    names = [name for name in shapes if start.is_unchanged(name)]
    total = sum(math.prod(shape) for shape in shapes.values())
    taken = share_of(sum(math.prod(shapes[name]) for name in names), total)
    rows = {
        "source": [_source(start)],
        "taken": [f"{len(names)} of {len(shapes)} tensors as they are, {taken} parameters"],
        "experts": _experts(start),
        "classes": _classes(start),
        "changed": _changed(start),
        "new": _new(start),
        "positions": _positions(start),
        "left out": _left_out(start),
        "begins": ["the moments of the optimizer at zero, averages at these weights, the data at step 0"],
        "note": _notes(start),
    }
    return {heading: content for heading, sentences in rows.items() if (content := list(sentences))}


def lines(table: Report) -> list[str]:
    """The table as lines of text."""
    return [f"{heading}: {sentence}" for heading, sentences in table.items() for sentence in sentences]


def _source(start: StartingWeights) -> str:
    source = start.source
    step = f", step {source.step:,}" if source.step else ""
    chosen = "the weights as trained (master)"
    if start.kind == AVERAGE:
        average = source.average
        known = average is not None and average.initial_share is not None
        share = f", {share_in_words(average.initial_share)}" if known and average is not None else ""
        chosen = f"the averaged weights ({start.config.train.init_weights}){share}"
    return f"{start.path} ({source.format}{step}), {chosen}"


def _experts(start: StartingWeights) -> Iterator[str]:
    old, new = start.source.config.model, start.config.model
    if start.needs_prototypes:
        what = "copies" if start.how == "copy" else "slices"
        yield (
            f"{new.num_experts} in each of {len(new.moe_blocks)} blocks, {what} of the source's MLPs; prototypes by"
            f" k-means on the tokens of {IMAGES} images of the data"
        )
    elif start.splits_experts:
        times = new.num_experts // old.num_experts
        yield f"{new.num_experts} in each layer, each of the source's {old.num_experts} split into {times}, with noise"


def _classes(start: StartingWeights) -> Iterator[str]:
    old = start.source.config.model.num_classes
    if not start.classes or start.classes == tuple(range(old)):
        return
    kept = {number for number in start.classes if number is not None}
    fresh = [number for number, before in enumerate(start.classes) if before is None]
    mean = f"the mean of the source's {old} classes"
    text = f"all {len(fresh)} rows are new, {mean}"
    if kept:
        text = f"{len(start.classes) - len(fresh)} of {len(start.classes)} rows are those of classes of the source"
        text += f"; new, {mean}: {_listed(fresh)}" if fresh else ""
    yield f"{text}; the row of the null class is kept"
    if not kept:
        yield f"left out, of the source: all {old} classes"
    elif unused := [number for number in range(old) if number not in kept]:
        yield f"left out, of the source: {_listed(unused)}"


def _changed(start: StartingWeights) -> Iterator[str]:
    new = start.config.model
    if OUTPUT[0] in changed_names(start.source.config.model, new, start.classes):
        variance = "starts at zero" if new.learn_sigma else "is left out"
        yield f"final_layer.linear: the variance {variance} (model.learn_sigma = {str(new.learn_sigma).lower()})"


def _new(start: StartingWeights) -> Iterator[str]:
    old, new = start.source.config.model, start.config.model
    if names := fresh_names(old, new):
        sizes = ("patch_size", "in_channels")
        why = [
            f"model.{n} = {getattr(new, n)}, not {getattr(old, n)}" for n in sizes if getattr(new, n) != getattr(old, n)
        ]
        if new.align_block:
            why.append("the projector of model.align_block is made anew")
        yield f"{', '.join(names)}, from train.seed: {'; '.join(why)}"


def _positions(start: StartingWeights) -> Iterator[str]:
    old, new = start.source.config.model, start.config.model
    before, now = (m.input_size // m.patch_size for m in (old, new))
    if before != now:
        yield f"computed for {now}x{now} tokens; the source has {before}x{before}"
    if old.position_scale != new.position_scale:
        yield f"model.position_scale = {new.position_scale:g}, not {old.position_scale:g}"


def _left_out(start: StartingWeights) -> Iterator[str]:
    source = start.source
    one_set = any(words in note for note in source.notes for words in _NOT_OF_WEIGHTS[2:])
    for kind in source.kinds:
        if kind in (start.kind, "exp_avg_sq") or (one_set and kind in (MASTER, AVERAGE)):
            continue
        yield _KIND_NAMES[kind]


def _notes(start: StartingWeights) -> Iterator[str]:
    old, new = start.source.config, start.config
    yield from (note for note in start.source.notes if not any(words in note for words in _NOT_OF_WEIGHTS))
    if old.diffusion.objective != new.diffusion.objective:
        yield (
            f"diffusion.objective = {new.diffusion.objective}, but {old.diffusion.objective} in the source: training"
            " has to change what the model predicts"
        )
    for name in _COMPUTED if not start.needs_prototypes else ():
        if getattr(old.model, name) != getattr(new.model, name):
            yield f"model.{name} = {getattr(new.model, name)}, but {getattr(old.model, name)} in the source"
    names = names_of(new), source_names(start.source)
    if start.classes and new.train.init_classes == SAME and all(names) and names[0] != names[1]:
        yield "the data's classes have other names than the source's: their rows are taken by number"
    average = start.source.average
    if average is not None and start.kind == AVERAGE and average.has_initial_weights:
        yield f"{average.in_words()}: train.init_weights=master takes the weights as trained"


def _listed(numbers: Sequence[int]) -> str:
    """Such as "class 3", "classes 0, 1, 2, 3 and 6 more"."""
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"class{'es' if len(numbers) > 1 else ''} {shown}{more}"
