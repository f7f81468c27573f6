"""Images from a trained run: a checkpoint's weights, the sampler, and the picture or archive of the result.

    model, config, step = load_model(Path("runs/digits"))
    images = generate(model, config, labels=[3, 3, 5], indices=[0, 1, 2])

How images are drawn is `diffusion/image_grid.py`'s; many of them are `sampling.py`'s.
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

from megapromoe.checkpoint.format import Checkpoint, CheckpointError, check_model, folder_of, steps_in
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.config.options import Config
from megapromoe.config.resolve import resolve
from megapromoe.diffusion.image_grid import (
    SampleError,
    check_channels,
    chunks,
    generate,
    grid,
    picture_scale,
    write_png,
)
from megapromoe.distributed import runtime
from megapromoe.distributed.agreement import distributed_session, raise_if_any_rank_failed
from megapromoe.distributed.mesh import Group, Mesh
from megapromoe.nn.dit import DiT
from megapromoe.nn.parallelize import build
from megapromoe.sampling.decoding import decoded, open_decoder

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


def find_checkpoint(run: Path, step: int | None = None, weights: str = "ema") -> Checkpoint:
    """The checkpoint of a step, or the latest. Raises SampleError, or CheckpointError if files are missing."""
    if weights not in ("ema", "master"):
        raise SampleError(f"weights = {weights!r}: must be ema or master")
    root = RunDirectory(run).checkpoints
    steps = steps_in(root)
    if not steps:
        raise SampleError(f"{root}: holds no complete checkpoint; train until train.save_every at least")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise SampleError(f"step = {step}: {root} has no such checkpoint; there are {there}")
    return Checkpoint(folder_of(root, steps[-1] if step is None else step))


def load_model(
    run: Path,
    step: int | None = None,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    overrides: Iterable[str] = (),
    mesh: Mesh | None = None,
) -> tuple[DiT, Config, int]:
    """The model of a checkpoint, float32 and in eval mode; the whole of it, on this process alone, without a mesh.

    Args:
        run: the run directory.
        step: of the checkpoint; None takes the latest.
        weights: "ema", the averaged ones, or "master".
        overrides: `sample.key=value` settings.
        mesh: how the model lies over ranks that all call this. Each keeps its part, and reads its share of the files'
            hashes, so that damage is told to one rank only: they must tell each other.

    Returns:
        model, the run's config, the checkpoint's step.

    Raises SampleError, ConfigError (see `run_config`), or CheckpointError: damaged, or of another model.
    """
    config = run_config(run, overrides)
    checkpoint = find_checkpoint(run, step, weights)
    one = Group((0,), 0)
    mesh = mesh or Mesh(one, one, one, one, one)
    checkpoint.verify(mesh.rank, mesh.world)
    model = build(config, mesh, device)
    check_model(checkpoint, {name: layout.shape for name, layout in model.layouts.items()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(model.layouts[name].take(checkpoint.logical(weights, name), mesh))
        for name, tensor in model.state_dict().items():
            if name not in model.layouts:
                tensor.copy_(checkpoint.buffer(name))
    return model.eval().requires_grad_(False), config, int(checkpoint.manifest["step"])


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
    autoencoder: str | None = None,
) -> None:
    """Draws images with a run's model and writes `out`: .png, a grid, or .npz: `images`, `labels`, `seed`.

    Called by every rank of `launch`, before it has joined the job.

    Args:
        classes: None takes all. The images are numbered class by class; in a grid each class has a row.
        count: images of each class.
        step, weights: see `load_model`.
        overrides: `sample.key=value` settings.
        autoencoder: of the run's latents. Without one the .npz of a run on latents holds latents.

    Raises SampleError or ConfigError, on every rank, before anything is drawn.
    """
    config = run_config(run, overrides)
    classes = list(range(config.model.num_classes)) if classes is None else classes
    _check_request(config, out, classes, count, autoencoder)
    with distributed_session(launch, config.train.timeout) as device:
        raise_if_any_rank_failed(_unwritable(out) if launch.rank == 0 else None, launch, SampleError)
        problem = None
        try:
            model, config, step = load_model(run, step, weights, device, overrides)
            decoder = None if autoencoder is None else open_decoder(config, autoencoder, device)
        except (SampleError, CheckpointError, OSError) as error:
            problem = str(error)
        raise_if_any_rank_failed(problem, launch, SampleError)
        labels = [label for label in classes for _ in range(count)]
        with tqdm(disable=launch.rank != 0 or None, unit="step", desc="sampling") as bar:
            said = partial(_show, bar)
            images = generate(model, config, labels, range(len(labels)), launch.rank, launch.world, said)
        finite = bool(images.isfinite().all())
        raise_if_any_rank_failed(
            None if finite else f"step {step} of {run} draws values that are not finite", launch, SampleError
        )
        images = gather(images, len(labels), config.sample.batch, launch.rank, launch.world)
        if images is not None:
            columns = count if len(classes) > 1 else math.ceil(math.sqrt(count))
            problem = _write(out, decoded(images, decoder).cpu(), labels, columns, config.sample.seed)
        raise_if_any_rank_failed(problem, launch, SampleError)
    logger.info("%s: %d images of step %d, %s weights", out, len(labels), step, weights)


def check_classes(config: Config, classes: Iterable[int]) -> list[str]:
    """What is wrong with a choice of classes."""
    last = config.model.num_classes - 1
    problems = []
    if wrong := [c for c in classes if not 0 <= c <= last]:
        problems.append(f"class {', '.join(map(str, wrong))}: the run's classes are 0..{last}")
    if not classes:
        problems.append("classes: at least one is needed")
    return problems


def _check_request(config: Config, out: Path, classes: list[int], count: int, autoencoder: str | None) -> None:
    problems = check_classes(config, classes)
    if count < 1:
        problems.append(f"count = {count}: must be at least 1")
    if out.suffix not in KINDS:
        problems.append(f"out = {out}: must end in {' or '.join(KINDS)}")
    if out.suffix == ".png" and autoencoder is None:
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
