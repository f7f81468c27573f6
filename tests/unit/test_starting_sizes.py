"""A run that starts from a checkpoint of other classes, of another size or with other experts."""

import json
from dataclasses import replace

import pytest
import torch
from support.golden_states import random_state
from support.levels import full
from support.starting_runs import TABLE, initial, read, saved_run, started

from megapromoe.conversion.exports import export
from megapromoe.conversion.start_report import report
from megapromoe.errors import UserError

BALANCE_BIAS = "model.balance_bias=0.01"

# ---- other classes


def test_rows_of_classes_follow_the_file(source_run, tmp_path):
    path, made = source_run
    (tmp_path / "classes.yaml").write_text("0: 7\n2: 3\n1: new\n")
    start, state = started(path, "model.num_classes=4", f"train.init_classes={tmp_path / 'classes.yaml'}")
    old, table = made.read("ema", TABLE), read(start, state, TABLE)
    mean = old[:-1].double().mean(dim=0).float()
    assert torch.equal(table, torch.stack([old[7], mean, old[3], mean, old[10]]))
    others = [name for name in made.shapes if name != TABLE]
    assert all(torch.equal(read(start, state, name), made.read("ema", name)) for name in others)
    table = report(start)
    assert table["classes"] == [
        "2 of 4 rows are those of classes of the source; new, the mean of the source's 10 classes: classes 1, 3; the"
        " row of the null class is kept",
        "left out, of the source: classes 0, 1, 2, 4 and 4 more",
    ]


def test_the_same_classes_and_new_ones(source_run):
    path, made = source_run
    old = made.read("ema", TABLE)
    assert torch.equal(read(*started(path), TABLE), old)
    table = read(*started(path, "train.init_classes=new", "model.num_classes=3"), TABLE)
    assert table.shape == (4, 32) and torch.equal(table[-1], old[-1]) and torch.equal(table[0], table[2])
    with pytest.raises(UserError, match="model.num_classes = 3: the source has 10 classes; set train.init_classes"):
        started(path, "model.num_classes=3")


@pytest.mark.parametrize(
    "content, message",
    [
        ("0: 10", "10 is not a class of the source; its classes are 0 to 9"),
        ("3: 0", "3 is not a class of the run; its classes are 0 to 2"),
        (
            "cat: 0",
            "'cat' is not a class of the run; its classes are 0 to 2; the names of the run's classes are not known",
        ),
        ("0: cat", "'cat' is not a class of the source"),
        ("[1, 2]", "lists 2 classes, the run has 3"),
        ("[]", "lists 0 classes, the run has 3"),
        ("{}", "must be a mapping"),
        ("5", "must be a mapping"),
        ("0: -1", "-1 is not a class of the source"),
        ("0: true", "True is not a class of the source"),
        ("0: [1]", r"\[1\] is not a class of the source"),
        ("a: [", "give a YAML or JSON file"),
    ],
)
def test_a_file_of_classes_that_cannot_be_used(source_run, tmp_path, content, message):
    path, _ = source_run
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        started(path, "model.num_classes=3", f"train.init_classes={tmp_path / 'c.yaml'}")


def test_classes_by_name(tmp_path):
    """Names of the data sets on both sides: digits to digits, in another order."""
    digits = ("data.source=digits", "model.in_channels=1", "model.input_size=8")
    path, made = saved_run(tmp_path, *digits)
    (tmp_path / "c.json").write_text(json.dumps({str(digit): str(9 - digit) for digit in range(10)}))
    table = read(*started(path, *digits, f"train.init_classes={tmp_path / 'c.json'}"), TABLE)
    old = made.read("ema", TABLE)
    assert torch.equal(table, torch.cat([old[:-1].flip(0), old[-1:]]))
    (tmp_path / "c.json").write_text('{"0": "ten"}')
    with pytest.raises(UserError, match="'ten' is not a class of the source; its classes are 0 to 9, or 0, 1, 2"):
        started(path, *digits, f"train.init_classes={tmp_path / 'c.json'}")
    fashion = ("data.source=fashion_mnist", "model.in_channels=1", "model.input_size=32")
    assert "have other names" in report(started(path, *fashion)[0])["note"][0]


# ---- other sizes


