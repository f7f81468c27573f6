"""A picture of images with their captions below them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from megapromoe.diffusion.image_grid import grid, picture_scale
from megapromoe.plot_text import font_file, legible

CELL, MARGIN = 150, 6  # pixels: width of an image with its caption, and space around it
IMAGE_SIDE = 96  # pixels: smaller images are enlarged by an integer factor to at most this side
TEXT, LINE, LINES = 10, 13, 3  # pixels: size of letters, distance of lines; lines of a caption, the rest is cut
BACKGROUND = 40  # gray level
ROW = 4  # images of a prompt that are shown in one row
SHEET = 1600  # pixels: width of a picture of prompts, unless the images of one prompt are wider


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


def prompt_sheet(images_BCHW: Tensor | np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """A picture of images above their prompts: uint8 (height, width, 3).

    Args:
        images_BCHW: in [-1, 1], clipped, with 1 or 3 channels; as many for each prompt, prompt by prompt.
        prompts: texts; an empty one is shown as "(no prompt)".
    """
    count, scale = len(images_BCHW) // len(prompts), picture_scale(images_BCHW.shape[-1])
    side = math.ceil(math.sqrt(count)) if count > ROW else count
    cells = [grid(images_BCHW[i * count : (i + 1) * count], side, scale) for i in range(len(prompts))]
    width = max(cells[0].shape[1], CELL)
    columns = min(max(1, SHEET // width), max(1, math.ceil(math.sqrt(len(prompts) * cells[0].shape[0] / width))))
    return np.asarray(caption_sheet(cells, [text or "(no prompt)" for text in prompts], columns))
