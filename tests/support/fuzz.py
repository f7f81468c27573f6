"""Seeded damage to files that the trainer reads back, and what became of it."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMED, OLDER, HARMLESS, SILENT = "named", "older used", "harmless", "silent"


def flips(files: list[Path], count: int, seed: int, classify: Callable[[], str]) -> Counter:
    """Flips one bit of one of `files` at a time, `count` times; how often `classify` returned each word.

    Files are chosen evenly, whatever their sizes, so that manifests are hit as often as tensors. Every file is as it
    was when this returns. What `classify` raises ends it, naming the flip.
    """
    chosen, outcomes = random.Random(seed), Counter()
    contents = {file: file.read_bytes() for file in files}
    for number in range(count):
        file = chosen.choice(files)
        place, bit = chosen.randrange(len(contents[file])), chosen.randrange(8)
        data = bytearray(contents[file])
        data[place] ^= 1 << bit
        file.write_bytes(bytes(data))
        try:
            outcome = classify()
        except BaseException as error:
            raise AssertionError(f"flip {number}: bit {bit} of byte {place} of {file}: {error!r}") from error
        finally:
            file.write_bytes(contents[file])
        if outcome == SILENT:
            context = contents[file][max(0, place - 30) : place + 30]
            print(f"silent: bit {bit} of byte {place} of {file}: {context!r}")
        outcomes[outcome] += 1
    return outcomes


def attempt(read: Callable[[], Any], refusals: type[Exception] | tuple[type[Exception], ...], expected: Any) -> str:
    """What became of one flip: refused by name, or the same value as without it, or another one."""
    try:
        value = read()
    except refusals:
        return NAMED
    return HARMLESS if value == expected else SILENT
