"""Image metrics of generated images: FID, sFID, Inception score, precision and recall against real images.

The images and the reference are divided into batches, which are the same for any number of ranks and are distributed
over them. The names of metrics of a network other than the standard one contain its name, see `features.py`. Results
are printed by `image_metrics_report.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.step_folders import snapshot_steps, steps_in
from megapromoe.checkpoint.weights import is_average
from megapromoe.config.options import Config
from megapromoe.distributed import runtime, watchdog
from megapromoe.distributed.agreement import (
    STEP_TIMEOUT,
    all_reduce_sum,
    broadcast_from_rank0,
    distributed_session,
    raising_together,
)
from megapromoe.evaluation.features import FeatureError, Features, Network, open_network
from megapromoe.evaluation.names import CLASSIFIERS, DATA
from megapromoe.evaluation.reference import EvaluationError, Images, Reference, check_finite, open_reference
from megapromoe.evaluation.statistics import Moments, Normal, Score, frechet_distance, precision_recall
from megapromoe.sampling.generation import generate_in_session
from megapromoe.sampling.image_sets import ImageSet
from megapromoe.sampling.request import GenerationRequest
from megapromoe.sampling.run_model import (
    CheckpointRemoved,
    check_has_classes,
    identify_checkpoint,
    retry_while_removed,
    run_config,
)
from megapromoe.work_progress import Progress

logger = logging.getLogger(__name__)

BATCH = 64  # images per call of a feature network
TIMEOUT = 600.0  # seconds that ranks wait for each other if there is no config of a run


@dataclass(frozen=True)
class Evaluation:
    """The images to evaluate (either `request` or `images`), the reference and the feature network.

    Attributes:
        request: sets of images to generate from a run, one for each guidance scale; they are kept in its `out`, a
            folder.
        images: an existing set: an .npz, or a folder of pictures.
        reference, split: see `reference.open_reference`.
        features, sha256, declared_standard: see `features.open_network`; None: the classifier of the data.
        every_step: generate from each checkpoint and snapshot of the run; `step` of the request is ignored.
        steps: generate from these steps, all of which must exist.
    """

    request: GenerationRequest | None
    images: Path | None
    reference: str
    split: str = "train"
    features: str | None = None
    sha256: str | None = None
    declared_standard: bool = False
    every_step: bool = False
    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.request is None) == (self.images is None) or self.request is not None and self.request.preview:
            raise ValueError("an evaluation needs either a request for a set or existing images")


class FeatureStatistics(NamedTuple):
    """Statistics of the features of a set of images.

    Attributes:
        pooled, spatial: normal distributions of the features; None if the network has none.
        score: Inception score and its standard deviation over splits; None without class probabilities.
        features_ND: the pooled features.
    """

    pooled: Normal
    spatial: Normal | None
    score: tuple[float, float] | None
    features_ND: Tensor


def evaluate(evaluation: Evaluation, launch: runtime.LaunchEnvironment) -> list[dict[str, Any]]:
    """Runs an evaluation and returns a record for each set of images. Called on every rank without a process group.

    Sets of a run are ordered by step and then by guidance scale. A record contains what was compared, the feature
    network and, as `figures`, the metrics by name.

    Raises EvaluationError, FeatureError, ImageSetError, SampleError or ConfigError on every rank. Generated images are
    kept.
    """
    request, sets = evaluation.request, []
    if request is not None:
        check_has_classes(request.run, run_config(request.run))
    config = None if request is None else request.checked(launch.world)
    name = _network_name(evaluation, config)
    limits = (TIMEOUT, STEP_TIMEOUT) if config is None else (config.train.timeout, config.train.step_timeout)
    with distributed_session(launch, *limits) as device:
        watchdog.starting("opening the network that makes features")
        network = _open_network(evaluation, name, device, launch)
        remedy = "{} images" if request is None else "--num-images {}"
        watchdog.starting("opening the reference")
        with raising_together(EvaluationError):
            reference = open_reference(evaluation.reference, evaluation.split, config, network)
            if evaluation.images is not None:
                sets = [(ImageSet(evaluation.images), {"images": str(evaluation.images)})]
            if request is not None and config is not None:
                # The shape after decoding is not known yet.
                m = config.model
                shape = None if request.autoencoder else (m.input_size, m.input_size, m.in_channels)
                reference.check_comparable(network, shape, len(request.labels(config)), remedy)
            for images, _ in sets:
                reference.check_comparable(network, images.shape, len(images), remedy)
        if request is not None and config is not None:
            sets += generate_sets_of_steps(evaluation, request, config, launch, device)
        real = None
        if reference.images is not None:
            real = extract_features(network, reference.images, launch, "reference")
        records = []
        for images, metadata in sets:
            with raising_together(EvaluationError):
                reference.check_comparable(network, images.shape, len(images), remedy)
            generated = extract_features(network, images, launch, images.path.name)
            records.append(
                {
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                    **metadata,
                    "count": len(images),
                    "asked": {name: getattr(evaluation, name) for name in ("reference", "split", "features")},
                    "reference": reference.name,
                    "reference_count": None if reference.images is None else len(reference.images),
                    "features": {
                        **{"name": network.name, "standard": network.standard, "declared": network.declared},
                        "sha256": network.sha256,
                    },
                    "figures": compare(network, generated, reference, real, launch),
                }
            )
    return records


def extract_features(
    network: Network, images: Images, launch: runtime.LaunchEnvironment, title: str
) -> FeatureStatistics:
    """Computes the statistics of the features of a set of images. Collective.

    Args:
        title: name of the set, for progress and messages.

    Raises EvaluationError on every rank if an image cannot be read, or features are not finite.
    """
    watchdog.at(f"features of {title}")
    with raising_together(EvaluationError):
        example = network(torch.from_numpy(images.read(0, 1)))
        totals = _Totals(example, len(images), network.device)
        starts = range(launch.rank * BATCH, len(images), launch.world * BATCH)
        with Progress(len(images), "image", f"features of {title}", enabled=launch.rank == 0) as progress:
            for start in starts:
                batch = images.read(start, min(start + BATCH, len(images)))
                features = network(torch.from_numpy(batch))
                if not all(f.isfinite().all() for f in features if f is not None):
                    numbers = f"{start}..{start + len(batch) - 1}"
                    raise EvaluationError(f"features = {network.name}: not finite at images {numbers} of {title}")
                totals.update(start, features)
                progress.update(min(launch.world * BATCH, len(images) - start))  # assumes equally fast ranks
                watchdog.touch()
        watchdog.at(f"waiting for the other ranks after the features of {title}")
    watchdog.at(f"sums of the features of {title}")
    return totals.reduce()


class _Totals:
    """Sums over the batches of this rank, for the outputs that the network has."""

    def __init__(self, example: Features, count: int, device: torch.device):
        pooled_ND, spatial_NP, probabilities_NK = example
        self.pooled = Moments(pooled_ND.shape[1], device)
        self.spatial = None if spatial_NP is None else Moments(spatial_NP.shape[1], device)
        self.score = None if probabilities_NK is None else Score(count, probabilities_NK.shape[1], device=device)
        self.features_ND = torch.zeros(count, pooled_ND.shape[1], device=device)

    def update(self, start: int, features: Features) -> None:
        """Adds the features of images `start`, start + 1, ..."""
        self.pooled.update(features.pooled_ND)
        self.features_ND[start : start + len(features.pooled_ND)] = features.pooled_ND
        if self.spatial is not None and features.spatial_NP is not None:
            self.spatial.update(features.spatial_NP)
        if self.score is not None and features.probabilities_NK is not None:
            self.score.update(start, features.probabilities_NK)

    def reduce(self) -> FeatureStatistics:
        """The statistics over all ranks. Collective."""
        return FeatureStatistics(
            self.pooled.normal(),
            None if self.spatial is None else self.spatial.normal(),
            None if self.score is None else self.score.value(),
            all_reduce_sum(self.features_ND),  # each row is nonzero on one rank only
        )


def compare(
    network: Network,
    generated: FeatureStatistics,
    reference: Reference,
    real: FeatureStatistics | None,
    launch: runtime.LaunchEnvironment,
) -> dict[str, float]:
    """Computes the metrics, by name, all finite. Collective.

    Args:
        generated: statistics of the images to evaluate.
        real: statistics of the images of the reference; None if it has only statistics from a file.

    Raises EvaluationError on every rank if a metric is not finite.
    """
    watchdog.at("comparing the features", extra=TIMEOUT)  # the other ranks wait for rank 0
    title, figures = network.title, {}
    pooled, spatial = reference.statistics.get("pooled"), reference.statistics.get("spatial")
    if real is not None:
        pooled, spatial = pooled or real.pooled, spatial or real.spatial
    if pooled is None:
        raise ValueError(f"reference {reference.name}: has neither images nor statistics of pooled features")
    with raising_together(EvaluationError, catch=(EvaluationError,)):
        if launch.rank == 0:
            figures[title("FID", "Fréchet distance")] = frechet_distance(generated.pooled, pooled)
            if generated.spatial is not None and spatial is not None:
                figures[title("sFID", "spatial Fréchet distance")] = frechet_distance(generated.spatial, spatial)
            if generated.score is not None:
                figures[title("Inception score", "classifier score")] = generated.score[0]
            check_finite(figures, network)
    if real is not None:
        precision, recall = precision_recall(real.features_ND, generated.features_ND)
        figures |= {title("precision", "precision"): precision, title("recall", "recall"): recall}
    return broadcast_from_rank0(figures)


def _network_name(evaluation: Evaluation, config: Config | None) -> str:
    if evaluation.features is not None:
        return evaluation.features
    name = evaluation.reference if config is None or evaluation.reference != DATA else config.data.source
    if name not in CLASSIFIERS:
        raise EvaluationError(
            f"features: there is no classifier for {name!r}; give --features FILE, such as the standard Inception's"
            f" weights, or {' or '.join(CLASSIFIERS)}"
        )
    return name


def _open_network(
    evaluation: Evaluation, name: str, device: torch.device, launch: runtime.LaunchEnvironment
) -> Network:
    """Opens the network. All ranks train the same classifier, bitwise equal. Collective."""
    with raising_together(FeatureError):
        network = open_network(name, device, evaluation.sha256, evaluation.declared_standard)
    expected = broadcast_from_rank0(network.sha256)
    with raising_together(FeatureError):
        if network.sha256 != expected:
            raise FeatureError(
                f"features = {name!r}: rank {launch.rank} has another network than rank 0; use machines of one kind"
            )
    return network


def _steps(evaluation: Evaluation, request: GenerationRequest, launch: runtime.LaunchEnvironment) -> list[int | None]:
    """The steps to generate from; None: the latest. Chosen by rank 0, since a run may be in training. Collective."""
    if not evaluation.every_step:
        return [*evaluation.steps] or [request.step]
    steps: list[int] = []
    if launch.rank == 0:
        run = RunDirectory(request.run)
        snapshots = snapshot_steps(run.snapshots) if is_average(request.weights) else []
        steps = sorted({*steps_in(run.checkpoints), *snapshots})
    return [*broadcast_from_rank0(steps)] or [None]  # without checkpoints, opening the latest raises


def generate_sets_of_steps(
    evaluation: Evaluation,
    request: GenerationRequest,
    config: Config,
    launch: runtime.LaunchEnvironment,
    device: torch.device,
) -> list[tuple[ImageSet, dict[str, Any]]]:
    """Generates the sets of all steps. With `every_step`, steps that the run removes meanwhile are skipped."""
    sets: list[tuple[ImageSet, dict[str, Any]]] = []
    steps, removed = _steps(evaluation, request, launch), None
    for step in steps:
        generate = partial(_generate_sets, replace(request, step=step), config, launch, device)
        try:
            sets += retry_while_removed(request.run, step, generate)
        except CheckpointRemoved as error:
            if not evaluation.every_step:
                raise
            removed = error
            logger.warning("%s; this step is skipped", error)
    if removed is not None and not sets:
        raise removed
    return sets


def _generate_sets(
    request: GenerationRequest, config: Config, launch: runtime.LaunchEnvironment, device: torch.device
) -> list[tuple[ImageSet, dict[str, Any]]]:
    """Generates the sets of a request, each with its metadata, under names unique to the request. Collective."""
    checkpoint = identify_checkpoint(request.run, request.step, request.weights, launch)
    identity = request.identity_at(checkpoint, config, None)
    identity |= {"autoencoder": request.autoencoder, "sample": {**identity["sample"], "guidance": None}}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    out = request.out / f"step-{checkpoint.step:08d}-{digest}.npz"
    request = replace(request, step=checkpoint.step, out=out, named=True)
    sets = [ImageSet(place) for place in generate_in_session(request, launch, device)]
    configs = [c for c, _ in request.outputs()]
    return [
        (images, _metadata(request, c, images, checkpoint.initial_share))
        for c, images in zip(configs, sets, strict=True)
    ]


def _metadata(request: GenerationRequest, config: Config, images: ImageSet, share: float | None) -> dict[str, Any]:
    """The entries of a record about a set. `share`: share of the initial weights in the weights that were used."""
    return {
        **{"run": str(request.run), "step": request.step, "guidance": config.sample.guidance},
        **{"weights": request.weights, "classes": request.classes},
        **{"only": None if request.only is None else list(request.only), "sample": asdict(config.sample)},
        "initial_share": share,
        **{"autoencoder": request.autoencoder, "images": str(images.path)},
    }
