"""Image files: folders with one subfolder per class, and the only functions that open image files.

Encoding reads squares with ADM's centre crop (`read_image`); sets of images are read uncropped (`open_image`).
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from megapromoe.errors import UserError

# Formats that Pillow reads without further libraries; lower case.
SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
MAX_PIXELS = 2 * (1 << 30) // 12  # of a file: Pillow's own limit
MAX_SIDE = 1 << 17  # pixels, long side of a scaled image: limits the memory for very elongated images
CLASS_ORDERS = ("name", "number")
_GRAY = ("1", "L")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_BLOCK = 1 << 22  # pixels converted at once
# Folders that operating systems and network storage create: macOS archives, Synology and QNAP, file systems, Windows.
_SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "lost+found", "$RECYCLE.BIN")
) | {"System Volume Information"}

# Pillow warns of damaged EXIF data, which is not used, and of large sizes, which are limited below. The filter is set
# once for the process, because `catch_warnings` is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(UserError):
    """A folder of images cannot be used, or an image cannot be read."""


@dataclass(frozen=True)
class Item:
    """A file of a folder.

    Attributes:
        path: path relative to the folder, with "/".
        label: class.
    """

    path: str
    label: int


@dataclass(frozen=True)
class Scan:
    """The files and classes of a folder, in an order that does not depend on the file system."""

    items: tuple[Item, ...]
    class_names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    """Path and reason of files that are not images according to their names."""
    notes: tuple[str, ...] = ()
    """Messages for the user: files that were ignored, and the numbering of classes if it is not the obvious one."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or was created by an operating system."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def hidden_note(names: Collection[str]) -> str:
    """The message about hidden files and folders that are ignored."""
    return f"{len(names):,} hidden or system files and folders are ignored, such as {min(names)}"


def scan(folder: Path, suffixes: frozenset[str] = SUFFIXES, one_class: bool = False, class_order: str = "name") -> Scan:
    """Lists the files of each class, folder/CLASS/any/depth/name.JPG, sorted by path. Hidden files are ignored.

    Args:
        suffixes: lower-case file name extensions; those of the files may be in any case.
        one_class: all files are of one class, which is named after the folder.
        class_order: numbering of the class folders from 0: "name", sorted as text, like torchvision's ImageFolder; or
            "number", sorted by the value of their names.

    Raises:
        ImageError: the folder does not exist or has no images, has one class (unless `one_class`), has classes without
            images, has images outside of class folders, or has class names without an order by number.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder; give a folder with one subfolder per class")
    paths, hidden = list_files(folder)
    good = [path for path in paths if path.lower().endswith(tuple(suffixes))]
    kept = set(good)
    skipped = tuple((path, "not the name of an image") for path in paths if path not in kept)
    notes = [hidden_note(hidden)] if hidden else []
    if not good:
        raise ImageError(
            f"{folder}: none of its {len(paths)} files has the name of an image ({', '.join(sorted(suffixes))})"
        )
    if one_class:
        return Scan(tuple(Item(path, 0) for path in good), (folder.resolve().name,), skipped, tuple(notes))
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
    count = Counter(path.split("/")[0] for path in good if "/" in path)
    problems = []
    if loose := [path for path in good if "/" not in path]:
        problems.append(f"{len(loose)} images, such as {loose[0]}, are in no class folder; move each into its class")
    if empty := [name for name in names if not count[name]]:
        problems.append(f"{len(empty)} class folders without images, such as {empty[0]!r}; fill or remove them")
    if len(names) == 1 and not loose:
        problems.append(
            f"one class, {names[0]!r}; give the parent folder of the classes, or --one-class if there is only one"
        )
    names, numbering_notes, unordered = numbered_classes(names, class_order)
    if problems + unordered:
        raise ImageError(f"{folder}: " + "; ".join(problems + unordered))
    notes += numbering_notes
    numbers = {name: number for number, name in enumerate(names)}
    items = tuple(Item(path, numbers[path.split("/")[0]]) for path in good)
    return Scan(items, tuple(names), skipped, tuple(notes))


def numbered_classes(names: Sequence[str], class_order: str) -> tuple[list[str], list[str], list[str]]:
    """Orders classes for their numbers.

    Args:
        names: sorted as text.
        class_order: see `scan`.

    Returns:
        The names in the order of their numbers, notes for the user, and the reasons why there is no such order.
    """
    if class_order != "number":
        return list(names), _numbering_notes(names, class_order), []
    if problems := _unordered(names):
        return list(names), [], problems
    ordered = sorted(names, key=int)
    return ordered, _numbering_notes(ordered, class_order), []


def _unordered(names: Sequence[str]) -> list[str]:
    """The reasons why classes with these names cannot be ordered by number."""
    if words := [name for name in names if not _is_number(name)]:
        return [f"--class-order number: {len(words)} class names are not whole numbers, such as {words[0]!r}"]
    values = Counter(map(int, names))
    if twice := [name for name in names if values[int(name)] > 1]:
        return [f"--class-order number: classes {twice[0]!r} and {twice[1]!r} have the same number; rename one"]
    return []


def _numbering_notes(names: Sequence[str], class_order: str) -> list[str]:
    """A note on the numbering of classes if all names are numbers and some class has another number than its name."""
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


def list_files(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted relative paths of all files below `folder`, and the paths of hidden files and folders.

    Links are followed, except to a folder that contains the link.
    """
    files: list[str] = []
    hidden: list[str] = []

    def walk(path: str, prefix: str, ancestors: frozenset[tuple[int, int]]) -> None:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in ancestors:
            return
        ancestors = ancestors | {(status.st_dev, status.st_ino)}
        with os.scandir(path) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    hidden.append(prefix + entry.name)
                elif entry.is_dir():
                    walk(entry.path, f"{prefix}{entry.name}/", ancestors)
                else:
                    files.append(prefix + entry.name)

    walk(str(folder), "", frozenset())
    return sorted(files), hidden


