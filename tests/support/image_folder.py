"""A folder of images in classes for tests, as they come: nested, in many modes, some broken."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path) -> Path:
    """Three classes, nested, in many modes, with two broken files and one that is no image; returns the folder."""
    random = np.random.default_rng(0)
    for number in range(14):
        pixels = random.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        path = folder / f"class{number % 3}" / ("deep/er" if number % 2 else "") / f"im{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 4 == 1:
            image.convert(["L", "CMYK"][number % 8 == 1]).save(path.with_suffix(".JPEG"))
        elif number % 4 == 3:
            image.convert("P").save(path.with_suffix(".Gif"), format="gif")
        else:
            image.save(path)
    content = (folder / "class0" / "im00.png").read_bytes()
    (folder / "class1" / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "class2" / "text.jpg").write_text("no image")
    (folder / "class2" / "notes.txt").write_text("no image by its name")
    return folder
