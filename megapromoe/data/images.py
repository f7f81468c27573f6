"""Folders of images: one folder for each class, read as square arrays by ADM's centre crop."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megapromoe.errors import UserError

# Lower case; what Pillow reads without further libraries.
SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
LONGEST = 1 << 17  # pixels of the long side of a scaled image: a strip of one row would otherwise take any memory
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class ImageError(UserError):
    """A folder of images that cannot be used, or an image that cannot be read."""


@dataclass(frozen=True)
class Item:
    """A file of a folder: its path below the folder, with "/", and its class."""

    path: str
    label: int


@dataclass(frozen=True)
class Scan:
    """What a folder holds, in an order that does not depend on the file system."""

    items: tuple[Item, ...]
    class_names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    """Path and reason of files that are no images by their names."""


def scan(folder: Path, suffixes: frozenset[str] = SUFFIXES, one_class: bool = False) -> Scan:
    """Lists the files of each class: folder/CLASS/any/depth/name.JPG, classes by name, files by path.

    Args:
        suffixes: lower-case ends of the names that count; files may have them in any case.
        one_class: all files, wherever they lie, are of one class, named as the folder.

    Raises ImageError: the folder is missing or empty, has one class (unless `one_class`), has classes without files, or
    holds its images outside of class folders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder; give one that holds a folder for each class")
    paths = sorted(_files(folder))
    good = [path for path in paths if path.lower().endswith(tuple(suffixes))]
    kept = set(good)
    skipped = [(path, "no image by its name") for path in paths if path not in kept]
    if not good:
        raise ImageError(f"{folder}: none of its {len(paths)} files is an image ({', '.join(sorted(suffixes))})")
    if one_class:
        return Scan(tuple(Item(path, 0) for path in good), (folder.resolve().name,), tuple(skipped))
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    count = Counter(path.split("/")[0] for path in good if "/" in path)
    problems = []
    if loose := [path for path in good if "/" not in path]:
        problems.append(f"{len(loose)} images, such as {loose[0]}, lie in no class folder; move each into its class")
    if empty := [name for name in names if not count[name]]:
        problems.append(f"{len(empty)} class folders without images, such as {empty[0]!r}; fill or remove them")
    if len(names) == 1 and not loose:
        problems.append(
            f"one class, {names[0]!r}; give the folder above the classes, or --one-class if there is but one"
        )
    if problems:
        raise ImageError(f"{folder}: " + "; ".join(problems))
    numbers = {name: number for number, name in enumerate(names)}
    return Scan(tuple(Item(p, numbers[p.split("/")[0]]) for p in good), tuple(names), tuple(skipped))


def _files(folder: Path) -> list[str]:
    """Paths of all files below, links followed, but no folder twice on the way down, and none that is hidden."""
    found: list[str] = []

    def walk(where: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in above:
            return
        above = above | {(status.st_dev, status.st_ino)}
        with os.scandir(where) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    walk(entry.path, f"{prefix}{entry.name}/", above)
                else:
                    found.append(prefix + entry.name)

    walk(str(folder), "", frozenset())
    return found


def read_image(path: Path, resolution: int, channels: int = 3) -> np.ndarray:
    """The centre of an image, uint8 (channels, resolution, resolution); the first frame, where there are several.

    Gray, CMYK, palette, 16-bit and transparent images are converted; EXIF turns are not applied, as in the published
    ImageNet latents. Raises ImageError with the reason, if it is damaged or no image.
    """
    if path.exists() and not path.is_file():  # reading a pipe or a device may never end
        raise ImageError("is no regular file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data, which is not used
            with Image.open(path) as file:
                file.load()
                image: Image.Image = file
                if image.mode in _SIXTEEN_BITS:  # Pillow would cut these off at 255
                    image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
                image = centre_crop(image.convert("RGB" if channels == 3 else "L"), resolution)
    except Exception as error:  # damaged files make Pillow raise what it likes
        reason = " ".join(str(error).replace(str(path), path.name).split())
        raise ImageError(f"{type(error).__name__}: {reason}") from error
    array = np.asarray(image, dtype=np.uint8)
    return array.transpose(2, 0, 1).copy() if array.ndim == 3 else array[None].copy()


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """ADM's crop: halve by boxes while both sides allow, scale the short side bicubically, cut out the centre.

    Source: Dhariwal and Nichol, arXiv 2105.05233; the crop of all published ImageNet diffusion models.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    if scale * max(image.size) > LONGEST:
        raise ImageError(f"{image.width}x{image.height}: too long for its other side; crop it")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))
