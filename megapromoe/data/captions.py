"""Captioned images: JSON lines, a .txt file beside each image, and WebDataset tars.

A caption that is missing, empty or not UTF-8 is refused, all in one message, or left out on request. White space in
captions is normalised: words are separated by one space.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from megapromoe.data.images import SUFFIXES, ImageError, Item, Scan, hidden_note, list_files

CLASS_NAMES = ("captioned",)  # images with captions are of one class
REMEDY = "correct them, or leave them out with --skip-bad-captions"


class CaptionError(ImageError):
    """Captions cannot be read."""

    on_all_ranks = True  # every rank reads the same files


@dataclass(frozen=True)
class CaptionedItem(Item):
    """An image with a caption.

    Attributes:
        caption: not empty; words separated by one space.
    """

    caption: str


@dataclass(frozen=True)
class CaptionedImages:
    """Images and their captions.

    Attributes:
        items: in order.
        scan: the items and what was left out.
        open: the image of an item: the path of its file, or its content.
    """

    scan: Scan
    items: tuple[CaptionedItem, ...]
    open: Callable[[Item], Path | BytesIO]


class CaptionProblems:
    """Collects captions that cannot be used, by reason.

    Args:
        source: file or folder of the captions, for messages.
        skip: leave them out; otherwise `finish` raises.
    """

    def __init__(self, source: Path | str, skip: bool):
        self.source, self.skip = source, skip
        self._places: dict[str, list[str]] = defaultdict(list)

    def add(self, place: str, reason: str) -> None:
        """Notes a caption: where it should be (a line, a file), and what is wrong."""
        self._places[reason].append(place)

    def caption(self, place: str, content: bytes | str | None) -> str | None:
        """The caption in `content`, or None after noting why it cannot be used; None as content: it is missing."""
        text, reason = normalised(content)
        if reason:
            self.add(place, reason)
        return text

    def finish(self, captioned: int) -> tuple[tuple[str, str], ...]:
        """What was left out, place and reason.

        Args:
            captioned: number of captions that can be used.

        Raises CaptionError that names all reasons, with their numbers and first places, unless `skip`; and if no
        caption is left.
        """
        count = sum(map(len, self._places.values()))
        reasons = ", ".join(f"{len(places):,} {reason}, such as {places[0]}" for reason, places in self._places.items())
        if count and not self.skip:
            raise CaptionError(f"{self.source}: {count:,} captions cannot be used: {reasons}; {REMEDY}")
        if not captioned:
            details = f" ({reasons})" if reasons else ""
            raise CaptionError(f"{self.source} holds no caption that can be used{details}; give another source")
        return tuple(sorted((p, f"caption {reason}") for reason, places in self._places.items() for p in places))


def normalised(content: bytes | str | None) -> tuple[str | None, str]:
    """A caption and "", or None and why there is none."""
    if content is None:
        return None, "missing"
    try:
        if isinstance(content, bytes):
            content = content.decode("utf-8-sig")
        content.encode()
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can express
        return None, "not valid Unicode"
    text = " ".join(content.split())
    return (text, "") if text else (None, "empty")


def read_captions(source: Path, skip: bool = False, text_only: bool = False) -> CaptionedImages:
    """Lists captioned images.

    Args:
        source: FILE.jsonl with lines {"image": path relative to the file, "caption": text}; a folder of images with a
            .txt file beside each; or WebDataset: a folder with .tar files, one .tar file, or a pattern of them with
            braces, such as "train-{000..099}.tar".
        skip: leave out captions that cannot be used.
        text_only: images are not needed.

    Raises CaptionError if there is nothing to read, or, in one message, for all captions that cannot be used.
    """
    name = str(source)
    if source.is_dir():
        tars = sorted(path for path in source.iterdir() if path.name.endswith(".tar") and path.is_file())
        return _from_tars(source, tars, skip, text_only) if tars else _beside_images(source, skip)
    if name.endswith(".jsonl"):
        return _from_json_lines(source, skip, text_only)
    if name.endswith(".tar"):
        from megapromoe.data.tars import expand

        return _from_tars(source, expand(name), skip, text_only)
    if not source.exists():
        raise CaptionError(f"{source}: no such file or folder; give a .jsonl, a folder of images, or .tar files")
    raise CaptionError(f"{source}: captions are a .jsonl file, .tar files, or a folder of images with .txt files")


def _from_json_lines(source: Path, skip: bool, text_only: bool) -> CaptionedImages:
    problems, items = CaptionProblems(source, skip), []
    try:
        lines = source.read_bytes().split(b"\n")
    except OSError as error:
        raise CaptionError(f"{source} cannot be read: {error.strerror}; give a .jsonl file") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"line {number}"
        content = _json_object(line)
        if isinstance(content, str):
            problems.add(place, content)
            continue
        image, caption = content.get("image"), content.get("caption")
        if not isinstance(image, str) and not (text_only and image is None):
            problems.add(place, 'without a text "image"')
        elif caption is not None and not isinstance(caption, str):
            problems.add(place, "not text")
        elif text := problems.caption(place, caption):
            items.append(CaptionedItem(image or place, 0, text))
    return _captioned(items, problems, (), lambda item: source.parent / item.path)


def _json_object(content: bytes) -> dict[str, Any] | str:
    """The object of a JSON text, or what is wrong with it."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    return value if isinstance(value, dict) else "not a JSON object"


