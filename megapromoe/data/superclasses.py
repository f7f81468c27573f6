"""Super-classes from WordNet: cuts the tree of hypernyms over the classes of a data set into groups of similar size.

The classes of ImageNet are nouns of WordNet 3.0, and the folder of a class, such as n01440764, has the number of its
synset: the place in bytes of the synset's line in the file `data.noun` of a WordNet database. So only the lines of the
classes and of their hypernyms are read. Of several hypernyms the first counts, which is that of the taxonomy (a dog is
a canine, then a domestic animal). The classes then are in a tree, which `cut` divides.

Source: the format is that of the manual page wndb(5WN) of WordNet 3.0. ProMoE (arXiv 2510.24711, section 4.2) groups
ImageNet's classes but does not publish its groups; these are another choice, with the classes of a group next to each
other in WordNet.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megapromoe.errors import ExitCode, UserError
from megapromoe.io import naming_errors

NOUNS = "data.noun"
SYNSET = re.compile(r"n(\d{8})")
# Of WordNet's pointers: a hypernym, and that of an instance, such as a person.
HYPERNYMS = ("@", "@i")
MOST_DEPTH = 64  # the deepest noun of WordNet 3.0 has 19 hypernyms
# A subtree with this part of a group or less is not cut off; instead the children of the group's node are divided.
LEAST_PART = 1 / 4


class SuperclassError(UserError):
    """Classes, a WordNet database or a number of groups from which no super-classes can be made."""

    exit_code = ExitCode.MISCONFIGURED


@dataclass(frozen=True)
class Group:
    """A super-class: its name and its classes, ascending."""

    name: str
    classes: tuple[int, ...]


def read_synsets(path: Path) -> list[str]:
    """The synset of each class, such as n01440764, in the order of the classes.

    Args:
        path: a file with a synset at the start of each line, or the folder of an image set with a folder for each
            class, whose sorted names are the classes.

    Raises SuperclassError naming the line that is wrong.
    """
    with naming_errors(path, any_error=True):
        if path.is_dir():
            folders = sorted(child.name for child in path.iterdir() if child.is_dir())
            lines = [(f"{path / name}", name) for name in folders]
        else:
            text = path.read_text(encoding="utf-8", errors="replace").splitlines()
            lines = [(f"{path}: line {number}", line) for number, line in enumerate(text, 1) if line.strip()]
    first_places: dict[str, str] = {}
    for place, line in lines:
        name = line.split()[0].rstrip(",:;")
        if not SYNSET.fullmatch(name):
            raise SuperclassError(f"{place}: {name!r}: must be a synset, such as n01440764")
        if name in first_places:
            raise SuperclassError(f"{place}: {name}: is listed twice; the first is {first_places[name]}")
        first_places[name] = place
    if not first_places:
        raise SuperclassError(f"{path}: has no classes; must be a synset in each line, or a folder of class folders")
    return list(first_places)


class WordNet:
    """The nouns of a WordNet database."""

    def __init__(self, folder: Path):
        """Raises SuperclassError if the folder has no `data.noun`."""
        self.path = folder / NOUNS
        if not self.path.is_file():
            raise SuperclassError(
                f"{folder}: must be the folder of a WordNet database, with a file {NOUNS}; Debian's package"
                " wordnet-base has one in /usr/share/wordnet"
            )
        self._known: dict[int, tuple[str, int | None]] = {}

    def name(self, number: int) -> str:
        """The first word of a synset."""
        return self._synset(number)[0]

    def path_from_root(self, number: int) -> tuple[int, ...]:
        """The numbers of a synset's first hypernyms, from the root of the tree to the synset itself.

        Raises SuperclassError if a number is no noun of the database.
        """
        path = [number]
        while (parent := self._synset(path[-1])[1]) is not None:
            if len(path) > MOST_DEPTH:
                raise SuperclassError(f"{self.path}: the hypernyms of n{number:08} have no end; the file is damaged")
            path.append(parent)
        return tuple(reversed(path))

    def _synset(self, number: int) -> tuple[str, int | None]:
        """The first word and the first hypernym of a synset; None: a root."""
        if number not in self._known:
            with naming_errors(self.path, any_error=True), self.path.open("rb") as file:
                file.seek(number)
                line = file.readline()
            try:
                self._known[number] = _parsed(line.decode("utf-8"), number)
            except (ValueError, IndexError):
                raise SuperclassError(
                    f"{self.path}: has no noun n{number:08}; the synsets of ImageNet are those of WordNet 3.0, in"
                    " other versions nouns have other numbers"
                ) from None
        return self._known[number]


def _parsed(line: str, number: int) -> tuple[str, int | None]:
    """The first word and the first hypernym in a line. Raises ValueError or IndexError if it is not that synset's."""
    fields = line.partition("|")[0].split()
    if fields[0] != f"{number:08}" or fields[2] != "n":
        raise ValueError(line)
    words = int(fields[3], 16)
    pointers = 4 + 2 * words  # after each word is its number in a file
    first = pointers + 1
    for place in range(first, first + 4 * int(fields[pointers]), 4):
        symbol, target, part = fields[place : place + 3]
        if symbol in HYPERNYMS and part == "n":
            return fields[4].replace("_", " "), int(target)
    return fields[4].replace("_", " "), None


