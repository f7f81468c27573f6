"""`megapromoe sample`: from options to the request."""

from pathlib import Path

import pytest

from megapromoe import cli
from megapromoe.distributed.launch_environment import LaunchEnvironment
from megapromoe.sampling.request import GenerationRequest


def test_sample_passes_all_options_on(sampled, tmp_path):
    out = tmp_path / "grid.png"
    line = ["sample", "--run-dir", str(tmp_path), "--class", "3", "5", "sample.batch=8", "--guidance", "1.5"]
    line += [
        "--out",
        str(out),
        "--count",
        "4",
        "--step",
        "500",
        "--weights",
        "master",
        "--seed",
        "7",
        "--steps",
        "9",
    ]
    assert cli.main([*line, "--method", "heun"]) == 0
    request = GenerationRequest(
        tmp_path,
        out,
        4,
        only=(3, 5),
        scales=("1.5",),
        step=500,
        weights="master",
        overrides=("sample.batch=8", "sample.steps=9", "sample.seed=7", "sample.method=heun"),
        preview=True,
    )
    assert sampled == [(request, LaunchEnvironment("python"))]


def test_sample_draws_all_classes_by_default(sampled, tmp_path):
    assert cli.main(["sample", "--run-dir", "r", "--out", "o.png", "--per-class", "2"]) == 0
    assert sampled[0][0] == GenerationRequest(Path("r"), Path("o.png"), 2, preview=True)
    assert (sampled[0][0].step, sampled[0][0].weights, sampled[0][0].overrides) == (None, "ema", ())


def test_sample_writes_into_the_run_by_default(sampled):
    assert cli.main(["sample", "--run-dir", "r"]) == 0
    assert sampled[0][0] == GenerationRequest(
        Path("r"), Path("r/samples/step.png"), 10, preview=True, complete_name=True
    )
    assert cli.main(["sample", "--run-dir", "r", "--num-images", "8"]) == 0
    assert sampled[1][0] == GenerationRequest(Path("r"), Path("r/samples/step"), 8, complete_name=True)


def test_sample_changes_only_how_images_are_drawn(sampled, capsys):
    assert cli.main(["sample", "--run-dir", "r", "--out", "o.png", "model.depth=3", "train.lr=1"]) == 2
    errors = capsys.readouterr().err
    assert "'model.depth=3'" in errors and "'train.lr=1'" in errors
    assert not sampled


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_count_must_be_positive(sampled, capsys, count):
    with pytest.raises(SystemExit) as left:
        cli.main(["sample", "--run-dir", "r", "--out", "o.png", "--count", count])
    assert left.value.code == 2