def _beside_images(source: Path, skip: bool) -> CaptionedImages:
    problems, items = CaptionProblems(source, skip), []
    paths, hidden = list_files(source)
    images = [path for path in paths if path.lower().endswith(tuple(SUFFIXES))]
    if not images:
        raise CaptionError(f"{source}: none of its {len(paths)} files is an image or a .tar; give another folder")
    texts = {path.rpartition(".")[0]: path for path in paths if path.lower().endswith(".txt")}
    if not texts and (lists := [path for path in paths if path.endswith(".jsonl")]):
        raise CaptionError(f"{source} holds no .txt files; give {source / lists[0]}, if it holds the captions")
    for path in images:
        stem = path.rpartition(".")[0]
        content = (source / texts[stem]).read_bytes() if stem in texts else None
        if text := problems.caption(texts.get(stem, f"{stem}.txt"), content):
            items.append(CaptionedItem(path, 0, text))
    used = {*images, *(texts[stem] for image in images if (stem := image.rpartition(".")[0]) in texts)}
    others = tuple((path, "not the name of an image") for path in paths if path not in used)
    notes = (hidden_note(hidden),) if hidden else ()
    return _captioned(items, problems, notes, lambda item: source / item.path, others)


def _from_tars(source: Path, tars: list[Path], skip: bool, text_only: bool) -> CaptionedImages:
    from megapromoe.data.tars import TarFiles

    problems, items = CaptionProblems(source, skip), []
    files = TarFiles(tars)
    for sample in files.samples():
        image = next((m for ext, m in sample.members.items() if f".{ext}" in SUFFIXES), None)
        place = sample.name if image is None else image.path
        if image is None and not text_only:
            problems.add(place, "without an image")
            continue
        content: bytes | str | None = None
        if "txt" in sample.members:
            content = files.read(sample.members["txt"])
        elif "json" in sample.members:
            metadata = _json_object(files.read(sample.members["json"]))
            if isinstance(metadata, str):
                problems.add(place, metadata)
                continue
            value = metadata.get("caption")
            content = value if isinstance(value, str) else None
        if text := problems.caption(place, content):
            items.append(CaptionedItem(place, 0, text))
    return _captioned(items, problems, (), lambda item: BytesIO(files.read_path(item.path)))


def _captioned(
    items: list[CaptionedItem],
    problems: CaptionProblems,
    notes: tuple[str, ...],
    open_image: Callable[[Item], Path | BytesIO],
    others: tuple[tuple[str, str], ...] = (),
) -> CaptionedImages:
    skipped = tuple(sorted((*others, *problems.finish(len(items)))))
    kept = tuple(items)
    return CaptionedImages(Scan(kept, CLASS_NAMES, skipped, notes), kept, open_image)
