"""Reads a safe subset of YAML: no repeated keys, no ambiguous numbers, limited size. Raises UnreadableFile.

YAML 1.1, as PyYAML reads it, keeps the last of several equal keys, reads `010` as 8 and `1:30` as 90, and expands a few
hundred bytes of aliases to billions of values. This module refuses each of these, and lists all problems at once. JSON
is YAML.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml._yaml import CParser
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from megapromoe.errors import UserError

MAX_BYTES = 1 << 20
MAX_VALUES = 30_000  # keys and values; an alias counts as many as it expands to
MAX_DEPTH = 32
_OCTAL = re.compile(r"[-+]?0[0-7_]+")


class UnreadableFile(UserError):
    """Text that cannot be read as YAML. The message gives the reason without the name of the file."""


def read_yaml(path: Path) -> Any:
    """The content of a YAML or JSON file. Raises UnreadableFile."""
    try:
        if path.is_fifo() and not str(path).startswith("/dev/"):  # /dev/fd/63 is the shell's <(command)
            raise UnreadableFile("is a pipe; give a regular file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UnreadableFile(f"cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise UnreadableFile(f"is longer than {MAX_BYTES:,} bytes; split it, or remove what is not needed")
    try:
        return parse_yaml(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UnreadableFile(f"is not YAML: {error}") from error


def parse_yaml(text: str) -> Any:
    """The value of YAML text. Raises UnreadableFile, listing every repeated key and ambiguous number."""
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if problems := list(dict.fromkeys(_violations(root, "", set()))):
            raise UnreadableFile("; ".join(problems))
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        raise UnreadableFile(f"is not YAML: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        # PyYAML's constructors raise these for values such as 2001-99-99 or `!!bool x`.
        raise UnreadableFile(f"is not YAML: a value cannot be read: {error!r}") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(Composer, CParser, SafeConstructor, Resolver):
    """A SafeLoader that refuses text that expands to too many values or is nested too deeply.

    libyaml parses, five times faster than PyYAML's own parser; `Composer` stands before it for `compose_node`.
    """

    def __init__(self, text: str):
        CParser.__init__(self, str(text))  # it reads a subclass of str, such as `TypedText`, as a file
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._values = self._depth = 0
        self._values_below: dict[
            int, int
        ] = {}  # id of a node -> number of values it expands to; holds only complete nodes

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        before = self._values
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"values are nested more than {MAX_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._values_below:
                self._refuse(f"*{event.anchor} is inside the value that it refers to", event)
            self._values += self._values_below[id(node)]
        else:
            self._values += 1
        if self._values > MAX_VALUES:
            self._refuse(
                f"it expands to more than {MAX_VALUES:,} values; write fewer values or fewer aliases (*name)", event
            )
        if not isinstance(event, yaml.AliasEvent):
            self._values_below[id(node)] = self._values - before
        return node

    def _refuse(self, problem: str, event: Any) -> None:
        raise yaml.YAMLError(f"line {event.start_mark.line + 1}: {problem}")


def _violations(node: yaml.Node, name: str, visited: set[int]) -> Iterator[str]:
    """A sentence for each repeated key and each ambiguous number at and below `node`, whose dotted name is `name`."""
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        if problem := _ambiguous(node):
            yield f"line {node.start_mark.line + 1}: {f'{name}: ' if name else ''}{problem}"
    elif isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            yield from _violations(entry, f"{name}[{number}]", visited)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            text = key.value if isinstance(key, yaml.ScalarNode) else ""
            where, line = f"{name}.{text}" if name else text, key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                same = _same_key(key)
                if same in lines:
                    yield f"line {line}: {where} occurs twice, first in line {lines[same]}; remove one of the two"
                lines.setdefault(same, line)
            yield from _violations(key, where, visited)
            yield from _violations(value, where, visited)


def _same_key(key: yaml.ScalarNode) -> str:
    """A normal form of a key, equal for keys with the same meaning: 1 and "1", yes and true, 16 and 0x10."""
    for kind, read in (("int", int), ("float", float)):
        if key.tag == f"tag:yaml.org,2002:{kind}":
            try:
                value = read(key.value.replace("_", ""), 0) if read is int else read(key.value.replace("_", ""))
            except ValueError:
                return key.value
            return str(int(value)) if value == value and abs(value) < 1e15 and value == int(value) else str(value)
    if key.tag == "tag:yaml.org,2002:bool":
        return str(key.value.lower() in ("yes", "true", "on"))
    return key.value


def _ambiguous(node: yaml.ScalarNode) -> str | None:
    if node.style or node.tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        return None
    if ":" in node.value:
        return f"{node.value} would be read in base 60; write the number itself, or '{node.value}' in quotes for text"
    if _OCTAL.fullmatch(node.value):
        decimal = node.value.replace("_", "").lstrip("+-").lstrip("0") or "0"
        decimal = node.value[0].strip("+0") * (node.value[0] == "-") + decimal
        return (
            f"{node.value} would be read in base 8; write {decimal} without leading zeros, or '{node.value}' in"
            " quotes for text"
        )
    return None
