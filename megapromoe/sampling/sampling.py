"""Many images of a run, drawn by many ranks into a folder of PNG files or one .npz; begun again, it goes on.

Image i is fixed by (sample.seed, i, its class), and drawn in the company of its chunk of `sample.batch` images, which
is the same at any number of ranks. Chunks go to *lanes*: a lane is a rank, or the tp ranks that hold one model
together. Under expert parallelism the lanes of a *block* share experts, so they draw in step, and the chunks of a block
are neighbours, always the same ones: its images have the same bits at any number of blocks. A lane without a chunk
draws one again, for the others' sake, and drops it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megapromoe.checkpoint.format import CheckpointError, sha256_of
from megapromoe.config.options import Config, ParallelConfig
from megapromoe.config.resolve import check
from megapromoe.data.autoencoder import Autoencoder
from megapromoe.diffusion.image_grid import SampleError, generate
from megapromoe.diffusion.noise import uniforms
from megapromoe.distributed import runtime
from megapromoe.distributed.agreement import broadcast_from_rank0, distributed_session, raise_if_any_rank_failed
from megapromoe.distributed.mesh import make_mesh
from megapromoe.nn.dit import DiT
from megapromoe.sampling.decoding import decoded, open_decoder, to_bytes
from megapromoe.sampling.generate import check_classes, find_checkpoint, load_model, run_config
from megapromoe.sampling.image_sets import ImageSetError, Parts

logger = logging.getLogger(__name__)

CLASSES = ("balanced", "random")
_OTHER_FILES = (".png", ".jpg", ".npy", ".pt", ".zip", ".safetensors")  # names that were not meant for a folder


@dataclass(frozen=True)
class Request:
    """What to draw.

    Attributes:
        run: the run directory.
        out: a folder for PNG files, or an .npz in the layout of guided-diffusion. With several `scales`, each has a
            folder `guidance-SCALE` in it, or a file with that in its name.
        num: images.
        classes: "balanced": they take turns; "random": drawn for each image.
        only: the classes to choose from; None is all.
        scales: guidance scales, a set of images for each; none: the run's.
        step, weights: of the checkpoint, see `load_model`.
        overrides: `sample.key=value` settings.
        autoencoder: decodes latents, see `decoding.open_decoder`.
        tp, ep: ranks over which a model too large for one is split.
        named: put the scale into the name even if there is one alone.
    """

    run: Path
    out: Path
    num: int
    classes: str = "balanced"
    only: tuple[int, ...] | None = None
    scales: tuple[float | str, ...] = ()
    step: int | None = None
    weights: str = "ema"
    overrides: tuple[str, ...] = ()
    autoencoder: str | None = None
    tp: int = 1
    ep: int = 1
    named: bool = False

    def configs(self) -> list[Config]:
        """The run's config for each scale. Raises SampleError or ConfigError."""
        scales = [(f"sample.guidance={scale}",) for scale in self.scales] or [()]
        return [run_config(self.run, (*self.overrides, *scale)) for scale in scales]

    def outputs(self) -> list[tuple[Config, Path]]:
        """The config and the place of each set."""
        configs = self.configs()
        if len(configs) == 1 and not self.named:
            return [(configs[0], self.out)]
        names = [f"guidance-{config.sample.guidance:.12g}" for config in configs]
        if self.out.suffix == ".npz":
            places = [self.out.with_name(f"{self.out.stem}-{name}.npz") for name in names]
        else:
            places = [self.out / name for name in names]
        return list(zip(configs, places, strict=True))


def sample_many(request: Request, launch: runtime.Launch) -> list[Path]:
    """Draws the sets of a request; returns their places. Called by every rank, before it has joined the job.

    Raises SampleError, ImageSetError or ConfigError on every rank; finished chunks are kept, and taken up by the next.
    """
    config = checked(request, launch.world)
    with distributed_session(launch, config.train.timeout) as device:
        return draw_sets(request, launch, device)


