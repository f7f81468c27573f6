"""How good drawn images are: FID, sFID, Inception score, precision and recall against real ones.

Images and reference are cut into chunks that ranks share out, the same chunks at any number of ranks. Figures of any
network but the standard one bear its name; see `features.py`. What is said of the records is `quality_report.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megapromoe.checkpoint.format import steps_in
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.config.options import Config
from megapromoe.distributed import runtime
from megapromoe.distributed.agreement import (
    all_reduce_sum,
    broadcast_from_rank0,
    distributed_session,
    raise_if_any_rank_failed,
)
from megapromoe.errors import UserError
from megapromoe.evaluation.features import CLASSIFIERS, FeatureError, Features, Network, open_network
from megapromoe.evaluation.pixels import BUILT_IN, data_of_run, open_pixels
from megapromoe.evaluation.statistics import Moments, Normal, Score, frechet_distance, precision_recall
from megapromoe.sampling.generation import generate_in_session
from megapromoe.sampling.image_sets import ImageSet, ImageSetError, entries, open_array
from megapromoe.sampling.request import GenerationRequest
from megapromoe.sampling.run_model import identify_checkpoint

logger = logging.getLogger(__name__)

BATCH = 64  # images that a network looks at together
TIMEOUT = 600.0  # seconds for which ranks wait for each other where no run says it
DATA = "data"  # the reference that is what the run trains on


class EvaluationError(UserError):
    """An evaluation that cannot be made as asked."""

    on_all_ranks = True


class Images(Protocol):
    """What can be looked at."""

    shape: tuple[int, int, int]
    """(H, W, C)."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """uint8 (B, H, W, C)."""


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate.

    Attributes:
        request: images to draw from a run, a set for each of its guidance scales; kept under its `out`, a folder.
        images: or a set that is there: an .npz, or a folder of pictures.
        reference: "data" (what the run trains on), a built-in data set, an .npz in the layout of guided-diffusion, or
            a folder of pictures.
        split: of a data set: "train" or "test".
        features, sha256, declared_standard: see `features.open_network`; None: the classifier of the data.
        every_step: draw from each checkpoint that the run keeps; the request's own `step` is not used.
    """

    request: GenerationRequest | None
    images: Path | None
    reference: str
    split: str = "train"
    features: str | None = None
    sha256: str | None = None
    declared_standard: bool = False
    every_step: bool = False


class Seen(NamedTuple):
    """What a network found in a set: distributions of its features, (score, deviation), the features (N, D)."""

    pooled: Normal
    spatial: Normal | None
    score: tuple[float, float] | None
    features_ND: Tensor | None


def evaluate(evaluation: Evaluation, launch: runtime.Launch) -> list[dict[str, Any]]:
    """The records of an evaluation, one for each set of images. Called by every rank, before it has joined the job.

    Sets of a run are in the order of steps, and at each of guidance scales. A record says what was compared, by which
    network, and under `figures` the name of each figure and its value.

    Raises EvaluationError, FeatureError, ImageSetError, SampleError or ConfigError on every rank. Images that were
    drawn by then are kept.
    """
    request = evaluation.request
    config = None if request is None else request.checked(launch.world)
    name = _network_name(evaluation, config)
    with distributed_session(launch, TIMEOUT if config is None else config.train.timeout) as device:
        network = _opened(evaluation, name, device, launch)
        drawn, problem, reference, given = [], None, None, {}
        try:
            reference, given = _reference(evaluation, config, network)
            if request is None:
                drawn = [ImageSet(evaluation.images)]
        except (ImageSetError, EvaluationError) as error:
            problem = str(error)
        raise_if_any_rank_failed(problem, launch, EvaluationError)
        shape = drawn[0].shape if drawn else _shape_of(request, config)
        count = len(drawn[0]) if drawn else request.num
        problem = _unfit(network, shape, count, reference, given, evaluation)
        raise_if_any_rank_failed(problem, launch, EvaluationError)

        facts: list[dict[str, Any]] = [{"images": str(evaluation.images)}]
        if request is not None:
            facts = []
            for step in _steps(evaluation, launch):
                one = _placed(replace(request, step=step), config, launch)
                sets = [ImageSet(place) for place in generate_in_session(one, launch, device)]
                facts += [_facts(one, own, images) for (own, _), images in zip(one.outputs(), sets, strict=True)]
                drawn += sets
        # A reference may come as nothing but statistics.
        real = None if reference is None else look(network, reference, launch, "reference")
        records = []
        for images, said in zip(drawn, facts, strict=True):
            raise_if_any_rank_failed(
                _unfit(network, images.shape, len(images), reference, given, evaluation), launch, EvaluationError
            )
            seen = look(network, images, launch, images.path.name)
            records.append(
                {
                    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    **said,
                    "count": len(images),
                    "reference": getattr(reference, "name", evaluation.reference),
                    "reference_count": None if reference is None else len(reference),
                    "features": {
                        **{"name": network.name, "standard": network.standard, "declared": network.declared},
                        "sha256": network.sha256,
                    },
                    "figures": compare(network, seen, real, given, launch),
                }
            )
    return records


