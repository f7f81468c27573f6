"""A picture of some records of a folder of latents: a row for each class, each image beside its mirror image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from megapromoe.data.autoencoder import Autoencoder, AutoencoderError
from megapromoe.data.latents import Latents, LatentsError
from megapromoe.plot_text import font_file, legible

MARGIN, GAP = 120, 2  # pixels: of the class names, between images
TEXT = 11  # pixels: size of the class names
SMALLEST = 32  # pixels: smaller images are enlarged by a whole factor
NOTHING = 40  # gray where a class has no more records


def contact_sheet(data: Latents, classes: Sequence[int], count: int, autoencoder: Autoencoder | None) -> Image.Image:
    """The first `count` records of each class, drawn from their means.

    Args:
        autoencoder: the one that made them decodes them; None shows raw channels, the first three as colours.

    Raises AutoencoderError if it is not the one that made them, LatentsError if a record is damaged.
    """
    if autoencoder is not None:
        must_match(data.manifest.autoencoder, autoencoder)
    rows = [np.flatnonzero(data.labels == label)[:count].tolist() for label in classes]
    if not any(rows):
        raise LatentsError(f"{data.folder} has no records of classes {', '.join(map(str, classes))}; give others")
    both = data.manifest.mirror != "none"
    pictures = {index: _pictures(data, index, both, autoencoder) for row in rows for index in row}
    views, height, width, _ = next(iter(pictures.values())).shape
    scale = max(1, SMALLEST // height)
    height, width = height * scale, width * scale
    size = (MARGIN + count * views * (width + GAP), len(rows) * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, (NOTHING,) * 3)
    write, font = ImageDraw.Draw(sheet), ImageFont.truetype(font_file(), TEXT)
    for number, (label, row) in enumerate(zip(classes, rows, strict=True)):
        top = number * (height + GAP) + GAP
        text = _shortened(f"{label} {legible(data.class_names[label])}", font)
        write.text((4, top + 4), text, fill="white", font=font)
        for place, picture in enumerate(picture for index in row for picture in pictures[index]):
            image = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (MARGIN + place * (width + GAP), top))
    return sheet


def _shortened(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, or as much of its beginning as the margin holds, and three dots."""
    if font.getlength(text) <= MARGIN - 8:
        return text
    while font.getlength(f"{text}...") > MARGIN - 8:
        text = text[:-1]
    return f"{text}..."


def _pictures(data: Latents, index: int, both: bool, autoencoder: Autoencoder | None) -> np.ndarray:
    """A record, and its mirror image, as uint8 (views, H, W, 3)."""
    data.raw(index)  # a damaged one is named
    mirror = np.array([False, True][: 1 + both])
    latents = torch.from_numpy(data.draw(np.full(len(mirror), index), mirror, None))
    if autoencoder is not None:
        images = autoencoder.decode(latents).cpu()
    else:
        images = latents[:, :3] if latents.shape[1] >= 3 else latents[:, :1]
        low, high = images.amin(dim=(0, 2, 3), keepdim=True), images.amax(dim=(0, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp(min=1e-6) * 2 - 1
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels.repeat(3, axis=3) if pixels.shape[3] == 1 else pixels


def must_match(identity: dict[str, str], autoencoder: Autoencoder) -> None:
    """Raises AutoencoderError if latents of this identity are known not to be of this autoencoder."""
    own = autoencoder.identity
    if identity["sha256"] and identity["sha256"] != own["sha256"] or identity["kind"] not in ("", own["kind"]):
        made, given = (f"{i['name']!r} ({i['kind']}, sha256 {i['sha256'][:12] or '?'})" for i in (identity, own))
        raise AutoencoderError(f"the latents were made by {made}, not by {given}: give that one")
