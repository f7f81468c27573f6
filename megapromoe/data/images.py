"""Images in files: folders with one folder for each class, and the one place that opens an image file.

Encoding reads squares by ADM's centre crop (`read_image`), sets of images whole pictures (`open_image`).
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megapromoe.errors import UserError

# Lower case; what Pillow reads without further libraries.
SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
MOST_PIXELS = 2 * (1 << 30) // 12  # of a file: those above which Pillow refuses to read it as well
LONGEST = 1 << 17  # pixels of the long side of a scaled image: a strip of one row would otherwise take any memory
CLASS_ORDERS = ("name", "number")
_GRAY = ("1", "L")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_BLOCK = 1 << 22  # pixels converted at once
# Folders that systems put among a user's own: archives of macOS, network storage, file systems, Windows.
_SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "lost+found", "$RECYCLE.BIN")
) | {"System Volume Information"}

# Of damaged EXIF data, which is not used, and of sizes, which are limited below. Set once for this library alone:
# `catch_warnings` in threads that overlap leaves the filters of one of them to the whole process.
warnings.filterwarnings("ignore", module=r"PIL\.")


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
    notes: tuple[str, ...] = ()
    """Sentences for the user: what was passed over, and how classes are numbered where that may surprise."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is not the user's own: hidden, or put there by a system."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def hidden_note(names: Collection[str]) -> str:
    """The sentence about hidden files and folders that are passed over."""
    return f"{len(names):,} hidden or system files and folders are passed over, such as {min(names)}"


