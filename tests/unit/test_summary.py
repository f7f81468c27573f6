"""What a run is, in a few lines; numbers as text."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megapromoe.cli import parse
from megapromoe.commands.sample import generation_request
from megapromoe.config.data_options import UNSET
from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.data.sources import open_dataset
from megapromoe.io import write_text
from megapromoe.number_text import clock_text, share_of, significant
from megapromoe.planning.cost import parameters
from megapromoe.training.run_clock import RunClock
from megapromoe.training.summary import closing_lines, sample_command, summary

RUN = Path("runs/x")


def rows(config, world=1, **options) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in summary(config, world, RUN, "begins at step 0", **options))


def test_the_lines_of_a_run_name_what_it_is():
    config = resolve("digits", overrides=["parallel.tp=2", "parallel.ep=2", "train.accumulation=2"], world=4)
    lines = rows(config, 4, dataset=open_dataset(config), device="cpu")
    names = ("model", "parameters", "data", "steps", "batch", "layout", "precision", "optimizer", "device", "run")
    assert tuple(lines) == names
    assert "2 of them with 4 experts" in lines["model"]
    assert lines["data"] == "digits: 1,797 records of 1x8x8, 10 classes"
    assert lines["batch"] == "128 images = 32 for a rank x data parallel 2 x accumulation 2"
    assert lines["layout"] == "4 ranks: tensor parallel tp 2, expert parallel ep 2, data parallel dp 2; ZeRO 1"
    assert lines["steps"].endswith("64,000 in all, 35.6 passes over the data")
    assert lines["precision"].startswith("fp32") and lines["run"] == "runs/x: begins at step 0"


def test_the_batch_names_the_null_images_of_stratified_dropout():
    options = ["data.condition_dropout=0.125", "data.condition_dropout_stratum=8", "train.accumulation=2"]
    config = resolve("digits", overrides=options, world=2)
    assert rows(config, 2)["batch"] == (
        "128 images = 32 for a rank x data parallel 2 x accumulation 2; 4 of a rank's micro-batch are null images,"
        " 1 of each 8"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_summary(name):
    config = resolve(name)
    lines = rows(config)
    assert f"{parameters(config.model).total:,} parameters" in lines["parameters"]
    assert "device" not in lines and ("not chosen yet" in lines["data"]) == (config.data.source == UNSET)
    synthetic = rows(resolve(name, overrides=["data.source=synthetic"]))
    assert "random numbers" in synthetic["data"] and "random numbers" not in lines["data"]
    assert ("experts" in lines["model"]) == bool(config.model.moe_blocks)


def test_the_summary_needs_no_torch():
    code = "import sys, megapromoe.training.summary; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [name for name in PRESETS if not resolve(name).model.has_text])
def test_the_next_command_is_one_that_sample_takes(name, tmp_path):
    folder = tmp_path / "a run"
    write_text(folder / "config.yaml", to_yaml(resolve(name)), parents=True)
    words = shlex.split(sample_command(resolve(name), folder))
    assert words[0] == "megapromoe"
    options = parse(words[1:])
    assert options.command == "sample" and options.run == folder
    generation_request(options, options.out).checked(world=1)


def test_no_command_is_suggested_that_a_text_model_does_not_have():
    config = resolve("t2i_3b", overrides=["data.source=synthetic"])
    lines = list(closing_lines(config, RUN, config.train.steps, None, RunClock(1.0, 0, 1)))
    assert lines[-1].startswith("checkpoint:")  # random captions have no words
    lines = list(closing_lines(config, RUN, config.train.steps, None, RunClock(1.0, 0, 1), "it's a red three"))
    assert lines[-1].startswith("next: ")
    options = parse(shlex.split(lines[-1])[2:])
    assert (options.command, options.run, options.prompt) == ("sample", RUN, ["it's a red three"])
    assert "captions of up to 256 tokens" in rows(config)["data"]


def test_a_log_ends_with_what_was_reached():
    clock = RunClock(3600.0, first_step=20, total_steps=500)
    lines = list(closing_lines(resolve("digits"), RUN, 500, {"denoising_loss": 0.51234, "total_loss": 9.0}, clock))
    assert lines[0] == "done: step 500 of 500; denoising loss 0.5123 over the last logged steps"
    assert lines[1] == "trained for 1:00:00, of which 0:00:00 since the last start"
    assert lines[2:] == [
        "checkpoint: runs/x/checkpoints/step-00000500",
        "next: megapromoe sample --run-dir runs/x --out runs/x/samples.png",
    ]
    stopped = list(closing_lines(resolve("digits"), RUN, 28, None, clock))
    assert stopped[0] == "stopped: step 28 of 500" and stopped[-1].endswith("step-00000028")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.9412, "2.94"), (12.34, "12.3"), (9.999, "10.0"), (99.96, "100"), (999.9, "1,000")]
    + [(4321.4, "4,321"), (0.03174, "0.0317"), (0.9999, "1.00"), (-2.5, "-2.50"), (float("inf"), "inf")],
)
def test_three_significant_digits(value, text):
    assert significant(value) == text


def test_durations_and_shares():
    assert [clock_text(s) for s in (0, 59.6, 3725, 360000)] == ["0:00:00", "0:01:00", "1:02:05", "100:00:00"]
    assert share_of(17.0, 96) == "17 of 96" and share_of(1234, 5678) == "1,234 of 5,678"
