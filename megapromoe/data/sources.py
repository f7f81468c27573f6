"""Opens the data set that the configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megapromoe.config.data_options import NO_DATA, UNSET
from megapromoe.config.options import Config
from megapromoe.data.caption_batches import CaptionSource, SyntheticCaptions, captions_beside
from megapromoe.data.datasets import Dataset, DatasetError, Digits, Synthetic, check_dataset
from megapromoe.data.fashion import FashionMNIST
from megapromoe.data.latents import Latents, read_manifest
from megapromoe.data.node_cache import cache_shards
from megapromoe.data.teacher import SyntheticTeacher, TeacherFeatures, teacher_beside
from megapromoe.data.text_encoder import described, have_same_encoder
from megapromoe.data.text_features import FOLDER, TextFeatures, read_text_manifest
from megapromoe.data.text_features import MANIFEST as TEXT_MANIFEST

SPLITS = ("train", "test")


def open_dataset(config: Config, split: str = "train") -> Dataset:
    """Opens the data set `config.data.source` and checks it against `config.model`.

    Args:
        split: "train", or "test" for images that are not used in training; not every source has a test split.

    Raises:
        DatasetError: the data set cannot be opened, has no such split, or its shape, classes or labels do not fit the
            model.
    """
    model, data = config.model, config.data
    dataset: Dataset
    if split not in SPLITS:
        raise DatasetError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    if data.source == UNSET:
        raise DatasetError(f"data.source = {UNSET!r}: {NO_DATA}; of a run, its config.yaml may say so too")
    if data.source == "latents":
        dataset = _open_latents(config, split)
    elif data.source == "fashion_mnist":
        dataset = FashionMNIST(split, data.path)
    elif data.source not in ("digits", "synthetic"):
        raise DatasetError(
            f"data.source: {data.source!r} is not known; use digits, fashion_mnist, latents or synthetic"
        )
    elif split == "test":
        raise DatasetError(
            f"data.source = {data.source!r} has no test split; use fashion_mnist, or latents with data.test_path"
        )
    elif data.source == "digits":
        dataset = Digits()
    else:
        shape = (model.in_channels, model.input_size, model.input_size)
        dataset = Synthetic(shape, model.num_classes, data.size, data.seed)
    check_dataset(dataset, model)
    return dataset


def open_captions(config: Config, dataset: Dataset) -> CaptionSource | None:
    """The captions of a data set with `model.condition=text`, else None.

    Raises DatasetError if the data set has none, if they do not fit the model, or if another encoder made them than the
    captions of training.
    """
    model = config.model
    if not model.has_text:
        return None
    if isinstance(dataset, Synthetic):
        return SyntheticCaptions(model.text_width, model.text_tokens, config.data.seed)
    if not isinstance(dataset, Latents):
        raise DatasetError(f"data.source = {config.data.source!r}: has no captions for model.condition = 'text'")
    captions = captions_beside(dataset, model.text_tokens)
    if captions.text.width != model.text_width:
        raise DatasetError(
            f"{captions.text.folder}: text features have {captions.text.width} channels, the model takes"
            f" {model.text_width}: set model.text_width={captions.text.width}"
        )
    _check_same_encoder(captions.text, Path(config.data.path) / FOLDER)
    return captions


def open_teacher_features(config: Config, dataset: Dataset) -> TeacherFeatures | None:
    """The teacher's features of a data set, which `model.align_block` needs; None without it.

    Raises DatasetError if the data set has none, or if they do not fit the model.
    """
    model = config.model
    if not model.align_block:
        return None
    side = model.input_size // model.patch_size
    if isinstance(dataset, Synthetic):
        return SyntheticTeacher(model.align_width, side, config.data.seed)
    if not isinstance(dataset, Latents):
        raise DatasetError(f"data.source = {config.data.source!r}: has no features of a teacher for model.align_block")
    features = teacher_beside(dataset)
    if features.shape != (model.align_width, side, side):
        width, *sides = features.shape
        raise DatasetError(
            f"{features.folder}: features have {width} channels and {sides[0]}x{sides[0]} tokens, the model needs"
            f" model.align_width = {model.align_width} and {side}x{side} (model.input_size / model.patch_size): set"
            f" model.align_width={width}, or encode again with --teacher-side {side}"
        )
    if config.data.flip and features.manifest.mirror == "none":
        raise DatasetError(f"data.flip = True: {features.folder} has no features of mirror images; set data.flip=false")
    return features


def _check_same_encoder(text: TextFeatures, trained_on: Path) -> None:
    """Raises DatasetError for captions that another encoder made than those in the folder `trained_on`.

    Without these, such as when a run is evaluated on another machine, there is nothing to compare.
    """
    if text.folder == trained_on or not (trained_on / TEXT_MANIFEST).is_file():
        return
    ours, trained = text.manifest.encoder, read_text_manifest(trained_on).encoder
    if not have_same_encoder(ours, trained):
        raise DatasetError(
            f"{text.folder}: was made by the text encoder {described(ours)}, the captions of training by"
            f" {described(trained)}; encode it again with that one"
        )


def _open_latents(config: Config, split: str) -> Latents:
    data, batch = config.data, config.train.global_batch
    if split == "test" and not data.test_path:
        raise DatasetError("data.test_path is empty: set it to a folder of latents that are not used in training")
    folder = Path(data.test_path if split == "test" else data.path)
    cache = cache_shards(folder, Path(data.cache), read_manifest(folder)) if data.cache and split == "train" else None
    dataset = Latents(folder, cache, data.verify)
    if data.flip and dataset.manifest.mirror == "none":
        raise DatasetError(f"data.flip = True: {folder} holds no mirrored latents; set data.flip=false")
    if split == "train" and len(dataset) < batch:
        raise DatasetError(
            f"{folder} holds {len(dataset)} records, fewer than train.global_batch = {batch}: encode more images, or"
            f" set train.global_batch={len(dataset)} or less"
        )
    return dataset


def latents_description(config: Config) -> dict[str, Any] | None:
    """Autoencoder, scale and shift of a run's latents, from their manifest; None for other data sets."""
    if config.data.source != "latents":
        return None
    manifest = read_manifest(Path(config.data.path))
    return {"autoencoder": manifest.autoencoder, "scale": list(manifest.scale), "shift": list(manifest.shift)}


def autoencoder_identity(config: Config) -> dict[str, str] | None:
    """Name, kind and SHA-256 of the autoencoder of a run's latents; None for other data sets."""
    return read_manifest(Path(config.data.path)).autoencoder if config.data.source == "latents" else None