def checked(request: Request, world: int) -> Config:
    """The run's config, if the request can be met on so many ranks; raises SampleError or ConfigError, for all."""
    outputs = request.outputs()
    config = outputs[0][0]
    expert_tp = config.parallel.expert_tp
    check(replace(config, parallel=ParallelConfig(tp=request.tp, ep=request.ep, expert_tp=expert_tp)))
    problems = [] if request.only is None else check_classes(config, request.only)
    if request.num < 1:
        problems.append(f"num = {request.num}: must be at least 1")
    if request.classes not in CLASSES:
        problems.append(f"classes = {request.classes!r}: must be {' or '.join(CLASSES)}")
    if request.out.suffix in _OTHER_FILES:
        problems.append(f"out = {request.out}: give a folder, for PNG files, or a name that ends in .npz")
    if len({place for _, place in outputs}) < len(outputs):
        problems.append(f"guidance = {', '.join(map(str, request.scales))}: each scale once")
    block = math.lcm(request.tp, request.ep * (request.tp if expert_tp else 1))
    if world % block:
        problems.append(f"tp {request.tp}, ep {request.ep}: need a multiple of {block} ranks, not {world}")
    if problems:
        raise SampleError("; ".join(problems))
    return config


def labels_of(request: Request, config: Config) -> np.ndarray:
    """The class of each image, int64 (num,)."""
    choice = np.array(range(config.model.num_classes) if request.only is None else request.only, dtype=np.int64)
    index = np.arange(request.num)
    if request.classes == "random":
        index = (uniforms(config.sample.seed, "image class", index) * len(choice)).astype(np.int64)
    return choice[index % len(choice)]


def draw_sets(request: Request, launch: runtime.Launch, device: torch.device) -> list[Path]:
    """`sample_many` on ranks that have joined the job. Collective."""
    config = checked(request, launch.world)
    facts = checkpoint_facts(request, launch)
    request = replace(request, step=facts["step"])
    problem = decoder = None
    try:
        decoder = open_decoder(config, request.autoencoder, device)
    except SampleError as error:
        problem = str(error)
    raise_if_any_rank_failed(problem, launch, SampleError)

    shape = (config.model.input_size, config.model.input_size, config.model.in_channels)
    if decoder is not None:
        side = decoder.resolution(config.model.input_size)
        shape = (side, side, decoder.channels)
    sets = [(c, Parts(place, request.num, c.sample.batch, shape)) for c, place in request.outputs()]
    try:
        missing = _opened(sets, request, facts, decoder, launch)
        if any(missing):
            model, lanes = _load(request, config, launch, device)
        for (config, parts), chunks in zip(sets, missing, strict=True):
            if chunks is None:
                if launch.rank == 0:
                    logger.info("%s: is there, %d images", parts.out, request.num)
                continue
            if chunks:
                _draw(model, config, decoder, labels_of(request, config), parts, chunks, lanes, launch)
            _finish(parts, labels_of(request, config), launch)
            logger.info("%s: %d images of step %d, %s weights", parts.out, request.num, request.step, request.weights)
    finally:
        for _, parts in sets:
            parts.close()
    return [parts.out for _, parts in sets]


def checkpoint_facts(request: Request, launch: runtime.Launch) -> dict[str, Any]:
    """The step that is drawn from, and the hash of its manifest: of one view of the folder. Collective."""
    problem, facts = None, {}
    if launch.rank == 0:
        try:
            checkpoint = find_checkpoint(request.run, request.step, request.weights)
            manifest = sha256_of(checkpoint.folder / "manifest.json")
            facts = {"step": int(checkpoint.manifest["step"]), "checkpoint": manifest}
        except (SampleError, CheckpointError, OSError) as error:
            problem = str(error)
    raise_if_any_rank_failed(problem, launch, SampleError)
    return broadcast_from_rank0(facts, launch)


def facts_of(request: Request, config: Config, decoder: Autoencoder | None) -> dict[str, Any]:
    """What, beside the checkpoint, the images of a set depend on: all that a repeated command must share."""
    return {
        "num": request.num,
        "classes": request.classes,
        "only": None if request.only is None else list(request.only),
        "weights": request.weights,
        "sample": asdict(config.sample),
        "autoencoder": None if decoder is None else decoder.identity["sha256"],
    }


def _opened(
    sets: list[tuple[Config, Parts]],
    request: Request,
    facts: Mapping[str, Any],
    decoder: Autoencoder | None,
    launch: runtime.Launch,
) -> list[list[int] | None]:
    """The chunks that each set misses, None for a finished one. Collective."""
    problem, missing = None, []
    if launch.rank == 0:
        try:
            missing = [parts.open({**facts, **facts_of(request, config, decoder)}) for config, parts in sets]
        except ImageSetError as error:
            problem = str(error)
    raise_if_any_rank_failed(problem, launch, ImageSetError)
    return broadcast_from_rank0(missing, launch)


