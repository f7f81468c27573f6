"""A picture of images with their captions below them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megapromoe.plot_text import font_file, legible

CELL, MARGIN = 150, 6  # pixels: width of an image with its caption, and space around it
IMAGE_SIDE = 96  # pixels: smaller images are enlarged by an integer factor to at most this side
TEXT, LINE, LINES = 10, 13, 3  # pixels: size of letters, distance of lines; lines of a caption, the rest is cut
BACKGROUND = 40  # gray level


def caption_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int = 6) -> Image.Image:
    """Images in rows of `columns`, each above its caption.

    Args:
        pictures: uint8 (H, W, 3) each, all of the same size.
        captions: one for each picture.
    """
    height, width, _ = pictures[0].shape
    scale = max(1, IMAGE_SIDE // max(height, width))
    height, width = height * scale, width * scale
    cell_width, cell_height = max(CELL, width) + 2 * MARGIN, height + LINES * LINE + 2 * MARGIN
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), (BACKGROUND,) * 3)
    canvas, font = ImageDraw.Draw(sheet), ImageFont.truetype(font_file(), TEXT)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = number % columns * cell_width + MARGIN, number // columns * cell_height + MARGIN
        image = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(image, (left, top))
        for line, text in enumerate(wrapped(legible(caption), font, cell_width - 2 * MARGIN)):
            canvas.text((left, top + height + 2 + line * LINE), text, fill="white", font=font)
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in at most `LINES` lines of `width` pixels; what is cut ends in three dots."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width:
            word = word[:-1]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LINES:
        last = lines[LINES - 1]
        while font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: LINES - 1], f"{last}..."]
    return lines
