"""Strict reading of files and values, used for configurations, study recipes and groups of classes.

A dataclass describes what it reads by its fields (`option`): default, help, kind, choices or interval. Reading collects
every violation as a sentence, so that one message contains all of them.

Why not pydantic: a field needs the same four facts there, so the options would be as long, and the 100 lines of this
module would be replaced by a translation of pydantic's errors into sentences with remedies. Importing pydantic and
building the models takes 0.10 s of CPU time at each start; importing the configuration without it takes 0.05 s.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import Field, field, fields
from functools import cache
from typing import Any

from megapromoe.config.strict_yaml import UnreadableFile, parse_yaml

ONE_UP, ZERO_UP, POSITIVE = "[1, inf)", "[0, inf)", "(0, inf)"


class Numbers:
    """The kind of a field that holds one number, or a tuple of several different ones."""


class NumberOrAuto:
    """The kind of a field that holds a whole number or "auto"."""


KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    Numbers: "a finite number, or a list of them such as [1,2]",
    NumberOrAuto: "a whole number, or auto",
}


class TypedText(str):
    """A value from the command line, which is parsed according to the kind of its field."""


def option(
    default: Any,
    help: str = "",
    choices: Collection[str] = (),
    within: str = "",
    kind: type | None = None,
    accepts: Callable[[str], bool] | None = None,
    form: str = "",
) -> Any:
    """A dataclass field with its default, one line of help, and the valid `choices` or interval, such as "[0, 1)".

    Args:
        kind: one of `KINDS`; needed only if the annotation of the field is not one of them.
        accepts: whether a value besides the `choices` is valid.
        form: how such a value looks, such as "FILE.yaml"; "": as the name of a user's code.
    """
    metadata = {"help": help, "choices": tuple(choices), "within": within, "kind": kind, "accepts": accepts}
    metadata["form"] = form
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def read_fields(reads: type, content: Mapping[Any, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """The values of a mapping for the fields of a dataclass, and a sentence for each violation.

    Args:
        reads: a dataclass whose fields are made by `option`; those without a kind are left to the caller.
        content: the content of a file; null leaves a field at its default.
        prefix: put before field names in sentences, such as "variants.tc.".
    """
    known = {f.name: f for f in fields(reads) if f.metadata}
    given = {name: value for name, value in content.items() if value is not None or name not in known}
    return read_values(known, given, prefix.rstrip(".") or "the file", prefix)


def read_values(
    known: Mapping[str, Field], content: Mapping[Any, Any], where: str, prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """The values of a mapping for known fields, and a sentence for each violation.

    Args:
        known: name -> field made by `option`.
        content: name -> value.
        where: what the keys belong to, for sentences.
        prefix: put before field names in sentences.
    """
    values, problems = {}, []
    for name, value in content.items():
        if problem := unknown_key(name, known, where):
            problems.append(problem)
            continue
        kind = kind_of(known[name])
        typed = as_kind(value, kind)
        rule = kind_rule(value, kind) if typed is None else range_rule(typed, known[name].metadata)
        if rule:
            problems.append(f"{prefix}{name} = {value!r}: {rule}")
        else:
            values[name] = typed
    return values, problems


def unknown_key(name: Any, known: Collection[str], where: str) -> str | None:
    """A sentence if `name` is not a key of `where`, else None."""
    return None if name in known else f"{name!r} is not a key of {where}; {suggest(str(name), known)}"


def kind_of(field: Field) -> type:
    """The kind, one of `KINDS`, of a field made by `option`."""
    kind = field.metadata["kind"] or field.type
    assert kind in KINDS, f"{field.name}: give the kind, or annotate the field with one of {list(KINDS)}"
    return kind


def as_kind(value: Any, kind: type) -> Any:
    """`value` converted to `kind`, one of `KINDS`; None if that is not possible."""
    if kind is str:
        return str(value) if isinstance(value, str) else None
    if isinstance(value, TypedText):
        try:
            value = parse_yaml(value)
        except UnreadableFile:
            return None
    if kind is Numbers:
        return _as_numbers(value)
    if kind is NumberOrAuto:
        return value if value == "auto" or type(value) is int else None
    if kind is float and not isinstance(value, bool):
        try:  # YAML reads "1e-4" as text
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None
    return value if type(value) is kind else None


def _as_numbers(value: Any) -> float | tuple[float, ...] | None:
    """A number, or a tuple of two or more, from a number, a list, or text such as "1,2"; None if it is neither."""
    if isinstance(value, str) and "," in value:
        value = value.split(",")
    if not isinstance(value, (list, tuple)):
        return as_kind(value, float)
    numbers = tuple(as_kind(number, float) for number in value)
    if not numbers or None in numbers:
        return None
    return numbers if len(numbers) > 1 else numbers[0]


def kind_rule(value: Any, kind: type) -> str:
    """The rule violated by a value for which `as_kind` is None; with a reason for unparsable text."""
    reason = ""
    if isinstance(value, TypedText):
        try:
            parse_yaml(value)
        except UnreadableFile as error:
            reason = f" ({str(error).removeprefix('line 1: ')})"
    return f"must be {KINDS[kind]}{reason}"


def range_rule(value: Any, metadata: Mapping[str, Any]) -> str | None:
    """The rule of the field's metadata that a value of the right kind violates; None if it violates none."""
    choices, interval = metadata["choices"], metadata["within"]
    if choices:
        accepts = metadata["accepts"]
        if value in choices or (accepts and accepts(value)):
            return None
        valid = [*choices, *([metadata["form"]] if metadata["form"] else [])]
        return f"must be one of {', '.join(valid)}; {suggest(value, valid)}"
    if isinstance(value, tuple) and len(set(value)) < len(value):
        return "must hold each number once"
    if interval:
        low, high = _ends(interval)
        for number in value if isinstance(value, tuple) else (value,) if value != "auto" else ():
            above = number >= low if interval[0] == "[" else number > low
            below = number <= high if interval[-1] == "]" else number < high
            if not (above and below):
                return f"must lie in {interval}"
    return None


@cache
def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


# ---- remedies


def suggest(word: str, known: Iterable[str]) -> str:
    """The closest known words to a misspelt one, or all known words if none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def nearest(value: int, valid: Iterable[int]) -> str:
    """The valid values next to `value` on both sides, as text."""
    valid = sorted(valid)
    return ", ".join(map(str, [v for v in valid if v < value][-2:] + [v for v in valid if v > value][:2]))


def nearest_divisors(value: int, total: int) -> str:
    """The divisors of `total` next to `value`, as text."""
    return nearest(value, (d for d in range(1, total + 1) if total % d == 0))


def nearest_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, as text."""
    return ", ".join(str(m) for m in (value // unit * unit, (value // unit + 1) * unit) if m > 0)