def look(network: Network, images: Images, launch: runtime.Launch, what: str) -> Seen:
    """What a network finds in a set of images. Collective.

    Raises EvaluationError on every rank if an image cannot be read, or features are not finite.
    """
    problem = None
    first = network(torch.from_numpy(images.read(0, 1)))
    pooled, spatial, score, features = _empty(first, len(images), network.device)
    starts = range(launch.rank * BATCH, len(images), launch.world * BATCH)
    for start in tqdm(starts, disable=launch.rank != 0 or None, unit="batch", desc=what):
        try:
            batch = images.read(start, min(start + BATCH, len(images)))
            found = network(torch.from_numpy(batch))
        except (ImageSetError, FeatureError) as error:
            problem = str(error)
            break
        if not all(f.isfinite().all() for f in found if f is not None):
            problem = f"features = {network.name}: not finite at images {start}..{start + len(batch) - 1} of {what}"
            break
        pooled.update(found.pooled_ND)
        features[start : start + len(batch)] = found.pooled_ND
        if spatial is not None:
            spatial.update(found.spatial_NP)
        if score is not None:
            score.update(start, found.probabilities_NK)
    raise_if_any_rank_failed(problem, launch, EvaluationError)
    return Seen(
        pooled.normal(launch),
        None if spatial is None else spatial.normal(launch),
        None if score is None else score.value(launch),
        all_reduce_sum(features, launch),  # each row is one rank's, zero elsewhere
    )


def _empty(first: Features, count: int, device: torch.device) -> tuple[Moments, Moments | None, Score | None, Tensor]:
    pooled_ND, spatial_NP, probabilities_NK = first
    return (
        Moments(pooled_ND.shape[1], device),
        None if spatial_NP is None else Moments(spatial_NP.shape[1], device),
        None if probabilities_NK is None else Score(count, probabilities_NK.shape[1], device=device),
        torch.zeros(count, pooled_ND.shape[1], device=device),
    )


def compare(
    network: Network, drawn: Seen, real: Seen | None, given: Mapping[str, Normal], launch: runtime.Launch
) -> dict[str, float]:
    """Figures by name. `given` statistics of the reference go before those of its images. Collective."""
    title, figures = network.title, {}
    pooled = given.get("pooled") or real.pooled
    spatial = given.get("spatial") or (real and real.spatial)
    if launch.rank == 0:
        figures[title("FID", "Fréchet distance")] = frechet_distance(drawn.pooled, pooled)
        if drawn.spatial is not None and spatial is not None:
            figures[title("sFID", "spatial Fréchet distance")] = frechet_distance(drawn.spatial, spatial)
        if drawn.score is not None:
            figures[title("Inception score", "classifier score")] = drawn.score[0]
    if real is not None:
        precision, recall = precision_recall(real.features_ND, drawn.features_ND, launch=launch)
        figures |= {title("precision", "precision"): precision, title("recall", "recall"): recall}
    return broadcast_from_rank0(figures, launch)


def _network_name(evaluation: Evaluation, config: Config | None) -> str:
    if evaluation.features is not None:
        return evaluation.features
    name = evaluation.reference if config is None or evaluation.reference != DATA else config.data.source
    if name not in CLASSIFIERS:
        raise EvaluationError(
            f"features: no classifier is made for {name!r}; give --features FILE, such as the standard Inception's"
            f" weights, or {' or '.join(CLASSIFIERS)}"
        )
    return name


def _opened(evaluation: Evaluation, name: str, device: torch.device, launch: runtime.Launch) -> Network:
    """The network. All ranks train the same classifier, to the same bits. Collective."""
    problem = network = None
    try:
        network = open_network(name, device, evaluation.sha256, evaluation.declared_standard)
    except FeatureError as error:
        problem = str(error)
    raise_if_any_rank_failed(problem, launch, FeatureError)
    if network.sha256 != broadcast_from_rank0(network.sha256, launch):
        problem = f"features = {name!r}: rank {launch.rank} has another network than rank 0; use machines of one kind"
    raise_if_any_rank_failed(problem, launch, FeatureError)
    return network


