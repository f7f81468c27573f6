"""Super-classes from WordNet's tree of hypernyms, of a small database in WordNet's format."""

import random
import re
from pathlib import Path

import pytest

from megapromoe.cli import main
from megapromoe.config.class_groups import superclasses_in
from megapromoe.config.resolve import resolve
from megapromoe.data.superclasses import SuperclassError, WordNet, read_synsets, superclasses

LICENCE = "".join(f"  {line} This software and database is being provided to you.  \n" for line in range(1, 30))
# Synset -> its hypernyms, the first first.
TREE = {
    "entity": [],
    "animal": ["entity"],
    "dog": ["animal"],
    "pug": ["dog"],
    "beagle": ["dog"],
    "collie": ["dog", "entity"],
    "bird": ["animal"],
    "wren": ["bird"],
    "owl": ["bird"],
    "thing": ["entity"],
    "cup": ["thing"],
    "dish towel": ["thing"],
    "car": ["thing"],
    "Big Ben": ["thing"],
}
CLASSES = ["pug", "beagle", "collie", "wren", "owl", "cup", "dish towel", "car", "Big Ben"]


def write_wordnet(folder: Path, tree: dict[str, list[str]]) -> dict[str, str]:
    """Writes `data.noun`; returns the synset of each name, such as n01440764."""

    def line(name: str, place: dict[str, int]) -> str:
        others = [f"word{i}" for i in range(10)] if name == "dog" else []  # eleven words, counted in base 16
        words = " ".join(f"{word.replace(' ', '_')} 0" for word in (name, *others))
        symbol = "@i" if name == "Big Ben" else "@"  # an instance
        pointers = [("+", place.get("entity", 0), "v")] + [(symbol, place.get(h, 0), "n") for h in tree[name]]
        listed = " ".join(f"{kind} {target:08} {part} 0000" for kind, target, part in pointers)
        return f"{place.get(name, 0):08} 05 n {1 + len(others):02x} {words} {len(pointers):03} {listed} | a | gloss  \n"

    places, end = {}, len(LICENCE)
    for name in tree:
        places[name] = end
        end += len(line(name, {}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.noun").write_text(LICENCE + "".join(line(name, places) for name in tree))
    return {name: f"n{place:08}" for name, place in places.items()}


def command(tmp_path: Path, *words: str) -> int:
    return main(["superclasses", "--wordnet", str(tmp_path / "wn"), *words])


def test_the_largest_group_is_cut_by_the_subtree_nearest_to_half_of_it(tmp_path):
    synsets = [write_wordnet(tmp_path / "wn", TREE)[name] for name in CLASSES]
    wordnet = WordNet(tmp_path / "wn")
    assert [wordnet.name(n) for n in wordnet.path_from_root(int(synsets[2][1:]))] == [
        "entity",
        "animal",
        "dog",
        "collie",
    ]
    assert [wordnet.name(n) for n in wordnet.path_from_root(int(synsets[8][1:]))] == ["entity", "thing", "Big Ben"]

    def groups(count: int) -> dict[str, tuple[int, ...]]:
        return {group.name: group.classes for group in superclasses(wordnet, synsets, count)}

    assert groups(2) == {"animal": (0, 1, 2, 3, 4), "thing": (5, 6, 7, 8)}
    assert groups(3) == {"dog": (0, 1, 2), "bird": (3, 4), "thing": (5, 6, 7, 8)}
    # The children of a flat node are divided.
    assert groups(4) == {"dog": (0, 1, 2), "bird": (3, 4), "other thing": (5, 6), "other thing 2": (7, 8)}
    assert [*groups(9)] == CLASSES and all(len(classes) == 1 for classes in groups(9).values())


def test_groups_of_random_trees(tmp_path):
    """Each class is in one group, groups are as many as asked for, not empty, and about equal; twice the same."""
    draw = random.Random(0)
    tree: dict[str, list[str]] = {"root": []}
    for number in range(400):
        tree[f"x{number}"] = [draw.choice([name for name in tree][-60:])]
    leaves = [name for name in tree if not any(name in above for above in tree.values())]
    named = write_wordnet(tmp_path, tree)
    synsets = [named[name] for name in leaves]
    for count in (2, 5, 12, 31):
        first, second = (superclasses(WordNet(tmp_path), synsets, count) for _ in range(2))
        assert first == second and len(first) == len({group.name for group in first}) == count
        assert sorted(n for group in first for n in group.classes) == list(range(len(leaves)))
        assert max(len(group.classes) for group in first) <= 3 * len(leaves) / count


def test_the_command_writes_what_the_classification_router_reads(tmp_path, capsys):
    named = write_wordnet(tmp_path / "wn", TREE)
    listed, out = tmp_path / "ids.txt", tmp_path / "groups.yaml"
    listed.write_text("".join(f"{named[name]} {name}, another name\n" for name in CLASSES) + "\n")
    assert command(tmp_path, "--synsets", str(listed), "--groups", "3", "--out", str(out)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r" +1  bird +2  wren, owl", lines[2]) and lines[4] == "3 groups of 2 to 4 of 9 classes"
    assert lines[5].endswith("model.num_experts=3")
    assert superclasses_in(out, 9) == "0,0,0,1,1,2,2,2,2"
    settings = ["data.source=unset", "model.num_classes=9", "model.num_experts=3", "model.router=classification"]
    config = resolve(overrides=[*settings, f"model.superclasses={out}"])
    assert config.model.superclass_of == (0, 0, 0, 1, 1, 2, 2, 2, 2)

    for name in reversed(CLASSES):  # the folders of an image set, in the order of their names
        (tmp_path / "train" / named[name]).mkdir(parents=True)
    assert read_synsets(tmp_path / "train") == [named[name] for name in CLASSES]
    before = out.read_text()
    assert command(tmp_path, "--synsets", str(tmp_path / "train"), "--groups", "3", "--out", str(out)) == 0
    assert out.read_text().splitlines()[2:] == before.splitlines()[2:]


@pytest.mark.parametrize(
    "listed, groups, message",
    [
        ("{pug}\ntench\n", "2", "ids.txt: line 2: 'tench': must be a synset, such as n01440764"),
        ("{pug}\n{owl}\n{pug}\n", "2", "ids.txt: line 3: .*: is listed twice; the first is .*line 1"),
        ("\n", "2", "ids.txt: has no classes"),
        ("{pug}\nn00000007\n", "2", "data.noun: has no noun n00000007; .* WordNet 3.0"),
        ("{pug}\nn99999999\n", "2", "data.noun: has no noun n99999999; .* WordNet 3.0"),
        ("{pug}\n{owl}\n", "3", "--groups 3: must be from 2 to 2, the number of classes"),
        ("{pug}\n{owl}\n", "1", "--groups 1: must be from 2 to 2, the number of classes"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, capsys, listed, groups, message):
    (tmp_path / "ids.txt").write_text(listed.format(**write_wordnet(tmp_path / "wn", TREE)))
    assert command(tmp_path, "--synsets", str(tmp_path / "ids.txt"), "--groups", groups) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_files_that_are_not_there_or_damaged(tmp_path, capsys):
    named = write_wordnet(tmp_path / "wn", TREE | {"entity": ["thing"]})  # a circle
    with pytest.raises(SuperclassError, match="have no end; the file is damaged"):
        WordNet(tmp_path / "wn").path_from_root(int(named["pug"][1:]))
    (tmp_path / "ids.txt").write_text(named["pug"])
    words = ["--synsets", str(tmp_path / "ids.txt"), "--groups", "2"]
    assert main(["superclasses", "--wordnet", str(tmp_path), *words]) == 2
    assert "must be the folder of a WordNet database" in capsys.readouterr().err
    assert command(tmp_path, *words, "--out", str(tmp_path / "groups.txt")) == 2
    assert "groups.txt: must end with .yaml or .yml" in capsys.readouterr().err
    assert command(tmp_path, "--synsets", str(tmp_path / "none"), "--groups", "2") == 1
    assert "none: No such file or directory" in capsys.readouterr().err
