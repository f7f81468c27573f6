"""Seeded damage to files that the trainer reads back, and what became of each: the engine of `tools/fuzz.py`.

A `Target` is a kind of file with its real reader. Its files are damaged one at a time: mostly one flipped bit, else a
file cut off, a block of zeros, two files swapped, one file in place of another, or a file removed. Then the reader runs
on the damaged files, and what it gives is compared with what it gives on sound ones, so that "harmless" is proven.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMED, OLDER, HARMLESS, SILENT = OUTCOMES = "named", "older used", "harmless", "silent"
OTHERS = ("cut off", "zeros", "swapped", "replaced", "removed")  # damage that is no flip
FLIPS_PER_OTHER = 8  # so many flips for each damage of the other kinds


@dataclass(frozen=True)
class Damage:
    """New contents of some files (None: removed), and what was done in words."""

    contents: dict[Path, bytes | None]
    words: str


@dataclass
class Target:
    """A kind of file, and how it is read back.

    Attributes:
        name: what the files are, for the table.
        files: those to damage.
        classify: reads the damaged files by the real reader; returns a word of `OUTCOMES`. Is given the damage.
        donors: sound files of another checkpoint or data set, whose contents may stand in for those of `files`.
        reset: called after each damage, once `files` are as they were, to undo what the reader itself wrote.
    """

    name: str
    files: list[Path]
    classify: Callable[[Damage], str]
    donors: list[Path] = field(default_factory=list)
    reset: Callable[[], None] = lambda: None


@dataclass
class Tally:
    """What became of the damage to a target."""

    name: str
    outcomes: Counter = field(default_factory=Counter)
    flips: int = 0
    silent: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.outcomes.values())


class Unclear(AssertionError):
    """A reader ended in an exception that is no sentence for the user."""


def damage(target: Target, flips: int, seed: int) -> Tally:
    """Damages a target `flips` times by a flipped bit, and by the other kinds of damage some times more.

    Files are chosen evenly, whatever their sizes, so that manifests are hit as often as tensors. Every file is as it
    was when this returns. Raises Unclear, naming the damage, for whatever else than an outcome `classify` ends in.
    """
    chosen, tally = random.Random(seed), Tally(target.name)
    sound = {file: file.read_bytes() for file in [*target.files, *target.donors]}
    kinds = ["flip"] * flips + [OTHERS[n % len(OTHERS)] for n in range(flips // FLIPS_PER_OTHER)]
    for number, kind in enumerate(kinds):
        change = _damage(kind, target, sound, chosen)
        for file, content in change.contents.items():
            file.unlink() if content is None else file.write_bytes(content)
        try:
            outcome = target.classify(change)
        except Exception as error:
            raise Unclear(f"{target.name}, seed {seed}, damage {number}: {change.words}: {error!r}") from error
        finally:
            for file in change.contents:
                file.write_bytes(sound[file])
            target.reset()
        if outcome == SILENT:
            tally.silent.append(change.words)
        tally.outcomes[outcome] += 1
        tally.flips += kind == "flip"
    return tally


def _damage(kind: str, target: Target, sound: dict[Path, bytes], chosen: random.Random) -> Damage:
    file = chosen.choice(target.files)
    data = sound[file]
    place, bit, size = chosen.randrange(max(len(data), 1)), chosen.randrange(8), 2 ** chosen.randrange(13)
    others = [other for other in sound if sound[other] != data]
    if kind in ("swapped", "replaced") and others:
        other = chosen.choice(others)
        if kind == "swapped" and other in target.files:
            return Damage({file: sound[other], other: data}, f"{file} and {other} swapped")
        return Damage({file: sound[other]}, f"{file} replaced by {other}")
    if kind == "removed":
        return Damage({file: None}, f"{file} removed")
    if kind == "cut off" and data:
        return Damage({file: data[:place]}, f"{file} cut off at byte {place} of {len(data)}")
    if kind == "zeros" and data:
        zeroed = data[:place] + bytes(min(size, len(data) - place)) + data[place + size :]
        return Damage({file: zeroed}, f"{file}: {size} zeros at byte {place} of {len(data)}")
    if not data:
        return Damage({file: bytes([1 << bit])}, f"{file}: byte {1 << bit} in the empty file")
    flipped = bytearray(data)
    flipped[place] ^= 1 << bit
    context = data[max(0, place - 30) : place + 30]
    return Damage({file: bytes(flipped)}, f"{file}: bit {bit} of byte {place} of {len(data)}, in {context!r}")


def outcome_of(read: Callable[[], Any], refusals: type[Exception] | tuple[type[Exception], ...], expected: Any) -> str:
    """What a reader makes of one damage: refused in a sentence, or the same value as without it, or another one."""
    try:
        value = read()
    except refusals:
        return NAMED
    return HARMLESS if value == expected else SILENT


@contextmanager
def warnings_of(name: str = "megapromoe") -> Iterator[list[str]]:
    """The warnings that the package logs within the block."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger(name), Collector(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False  # thousands of them
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def snapshot(folder: Path) -> Callable[[], None]:
    """Notes all files below a folder; the function that it returns puts them back as they were."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def restore() -> None:
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            if path not in before:
                path.unlink()
        for path, content in before.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)

    return restore


def table(tallies: list[Tally]) -> str:
    """The tallies as a Markdown table."""
    lines = [
        f"| kind of file | damages | of them flips | {' | '.join(OUTCOMES)} |",
        f"|---|{'---|' * (2 + len(OUTCOMES))}",
    ]
    for tally in tallies:
        counts = " | ".join(f"{tally.outcomes[outcome]:,}" for outcome in OUTCOMES)
        lines.append(f"| {tally.name} | {tally.total:,} | {tally.flips:,} | {counts} |")
    return "\n".join(lines)