def _reference(
    evaluation: Evaluation, config: Config | None, network: Network
) -> tuple[Images | None, dict[str, Normal]]:
    """The images to compare with, and statistics that stand for them: those of a file hold for the standard network."""
    name = evaluation.reference
    if name == DATA:
        if config is None:
            raise EvaluationError(
                "reference = data: is what a run trains on; give a file, a folder or a data set's name"
            )
        return data_of_run(config, evaluation.split), {}
    if name in BUILT_IN:
        return open_pixels(name, evaluation.split), {}
    path = Path(name)
    if evaluation.split != "train":
        raise EvaluationError(f"split = {evaluation.split}: only data sets have splits, not {name}")
    if path.is_dir():
        return ImageSet(path), {}
    if not path.is_file():
        raise EvaluationError(
            f"reference = {name!r}: no such file or folder, and none of {', '.join((DATA, *BUILT_IN))}"
        )
    there = entries(path)
    given = {}
    for kind, mean, covariance in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if network.standard and {mean, covariance} <= there:
            values = [torch.from_numpy(np.array(open_array(path, n), dtype=np.float64)) for n in (mean, covariance)]
            given[kind] = Normal(*values, count=0)
    if "arr_0" in there:
        return ImageSet(path), given
    if not given:
        raise EvaluationError(
            f"reference = {name}: holds {', '.join(sorted(there))}; images (arr_0) are needed, or mu and sigma with the"
            " standard network"
        )
    return None, given


def _shape_of(request: GenerationRequest, config: Config) -> tuple[int, int, int] | None:
    """The shape of images that will be drawn, where no autoencoder makes them."""
    m = config.model
    return None if request.autoencoder else (m.input_size, m.input_size, m.in_channels)


def _unfit(
    network: Network,
    shape: tuple[int, int, int] | None,
    count: int,
    reference: Images | None,
    given: Mapping[str, Normal],
    evaluation: Evaluation,
) -> str | None:
    """Why images of this shape and number cannot be compared with the reference by the network, if so."""
    problems = []
    real = None if reference is None else reference.shape
    if shape and real and shape != real:
        problems.append(f"the images are {_size(shape)}, the reference {_size(real)}: compare images of one size")
    if network.shape and (wrong := [s for s in (shape, real) if s and s != network.shape]):
        problems.append(f"features = {network.name}: looks at images of {_size(network.shape)}, not {_size(wrong[0])}")
    if problems or not (shape or real):
        return "; ".join(problems) or None
    dims = [f.shape[1] for f in network(torch.zeros(1, *(shape or real), dtype=torch.uint8))[:2] if f is not None]
    kinds = ("pooled", "spatial")[: len(dims)]
    if wrong := [kind for kind, dim in zip(kinds, dims, strict=True) if kind in given and len(given[kind].mean) != dim]:
        problems.append(f"reference = {evaluation.reference}: its {wrong[0]} statistics are not of {network.name}")
    most = max(dims)
    if count <= most:
        remedy = f"--num {most + 1}" if evaluation.request else f"{most + 1} images"
        problems.append(
            f"{count} images are too few for the covariance of {most} features of {network.name}; use {remedy} at least"
        )
    needed = max((dim for kind, dim in zip(kinds, dims, strict=True) if kind not in given), default=0)
    if reference is not None and len(reference) <= needed:
        problems.append(
            f"reference = {evaluation.reference}: {len(reference)} images are too few for the covariance of {needed}"
            f" features; {needed + 1} are needed at least"
        )
    return "; ".join(problems) or None


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _steps(evaluation: Evaluation, launch: runtime.Launch) -> list[int | None]:
    """The steps to draw from; None: the last. Rank 0 looks for all, as a live run saves and removes. Collective."""
    request = evaluation.request
    if not evaluation.every_step:
        return [request.step]
    there = steps_in(RunDirectory(request.run).checkpoints) if launch.rank == 0 else []
    return broadcast_from_rank0(there, launch) or [None]  # of none, the usual error


def _placed(request: GenerationRequest, config: Config, launch: runtime.Launch) -> GenerationRequest:
    """The request with its step, and a name for its sets that no other has. Collective."""
    checkpoint = identify_checkpoint(request.run, request.step, request.weights, launch)
    facts = request.identity_at(checkpoint, config, None)
    facts |= {"autoencoder": request.autoencoder, "sample": {**facts["sample"], "guidance": None}}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    out = request.out / f"step-{checkpoint.step:08d}-{digest}.npz"
    return replace(request, step=checkpoint.step, out=out, named=True)


def _facts(request: GenerationRequest, config: Config, images: ImageSet) -> dict[str, Any]:
    facts = request.identity(config, None)
    return {
        **{"run": str(request.run), "step": request.step, "guidance": config.sample.guidance},
        **{key: facts[key] for key in ("weights", "classes", "only", "sample")},
        **{"autoencoder": request.autoencoder, "images": str(images.path)},
    }
