"""Code that all commands use: types of options, errors, and words of the form section.key=value.

The module imports neither the configuration nor torch, so that `megapromoe --help` starts fast.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar, cast

from megapromoe.errors import ExitCode, UserError

SETTING = re.compile(r"\w+\.\w+=")

Value = TypeVar("Value")


class CommandError(UserError):
    """Options of a command line that cannot be combined, or that are incomplete."""

    exit_code = ExitCode.MISCONFIGURED
    on_all_ranks = True  # every rank parses the same command line


class FileError(UserError):
    """A file or folder that the operating system does not let a command read or write."""


class InterruptedCommand(UserError):
    """Ctrl-C in a command whose finished work is kept. The message explains how to continue."""

    exit_code = ExitCode.INTERRUPTED


class OutputError(UserError):
    """Standard output cannot be written. Without a message if the reader closed it, as in `megapromoe | head`."""


class CommandOutput:
    """Standard output of a command. Its write errors are raised as OutputError, to separate them from file errors."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._errors():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._errors():
            self._stream.flush()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError as error:
            closed = OutputError()
            closed.exit_code = ExitCode.OUTPUT_CLOSED
            raise closed from error
        except OSError as error:
            raise OutputError(f"the output cannot be written: {error.strerror}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def checked_output() -> Iterator[None]:
    """Replaces standard output by a `CommandOutput`, and flushes it at the end. After an error the rest is dropped."""
    stream = sys.stdout
    if stream is None:  # closed before the start
        yield
        return
    output = CommandOutput(stream)
    sys.stdout = cast(TextIO, output)
    try:
        yield
        output.flush()
    except SystemExit:  # raised by argparse after it has printed
        output.flush()
        raise
    finally:
        sys.stdout = stream
        try:
            output.flush()
        except OutputError:  # otherwise Python prints the same error at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def file_errors() -> Iterator[None]:
    """Converts an OSError into a FileError with the file and the reason."""
    try:
        yield
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
        raise FileError(reason) from error


def takes_no_settings(parser: argparse.ArgumentParser, rule: str = "this command takes no settings") -> None:
    """Declares that a command or sub-command refuses words of the form section.key=value; `rule` is the reason."""
    parser.set_defaults(no_settings=rule)


def refuse_other_words(options: argparse.Namespace, rule: str) -> None:
    """Raises CommandError, with `rule` as the reason, for words that are neither an option nor section.key=value."""
    if wrong := [word for word in options.overrides if not SETTING.match(word)]:
        raise CommandError(f"{' '.join(wrong)}: {rule}; settings are section.key=value")


# ---- types of options, for argparse

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def byte_size(text: str) -> int:
    """An argparse type: a positive number of bytes, such as 5GB, 500MB or 1000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B|)", text.strip().upper())
    size = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give bytes, or a number with KB, MB, GB or TB")
    return size


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`, both included."""
    limits = f"of at least {least}" if most is None else f"in {least}..{most}"

    def read(text: str) -> int:
        value = int(text) if text.isascii() and text.isdecimal() else None
        if value is None or value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}, not {text!r}")
        return value

    return read


positive = whole_number(1)


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def image_count(text: str) -> int:
    """An argparse type: a whole number above 0, also with K, M or B for thousands, millions or billions."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper(), re.ASCII)
    count = 0.0 if match is None else float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]]
    if not 1 <= count < 1e18 or (round(count) != count):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of images, such as 1281167 or 128M")
    return round(count)


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, not {text!r}")
    return value


def comma_separated(kind: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """An argparse type: numbers separated by commas."""

    def read(text: str) -> tuple[Value, ...]:
        try:
            return tuple(kind(word) for word in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be numbers separated by commas, not {text!r}") from None

    return read
