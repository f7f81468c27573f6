"""Prompts of images: words on the command line, files of them, and GenEval's file of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapromoe.data.captions import normalised
from megapromoe.diffusion.image_grid import SampleError
from megapromoe.io import sha256_of_json

_KEYS = ("prompt", "seed", "id")  # of a line of a .jsonl
_SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class Prompt:
    """What an image is to show, in words.

    Attributes:
        text: words separated by one space, like captions; empty: an image without a condition.
        seed: of its images, which are then numbered from 0; None: `sample.seed`, and their numbers in the output.
        id: a name of the user's, which is written beside the images.
        metadata: the line of GenEval's file.
    """

    text: str
    seed: int | None = None
    id: str | int | None = None
    metadata: str | None = None

    def record(self) -> dict[str, Any]:
        """The prompt as JSON, without what it does not have."""
        values = {"prompt": self.text, "seed": self.seed, "id": self.id}
        return {key: value for key, value in values.items() if value is not None}


def prompt_of(text: str) -> Prompt:
    """A prompt from the command line. Raises SampleError if it is not Unicode."""
    return Prompt(_words(text, f"prompt {shortened(text)}"))


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a file: one on each line; of a .jsonl, {"prompt": text} with optional "seed" and "id".

    Lines without text are ignored. `{"prompt": ""}` is an image without a condition.

    Raises SampleError, which names the line.
    """
    if path.suffix == ".jsonl":
        prompts = [_prompt_of_line(content, place) for place, content in _objects(path)]
    else:
        prompts = [Prompt(_words(line, place)) for place, line in _lines(path)]
    return _at_least_one(prompts, path)


def read_geneval(path: Path) -> list[Prompt]:
    """The prompts of GenEval's evaluation_metadata.jsonl, each with its line.

    Raises SampleError, which names the line, if one has no "tag", "include" or "prompt".
    """
    prompts = []
    for place, content in _objects(path):
        if missing := [key for key in ("tag", "include", "prompt") if key not in content]:
            raise SampleError(f'{place} has no "{missing[0]}"; give GenEval\'s evaluation_metadata.jsonl')
        text = _words(content["prompt"], place)
        prompts.append(Prompt(text, metadata=json.dumps(content, ensure_ascii=False)))
    return _at_least_one(prompts, path)


def digest(prompts: Sequence[Prompt]) -> str:
    """What identifies prompts in a request: their number and a hash."""
    content = [[p.text, p.seed, p.id, p.metadata] for p in prompts]
    return f"{len(prompts)}, sha256 {sha256_of_json(content)[:16]}"


def shortened(text: str) -> str:
    """A prompt in a message: quoted, and cut."""
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")


def _prompt_of_line(content: dict[str, Any], place: str) -> Prompt:
    if others := [key for key in content if key not in _KEYS]:
        raise SampleError(f'{place} has the key "{others[0]}"; use {", ".join(_KEYS)}, or --geneval for its file')
    if "prompt" not in content:
        raise SampleError(f'{place} has no "prompt"; write {{"prompt": "a red three"}}')
    seed, name = content.get("seed"), content.get("id")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise SampleError(f'{place}: "seed" {seed!r} is not a whole number, 0 or more')
    if name is not None and not isinstance(name, (str, int)):
        raise SampleError(f'{place}: "id" {name!r} is neither text nor a whole number')
    return Prompt(_words(content["prompt"], place), seed, name)


def _words(text: Any, place: str) -> str:
    """A text as captions are normalised. Raises SampleError."""
    if not isinstance(text, str):
        raise SampleError(f'{place}: "prompt" {text!r} is not text; write it in quotes')
    words, reason = normalised(text)
    if words is None and reason != "empty":
        raise SampleError(f"{place}: the prompt is {reason}; write it in UTF-8")
    return words or ""


def _objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The place and the object of each line. Raises SampleError."""
    objects = []
    for place, line in _lines(path):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SampleError(f'{place} is not JSON; write {{"prompt": "a red three"}} on each line') from error
        if not isinstance(content, dict):
            raise SampleError(f'{place} is not a JSON object; write {{"prompt": "a red three"}} on each line')
        objects.append((place, content))
    return objects


def _lines(path: Path) -> list[tuple[str, str]]:
    """The place and the text of each line that has text. Raises SampleError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SampleError(f"{path}: cannot be read ({error.strerror}); give a file of prompts") from error
    except UnicodeDecodeError as error:
        raise SampleError(f"{path}: is not UTF-8 at byte {error.start}; write the prompts in UTF-8") from error
    return [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _at_least_one(prompts: list[Prompt], path: Path) -> list[Prompt]:
    if not prompts:
        raise SampleError(f"{path}: holds no prompt; write one on each line")
    return prompts
