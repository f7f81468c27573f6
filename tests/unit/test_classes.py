"""Groups of classes: files of them, and super-classes in the configuration."""

import json

import pytest

from megapromoe.config.class_groups import ClassGroupError, read_groups, superclass_table, superclasses_in
from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import check, resolve, to_yaml

GUIDED = ("model.router=classification",)


def written(tmp_path, text, name="groups.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def violations(path, classes=10, read=read_groups):
    with pytest.raises(ClassGroupError) as raised:
        read(path, classes)
    return "\n".join(raised.value.violations)


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_groups_of_a_file(tmp_path, kind):
    content = {"animals": [2, 3, "5-7"], "vehicles": [0, "9"]}
    text = json.dumps(content) if kind == "json" else "animals: [2, 3, 5-7]\nvehicles: [0, '9']\n"
    groups = read_groups(written(tmp_path, text, f"groups.{kind}"), 10)
    assert groups == {"animals": (2, 3, 5, 6, 7), "vehicles": (0, 9)} and list(groups) == ["animals", "vehicles"]


def test_all_problems_of_a_file_are_reported_together(tmp_path):
    text = "a: [1, 12]\nb: 3\nc: [x, 7-4, -1, 1.5, true]\nd: []\ne: [2, 1-3]\n"
    messages = violations(written(tmp_path, text))
    for expected in (
        "a: 12: classes are 0..9",
        "b: must be a list",
        "c: 'x' is neither",
        "c: '7-4' is neither",
        "c: -1 is neither",
        "c: 1.5 is neither",
        "c: True is neither",
        "d: must be a list",
        "e: class 2 is listed twice",
    ):
        assert expected in messages
    assert messages.count("\n") == 8


@pytest.mark.parametrize("text, message", [("[1, 2]", "must be a mapping"), ("a: [", "is not YAML"), ("", "must be")])
def test_files_that_hold_no_groups(tmp_path, text, message):
    assert message in violations(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    assert "cannot be read (No such file" in violations(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("classes, experts", [(10, 4), (1000, 12), (5, 5), (7, 1)])
@pytest.mark.parametrize("how", ["contiguous", "modulo"])
def test_groupings_are_balanced(how, classes, experts):
    table = superclass_table(how, classes, experts)
    sizes = [table.count(e) for e in range(experts)]
    assert len(table) == classes and max(sizes) - min(sizes) <= 1
    assert list(table) == sorted(table) if how == "contiguous" else table[:experts] == tuple(range(experts))


def test_superclasses_of_a_file_are_written_into_the_config(tmp_path):
    path = written(tmp_path, "round: [0, 6, 8, 9]\nstraight: [1, 4, 7]\nmixed: [2, 3, 5]\n")
    words = (*GUIDED, "model.num_experts=3", f"model.superclasses={path}")
    config = resolve("digits", overrides=words)
    assert config.model.superclass_of == (0, 1, 2, 2, 1, 2, 0, 1, 0, 0)
    path.unlink()
    again = written(tmp_path, to_yaml(config), "config.yaml")
    assert resolve(file=again) == config
    check(config)


def test_a_file_that_is_no_partition(tmp_path):
    messages = violations(written(tmp_path, "a: [0-4]\nb: [4-6]\n"), read=superclasses_in)
    assert "class 4 is in a and in b" in messages and "3 of 10 classes are in no group: 7, 8, 9" in messages


@pytest.mark.parametrize(
    "words, message",
    [
        (["model.superclasses=nowhere.json"], "model.superclasses = 'nowhere.json': nowhere.json: cannot be read"),
        (["model.superclasses=wordnet"], "model.superclasses = 'wordnet': must be contiguous, modulo, a .yaml"),
        (["model.superclasses=0,1,2,3"], "for 4 classes, the model has 10"),
        (["model.superclasses=0,1,2,3,4,0,0,0,0,0"], "super-class 4, there are 4 experts"),
        (["model.superclasses=0,1,1,3,3,0,0,0,0,0"], "gives no class to super-class 2"),
        (["model.num_experts=11"], "10 classes give fewer super-classes than there are experts, 11"),
        (["model.top_k=2"], "model.top_k = 2: must be 1 with model.router = 'classification'"),
        (["model.router=kmeans", "model.top_k=2"], "must be 1 with model.router = 'kmeans'"),
        (["model.router=kmeans", "model.batch_scope=rank"], "must be global with model.router = 'kmeans'"),
        (["model.router=kmeans", "model.balance_weight=1"], "must be 0 with model.router = 'kmeans'"),
        (["model.router=kmeans", "model.kmeans_decay=1"], "model.kmeans_decay = 1.0: must lie in [0, 1)"),
    ],
)
def test_rules_of_the_configuration(words, message):
    with pytest.raises(ConfigError) as raised:
        resolve("digits", overrides=[*GUIDED, *words])
    assert len(raised.value.violations) == 1 and message in str(raised.value)


def test_superclasses_are_read_only_for_the_router_that_needs_them():
    resolve("digits", overrides=["model.superclasses=nowhere.json", "model.num_experts=11"])
