"""evaluation.jsonl: a repeated evaluation adds a line only where its outcome differs."""

import json

from megapromoe.evaluation.image_metrics_report import append


def record(value: float, time: str = "now", **request) -> dict:
    return {"time": time, "step": 5, "guidance": 1.0, **request, "figures": {"FID": value}}


def values(file) -> list[float]:
    return [json.loads(line)["figures"]["FID"] for line in file.read_text().splitlines()]


def test_the_same_outcome_of_the_same_request_is_one_line(tmp_path):
    file = tmp_path / "evaluation.jsonl"
    assert append([record(1.0), record(2.0, guidance=2.0)], file) == 2
    assert append([record(1.0, "later"), record(2.0, "later", guidance=2.0)], file) == 0
    assert append([record(1.0, step=6), record(1.0, "later")], file) == 1
    assert values(file) == [1.0, 2.0, 1.0]


def test_another_outcome_is_a_line_and_the_newest_counts(tmp_path):
    file = tmp_path / "evaluation.jsonl"
    for value in (1.0, 1.5, 1.5, 1.0):
        append([record(value)], file)
    assert values(file) == [1.0, 1.5, 1.0], "readers take the newest of several"
    file.write_text(file.read_text() + '{"torn')
    assert append([record(1.0)], file) == 0
    assert append([record(float("nan"), step=7)], file) == 1 and append([record(float("nan"), step=7)], file) == 0
