"""The one place where a run is opened to look at its model: config, checkpoint, and the model with its weights.

    model, config, step = load_model(Path("runs/digits"))
    images = generate(model, config, labels=[3, 3, 5], indices=[0, 1, 2])

How images are generated is in `diffusion/image_grid.py`; how ranks share them out, in `generation.py`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from megapromoe.checkpoint.average import Average
from megapromoe.checkpoint.format import Checkpoint, check_model
from megapromoe.checkpoint.latest import TRIES, read_latest, removed_too_often
from megapromoe.checkpoint.manifest import MANIFEST, CheckpointError
from megapromoe.checkpoint.origin import changed_settings
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.snapshots import choose_weights, readable_steps
from megapromoe.checkpoint.step_folders import folder_of, snapshot_of
from megapromoe.config.options import Config, to_dict
from megapromoe.config.resolve import resolve
from megapromoe.diffusion.image_grid import SampleError
from megapromoe.distributed import runtime
from megapromoe.distributed.agreement import broadcast_from_rank0, raising_together, this_rank
from megapromoe.distributed.mesh import UNSHARDED, Mesh
from megapromoe.io import sha256_of
from megapromoe.nn.dit import DiT
from megapromoe.nn.parallelize import build

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointGone(SampleError):
    """A checkpoint that its run removed while it was read; every rank raises it."""


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
    """The checkpoint, or the snapshot of averages, of a step; without one the newest checkpoint.

    Raises SampleError for other `weights`, or CheckpointError.
    """
    if weights not in ("ema", "master"):
        raise SampleError(f"weights = {weights!r}: must be ema or master")
    root = RunDirectory(run).checkpoints
    return read_latest(root, step, lambda chosen: Checkpoint(choose_weights(root, chosen, weights)))


def average_of(run: Path, step: int) -> Average:
    """What the checkpoint, or the snapshot, of a step says of its averaged weights. Raises CheckpointError."""
    return Average.of(find_checkpoint(run, step).manifest)


@dataclass(frozen=True)
class CheckpointId:
    """Which checkpoint images are generated from.

    Attributes:
        step: of the checkpoint.
        sha256: of its manifest.
        initial_share: of the initial weights in its averages; None: unknown.
    """

    step: int
    sha256: str
    initial_share: float | None = None


def identify_checkpoint(run: Path, step: int | None, weights: str, launch: runtime.LaunchEnvironment) -> CheckpointId:
    """The checkpoint of a step, or the latest, as rank 0 sees the run's folder. Collective.

    Rank 0 decides for all: a live run saves and removes checkpoints, and a file system may show them to some machines
    later than to others. Raises SampleError on every rank, CheckpointGone if the run does not have the step.
    """
    identity = CheckpointId(-1, "")
    root = RunDirectory(run).checkpoints
    try:
        with raising_together(SampleError):
            if launch.rank == 0:
                identity = read_latest(root, step, lambda chosen: _identify(run, chosen, weights))
    except SampleError as error:
        if broadcast_from_rank0(launch.rank == 0 and step is not None and step not in readable_steps(root, weights)):
            raise CheckpointGone(str(error)) from error
        raise
    return broadcast_from_rank0(identity)


def _identify(run: Path, step: int, weights: str) -> CheckpointId:
    checkpoint = find_checkpoint(run, step, weights)
    share = Average.of(checkpoint.manifest).initial_share
    return CheckpointId(step, sha256_of(checkpoint.folder / MANIFEST), share)


def is_there(run: Path, checkpoint: CheckpointId) -> bool:
    """Whether a run still has this very checkpoint."""
    directory = RunDirectory(run)
    for folder in (
        snapshot_of(directory.snapshots, checkpoint.step),
        folder_of(directory.checkpoints, checkpoint.step),
    ):
        with contextlib.suppress(OSError):
            if sha256_of(folder / MANIFEST) == checkpoint.sha256:
                return True
    return False


def again_while_gone(run: Path, step: int | None, attempt: Callable[[], T]) -> T:
    """The result of `attempt`, again where it raises CheckpointGone and asked for the latest checkpoint. Collective.

    Args:
        step: that was asked for; None for the latest.
        attempt: chooses the checkpoint and uses it, on every rank.

    Raises what `attempt` raises; CheckpointError after `TRIES` latest checkpoints that were removed.
    """
    if step is not None:
        return attempt()
    for _ in range(TRIES):
        try:
            return attempt()
        except CheckpointGone as error:
            logger.warning("%s; trying the latest checkpoint again", error)
    raise removed_too_often(RunDirectory(run).checkpoints)


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
        step: of the checkpoint; None takes the latest, again if its run removes it meanwhile. Give it with a mesh, so
            that all ranks read the same.
        weights: "ema", the averaged ones, or "master".
        overrides: `sample.key=value` settings.
        mesh: how the model lies over ranks that all call this. Each keeps its part, and reads its share of the files'
            hashes, so that only one rank notices a damaged file: call this within `raising_together`.

    Returns:
        model, the run's config, the checkpoint's step.

    Raises SampleError, ConfigError (see `run_config`), or CheckpointError: damaged, or of another model.
    """
    config = run_config(run, overrides)
    mesh = mesh or UNSHARDED
    if step is None and mesh.world_size > 1:
        raise ValueError("step = None: ranks that share a model must be given the step, or they may differ")
    root = RunDirectory(run).checkpoints
    return read_latest(root, step, lambda chosen: _load(run, chosen, weights, config, device, mesh))


def _load(
    run: Path, step: int, weights: str, config: Config, device: torch.device | str, mesh: Mesh
) -> tuple[DiT, Config, int]:
    checkpoint = find_checkpoint(run, step, weights)
    checkpoint.verify(mesh.rank, mesh.world_size)
    model = build(config, mesh, device)
    check_model(checkpoint, {name: layout.shape for name, layout in model.layouts.items()})
    _check_config(run, checkpoint, config)
    if this_rank() == 0:
        _report_average(run, step, weights, Average.of(checkpoint.manifest))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(model.layouts[name].local_shard(checkpoint.logical(weights, name), mesh))
        for name, tensor in model.state_dict().items():
            if name not in model.layouts:
                tensor.copy_(checkpoint.buffer(name))
    return model.eval().requires_grad_(False), config, int(checkpoint.manifest["step"])


def _report_average(run: Path, step: int, weights: str, average: Average) -> None:
    """Logs how much of the averaged weights is still initial; a warning where it is too much."""
    if warning := average.warning(weights):
        logger.warning("step %d of %s: %s", step, run, warning)
    elif weights == "ema":
        logger.info("step %d of %s: averaged weights, %s", step, run, average.in_words())


def _check_config(run: Path, checkpoint: Checkpoint, config: Config) -> None:
    """Raises CheckpointError if the weights were trained with another model or diffusion than config.yaml has."""
    changed = changed_settings(checkpoint.manifest.get("config") or to_dict(config), config)
    listed = [
        f"\n  - {key}: {old!r} in the checkpoint, {new!r} in the file"
        for key, (old, new) in sorted(changed.items())
        if key.split(".")[0] in ("model", "diffusion")
    ]
    if listed:
        raise CheckpointError(
            f"{RunDirectory(run).config_file}: is not the config that {checkpoint.folder.name} was trained with;"
            f" restore these fields in the file:{''.join(listed)}"
        )
