"""Evaluation of every checkpoint of a run: as each alone, at 1 and 2 ranks; their table and picture."""

import json
import shutil
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from support import processes
from support.evaluations import parsed
from support.sampled_runs import ALONE, as_job, stirred_run

from megapromoe.checkpoint.manifest import seal
from megapromoe.checkpoint.step_folders import steps_in
from megapromoe.commands import evaluate as command
from megapromoe.diffusion.image_grid import SampleError
from megapromoe.evaluation import image_metrics, image_metrics_report
from megapromoe.evaluation.image_metrics import Evaluation
from megapromoe.sampling.request import GenerationRequest


@pytest.fixture(scope="module")
def long_run(run, tmp_path_factory):
    """A run that kept two checkpoints, of different weights: steps 3 and 1200."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("long") / "run")
    other = tmp_path_factory.mktemp("other")
    processes.run(1, stirred_run, str(other), "model.num_experts=3", "train.seed=5")
    later = shutil.copytree(other / "checkpoints" / "step-00000003", folder / "checkpoints" / "step-00001200")
    manifest = json.loads((later / "manifest.json").read_text())
    (later / "manifest.json").write_text(seal(manifest | {"step": 1200}))
    return folder


def evaluate_where_the_first_sees_more(evaluation, launch):
    """As on a file system that shows what was saved to some machines later than to others."""
    if launch.rank > 0:
        image_metrics.steps_in = lambda root: [3]
    return image_metrics.evaluate(evaluation, launch)


@pytest.mark.full
def test_every_step_is_as_each_alone(long_run, tmp_path, trained, network, monkeypatch):
    request = GenerationRequest(long_run, tmp_path / "drawn", 130, scales=(1.0, 3.0))
    both = as_job(2, tmp_path, evaluate_where_the_first_sees_more, Evaluation(request, None, "data", every_step=True))
    figures = [[record["figures"] for record in records] for records in both]
    assert figures[0] == figures[1] and len(list((tmp_path / "drawn").iterdir())) == 4
    calls, extract = [], image_metrics.extract_features
    monkeypatch.setattr(image_metrics, "open_network", lambda *arguments: calls.append("opened") or network)
    monkeypatch.setattr(
        image_metrics, "extract_features", lambda *arguments: calls.append(arguments[3]) or extract(*arguments)
    )
    records = image_metrics.evaluate(Evaluation(request, None, "data", every_step=True), ALONE)
    assert calls[:2] == ["opened", "reference"] and len(calls) == 2 + 4 and len(set(calls)) == 6
    assert [(r["step"], r["guidance"]) for r in records] == [(3, 1.0), (3, 3.0), (1200, 1.0), (1200, 3.0)]
    alone = []
    for step in (3, 1200):
        alone += image_metrics.evaluate(Evaluation(replace(request, step=step), None, "data"), ALONE)
    for together, separate, job in zip(records, alone, both[0], strict=True):
        assert together["figures"] == separate["figures"] == pytest.approx(job["figures"], rel=1e-9)
        assert together["images"] == separate["images"] == job["images"]
    assert records[0]["figures"] != records[2]["figures"]


@pytest.mark.full
def test_checkpoints_that_go_or_are_not_there_are_named(long_run, tmp_path, trained, monkeypatch, caplog):
    none = tmp_path / "none"
    none.mkdir()
    (none / "config.yaml").write_text((long_run / "config.yaml").read_text())
    evaluation = Evaluation(GenerationRequest(long_run, tmp_path / "drawn", 130), None, "data", every_step=True)
    monkeypatch.setattr(image_metrics, "steps_in", lambda root: [3, 7, 1200])
    records = image_metrics.evaluate(evaluation, ALONE)
    assert [record["step"] for record in records] == [3, 1200], "one that its run removed meanwhile is left out"
    assert "no such checkpoint; there are 3, 1200; this step is skipped" in caplog.text
    monkeypatch.setattr(image_metrics, "steps_in", steps_in)
    with pytest.raises(SampleError, match="holds no complete checkpoint"):
        image_metrics.evaluate(replace(evaluation, request=replace(evaluation.request, run=none)), ALONE)


def record_of(step, guidance, distance):
    features = {"name": "x", "standard": False, "declared": False}
    values = {"count": 130, "reference": "digits", "reference_count": 1797, "features": features, "weights": "ema"}
    return values | {"step": step, "guidance": guidance, "figures": {"Fréchet distance (x)": distance}}


def test_a_table_and_a_picture_of_several_steps(tmp_path, monkeypatch):
    records = [record_of(*values) for values in ((3, 1.0, 9.0), (3, 2.0, 8.0), (1200, 1.0, 5.0), (1200, 2.0, 4.5))]
    first, steps, scales, line = image_metrics_report.table(records).splitlines()
    assert first.startswith("130 images of each of 2 steps (ema weights) against digits (1,797 images)")
    assert steps.split("  ")[-1].strip() == "step 1,200" and steps.count("step 3") == 2
    assert [steps.index("step 3"), scales.index("guidance 1")] < [steps.index("step 1,200"), scales.index("guidance 2")]
    assert len(steps) == len(scales) == len(line) and line.split()[-4:] == ["9", "8", "5", "4.5"]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    image_metrics_report.plot(records[::-1], tmp_path / "steps.png")
    image_metrics_report.plot(records[:2], tmp_path / "scales.png")
    over_steps, over_scales = drawn
    lines = {line.get_label(): line.get_xydata().tolist() for line in over_steps.lines}
    assert lines == {"guidance 1": [[3, 9], [1200, 5]], "guidance 2": [[3, 8], [1200, 4.5]]}
    assert (over_steps.get_xlabel(), over_scales.get_xlabel()) == ("step", "guidance scale")
    assert [line.get_xydata().tolist() for line in over_scales.lines] == [[[1, 9], [2, 8]]]
    assert "step" not in over_steps.get_title().replace("of each step", "") and "step 3," in over_scales.get_title()


def test_the_command_evaluates_every_step(long_run, tmp_path, trained, capsys):
    words = [
        "--run-dir",
        str(long_run),
        "--num-images",
        "120",
        "--guidance",
        "1.5",
        "--samples",
        str(tmp_path / "kept"),
    ]
    assert command.run(parsed(*words, "--every-step", "--plot", str(tmp_path / "plot.png")), ALONE) == 0
    output = capsys.readouterr().out
    assert output.startswith("120 images of each of 2 steps (ema weights)") and "step 1,200" in output
    kept = [json.loads(line) for line in (long_run / "evaluation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in kept] == [3, 1200] and (tmp_path / "plot.png").is_file()
    assert command.run(parsed(*words, "--json"), ALONE) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 1200, "the last one, where nothing is said"
