"""Images from a trained run: a checkpoint's weights, the sampler, and the picture or archive of the result.

    model, config, step = load_model(Path("runs/digits"))
    images = generate(model, config, labels=[3, 3, 5], indices=[0, 1, 2])

How images are drawn is `diffusion/drawing.py`'s.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megapromoe.config import Config, resolve
from megapromoe.diffusion.drawing import (
    SampleError,
    check_channels,
    chunks,
    generate,
    grid,
    picture_scale,
    write_png,
)
from megapromoe.models.dit import DiT
from megapromoe.parallel.mesh import Group, Mesh
from megapromoe.parallelize import build
from megapromoe.training import runtime
from megapromoe.training.checkpoint_file import Checkpoint, CheckpointError, check_model, folder_of, steps_in
from megapromoe.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

KINDS = (".png", ".npz")


def run_config(run: Path, overrides: Iterable[str] = ()) -> Config:
    """The config of a run directory, with other `sample.key=value` settings.

    Raises SampleError if the folder is no run or an override is of another section; ConfigError for values.
    """
    directory = RunDirectory(run)
    overrides = list(overrides)
    problems = []
    if not directory.config_file.is_file():
        problems.append(f"{run}: has no config.yaml, so it is no run; give the --run of `megapromoe train`")
    if others := [text for text in overrides if not text.strip().startswith("sample.")]:
        problems.append(f"{', '.join(others)}: the run's model is fixed; only sample.key=value can be set")
    if problems:
        raise SampleError("; ".join(problems))
    return resolve(file=directory.config_file, overrides=overrides)


def load_model(
    run: Path,
    step: int | None = None,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    overrides: Iterable[str] = (),
) -> tuple[DiT, Config, int]:
    """The whole model of a checkpoint, on this process alone, float32 and in eval mode.

    Args:
        run: the run directory.
        step: of the checkpoint; None takes the latest.
        weights: "ema", the averaged ones, or "master".
        overrides: `sample.key=value` settings.

    Returns:
        model, the run's config, the checkpoint's step.

    Raises SampleError, ConfigError (see `run_config`), or CheckpointError: damaged, or of another model.
    """
    config = run_config(run, overrides)
    if weights not in ("ema", "master"):
        raise SampleError(f"weights = {weights!r}: must be ema or master")
    root = RunDirectory(run).checkpoints
    steps = steps_in(root)
    if not steps:
        raise SampleError(f"{root}: holds no complete checkpoint; train until train.save_every at least")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise SampleError(f"step = {step}: {root} has no such checkpoint; there are {there}")
    step = steps[-1] if step is None else step
    checkpoint = Checkpoint(folder_of(root, step))
    checkpoint.verify()
    one = Group((0,), 0)
    model = build(config, Mesh(one, one, one, one, one), device)  # whole, also inside a job of many ranks
    check_model(checkpoint, {name: layout.shape for name, layout in model.layouts.items()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.logical(weights, name))
        for name, tensor in model.state_dict().items():
            if name not in model.layouts:
                tensor.copy_(checkpoint.buffer(name))
    return model.eval().requires_grad_(False), config, step


def gather(images: Tensor, count: int, batch: int, rank: int, world: int) -> Tensor | None:
    """All `count` images in order on rank 0, None elsewhere, from what `generate` gave each. Collective."""
    if world == 1:
        return images
    if rank:
        if len(images):
            dist.send(images.contiguous(), 0)
        return None
    whole = images.new_empty(count, *images.shape[1:])
    for source in range(world):
        stretches = chunks(count, batch, source, world)
        sizes = [len(stretch) for stretch in stretches]
        part = images
        if source:
            part = images.new_empty(sum(sizes), *images.shape[1:])
            if sizes:
                dist.recv(part, source)
        for stretch, piece in zip(stretches, part.split(sizes), strict=True):
            whole[stretch.start : stretch.stop] = piece
    return whole


def sample_command(
    run: Path,
    out: Path,
    classes: list[int] | None,
    count: int,
    step: int | None,
    weights: str,
    overrides: list[str],
    launch: runtime.Launch,
) -> None:
    """Draws images with a run's model and writes `out`: .png, a grid, or .npz: `images`, `labels`, `seed`.

    Called by every rank of `launch`, before it has joined the job.

    Args:
        classes: None takes all. The images are numbered class by class; in a grid each class has a row.
        count: images of each class.
        step, weights: see `load_model`.
        overrides: `sample.key=value` settings.

    Raises SampleError or ConfigError, on every rank, before anything is drawn.
    """
    config = run_config(run, overrides)
    classes = list(range(config.model.num_classes)) if classes is None else classes
    _check_request(config, out, classes, count)
    alone = launch.world == 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not alone:
        device = runtime.start(launch, config.train.timeout).device
    try:
        _agree(_unwritable(out) if launch.rank == 0 else None, launch)
        _draw(run, out, classes, count, step, weights, overrides, launch, device)
    finally:
        if not alone:
            runtime.stop()


def _draw(
    run: Path,
    out: Path,
    classes: list[int],
    count: int,
    step: int | None,
    weights: str,
    overrides: list[str],
    launch: runtime.Launch,
    device: torch.device,
) -> None:
    """What follows the checks of `sample_command`: load, draw, gather, write. Collective."""
    problem = None
    try:
        model, config, step = load_model(run, step, weights, device, overrides)
    except (SampleError, CheckpointError, OSError) as error:
        problem = str(error)
    _agree(problem, launch)
    labels = [label for label in classes for _ in range(count)]
    with tqdm(disable=launch.rank != 0 or None, unit="step", desc="sampling") as bar:
        said = partial(_show, bar)
        images = generate(model, config, labels, range(len(labels)), launch.rank, launch.world, said)
    finite = bool(images.isfinite().all())
    _agree(None if finite else f"step {step} of {run} draws values that are not finite", launch)
    images = gather(images, len(labels), config.sample.batch, launch.rank, launch.world)
    if images is not None:
        columns = count if len(classes) > 1 else math.ceil(math.sqrt(count))
        problem = _write(out, images.cpu(), labels, columns, config.sample.seed)
    _agree(problem, launch)
    logger.info("%s: %d images of step %d, %s weights", out, len(labels), step, weights)


def _check_request(config: Config, out: Path, classes: list[int], count: int) -> None:
    problems = []
    last = config.model.num_classes - 1
    if wrong := [c for c in classes if not 0 <= c <= last]:
        problems.append(f"class {', '.join(map(str, wrong))}: the run's classes are 0..{last}")
    if not classes:
        problems.append("classes: at least one is needed")
    if count < 1:
        problems.append(f"count = {count}: must be at least 1")
    if out.suffix not in KINDS:
        problems.append(f"out = {out}: must end in {' or '.join(KINDS)}")
    if out.suffix == ".png":
        try:
            check_channels(config.model.in_channels)
        except SampleError as error:
            problems.append(str(error))
    if problems:
        raise SampleError("; ".join(problems))


def _unwritable(out: Path) -> str | None:
    """Why `out` cannot be written, if so; makes its folder."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            return f"out = {out}: is a folder; give the path of a file"
        _aside(out).touch()
        _aside(out).unlink()
    except OSError as error:
        return f"out = {out}: cannot be written ({error.strerror}); give another path"
    return None


def _agree(problem: str | None, launch: runtime.Launch) -> None:
    """Raises SampleError on every rank if any has a problem. Collective."""
    problems: list[str | None] = [problem]
    if launch.world > 1:
        problems = [None] * launch.world
        dist.all_gather_object(problems, problem)
    if found := dict.fromkeys(p for p in problems if p):
        raise SampleError("; ".join(found))


def _show(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _write(out: Path, images: Tensor, labels: list[int], columns: int, seed: int) -> str | None:
    """Writes `out` as a whole; returns why it could not, if so."""
    try:
        if out.suffix == ".npz":
            with open(_aside(out), "wb") as file:
                np.savez(file, images=images.numpy(), labels=np.array(labels), seed=np.array(seed))
        else:
            write_png(_aside(out), grid(images, columns, picture_scale(images.shape[-1])))
        os.replace(_aside(out), out)
    except OSError as error:
        return f"out = {out}: cannot be written ({error.strerror}); give another path"
    return None


def _aside(out: Path) -> Path:
    return out.with_name(f"{out.name}.writing")