def read_image(path: Path | BytesIO, resolution: int, channels: int = 3) -> np.ndarray:
    """Reads the centre crop of an image, uint8 (channels, resolution, resolution); see `open_image`.

    The EXIF orientation is not applied, as in the published ImageNet latents.

    Raises ImageError with the reason, without the path, if the image cannot be read or is too elongated.
    """
    image = open_image(path, "RGB" if channels == 3 else "L", lambda image: centre_crop(image, resolution))
    array = np.asarray(image, dtype=np.uint8)
    return array.transpose(2, 0, 1).copy() if array.ndim == 3 else array[None].copy()


def open_image(
    path: Path | BytesIO, mode: str | None = None, edit: Callable[[Image.Image], Image.Image] = lambda image: image
) -> Image.Image:
    """Opens an image file with 8 bits per channel; of several frames, the first.

    Gray, CMYK, palette, 16-bit and transparent images are converted.

    Args:
        path: a file, or its content.
        mode: "RGB" or "L"; None: "L" for gray images without transparency, otherwise "RGB".
        edit: applied to the image while its file is open.

    Raises ImageError with the reason, without the path, if the file is damaged or not an image, has more than
    `MAX_PIXELS` pixels, or holds values for which black and white are not defined.
    """
    if isinstance(path, Path) and path.exists() and not path.is_file():  # reading a pipe or a device may never end
        raise ImageError("is not a regular file")
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{file.width}x{file.height}")
            file.load()
            image: Image.Image = file
            if image.mode == "F":
                raise ImageError(
                    "holds floating-point pixels, for which black and white are not defined; save it with 8 or 16"
                    " bits per channel"
                )
            if image.mode in _SIXTEEN_BITS:  # Pillow's own conversion clips the values at 255
                image = _eight_bits(image)
            return edit(image.convert(mode or ("L" if image.mode in _GRAY else "RGB")))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"has more than {MAX_PIXELS:,} pixels ({error}); scale it down") from error
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        reason = str(error).replace(str(path), path.name if isinstance(path, Path) else "it")
        reason = " ".join(reason.split())
        raise ImageError(f"{type(error).__name__}: {reason}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Converts a gray image with values 0..65535 to 8 bits, rounded, in blocks of rows to limit the memory."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(
            f"holds values from {low:,} to {high:,} instead of 0 to 65,535, so that white is not defined; save it with"
            " 8 or 16 bits per channel"
        )
    pixels = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _BLOCK // values.shape[1])
    for top in range(0, len(values), rows):
        pixels[top : top + rows] = (
            values[top : top + rows].astype(np.uint32) + 128
        ) // 257  # 65535 = 255 * 257; no value is halfway
    return Image.fromarray(pixels)


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """ADM's centre crop to `resolution` x `resolution` pixels.

    The image is halved with a box filter while its short side is at least twice the resolution, then scaled
    bicubically so that the short side equals the resolution, then cropped.

    Source: Dhariwal and Nichol, arXiv 2105.05233; the crop of the published ImageNet diffusion models.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale, longest = resolution / min(image.size), min(MAX_SIDE, MAX_PIXELS // resolution)
    if scale * max(image.size) > longest:
        raise ImageError(
            f"{image.width}x{image.height}: too elongated; when the short side is scaled to {resolution} pixels, the"
            f" long side may have {longest:,} at most: crop the image"
        )
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))