def scan(folder: Path, suffixes: frozenset[str] = SUFFIXES, one_class: bool = False, class_order: str = "name") -> Scan:
    """Lists the files of each class: folder/CLASS/any/depth/name.JPG, files by path; hidden ones are passed over.

    Args:
        suffixes: lower-case ends of the names that count; files may have them in any case.
        one_class: all files, wherever they lie, are of one class, named as the folder.
        class_order: by which class folders are numbered from 0: "name", as text, like torchvision's ImageFolder; or
            "number", the value of their names.

    Raises ImageError: the folder is missing or empty, has one class (unless `one_class`), has classes without files,
    holds its images outside of class folders, or has names that are no numbers, which are to be ordered as such.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder; give one that holds a folder for each class")
    paths, hidden = _files(folder)
    good = [path for path in paths if path.lower().endswith(tuple(suffixes))]
    kept = set(good)
    skipped = tuple((path, "no image by its name") for path in paths if path not in kept)
    notes = [hidden_note(hidden)] if hidden else []
    if not good:
        raise ImageError(f"{folder}: none of its {len(paths)} files is an image ({', '.join(sorted(suffixes))})")
    if one_class:
        return Scan(tuple(Item(path, 0) for path in good), (folder.resolve().name,), skipped, tuple(notes))
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
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
    if class_order == "number":
        problems += _unordered(names)
    if problems:
        raise ImageError(f"{folder}: " + "; ".join(problems))
    if class_order == "number":
        names.sort(key=int)
    notes += _numbering_notes(names, class_order)
    numbers = {name: number for number, name in enumerate(names)}
    items = tuple(Item(path, numbers[path.split("/")[0]]) for path in good)
    return Scan(items, tuple(names), skipped, tuple(notes))


def _unordered(names: Sequence[str]) -> list[str]:
    """Why classes of these names have no order by number."""
    if words := [name for name in names if not _is_number(name)]:
        return [f"--class-order number: {len(words)} names of classes are no whole numbers, such as {words[0]!r}"]
    values = Counter(map(int, names))
    if twice := [name for name in names if values[int(name)] > 1]:
        return [f"--class-order number: the classes {twice[0]!r} and {twice[1]!r} have one number; rename one"]
    return []


def _numbering_notes(names: Sequence[str], class_order: str) -> list[str]:
    """How classes are numbered, where all names are numbers and some class has another one than its name."""
    if not all(map(_is_number, names)):
        return []
    other = next(((name, number) for number, name in enumerate(names) if int(name) != number), None)
    if other is None:
        return []
    rule = f"the {len(names)} class folders have numbers as names, and folder {other[0]!r} is class {other[1]}"
    if class_order == "number":
        return [f"{rule}: classes are numbered from 0, without gaps"]
    if sorted(names, key=int) == list(names):
        return [f"{rule}: classes are numbered from 0, without gaps, in the order of their names as text"]
    return [f"{rule}: classes are numbered in the order of their names as text; --class-order number takes their value"]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _files(folder: Path) -> tuple[list[str], list[str]]:
    """Paths of all files below, sorted, and of what is hidden; links are followed, but no folder twice on one way."""
    files: list[str] = []
    hidden: list[str] = []

    def walk(where: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in above:
            return
        above = above | {(status.st_dev, status.st_ino)}
        with os.scandir(where) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    hidden.append(prefix + entry.name)
                elif entry.is_dir():
                    walk(entry.path, f"{prefix}{entry.name}/", above)
                else:
                    files.append(prefix + entry.name)

    walk(str(folder), "", frozenset())
    return sorted(files), hidden


def read_image(path: Path, resolution: int, channels: int = 3) -> np.ndarray:
    """The centre of an image, uint8 (channels, resolution, resolution); see `open_image`.

    EXIF turns are not applied, as in the published ImageNet latents. Raises ImageError with the reason, without the
    path, if the image cannot be read or is too long for its other side.
    """
    image = open_image(path, "RGB" if channels == 3 else "L", lambda image: centre_crop(image, resolution))
    array = np.asarray(image, dtype=np.uint8)
    return array.transpose(2, 0, 1).copy() if array.ndim == 3 else array[None].copy()


def open_image(
    path: Path, mode: str | None = None, edit: Callable[[Image.Image], Image.Image] = lambda image: image
) -> Image.Image:
    """The image of a file with 8 bits a channel; the first frame, where there are several.

    Gray, CMYK, palette, 16-bit and transparent images are converted.

    Args:
        mode: "RGB" or "L"; None: "L" for gray images without transparency, else "RGB".
        edit: applied to the image while its file is open.

    Raises ImageError with the reason, without the path, if the file is damaged or no image, has more than
    `MOST_PIXELS`, or holds values of which neither black nor white is defined.
    """
    if path.exists() and not path.is_file():  # reading a pipe or a device may never end
        raise ImageError("is no regular file")
    try:
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                raise Image.DecompressionBombError(f"{file.width}x{file.height}")
            file.load()
            image: Image.Image = file
            if image.mode == "F":
                raise ImageError(
                    "holds floating-point pixels, of which neither black nor white is defined; save it with 8 or 16"
                    " bits a channel"
                )
            if image.mode in _SIXTEEN_BITS:  # Pillow would cut these off at 255
                image = _eight_bits(image)
            return edit(image.convert(mode or ("L" if image.mode in _GRAY else "RGB")))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"has more than {MOST_PIXELS:,} pixels ({error}); scale it down") from error
    except Exception as error:  # damaged files make Pillow raise what it likes
        reason = " ".join(str(error).replace(str(path), path.name).split())
        raise ImageError(f"{type(error).__name__}: {reason}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """A gray image of values 0..65535 with 8 bits, rounded; by blocks of rows, so that it takes little memory."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(
            f"holds values from {low:,} to {high:,}, where 16 bits have 0 to 65,535, so that its white is not known;"
            " save it with 8 or 16 bits a channel"
        )
    pixels = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _BLOCK // values.shape[1])
    for top in range(0, len(values), rows):
        pixels[top : top + rows] = (values[top : top + rows].astype(np.uint32) + 128) // 257  # 257: never a half
    return Image.fromarray(pixels)


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """ADM's crop: halve by boxes while both sides allow, scale the short side bicubically, cut out the centre.

    Source: Dhariwal and Nichol, arXiv 2105.05233; the crop of all published ImageNet diffusion models.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale, longest = resolution / min(image.size), min(LONGEST, MOST_PIXELS // resolution)
    if scale * max(image.size) > longest:
        raise ImageError(
            f"{image.width}x{image.height}: too long for its other side; scaled so that the short side has"
            f" {resolution} pixels, the long one may have {longest:,} at most: crop it"
        )
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))
