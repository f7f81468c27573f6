"""YAML in which every value means what it looks like, wherever the program reads YAML."""

import os
import time

import pytest

from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError
from megapromoe.config.class_groups import ClassGroupError, read_groups
from megapromoe.config.options import Config, ConfigError
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.config.strict_yaml import MAX_BYTES, UnreadableFile, parse_yaml, read_yaml
from megapromoe.studies.recipe import StudyError, read_recipe


def refusal(text):
    with pytest.raises(UnreadableFile) as error:
        parse_yaml(text)
    return str(error.value)


def test_what_is_not_ambiguous_is_read_as_before():
    text = "a: 1\nb: [0, 0x1F, 1_000, -3, 0.5, '010', '1:30', \"1:2\", 1e-4, true]\nc: {d: null, e: text}\n"
    expected = {"a": 1, "b": [0, 31, 1000, -3, 0.5, "010", "1:30", "1:2", "1e-4", True], "c": {"d": None, "e": "text"}}
    assert parse_yaml(text) == expected
    assert parse_yaml("") is None and parse_yaml("# nothing\n") is None
    assert parse_yaml("x: &a {b: 1}\ny: {<<: *a, b: 2}\nz: *a\n") == {"x": {"b": 1}, "y": {"b": 2}, "z": {"b": 1}}


@pytest.mark.parametrize(
    "text, named",
    [
        ("train: {lr: 1.0}\nmodel: {depth: 2}\ntrain: {lr: 2.0}\n", "line 3: train occurs twice, first in line 1"),
        ("train:\n  lr: 1.0\n  lr: 2.0\n", "line 3: train.lr occurs twice, first in line 2"),
        ("a: [{b: {c: 1, c: 1}}]\n", "line 1: a[0].b.c occurs twice"),
        ('{"a": 1, "a": 2}', "a occurs twice"),
        ("1: a\n'1': b\n", "line 2: 1 occurs twice"),
        ("yes: a\ntrue: b\n", "line 2: true occurs twice"),
        ("16: a\n0x10: b\n", "line 2: 0x10 occurs twice"),
        ("? [1]\n: {d: 1, d: 2}\n", "d occurs twice"),
    ],
)
def test_a_key_that_stands_twice_is_refused_at_any_depth(text, named):
    assert named in refusal(text) and "remove one of the two" in refusal(text)


@pytest.mark.parametrize(
    "text, named",
    [
        ("train:\n  steps: 010\n", "line 2: train.steps: 010 would be read in base 8; write 10 without"),
        ("a: -0_17\n", "a: -0_17 would be read in base 8; write -17 without"),
        ("a: 00\n", "write 0 without"),
        ("a:\n- 1\n- 1:30\n", "line 3: a[1]: 1:30 would be read in base 60"),
        ("a: 1:30.5\n", "a: 1:30.5 would be read in base 60"),
        ("1:30: x\n", "1:30 would be read in base 60"),
        ("010", "line 1: 010 would be read in base 8"),
    ],
)
def test_a_number_that_reads_in_two_ways_is_refused(text, named):
    assert named in refusal(text) and "quotes" in refusal(text)


def test_all_problems_are_in_one_message():
    message = refusal("a: 010\nb: {c: 1, c: 2}\nd: [1:30]\na: 1\n")
    assert all(part in message for part in ("a: 010", "b.c occurs twice", "d[0]: 1:30", "a occurs twice"))


def bomb(levels, width=9):
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text, named",
    [
        (bomb(12), "expands to more than"),
        ("x: &x {k: 1}\n" + "\n".join(f"a{n}: {{<<: *x}}" for n in range(8_000)), "expands to more than"),
        ("[1, " * 500, "nested more than"),
        ("- " * 500, "nested more than"),
        ("a: &a [*a]", "*a is inside the value"),
        ("a: &a\n  b: &b [1]\n  c: *a\n", "*a is inside the value"),
        ("2001-99-99", "is not YAML"),
        ("!!bool x", "is not YAML"),
        ("!!int x", "is not YAML"),
        ("1" * 5000, "is not YAML"),
        ("a: 1\n---\na: 2\n", "is not YAML"),
    ],
    ids=range(11),
)
def test_extreme_yaml_is_refused_with_one_sentence_in_bounded_time(text, named):
    start = time.process_time()
    assert named in refusal(text)
    assert time.process_time() - start < 20


def test_only_short_regular_files_are_read(tmp_path):
    (tmp_path / "long.yaml").write_text("# " + "x" * MAX_BYTES)
    with pytest.raises(UnreadableFile, match="is longer than"):
        read_yaml(tmp_path / "long.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UnreadableFile, match="is a pipe"):
        read_yaml(tmp_path / "pipe.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(UnreadableFile, match="is not YAML"):
        read_yaml(tmp_path / "latin.yaml")
    with pytest.raises(UnreadableFile, match="cannot be read"):
        read_yaml(tmp_path / "missing.yaml")


def test_configurations_recipes_groups_and_stored_configs_are_read_so(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("train:\n  steps: 010\n  lr: 1.0\n  lr: 2.0\n")
    for read in (lambda: resolve(file=file), lambda: read_recipe(file), lambda: read_groups(file, 10)):
        with pytest.raises((ConfigError, StudyError, ClassGroupError)) as error:
            read()
        assert "train.lr occurs twice" in str(error.value) and "train.steps: 010" in str(error.value)
        assert str(file) in str(error.value)
    run = tmp_path / "run"
    RunDirectory.open(run, Config(), 1).close()
    (run / "config.yaml").write_text(to_yaml(Config()) + "train: {steps: 1}\n")
    with pytest.raises(RunDirectoryError, match="train occurs twice"):
        RunDirectory.open(run, Config(), 1)


def test_values_on_the_command_line_are_read_so():
    with pytest.raises(ConfigError) as error:
        resolve("digits", overrides=["train.steps=010", "train.lr=1:30", "train.max_grad_norm=[", "model.depth=4"])
    message = str(error.value)
    assert "train.steps = '010' (command line): must be a whole number (010 would be read in base 8" in message
    assert "train.lr = '1:30' (command line): must be a finite number (1:30 would be read in base 60" in message
    assert "train.max_grad_norm" in message and "model.depth" not in message
    assert resolve("digits", overrides=["train.steps=40", "train.lr=1e-4"]).train.steps == 40


def test_tabs_may_separate_the_parts_of_a_line():
    assert parse_yaml("train:\n  steps:\t60\t# few\n") == {"train": {"steps": 60}}
