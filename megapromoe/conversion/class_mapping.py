"""The classes of a run that starts from a checkpoint: which class of the source each of them was.

A file of `train.init_classes` is YAML or JSON, a mapping from the run's classes to those of the source:

    0: 7              class 0 of the run was class 7 of the source
    sneaker: Sneaker  classes by name, where the data sets have names
    8: new            class 8 has no predecessor; so have classes that are not listed

or a list with an entry for each class of the run, in their order: [7, new, 3].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megapromoe.config.options import Config
from megapromoe.config.strict_yaml import UnreadableFile, read_yaml
from megapromoe.conversion.stream import ConversionError

SAME, NEW = "same", "new"
_SHOWN = 6  # names or numbers in a message


def source_classes(
    choice: str, classes: int, source: int, names: Sequence[str] = (), source_names: Sequence[str] = ()
) -> tuple[int | None, ...]:
    """For each class of a run the class of the source, or None for a new one.

    Args:
        choice: `train.init_classes`.
        classes, source: numbers of classes.
        names, source_names: names of the classes; empty if unknown.

    Raises ConversionError for another number of classes without a mapping, and for a file that cannot be used.
    """
    if choice == NEW:
        return (None,) * classes
    if choice == SAME:
        if classes != source:
            raise ConversionError(
                f"model.num_classes = {classes}: the source has {source} classes; set train.init_classes to new, or to"
                " a file that maps the run's classes to the source's"
            )
        return tuple(range(classes))
    return _read(Path(choice), classes, source, names, source_names)


def names_of(config: Config) -> tuple[str, ...]:
    """The names of the classes that a config's data set has, as far as they are known without its records."""
    from megapromoe.data.datasets import DatasetError, Digits
    from megapromoe.data.fashion import FashionMNIST
    from megapromoe.data.latents import read_manifest

    data = config.data
    names: tuple[str, ...] = ()
    if data.source == "digits":
        names = Digits.class_names
    elif data.source == "fashion_mnist":
        names = FashionMNIST.class_names
    elif data.source == "latents" and data.path:
        try:
            names = read_manifest(Path(data.path)).class_names
        except DatasetError:
            return ()
    return names if len(names) == config.model.num_classes else ()


def _read(
    path: Path, classes: int, source: int, names: Sequence[str], source_names: Sequence[str]
) -> tuple[int | None, ...]:
    where = f"train.init_classes = {str(path)!r}"
    try:
        content = read_yaml(path)
    except UnreadableFile as error:
        raise ConversionError(f"{where}: {error}; give a YAML or JSON file") from None
    if isinstance(content, list):
        if len(content) != classes:
            raise ConversionError(f"{where}: lists {len(content)} classes, the run has {classes}; list each once")
        content = dict(enumerate(content))
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{where}: must be a mapping from the run's classes to the source's, or a list of these")
    mapped: dict[int, int | None] = {}
    for key, value in content.items():
        number = _number(key, classes, names, f"{where}: {key!r}", "the run")
        if number in mapped:
            raise ConversionError(f"{where}: class {number} of the run is listed twice; list each class once")
        if value is None or value == NEW:
            mapped[number] = None
        else:
            mapped[number] = _number(value, source, source_names, f"{where}: {value!r}", "the source")
    return tuple(mapped.get(number) for number in range(classes))


def _number(word: Any, classes: int, names: Sequence[str], where: str, whose: str) -> int:
    """The number of a class that is given by number or by name. Raises ConversionError."""
    if type(word) is int and 0 <= word < classes:
        return word
    if isinstance(word, str) and list(names).count(word) == 1:
        return list(names).index(word)
    known = f"0 to {classes - 1}"
    if names and not isinstance(word, int):
        known += f", or {', '.join(names[:_SHOWN])}" + (" ..." if len(names) > _SHOWN else "")
    elif not isinstance(word, int):
        known += f"; the names of {whose}'s classes are not known"
    raise ConversionError(f"{where} is not a class of {whose}; its classes are {known}")
