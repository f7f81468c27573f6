"""The classes of a table: its labels checked, numbered from 0, and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megapromoe.data.images import Item, Scan, numbered_classes
from megapromoe.data.tables.table import Labels, Table, TableError

MAX_CLASSES = 1 << 20


@dataclass(frozen=True)
class TableItem(Item):
    """A record of a table.

    Attributes:
        row: its number.
    """

    row: int


def table_scan(
    table: Table, one_class: bool = False, class_order: str = "name", num_classes: int | None = None
) -> Scan:
    """Lists the records of a table with their classes.

    Args:
        one_class: all records are of one class, which is named after the file or folder; labels are not read.
        class_order: numbering of classes whose labels are text, see `images.scan`.
        num_classes: number of classes for labels that are numbers; None: the names in the table, or the largest label
            + 1.

    Raises TableError that names the first record without a label or with one that is out of range.
    """
    if not len(table):
        raise TableError(f"{table.path}: holds no records; give another file or folder")
    if one_class:
        items = tuple(TableItem(table.name(row), 0, row) for row in range(len(table)))
        return Scan(items, (table.path.resolve().stem,), ())
    labels = table.labels()
    if len(labels.values) != len(table):
        raise TableError(
            f"{table.path}: holds {len(labels.values):,} labels for {len(table):,} records; it is damaged: write it"
            " again"
        )
    missing = [row for row, label in enumerate(labels.values) if label is None]
    if missing:
        raise TableError(
            f"{table.path}, {table.name(missing[0])}: has no label ({len(missing):,} of {len(table):,} records); remove"
            " these records, or give --one-class if all are of one class"
        )
    if isinstance(labels.values[0], str):
        numbers, names, notes = _from_text(table, labels.values, class_order, num_classes)
    else:
        numbers, names, notes = _from_numbers(table, labels, num_classes)
    if len(set(numbers)) == 1:
        raise TableError(
            f"{table.path}: all {len(table):,} records have the label {labels.values[0]!r}; give --one-class if there"
            " is only one class"
        )
    if unused := len(names) - len(set(numbers)):
        first = next(number for number in range(len(names)) if number not in set(numbers))
        notes = (*notes, f"{unused:,} of {len(names):,} classes have no record, such as class {first} ({names[first]})")
    items = tuple(TableItem(table.name(row), number, row) for row, number in enumerate(numbers))
    return Scan(items, tuple(names), (), tuple(notes))


def _from_numbers(
    table: Table, labels: Labels, num_classes: int | None
) -> tuple[list[int], tuple[str, ...], tuple[str, ...]]:
    numbers = [int(label) for label in labels.values]  # type: ignore[arg-type]
    highest = max(numbers)
    if labels.names is not None and num_classes not in (None, len(labels.names)):
        raise TableError(f"--num-classes {num_classes}: {table.path} names {len(labels.names)} classes; remove it")
    count = len(labels.names) if labels.names is not None else num_classes
    if count is None:
        # More classes than records are no classes, but another number, such as an identifier.
        if highest >= min(len(numbers), MAX_CLASSES):
            row = numbers.index(highest)
            raise TableError(
                f"{table.path}, {table.name(row)}: has label {highest}, which makes more classes than the"
                f" {len(numbers):,} records; give --label-field NAME if these are not the labels, or --num-classes N if"
                " they are"
            )
        count = highest + 1
    if outside := [row for row, number in enumerate(numbers) if not 0 <= number < count]:
        remedy = "correct them" if labels.names is not None else "correct them or give another --num-classes"
        raise TableError(
            f"{table.path}, {table.name(outside[0])}: has label {numbers[outside[0]]}, which is not in 0..{count - 1}"
            f" ({len(outside):,} of {len(numbers):,} records); {remedy}"
        )
    return numbers, labels.names or tuple(str(number) for number in range(count)), ()


def _from_text(
    table: Table, labels: Sequence[int | str | None], class_order: str, num_classes: int | None
) -> tuple[list[int], tuple[str, ...], tuple[str, ...]]:
    if num_classes is not None:
        raise TableError(f"--num-classes {num_classes}: the labels of {table.path} are text, which gives it; remove it")
    texts = [str(label) for label in labels]
    if len(set(texts)) > min(len(texts) - 1, MAX_CLASSES) and len(texts) > 1:
        raise TableError(
            f"{table.path}: each of its {len(texts):,} labels is another text, such as {texts[0][:60]!r}; give"
            " --label-field NAME of the classes"
        )
    names, notes, problems = numbered_classes(sorted(set(texts)), class_order)
    if problems:
        raise TableError(f"{table.path}: " + "; ".join(problems))
    number = {name: place for place, name in enumerate(names)}
    return [number[text] for text in texts], tuple(names), tuple(notes)
