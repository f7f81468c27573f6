"""What a run is, in a few lines; numbers as text."""

import subprocess
import sys
from pathlib import Path

import pytest

from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import resolve
from megapromoe.data.sources import open_dataset
from megapromoe.number_text import duration, share_of, significant
from megapromoe.planning.cost import parameters
from megapromoe.training.summary import summary

RUN = Path("runs/x")


def rows(config, world=1, **options) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in summary(config, world, RUN, "begins at step 0", **options))


def test_the_lines_of_a_run_name_what_it_is():
    config = resolve("digits", overrides=["parallel.tp=2", "parallel.ep=2", "train.accumulation=2"], world=4)
    found = rows(config, 4, dataset=open_dataset(config), device="cpu")
    names = ("model", "parameters", "data", "steps", "batch", "layout", "precision", "optimizer", "device", "run")
    assert tuple(found) == names
    assert "2 of them with 4 experts" in found["model"]
    assert found["data"] == "digits: 1,797 records of 1x8x8, 10 classes"
    assert found["batch"] == "128 images = 32 for a rank x data parallel 2 x accumulation 2"
    assert found["layout"] == "4 ranks: tensor parallel tp 2, expert parallel ep 2, data parallel dp 2; ZeRO 1"
    assert found["steps"].endswith("64,000 in all, 35.6 passes over the data")
    assert found["precision"].startswith("fp32") and found["run"] == "runs/x: begins at step 0"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_summary(name):
    config = resolve(name)
    found = rows(config)
    assert f"{parameters(config.model).total:,} parameters" in found["parameters"]
    assert "device" not in found and ("random numbers" in found["data"]) == (config.data.source == "synthetic")
    assert ("experts" in found["model"]) == bool(config.model.moe_blocks)


def test_the_summary_needs_no_torch():
    code = "import sys, megapromoe.training.summary; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.9412, "2.94"), (12.34, "12.3"), (9.999, "10.0"), (99.96, "100"), (999.9, "1,000")]
    + [(4321.4, "4,321"), (0.03174, "0.0317"), (0.9999, "1.00"), (-2.5, "-2.50"), (float("inf"), "inf")],
)
def test_three_significant_digits(value, text):
    assert significant(value) == text


def test_durations_and_shares():
    assert [duration(s) for s in (0, 59.6, 3725, 360000)] == ["0:00:00", "0:01:00", "1:02:05", "100:00:00"]
    assert share_of(17.0, 96) == "17 of 96" and share_of(1234, 5678) == "1,234 of 5,678"
