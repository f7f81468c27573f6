"""Evaluation as a whole, on digits: the figures of a run and of a set of images, at 1 and 2 ranks; the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.evaluations import parsed
from support.reference_statistics import published_frechet
from support.sampled_runs import ALONE, as_job

from megapromoe.commands import evaluate as command
from megapromoe.config.options import ConfigError
from megapromoe.evaluation import image_metrics, image_metrics_report
from megapromoe.evaluation.image_metrics import Evaluation, EvaluationError
from megapromoe.evaluation.pixels import open_pixels
from megapromoe.evaluation.statistics import precision_recall
from megapromoe.sampling.request import GenerationRequest


def real_digits(file: Path, count: int = 1797) -> np.ndarray:
    images = open_pixels("digits").read(0, count)
    np.savez(file, arr_0=images)
    return images


@pytest.mark.full
def test_real_digits_are_as_good_as_real_digits(tmp_path, trained):
    real_digits(tmp_path / "real.npz")
    (record,) = image_metrics.evaluate(Evaluation(None, tmp_path / "real.npz", "digits"), ALONE)
    figures = record["figures"]
    assert all(name.endswith("(digits classifier)") for name in figures) and "FID" not in str(record)
    distance, spatial, score, precision, recall = figures.values()
    assert distance < 1e-4 and spatial < 1e-4 and (precision, recall) == (1.0, 1.0) and 8 < score <= 10
    assert (record["reference"], record["reference_count"], record["count"]) == ("digits", 1797, 1797)


def test_figures_are_those_of_the_features(tmp_path, trained, network):
    images = real_digits(tmp_path / "half.npz", 900)
    other = 255 - open_pixels("digits").read(900, 1797)
    np.savez(tmp_path / "other.npz", arr_0=other)
    (record,) = image_metrics.evaluate(
        Evaluation(None, tmp_path / "half.npz", str(tmp_path / "other.npz"), features="x"), ALONE
    )
    a, b = (network(torch.from_numpy(x)) for x in (images, other))
    expected = [published_frechet(a[i].double().numpy(), b[i].double().numpy()) for i in (0, 1)]
    distance, spatial, _, precision, recall = record["figures"].values()
    assert (distance, spatial) == pytest.approx(expected, rel=1e-4)
    assert (precision, recall) == precision_recall(b.pooled_ND, a.pooled_ND)


@pytest.mark.full
def test_a_run_is_evaluated_alike_on_one_rank_and_on_two(run, tmp_path):
    """Images are drawn once, by two ranks, and then taken as they are."""
    evaluation = Evaluation(GenerationRequest(run, tmp_path / "drawn", 130, scales=(1.0, 3.0)), None, "data")
    two, also = as_job(2, tmp_path, image_metrics.evaluate, evaluation)
    single = image_metrics.evaluate(evaluation, ALONE)
    assert [r["guidance"] for r in single] == [1.0, 3.0] and two[0]["figures"] == also[0]["figures"]
    for a, b in zip(single, two, strict=True):
        assert a["figures"] == pytest.approx(b["figures"], rel=1e-9)
        assert a["images"] == b["images"] and a["features"] == b["features"] and a["step"] == 3
    assert single[0]["figures"] != single[1]["figures"]
    assert len(list((tmp_path / "drawn").iterdir())) == 2
    text = image_metrics_report.table(single)
    assert "130 images of step 3 (ema weights) against digits (1,797 images)" in text and "guidance 3" in text
    image_metrics_report.append(single, tmp_path / "evaluation.jsonl")
    image_metrics_report.append(single[:1], tmp_path / "evaluation.jsonl")
    lines = (tmp_path / "evaluation.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == single, "the same figures of the same request are one line"
    image_metrics_report.plot(single, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 300
    with pytest.raises(EvaluationError, match="the figures are above"):
        image_metrics_report.append(single, tmp_path)


def test_incomparable_sets_are_refused_before_sampling(run, tmp_path, trained):
    request = GenerationRequest(run, tmp_path / "drawn", 112)
    with pytest.raises(
        EvaluationError, match="112 images are too few for the covariance of 112 .*use --num-images 113"
    ):
        image_metrics.evaluate(Evaluation(request, None, "data"), ALONE)
    real_digits(tmp_path / "few.npz", 50)
    with pytest.raises(EvaluationError, match="few.npz: 50 images are too few .*113 are needed"):
        image_metrics.evaluate(
            Evaluation(
                GenerationRequest(run, tmp_path / "drawn", 113), None, str(tmp_path / "few.npz"), features="digits"
            ),
            ALONE,
        )
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((200, 9, 9, 1), dtype=np.uint8))
    with pytest.raises(EvaluationError, match="the images are 8x8x1, the reference 9x9x1") as error:
        image_metrics.evaluate(Evaluation(request, None, str(tmp_path / "large.npz"), features="digits"), ALONE)
    assert "takes images of 8x8x1, not 9x9x1" in str(error.value)
    for wrong, match in (
        (Evaluation(None, tmp_path / "few.npz", "data", features="digits"), "is the training data of a run"),
        (Evaluation(None, tmp_path / "few.npz", "gone.npz", features="digits"), "no such file or folder"),
        (Evaluation(None, tmp_path / "few.npz", str(tmp_path / "large.npz")), "give --features FILE"),
        (Evaluation(request, None, "data", split="test"), "no test split"),
    ):
        with pytest.raises(EvaluationError, match=match):
            image_metrics.evaluate(wrong, ALONE)
    assert not (tmp_path / "drawn").exists()


# ---- the command


def test_the_command_evaluates_prints_and_keeps(run, tmp_path, trained, capsys):
    words = ["--run-dir", str(run), "--num-images", "120", "--guidance", "1", "2", "--samples", str(tmp_path / "kept")]
    assert command.run(parsed(*words, "--plot", str(tmp_path / "plot.png")), ALONE) == 0
    assert "Fréchet distance (digits classifier)" in capsys.readouterr().out
    assert command.run(parsed(*words, "--json"), ALONE) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kept = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [r["guidance"] for r in printed] == [1.0, 2.0]
    assert [r | {"time": ""} for r in kept] == [r | {"time": ""} for r in printed], "repeated, it adds no line"
    assert (tmp_path / "plot.png").is_file()


@pytest.mark.parametrize(
    "words, messages",
    [
        ([], ["give one of them"]),
        (["--run-dir", "r", "--images", "i"], ["give one of them"]),
        (["--run-dir", "r"], ["--num-images: is needed"]),
        (
            ["--images", "i", "--num-images", "5", "--plot", "p"],
            ["--num-images: is for", "--plot: is for", "--reference: is needed"],
        ),
        (
            ["--run-dir", "r", "--every-step", "--step", "3"],
            ["--num-images: is needed", "--every-step, --step 3: give one"],
        ),
        (["--images", "i", "--every-step"], ["--every-step: is for sampling", "--reference: is needed"]),
    ],
)
def test_options_that_do_not_go_together(words, messages):
    with pytest.raises(ConfigError) as error:
        command.run(parsed(*words), ALONE)
    assert all(part in str(error.value) for part in messages)
