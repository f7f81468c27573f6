"""What commands say of averaged weights that are still the initial ones, and how the share travels with them."""

import json
from dataclasses import replace

import pytest
from support.golden_states import random_state
from support.small_studies import finished, recipe, rows

from megapromoe.checkpoint.average import Average
from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.step_folders import folder_of
from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import open_state
from megapromoe.evaluation.image_metrics_report import table
from megapromoe.sampling.run_model import identify_checkpoint, load_model
from megapromoe.studies.study import open_study, plan
from megapromoe.studies.tables import to_markdown

SMALL = ("model.hidden_size=16", "model.depth=2", "model.heads=2", "model.num_experts=2", "train.ema_decay=0.9999")
STILL = "97.5% of the averaged weights are still the initial ones (train.ema_decay = 0.9999, 250 updates)"


@pytest.fixture
def run(tmp_path):
    """A run directory whose averages are to 97.5 % the initial weights."""
    state = replace(random_state(resolve("digits", overrides=SMALL)), step=250, updates=250)
    export(replace(state, average=Average(False, 0.9999**250, 250, 0.9999)), tmp_path / "run", "ours")
    return tmp_path / "run"


def test_a_model_of_such_averages_is_opened_with_a_warning(run, caplog):
    with caplog.at_level("INFO"):
        load_model(run)
    assert STILL in caplog.text and "--weights master" in caplog.text and "WARNING" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        load_model(run, weights="master")
    assert not caplog.text


def test_a_small_share_is_printed_without_a_warning(run, tmp_path, caplog):
    state = open_state(run)
    export(replace(state, average=Average(True, 0.004, 250, 0.9999)), tmp_path / "trained", "ours")
    with caplog.at_level("INFO"):
        load_model(tmp_path / "trained")
    assert "averaged weights, 0.4% of them still the initial weights" in caplog.text and "WARNING" not in caplog.text


@pytest.mark.parametrize(
    ("form", "dest", "options", "line"),
    [
        ("safetensors", "a.safetensors", ["--weights", "ema"], "written: averaged weights (ema), 97.5% of them still"),
        ("safetensors", "a.safetensors", ["--weights", "master"], "written: weights as trained (master)"),
        ("safetensors", "a.safetensors", [], "ema is the averaged weights, 97.5% of them still the initial weights"),
        ("diffusers", "folder", [], "written: averaged weights (ema), 97.5% of them still the initial weights"),
        ("published", "a.pth", [], "ema is the averaged weights, 97.5% of them still the initial weights"),
    ],
)
def test_convert_prints_which_weights_it_wrote(run, tmp_path, capsys, form, dest, options, line):
    assert main(["convert", str(run), str(tmp_path / dest), "--to", form, *options]) == 0
    printed = capsys.readouterr().out
    assert line in printed
    alone = "written: averaged weights (ema)" in printed
    assert (f"warning: {STILL}" in printed) is alone


def test_the_help_of_convert_names_the_default(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "default: ema for diffusers" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("form", "dest"), [("safetensors", "a.safetensors"), ("diffusers", "folder"), ("ours", "new")])
def test_the_share_is_stored_with_the_averages(run, tmp_path, form, dest):
    export(open_state(run), tmp_path / dest, form)
    assert open_state(tmp_path / dest).average.initial_share == 0.9999**250


def test_weights_as_trained_have_no_share_of_initial_ones(run, tmp_path):
    export(open_state(run), tmp_path / "a.safetensors", "safetensors", "master")
    assert open_state(tmp_path / "a.safetensors").average.initial_share is None


def test_inspect_prints_the_share_of_initial_weights(run, capsys):
    assert main(["inspect", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "averaged weights: 97.5% of them still the initial weights" in printed and STILL in printed
    assert main(["inspect", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["initial_share"] == 0.9999**250


def test_upcycle_prints_the_share_and_its_run_starts_with_new_initial_weights(run, tmp_path, capsys):
    assert main(["upcycle", str(run), str(tmp_path / "new"), "model.num_experts=4"]) == 0
    printed = capsys.readouterr().out
    assert "from averaged weights (ema), 97.5% of them still the initial weights" in printed and STILL in printed
    manifest = Checkpoint(folder_of(tmp_path / "new" / "checkpoints", 0)).manifest
    assert manifest["ema_initial_share"] == 1.0 and "ema_warmup" not in manifest
    command = ["upcycle", str(run), str(tmp_path / "other"), "model.num_experts=4", "--weights", "master"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "from weights as trained (master)" in printed and "warning" not in printed


def test_an_evaluation_prints_the_largest_share(run):
    share = identify_checkpoint(run, None, "ema", type("LaunchEnvironment", (), {"rank": 0})).initial_share
    assert share == 0.9999**250
    record = {"count": 9, "reference": "digits", "reference_count": 9, "guidance": 1.0, "weights": "ema", "figures": {}}
    record |= {"features": {"name": "digits", "declared": False}, "figures": {"FD": 1.0}}
    records = [record | {"step": 250, "initial_share": share}, record | {"step": 500, "initial_share": 0.9999**500}]
    assert "averaged weights: 97.5% of them still the initial weights" in table(records[:1])
    assert "averaged weights: at most 97.5% of them still the initial weights" in table(records)
    assert "unknown share" in table([records[0] | {"initial_share": None}])
    assert "averaged" not in table([records[0] | {"weights": "master"}])


def test_averages_of_a_study_warm_up_unless_its_recipe_disables_it(tmp_path):
    study = plan(tmp_path / "s", recipe(preset="promoe_s", settings={}))
    assert all(task.config.train.ema_warmup for task in study.tasks)
    explicit = plan(tmp_path / "told", recipe(settings={"train.ema_warmup": False}))
    assert not any(task.config.train.ema_warmup for task in explicit.tasks)
    assert [task.config for task in open_study(tmp_path / "told").tasks] == [task.config for task in explicit.tasks]


def test_a_study_planned_by_an_older_version_keeps_its_constant_decay(tmp_path):
    study = plan(tmp_path, recipe())
    for task in study.tasks:
        file = study.config(task)
        file.write_text("".join(line for line in file.read_text().splitlines(True) if "ema_warmup" not in line))
    assert not any(task.config.train.ema_warmup for task in open_study(tmp_path).tasks)


def test_results_of_a_study_name_the_largest_share(tmp_path):
    results = rows(finished(tmp_path, recipe()))
    shares = [0.002 * number for number in range(len(results))]
    with_shares = [row | {"initial_share": share} for row, share in zip(results, shares, strict=True)]
    text = to_markdown(with_shares, recipe(), [], [])
    assert f"Of the averaged weights at most {max(shares):.1%} are still the initial ones." in text
    with_shares[0]["initial_share"] = 0.975
    text = to_markdown(with_shares, recipe(), [], [])
    assert "at most 97.5% are still the initial ones: too much, use `weights: master`" in text
    assert "still the initial" not in to_markdown(results, recipe(), [], []), "losses of an earlier version"
    assert "still the initial" not in to_markdown(with_shares, recipe(weights="master"), [], [])
