"""A picture of records of a latent folder: one row per class, each image next to its mirror image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from megapromoe.data.autoencoder import Autoencoder, AutoencoderError, renormalised
from megapromoe.data.latents import Latents, LatentsError
from megapromoe.plot_text import font_file, legible

MARGIN, GAP = 120, 2  # pixels: width of the column of class names; gap between images
TEXT = 11  # pixels: size of the class names
MIN_SIZE = 32  # pixels: smaller images are enlarged by an integer factor
BACKGROUND = 40  # gray level between images, and where a class has too few records


def contact_sheet(data: Latents, classes: Sequence[int], count: int, autoencoder: Autoencoder | None) -> Image.Image:
    """A picture of the means of the first `count` records of each class.

    Args:
        data: the latents.
        classes: class labels, one row each.
        count: images per row, without mirror images.
        autoencoder: decodes the latents; None: shows the latents' first three channels as colours.

    Raises AutoencoderError if the latents are of another autoencoder, LatentsError if a record is damaged.
    """
    autoencoder = _decoder_of(data, autoencoder)
    rows = [np.flatnonzero(data.labels == label)[:count].tolist() for label in classes]
    if not any(rows):
        raise LatentsError(f"{data.folder} has no records of classes {', '.join(map(str, classes))}; give others")
    with_mirror = data.manifest.mirror != "none"
    pictures = {index: _pictures(data, index, with_mirror, autoencoder) for row in rows for index in row}
    views, height, width, _ = next(iter(pictures.values())).shape
    scale = max(1, MIN_SIZE // height)
    height, width = height * scale, width * scale
    size = (MARGIN + count * views * (width + GAP), len(rows) * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, (BACKGROUND,) * 3)
    canvas, font = ImageDraw.Draw(sheet), ImageFont.truetype(font_file(), TEXT)
    for number, (label, row) in enumerate(zip(classes, rows, strict=True)):
        top = number * (height + GAP) + GAP
        text = _shortened(f"{label} {legible(data.class_names[label])}", font)
        canvas.text((4, top + 4), text, fill="white", font=font)
        for column, picture in enumerate(picture for index in row for picture in pictures[index]):
            image = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (MARGIN + column * (width + GAP), top))
    return sheet


def first_pictures(data: Latents, indices: Sequence[int], autoencoder: Autoencoder | None) -> list[np.ndarray]:
    """The means of some records as uint8 (H, W, 3), without mirror images; arguments and exceptions as above."""
    autoencoder = _decoder_of(data, autoencoder)
    return [_pictures(data, index, False, autoencoder)[0] for index in indices]


def _decoder_of(data: Latents, autoencoder: Autoencoder | None) -> Autoencoder | None:
    """The autoencoder with the normalisation of the latents. Raises AutoencoderError if another one made them."""
    if autoencoder is None:
        return None
    check_same_autoencoder(data.manifest.autoencoder, autoencoder)
    return renormalised(autoencoder, data.manifest.scale, data.manifest.shift)


def _shortened(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut to the width of the margin and ended with three dots if it is too long."""
    if font.getlength(text) <= MARGIN - 8:
        return text
    while font.getlength(f"{text}...") > MARGIN - 8:
        text = text[:-1]
    return f"{text}..."


def _pictures(data: Latents, index: int, with_mirror: bool, autoencoder: Autoencoder | None) -> np.ndarray:
    """A record, and its mirror image if `with_mirror`, as uint8 (views, H, W, 3)."""
    data.raw(index)  # raises LatentsError for a damaged record
    mirror = np.array([False, True][: 1 + with_mirror])
    latents = torch.from_numpy(data.sample(np.full(len(mirror), index), mirror, None))
    if autoencoder is not None:
        images = autoencoder.decode(latents).cpu()
    else:
        images = latents[:, :3] if latents.shape[1] >= 3 else latents[:, :1]
        low, high = images.amin(dim=(0, 2, 3), keepdim=True), images.amax(dim=(0, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp(min=1e-6) * 2 - 1
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels.repeat(3, axis=3) if pixels.shape[3] == 1 else pixels


def check_same_autoencoder(identity: dict[str, str], autoencoder: Autoencoder) -> None:
    """Raises AutoencoderError if latents with this autoencoder identity were made by another autoencoder."""
    given = autoencoder.identity
    if identity["sha256"] and identity["sha256"] != given["sha256"] or identity["kind"] not in ("", given["kind"]):
        expected, actual = (f"{i['name']!r} ({i['kind']}, sha256 {i['sha256'][:12] or '?'})" for i in (identity, given))
        raise AutoencoderError(f"the latents were made by {expected}, not by {actual}: give {identity['name']!r}")