def superclasses(wordnet: WordNet, synsets: Sequence[str], count: int) -> list[Group]:
    """Divides the classes into `count` groups of similar size, each of classes next to each other in WordNet's tree.

    The largest group is divided until there are `count`: a subtree is cut off whose part of the group is nearest to one
    half. If that part is a quarter or less, because the tree is flat, the group's node is divided: its first children
    against the others. All ties go to the first class, so equal inputs give equal groups. Groups are in the order of
    their first class.

    Args:
        synsets: of each class.
        count: the super-classes, as many as there will be experts.

    Raises SuperclassError for a number of groups that there cannot be, and for unknown synsets.
    """
    if not 2 <= count <= len(synsets):
        raise SuperclassError(f"--groups {count}: must be from 2 to {len(synsets)}, the number of classes")
    paths = [wordnet.path_from_root(int(synset[1:])) for synset in synsets]
    groups = [tuple(range(len(synsets)))]
    while len(groups) < count:
        largest = max(groups, key=lambda group: (len(group), -group[0]))
        groups.remove(largest)
        groups += cut(largest, paths)
    return list(_named(sorted(groups), paths, wordnet))


def cut(group: tuple[int, ...], paths: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divides a group of at least two classes into two; see `superclasses`."""
    counts = Counter(node for number in group for node in paths[number])
    # Nodes in the order of the first class below them and of their depth.
    best = min((node for node in counts if counts[node] < len(group)), key=lambda n: abs(2 * counts[n] - len(group)))
    if min(counts[best], len(group) - counts[best]) > LEAST_PART * len(group):
        chosen = {number for number in group if best in paths[number]}
    else:
        depth = len(_common(group, paths))
        branches = {number: paths[number][: depth + 1] for number in group}
        order = list(dict.fromkeys(branches.values()))
        sizes = Counter(branches.values())
        cuts = [sum(sizes[branch] for branch in order[:stop]) for stop in range(1, len(order))]
        stop = 1 + min(range(len(cuts)), key=lambda i: abs(2 * cuts[i] - len(group)))
        chosen = {number for number in group if branches[number] in order[:stop]}
    return tuple(n for n in group if n in chosen), tuple(n for n in group if n not in chosen)


def _common(group: Sequence[int], paths: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The part of the paths that all classes of a group have in common."""
    path = paths[group[0]]
    shared = 0
    while all(paths[n][: shared + 1] == path[: shared + 1] for n in group) and shared < len(path):
        shared += 1
    return path[:shared]


def _named(groups: Sequence[tuple[int, ...]], paths: Sequence[tuple[int, ...]], wordnet: WordNet) -> Iterator[Group]:
    """The groups with names: the word of the deepest node that has all classes, "other WORD" if it also has others."""
    used: Counter[str] = Counter()
    for group in groups:
        common = _common(group, paths)
        everything = sum(path[: len(common)] == common for path in paths)
        word = wordnet.name(common[-1]) if common else "entity"
        name = word if everything == len(group) else f"other {word}"
        used[name] += 1
        yield Group(f"{name} {used[name]}" if used[name] > 1 else name, group)


def file_of_groups(groups: Sequence[Group], source: str) -> str:
    """The text of a file for `model.superclasses`: YAML, with the classes of each group as numbers and ranges."""
    lines = [f"# {line}" for line in source.splitlines()]
    for group in groups:
        entries = ", ".join(json.dumps(entry) for entry in _ranges(group.classes))
        lines.append(f"{json.dumps(group.name)}: [{entries}]")
    return "\n".join(lines) + "\n"


def _ranges(numbers: Sequence[int]) -> Iterator[int | str]:
    """Consecutive numbers as "first-last"."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            first, last = numbers[start], numbers[place - 1]
            yield first if first == last else f"{first}-{last}"
            start = place


def table(groups: Sequence[Group], wordnet: WordNet, synsets: Sequence[str]) -> Iterator[str]:
    """Lines with number, name, size and first classes of each group, then the smallest and the largest size."""
    width = max(len("name"), *(len(group.name) for group in groups))
    yield f"group  {'name':{width}}  classes  first of them"
    for number, group in enumerate(groups):
        words = ", ".join(wordnet.name(int(synsets[n][1:])) for n in group.classes[:3])
        yield f"{number:5}  {group.name:{width}}  {len(group.classes):7}  {words}"
    sizes = [len(group.classes) for group in groups]
    yield f"{len(groups)} groups of {min(sizes)} to {max(sizes)} of {sum(sizes)} classes"
