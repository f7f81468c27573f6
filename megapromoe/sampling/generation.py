"""Generates images of a run on all ranks of a job: a preview of a few images, or a set of, say, 50,000.

Image i depends on (its seed, i, its class or prompt) only. Images are generated in chunks of `sample.batch`, which are
the same for any number of ranks, because DiffMoE selects among all tokens of a chunk. `ReplicaLayout` assigns chunks to
ranks, and an `ImageWriter` stores the chunks and assembles the output. The same request continues an interrupted set.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megapromoe.config.options import Config
from megapromoe.data.autoencoder import Autoencoder
from megapromoe.diffusion import multistep
from megapromoe.diffusion.image_grid import SampleError, chunk_ranges, generate
from megapromoe.distributed import runtime, watchdog
from megapromoe.distributed.agreement import broadcast_from_rank0, distributed_session, raising_together
from megapromoe.distributed.mesh import make_mesh
from megapromoe.nn.dit import DiT
from megapromoe.nn.text_condition import TextCondition
from megapromoe.sampling.decoding import decoded, normalisation_of_latents, open_decoder
from megapromoe.sampling.geneval_writer import GenEvalWriter
from megapromoe.sampling.image_set_writer import ImageSetWriter
from megapromoe.sampling.image_sets import ImageSetError
from megapromoe.sampling.preview_writer import PreviewWriter
from megapromoe.sampling.prompt_features import Features, PromptEncoder, condition_of, open_prompt_encoder
from megapromoe.sampling.replica_layout import ReplicaLayout
from megapromoe.sampling.request import GenerationRequest
from megapromoe.sampling.run_model import (
    CheckpointId,
    CheckpointRemoved,
    checkpoint_exists,
    identify_checkpoint,
    load_model,
    retry_while_removed,
)
from megapromoe.work_progress import Progress

logger = logging.getLogger(__name__)


class ImageWriter(Protocol):
    """Stores the generated chunks of images of all ranks and assembles the output `out`."""

    @property
    def out(self) -> Path: ...

    def open(self, identity: Mapping[str, Any]) -> list[int] | None:
        """Returns the missing chunks, or None if `out` is complete. Called on rank 0. Raises ImageSetError.

        Args:
            identity: everything that the images depend on.
        """

    def write(self, chunk: int, images_BCHW: Tensor) -> None:
        """Stores the images (B, C, H, W) of a chunk, about [-1, 1]. Called on one rank per chunk. Raises OSError."""

    def finish(self, labels: np.ndarray) -> None:
        """Assembles `out` from all chunks atomically. Collective. Raises ImageSetError, possibly on rank 0 only.

        Args:
            labels: class of each image, or number of its prompt, int64 (N,).
        """

    def abandon(self) -> bool:
        """Removes what `open` has created, unless there are chunks; returns whether there are none. For rank 0."""

    def close(self) -> None:
        """Releases the resources of the writer."""


def generate_images(request: GenerationRequest, launch: runtime.LaunchEnvironment) -> list[Path]:
    """Generates the images of a request and returns their paths. Called on every rank, before the process group exists.

    Raises SampleError, ImageSetError or ConfigError on every rank. Completed chunks of a set are kept, and the next
    call continues from them.
    """
    config = request.checked(launch.world)
    with distributed_session(launch, config.train.timeout, config.train.step_timeout) as device:
        return generate_in_session(request, launch, device)


def generate_in_session(
    request: GenerationRequest, launch: runtime.LaunchEnvironment, device: torch.device
) -> list[Path]:
    """`generate_images` within an initialised process group. Collective.

    Without `request.step`, retries with the then latest checkpoint if the run removes it while it is read. With a step,
    raises CheckpointRemoved on every rank in that case.
    """
    return retry_while_removed(request.run, request.step, lambda: _generate(request, launch, device))


def _generate(request: GenerationRequest, launch: runtime.LaunchEnvironment, device: torch.device) -> list[Path]:
    config = request.checked(launch.world)
    watchdog.starting(f"choosing the checkpoint of {request.run}")
    checkpoint = identify_checkpoint(request.run, request.step, request.weights, launch)
    request = replace(request, step=checkpoint.step)
    request = replace(request, prompts=broadcast_from_rank0(request.prompts))  # files of nodes may differ
    with raising_together(SampleError):
        multistep.check_available(config.sample.method)
        decoder = _open_decoder(request, config, device)
        encoder = None if request.prompts is None else open_prompt_encoder(config, request.text_encoder, device)
        if encoder is not None and request.prompts is not None:
            encoder.check(request.prompts)
    if request.complete_name:
        request = request.with_complete_name(config, decoder, encoder)
    outputs = [(c, _make_writer(request, c, place, decoder)) for c, place in request.outputs()]
    watchdog.starting("opening the output")
    try:
        missing: list[list[int] | None] = []
        with raising_together(ImageSetError):
            if launch.rank == 0:
                missing = [writer.open(request.identity_at(checkpoint, c, decoder, encoder)) for c, writer in outputs]
        missing = broadcast_from_rank0(missing)
        replica = None
        if any(missing):
            layout = ReplicaLayout.of_job(launch, request.tp, request.ep, config.parallel.expert_tp)
            # Before the model is loaded, so that a device need not hold both.
            features = _encode_prompts(request, config, encoder, layout, missing)
            encoder = None
            try:
                model = _load_shard(request, checkpoint, config, launch, device)
            except CheckpointRemoved as removed:
                free = launch.rank != 0 or all([writer.abandon() for _, writer in outputs])
                if not broadcast_from_rank0(free):
                    raise SampleError(f"{removed}; {request.out} has images of it, use another --out") from removed
                raise
            source = f"step {request.step} of {request.run}"
            replica = Replica(model, decoder, request, features, layout, launch, source)
        for (config, writer), chunks in zip(outputs, missing, strict=True):
            labels = request.labels(config)
            if chunks is None:
                if launch.rank == 0:
                    logger.info("%s: is complete already, %d images", writer.out, len(labels))
                continue
            if replica is not None:
                replica.generate_chunks(config, labels, writer, chunks)
            watchdog.at(f"finishing {writer.out}")
            with raising_together(ImageSetError):
                writer.finish(labels)
            logger.info("%s: %d images of step %d, %s weights", writer.out, len(labels), request.step, request.weights)
    finally:
        for _, writer in outputs:
            writer.close()
    return [writer.out for _, writer in outputs]


def _open_decoder(request: GenerationRequest, config: Config, device: torch.device) -> Autoencoder | None:
    if request.preview and request.autoencoder is None:
        return None  # a preview in an .npz may contain latents
    return open_decoder(config, request.autoencoder, device, request.run)


def _make_writer(request: GenerationRequest, config: Config, place: Path, decoder: Autoencoder | None) -> ImageWriter:
    count, batch, prompts = len(request.labels(config)), config.sample.batch, request.prompts
    if request.preview:
        columns = request.num if count > request.num else math.ceil(math.sqrt(count))
        texts = None if prompts is None else [prompt.text for prompt in prompts]
        normalisation = normalisation_of_latents(config, request.run) if decoder is None else None
        return PreviewWriter(place, count, batch, columns, config.sample.seed, texts, normalisation)
    side, channels = config.model.input_size, config.model.in_channels
    if decoder is not None:
        side, channels = decoder.resolution(side), decoder.channels
    make = GenEvalWriter if request.geneval else ImageSetWriter
    return make(place, count, batch, (side, side, channels), prompts)


@dataclass(frozen=True)
class Replica:
    """A model replica that generates its share of the images.

    Attributes:
        model: the model, or this rank's shard of it.
        decoder: autoencoder for generated latents; None: the output is not decoded.
        request: what to generate.
        features: text features of the prompts of this rank's images.
        layout: assignment of chunks to replicas.
        launch: this rank.
        source: origin of the weights, for messages.
    """

    model: DiT
    decoder: Autoencoder | None
    request: GenerationRequest
    features: Features
    layout: ReplicaLayout
    launch: runtime.LaunchEnvironment
    source: str

    def generate_chunks(self, config: Config, labels: np.ndarray, writer: ImageWriter, missing: list[int]) -> None:
        """Generates the missing chunks of images and passes them to the writer. Collective.

        Args:
            labels: class of each image of the complete output, or number of its prompt, int64 (N,).
            missing: numbers of the chunks to generate.

        Raises SampleError on every rank if values are not finite or the writer cannot store them.
        """
        ranges = chunk_ranges(len(labels), config.sample.batch)
        done = len(labels) - sum(len(ranges[c]) for c in missing)
        shown = self.launch.rank == 0
        with Progress(len(labels), "image", writer.out.name, done=done, enabled=shown) as progress:

            def show(step: int, steps: int) -> None:
                progress.note(f"step {step}/{steps}")

            for chunk, chunks in self.layout.rounds(missing, len(ranges) - 1):
                watchdog.at(f"chunks {', '.join(map(str, chunks))} of {writer.out}")
                with raising_together(SampleError, catch=(SampleError,)):
                    if chunk is not None:
                        numbers = ranges[chunk]
                        condition = self._condition(config, labels[numbers.start : numbers.stop])
                        seeds, indices = self.request.noise_of(config, labels, numbers)
                        images = generate(self.model, config, condition, indices, show, seeds)
                        self._keep(chunk, images, numbers, writer, keep=chunk in chunks)
                    watchdog.at(f"waiting for the other ranks after chunks {', '.join(map(str, chunks))}")
                progress.update(sum(len(ranges[c]) for c in chunks))

    def _condition(self, config: Config, labels_B: np.ndarray) -> list[int] | TextCondition:
        prompts = self.request.prompts
        if prompts is None:
            return labels_B.tolist()
        return condition_of(self.features, [prompts[p].text for p in labels_B], config.model.text_tokens)

    def _keep(self, chunk: int, images: Tensor, numbers: range, writer: ImageWriter, keep: bool) -> None:
        if not images.isfinite().all():
            raise SampleError(
                f"images {numbers.start}..{numbers.stop - 1}: {self.source} generates values that are not finite"
            )
        if keep and self.layout.writes(chunk):
            try:
                writer.write(chunk, decoded(images, self.decoder))
            except OSError as error:
                raise SampleError(
                    f"{writer.out}: cannot be written ({error.strerror}); completed images are kept, repeat the command"
                    " to continue"
                ) from error


def _encode_prompts(
    request: GenerationRequest,
    config: Config,
    encoder: PromptEncoder | None,
    layout: ReplicaLayout,
    missing: Sequence[list[int] | None],
) -> Features:
    """The text features of the prompts of the missing chunks that this rank generates. Collective."""
    if request.prompts is None or encoder is None:
        return {}
    watchdog.starting("encoding the prompts", math.inf)
    labels = request.labels(config)
    ranges = chunk_ranges(len(labels), config.sample.batch)
    texts: dict[str, None] = {}  # in order, without repetitions
    for chunks in missing:
        for chunk, _ in layout.rounds(chunks or [], len(ranges) - 1):
            if chunk is not None:
                numbers = ranges[chunk]
                texts |= {request.prompts[p].text: None for p in labels[numbers.start : numbers.stop]}
    with raising_together(SampleError):
        return encoder.encode(texts)


def _load_shard(
    request: GenerationRequest,
    checkpoint: CheckpointId,
    config: Config,
    launch: runtime.LaunchEnvironment,
    device: torch.device,
) -> DiT:
    """Loads this rank's shard of the model. Collective.

    Raises SampleError on every rank, CheckpointRemoved if the run removed the checkpoint meanwhile.
    """
    watchdog.starting("reading the checkpoint", math.inf)
    expert_tp = config.parallel.expert_tp and request.tp > 1
    mesh = make_mesh(request.tp, request.ep, expert_tp, config.train.timeout) if launch.world > 1 else None
    try:
        with raising_together(SampleError):
            return load_model(request.run, checkpoint.step, request.weights, device, request.overrides, mesh)[0]
    except SampleError as error:
        if broadcast_from_rank0(launch.rank == 0 and not checkpoint_exists(request.run, checkpoint)):
            raise CheckpointRemoved(f"step {checkpoint.step} of {request.run} was removed while it was read") from error
        raise
