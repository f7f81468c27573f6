"""What `megapromoe encode` reads: opens the source of records that the options name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megapromoe.commands.command_line import positive

if TYPE_CHECKING:
    from megapromoe.data.captions import CaptionedImages
    from megapromoe.data.encode import Source
    from megapromoe.data.scenes.encoding import EncodedScenes
    from megapromoe.data.tables.table import Table

COMPUTE = "compute"
SD_SCALE = 0.18215
RESOLUTION = 256


def table_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name parts of tables."""
    table = parser.add_argument_group("columns, data sets and tensors of --images and --latents")
    table.add_argument("--data-field", metavar="NAME", help="that of the images or latents; default: by usual names")
    table.add_argument("--label-field", metavar="NAME", help="that of the labels; default: by usual names")
    table.add_argument("--flip-field", metavar="NAME", help="that of the latents of mirror images")
    table.add_argument("--num-classes", type=positive, metavar="N", help="classes; default: the largest label + 1")


def violations(options: argparse.Namespace) -> list[str]:
    """The options about sources that cannot be combined, or that are missing, a sentence for each."""
    wrong = []
    if options.latents and options.scale is None and not (options.statistics or options.autoencoder):
        wrong.append(
            f"--latents needs --statistics FILE or {COMPUTE}, --autoencoder PATH, or --scale S: {SD_SCALE} for latents"
            " of SD's autoencoder, 1 for latents that are stored scaled"
        )
    if options.statistics and (options.scenes or options.text_only or options.autoencoder == "none"):
        wrong.append("--statistics: is for latents, and these are pixels or text; remove it")
    if options.values == "mean_std" and options.npz:
        wrong.append("--values mean_std: is for --latents; .npz files hold log-variances")
    columns = {"--data-field": options.data_field, "--label-field": options.label_field}
    columns |= {"--num-classes": options.num_classes}
    is_for_tables = bool(options.images or options.latents)
    wrong += [
        f"{name}: is for --images and --latents" for name, value in columns.items() if value and not is_for_tables
    ]
    if options.flip_field and not options.latents:
        wrong.append("--flip-field: is for --latents")
    return wrong


def open_source(options: argparse.Namespace, captioned: CaptionedImages | EncodedScenes | None, device: str) -> Source:
    """The source of records.

    Args:
        options: of the command.
        captioned: images with captions, or scenes; None for images and latents of classes.
        device: device of the autoencoder.

    Raises UserError if it cannot be opened.
    """
    from megapromoe.data.captions import CaptionedImages

    source: Source
    if options.images or isinstance(captioned, CaptionedImages):
        source = _images(options, captioned if isinstance(captioned, CaptionedImages) else None, device)
    elif captioned is not None:
        return captioned
    else:
        source = _table_latents(options) if options.latents else _published(options)
        if options.autoencoder:  # only its identity is stored: the files do not name their autoencoder
            _describe_autoencoder(source, options, device)
    if options.statistics and options.statistics != COMPUTE:
        _apply_statistics(source, Path(options.statistics), 1.0 if options.scale is None else options.scale)
    elif options.statistics:  # computed when all records are written
        channels = source.manifest_fields["shape"][0]
        source.manifest_fields["scale"] = (1.0 if options.scale is None else options.scale,) * channels
    return source


def _images(options: argparse.Namespace, captioned: CaptionedImages | None, device: str) -> Source:
    from megapromoe.data.autoencoder import open_autoencoder
    from megapromoe.data.encode import EncodedImages
    from megapromoe.data.images import ImageError, scan
    from megapromoe.data.tables.opening import is_table
    from megapromoe.data.tables.table import IMAGES

    autoencoder = open_autoencoder(options.autoencoder, device, options.channels)
    how = (autoencoder, options.resolution or RESOLUTION, options.batch, options.workers, options.dtype)
    if captioned is not None:  # "left of" is false for a mirror image
        return EncodedImages(options.captions, captioned.scan, *how, mirror=False, open_item=captioned.open)
    if is_table(options.images):
        table, files = _table(options, options.images, IMAGES)
        return EncodedImages(
            options.images,
            files,
            *how,
            stream=lambda items: (value for value, *_ in table.values(items[0].row, items[-1].row + 1)),  # type: ignore
        )
    if any((options.data_field, options.label_field, options.num_classes)):
        raise ImageError(
            f"{options.images}: is a folder of classes, which their folders name and number; leave out --data-field,"
            " --label-field and --num-classes"
        )
    files = scan(options.images, one_class=options.one_class, class_order=options.class_order)
    return EncodedImages(options.images, files, *how)


def _table(options: argparse.Namespace, path: Path, kind: str):
    """The table at a path, and its records with their classes."""
    from megapromoe.data.tables.classes import table_scan
    from megapromoe.data.tables.opening import open_table
    from megapromoe.data.tables.table import Fields

    fields = Fields(options.data_field or "", options.label_field or "", options.flip_field or "")
    table: Table = open_table(path, kind, fields)
    return table, table_scan(table, options.one_class, options.class_order, options.num_classes)


def _table_latents(options: argparse.Namespace) -> Source:
    from megapromoe.data.table_latents import TableLatents
    from megapromoe.data.tables.table import LATENTS

    table, files = _table(options, options.latents, LATENTS)
    scale = 1.0 if options.scale is None else options.scale
    return TableLatents(table, files, options.values or "", scale, resolution=options.resolution, dtype=options.dtype)


def _published(options: argparse.Namespace) -> Source:
    from megapromoe.data.importing import PublishedLatents

    return PublishedLatents(
        options.npz,
        options.values or "posterior",
        SD_SCALE if options.scale is None else options.scale,
        workers=options.workers,
        dtype=options.dtype,
        one_class=options.one_class,
        class_order=options.class_order,
    )


def _describe_autoencoder(source: Source, options: argparse.Namespace, device: str) -> None:
    """Stores the identity of the autoencoder, and its scale and shift if no others are given."""
    from megapromoe.data.autoencoder import AutoencoderError, open_autoencoder

    autoencoder = open_autoencoder(options.autoencoder, device)
    shape = source.manifest_fields["shape"]
    side = autoencoder.resolution(shape[1])
    if options.latents and options.resolution not in (None, side):
        raise AutoencoderError(
            f"--resolution {options.resolution}: images of autoencoder {options.autoencoder!r} have {side} pixels for"
            f" latents of {shape[1]}; leave it out"
        )
    made = autoencoder.latent_shape(side if options.latents else source.manifest_fields["resolution"])
    if made != shape:
        raise AutoencoderError(
            f"autoencoder {options.autoencoder!r} makes latents of shape {made}, but the files have"
            f" shape {shape}; give the autoencoder that made them"
        )
    source.manifest_fields["autoencoder"] = autoencoder.identity
    if options.latents:
        source.manifest_fields["resolution"] = side
    if not (options.latents and (options.scale is not None or options.statistics)):
        source.manifest_fields |= {"scale": autoencoder.scale, "shift": autoencoder.shift}


def _apply_statistics(source: Source, path: Path, factor: float) -> None:
    from megapromoe.conversion.latent_statistics import read_statistics
    from megapromoe.data.channel_statistics import from_arrays

    fields = source.manifest_fields
    scale, shift = from_arrays(read_statistics(path), fields["shape"][0], factor, f"--statistics {path}")
    fields |= {"scale": scale, "shift": shift}
    fields["autoencoder"] = fields["autoencoder"] | {"normalisation": f"of {path.name}"}