def test_another_grid_changes_positions_alone(source_run):
    path, made = source_run
    start, state = started(path, "model.input_size=16")
    assert all(torch.equal(read(start, state, name), made.read("ema", name)) for name in made.shapes)
    assert report(start)["positions"] == ["computed for 8x8 tokens; the source has 4x4"]
    start, _ = started(path, "model.input_size=16", "model.position_scale=0.5")
    assert report(start)["positions"][1] == "model.position_scale = 0.5, not 1"


@pytest.mark.parametrize("size", ["model.patch_size=4", "model.in_channels=3"])
def test_other_patches_start_from_the_models_own_values(source_run, size):
    path, made = source_run
    start, state = started(path, size)
    fresh = {"x_embedder.proj.weight", "x_embedder.proj.bias", "final_layer.linear.weight", "final_layer.linear.bias"}
    for name in state.shapes:
        expected = initial(start.config, name) if name in fresh else made.read("ema", name)
        assert torch.equal(read(start, state, name), expected), name
    assert size.replace("=", " = ") in report(start)["new"][0]


def test_the_variance_is_dropped_or_begins_at_zero(source_run, tmp_path):
    path, made = source_run
    weight = made.read("ema", "final_layer.linear.weight")
    start, state = started(path, "model.learn_sigma=false")
    mean = weight.view(4, 2, 4, 32)[:, 0].reshape(16, 32)
    assert torch.equal(read(start, state, "final_layer.linear.weight"), mean)
    export(replace(random_state(start.config), read=lambda kind, name: state.read("ema", name)), tmp_path / "b", "ours")
    again = read(*started(tmp_path / "b"), "final_layer.linear.weight").view(4, 2, 4, 32)
    assert torch.equal(again[:, 0].reshape(16, 32), mean) and not again[:, 1].any()


# ---- other experts


def test_balance_biases_start_at_zero_or_are_those_of_the_source(tmp_path, source_run):
    """From a file with biases, from files without, into more experts; without biases a run would route otherwise."""
    path, made = source_run
    export(made, tmp_path / "a.pth", "published")
    for source in (path, tmp_path / "a.pth"):
        assert not started(source, BALANCE_BIAS)[1].buffers
    path, made = saved_run(tmp_path, BALANCE_BIAS)
    (name,) = made.buffers
    assert made.buffers[name].any()
    assert torch.equal(started(path, BALANCE_BIAS)[1].buffers[name], made.buffers[name])
    grown = started(path, BALANCE_BIAS, "model.num_experts=8")[1]
    assert torch.equal(grown.buffers[name], made.buffers[name].repeat(2))
    with pytest.raises(UserError, match=r"model\.balance_bias = 0: must be more than 0"):
        started(path)


def test_each_expert_is_split(source_run):
    from megapromoe.conversion.upcycle import grow

    path, made = source_run
    start, state = started(path, "model.num_experts=8", "model.num_classes=3", "train.init_classes=new")
    expected = grow(made, replace(made.config, model=replace(made.config.model, num_experts=8)))
    for name in (name for name in expected.shapes if name != TABLE):
        assert torch.equal(read(start, state, name), expected.read("ema", name)), name
    assert report(start)["experts"] == ["8 in each layer, each of the source's 4 split into 2, with noise"]
    with pytest.raises(UserError, match="model.num_experts = 6: must be a multiple of the source's 4"):
        started(path, "model.num_experts=6")


@pytest.mark.parametrize("ratio, how", [full("2.0", "slices"), full("4.0", "copies")])
def test_experts_from_the_mlps_of_a_dense_model(tmp_path, ratio, how):
    from megapromoe.conversion.upcycle import cluster, from_dense, moe_inputs

    path, made = saved_run(tmp_path, "model.router=dense")
    settings = (f"model.expert_ratio={ratio}", "model.input_size=16", "train.init_classes=new")
    start, state = started(path, *settings)
    assert how in report(start)["experts"][0]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        again = start.state(start.prototypes())
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(read(start, again, name), read(start, state, name)) for name in state.shapes)
    dense = replace(
        made,
        config=replace(start.config, model=replace(start.config.model, router="dense")),
        read=lambda kind, name: read(start, start._adapted(), name),
    )
    tokens = moe_inputs(dense, start.config, 64)
    prototypes = {block: cluster(x, start.config) for block, x in tokens.items()}
    expected = from_dense(dense, start.config, prototypes, how.replace("slices", "slice").replace("copies", "copy"))
    for name in expected.shapes:
        assert torch.equal(read(start, state, name), expected.read("ema", name)), name
