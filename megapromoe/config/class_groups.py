"""Groups of classes: the super-classes that guide a router, and the subsets that an analysis compares.

A file of groups is YAML or JSON, a mapping from a group's name to its classes, as numbers or as "first-last":

    animals: [2, 3, "5-7"]
    vehicles: [0, 1, 8, 9]

This module imports no torch.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from megapromoe.config.strict_yaml import UnreadableFile, read_yaml
from megapromoe.errors import ExitCode, Violations

CONTIGUOUS, MODULO = "contiguous", "modulo"
SUFFIXES = (".yaml", ".yml", ".json")


class ClassGroupError(Violations):
    """Groups of classes that cannot be used; `violations` lists every reason."""

    subject = "the groups of classes"
    exit_code = ExitCode.MISCONFIGURED
    on_all_ranks = True  # every rank reads the same file


def is_file(superclasses: str) -> bool:
    """Whether a value of `model.superclasses` names a file of groups."""
    return superclasses.endswith(SUFFIXES)


def read_groups(path: Path, classes: int) -> dict[str, tuple[int, ...]]:
    """The groups in a file: name -> class numbers below `classes`, in the file's order.

    Raises ClassGroupError, listing everything that is wrong.
    """
    try:
        content = read_yaml(path)  # JSON is YAML
    except UnreadableFile as error:
        raise ClassGroupError([f"{path}: {error}"]) from None
    if not isinstance(content, Mapping) or not content:
        raise ClassGroupError([f"{path}: must be a mapping from a group's name to its classes"])
    problems: list[str] = []
    groups = {}
    for name, entries in content.items():
        numbers: list[int] = []
        if not isinstance(entries, list) or not entries:
            problems.append(f"{path}: {name}: must be a list of classes, such as [0, 3, '5-7'], not {entries!r}")
            continue
        for entry in entries:
            class_range = _numbers(entry)
            if not class_range:
                problems.append(f"{path}: {name}: {entry!r} is neither a class nor a range 'first-last'")
            elif class_range[-1] >= classes:
                problems.append(f"{path}: {name}: {entry!r}: classes are 0..{classes - 1}")
            else:
                numbers += class_range
        if twice := sorted({n for n in numbers if numbers.count(n) > 1}):
            problems.append(f"{path}: {name}: class {twice[0]} is listed twice")
        groups[str(name)] = tuple(numbers)
    if problems:
        raise ClassGroupError(problems)
    return groups


def _numbers(entry: object) -> range:
    """The classes of an entry of a group, as a range; empty if the entry is invalid."""
    if type(entry) is int:
        return range(max(entry, 0), entry + 1)
    first, dash, last = str(entry).partition("-") if isinstance(entry, str) else ("", "", "")
    if first.isdecimal() and (last.isdecimal() or not dash):
        return range(int(first), int(last if dash else first) + 1)
    return range(0)


def superclasses_in(path: Path, classes: int) -> str:
    """The super-classes in a file as a value of `model.superclasses` that needs no file: "0,0,1,...".

    The n-th group is super-class n. Raises ClassGroupError like `read_groups`, and for classes in no group or in two.
    """
    groups = read_groups(path, classes)
    owner: dict[int, str] = {}
    problems = []
    for name, numbers in groups.items():
        problems += [f"{path}: class {n} is in {owner[n]} and in {name}" for n in numbers if n in owner]
        owner |= {n: name for n in numbers}
    if missing := [n for n in range(classes) if n not in owner]:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        problems.append(f"{path}: {len(missing)} of {classes} classes are in no group: {shown}")
    if problems:
        raise ClassGroupError(problems)
    place = {name: number for number, name in enumerate(groups)}
    return ",".join(str(place[owner[n]]) for n in range(classes))


def superclass_table(superclasses: str, classes: int, experts: int) -> tuple[int, ...]:
    """The super-class, and so the expert, of each class.

    Args:
        superclasses: "contiguous" (equal ranges of consecutive classes), "modulo" (class mod experts), or a number
            for each class, such as "0,0,1,1".

    Raises ClassGroupError: see `superclass_problems`.
    """
    if problems := list(superclass_problems(superclasses, classes, experts)):
        raise ClassGroupError(problems)
    if superclasses == CONTIGUOUS:
        return tuple(number * experts // classes for number in range(classes))
    if superclasses == MODULO:
        return tuple(number % experts for number in range(classes))
    return tuple(int(word) for word in superclasses.split(","))


def superclass_problems(superclasses: str, classes: int, experts: int) -> Iterator[str]:
    """A sentence for each problem of a value of `model.superclasses`. Each expert needs exactly one super-class."""
    if superclasses in (CONTIGUOUS, MODULO):
        if classes < experts:
            yield f"{classes} classes give fewer super-classes than there are experts, {experts}; use fewer experts"
        return
    words = [word.strip() for word in superclasses.split(",")]
    if not all(word.isdecimal() for word in words):
        kinds = ", ".join(SUFFIXES)
        yield f"must be {CONTIGUOUS}, {MODULO}, a {kinds} file, or a super-class for each class: 0,0,1,..."
        return
    numbers = list(map(int, words))
    if len(numbers) != classes:
        yield f"names a super-class for {len(numbers)} classes, the model has {classes}"
    if max(numbers) >= experts:
        yield f"names super-class {max(numbers)}, there are {experts} experts; use as many experts as super-classes"
    elif missing := sorted(set(range(experts)) - set(numbers)):
        yield f"gives no class to super-class {missing[0]}; each of the {experts} experts needs one"