@dataclass(frozen=True)
class Lanes:
    """Where this rank stands: `lane` of `width` in block `block` of `blocks`; `first` of its lane's ranks or not."""

    lane: int
    width: int
    block: int
    blocks: int
    first: bool

    def rounds(self, missing: list[int], last: int) -> Iterator[tuple[int | None, list[int]]]:
        """Each round: the chunk this rank draws (None: none), and the missing ones that all ranks draw in it.

        Every rank gets as many rounds, every lane of a block a chunk in the same ones.
        """
        wanted = set(missing)
        units = sorted({chunk // self.width for chunk in missing})
        for start in range(0, len(units), self.blocks):
            now = units[start : start + self.blocks]
            drawn = [c for unit in now for c in range(unit * self.width, (unit + 1) * self.width) if c in wanted]
            yield min(now[self.block] * self.width + self.lane, last) if self.block < len(now) else None, drawn

    def keeps(self, chunk: int) -> bool:
        """Whether this rank is the one to write the chunk that it draws."""
        return self.first and chunk % self.width == self.lane


def lanes_of(rank: int, world: int, tp: int, ep: int, etp: int) -> Lanes:
    """The place of a rank among the lanes; see the head of this file."""
    size = math.lcm(tp, ep * etp)
    block, place = divmod(rank, size)
    return Lanes(place // tp, size // tp, block, world // size, place % tp == 0)


def _load(request: Request, config: Config, launch: runtime.Launch, device: torch.device) -> tuple[DiT, Lanes]:
    """This rank's part of the model. Collective."""
    expert_tp = config.parallel.expert_tp and request.tp > 1
    mesh = make_mesh(request.tp, request.ep, expert_tp, config.train.timeout) if launch.world > 1 else None
    problem = model = None
    try:
        model = load_model(request.run, request.step, request.weights, device, request.overrides, mesh)[0]
    except (SampleError, CheckpointError, OSError) as error:
        problem = str(error)
    raise_if_any_rank_failed(problem, launch, SampleError)
    etp = request.tp if expert_tp else 1
    return model, lanes_of(launch.rank, launch.world, request.tp, request.ep, etp)


def _draw(
    model: DiT,
    config: Config,
    decoder: Autoencoder | None,
    labels: np.ndarray,
    parts: Parts,
    missing: list[int],
    lanes: Lanes,
    launch: runtime.Launch,
) -> None:
    """Draws the missing chunks of a set. Collective."""
    sizes = {c: min(parts.batch, parts.count - c * parts.batch) for c in missing}
    bar = tqdm(
        total=parts.count,
        initial=parts.count - sum(sizes.values()),
        disable=launch.rank != 0 or None,
        unit="image",
        desc=parts.out.name,
    )

    def said(step: int, steps: int) -> None:
        bar.set_postfix_str(f"step {step}/{steps}")

    with bar:
        for chunk, drawn in lanes.rounds(missing, parts.chunks - 1):
            problem = None
            if chunk is not None:
                stretch = range(chunk * parts.batch, min((chunk + 1) * parts.batch, parts.count))
                classes = labels[stretch.start : stretch.stop].tolist()
                images = generate(model, config, classes, stretch, progress=said)
                if not images.isfinite().all():
                    problem = f"images {stretch.start}..{stretch.stop - 1}: the model draws values that are not finite"
                elif chunk in sizes and lanes.keeps(chunk):
                    try:
                        parts.write(chunk, to_bytes(decoded(images, decoder)))
                    except OSError as error:
                        problem = f"{parts.folder}: cannot be written ({error.strerror}); what is there is kept"
            raise_if_any_rank_failed(problem, launch, SampleError)
            bar.update(sum(sizes[c] for c in drawn))


def _finish(parts: Parts, labels: np.ndarray, launch: runtime.Launch) -> None:
    problem = None
    if launch.rank == 0:
        try:
            parts.finish(labels)
        except OSError as error:
            problem = f"{parts.out}: cannot be written ({error.strerror}); the chunks are kept in {parts.folder}"
    raise_if_any_rank_failed(problem, launch, ImageSetError)
