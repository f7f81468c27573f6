"""The measurements of a study in long form: the same rows and values as CSV and as Parquet, with their types."""

import importlib.util
import json
import math

import pytest
from support.image_evaluations import record, write
from support.small_studies import TINY, compared, finished, recipe

from megapromoe.studies import measurements
from megapromoe.studies.measurements import CSV, PARQUET, Columns, write_measurements
from megapromoe.studies.results import write_results

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install megapromoe[data]")


def read(study):
    """Both files as lists of rows, the CSV read with the types of the Parquet file."""
    from pyarrow import csv, parquet

    table = parquet.read_table(study.folder / PARQUET)
    types = {field.name: field.type for field in table.schema}
    options = csv.ConvertOptions(column_types=types, null_values=[""])  # else a NaN would be a missing value
    options.strings_can_be_null, options.quoted_strings_can_be_null = True, False
    return csv.read_csv(study.folder / CSV, convert_options=options), table


def same(first, second):
    return first == second or (isinstance(first, float) and isinstance(second, float) and math.isnan(first + second))


def test_both_files_hold_the_same_values_with_their_types(tmp_path):
    variants = {
        "promoe": {},
        "a.b_c": {"settings": {"model.router": "tc", "model.shared_expert": False, "model.unconditional_expert": False,
                               "train.lr": 1e-3, "train.ema_decay": [0.9, 0.99]}},
    }  # fmt: skip
    axes = {"model.num_experts": [2, 4]}
    study = finished(tmp_path, recipe(axes=axes, seeds=[0], variants=variants), lambda task: 1 / 3)
    first = study.tasks[0]
    third = 1 / 3
    lines = [{"step": 1, "denoising_loss": third, "total_loss": float("nan"), "note": 'a "quoted", text'}]
    lines += [{"step": 2, "denoising_loss": 1e-300, "total_loss": float("inf"), "flag": True, "expert_load": [[1]]}]
    (study.run(first) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    name = 'distance, "quoted" (X)'
    write(study.run(first), [record(3, 1.5, figures={name: 0.1 + 0.2})])
    assert write_measurements(study) == ([tmp_path / CSV, tmp_path / PARQUET], {})
    from_csv, from_parquet = read(study)
    assert from_csv.schema == from_parquet.schema and from_csv.num_rows == from_parquet.num_rows
    rows, others = from_csv.to_pylist(), from_parquet.to_pylist()
    assert all(same(row[key], other[key]) for row, other in zip(rows, others, strict=True) for key in row)
    kinds = {"int64": int, "double": float, "bool": bool, "string": str}
    types = {field.name: kinds[str(field.type)] for field in from_parquet.schema}
    assert types == Columns(study).types
    settings = {"model.num_experts": int, "model.router": str, "model.shared_expert": bool, "train.lr": float}
    assert settings.items() <= types.items() and types["train.ema_decay"] is str, "a number and a list: as JSON"
    of_first = [row for row in others if row["task"] == first.name]
    values = {(row["source"], row["step"], row["metric"]): row["value"] for row in of_first}
    assert math.isnan(values.pop(("training", 1, "total_loss")))
    assert values == {
        ("training", 1, "denoising_loss"): third, ("training", 2, "denoising_loss"): 1e-300,
        ("training", 2, "total_loss"): math.inf, ("evaluation", 3, name): 0.1 + 0.2,
        ("fixed draws", 3, "fixed_loss"): third,
    }  # fmt: skip
    (evaluated,) = [row for row in of_first if row["source"] == "evaluation"]
    assert (evaluated["guidance"], evaluated["images"], evaluated["seed"]) == (1.5, 200, 0)
    assert {row["model.num_experts"] for row in others} == {2, 4} and of_first[0]["guidance"] is None


def test_an_axis_that_does_not_apply_is_missing(tmp_path):
    study = finished(tmp_path, compared(seeds=[0]))
    write_measurements(study)
    rows = read(study)[1].to_pylist()
    experts = {(row["variant"], row["model.num_experts"]) for row in rows}
    assert experts == {("promoe", 2), ("promoe", 4), ("tc", 2), ("tc", 4), ("dense", None)}
    assert "train.seed" not in rows[0] and "data.seed" not in rows[0], "the column seed has them"


def test_an_empty_text_differs_from_a_missing_one(tmp_path):
    assert [measurements._cell(value) for value in (None, "", "a,b", 'a"b', 0.1, True, 3)] == [
        "", '""', '"a,b"', '"a""b"', "0.1", "true", "3",
    ]  # fmt: skip


def test_collect_writes_both_and_names_what_is_missing(tmp_path, monkeypatch):
    study = finished(tmp_path, recipe(settings=TINY, axes={}, seeds=[0]))
    _, files = write_results(study, study.tasks, 8192, ["promoe"])
    assert {str(tmp_path / CSV), str(tmp_path / PARQUET)} <= set(files)
    (tmp_path / PARQUET).unlink()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    _, files = write_results(study, study.tasks, 8192, ["promoe"])
    assert f"{tmp_path / PARQUET}: not written: it needs pyarrow: pip install 'megapromoe[data]'" in files
    assert (tmp_path / CSV).exists() and not (tmp_path / PARQUET).exists()
    (study.run(study.tasks[0]) / "metrics.jsonl").unlink()
    study.loss_file(study.tasks[0]).unlink()
    reason = "no run has logged a step yet"
    assert write_measurements(study) == ([], {CSV: reason, PARQUET: reason})


def test_a_failed_write_leaves_the_files_as_they_were(tmp_path, monkeypatch):
    study = finished(tmp_path, recipe(axes={}, seeds=[0]))
    write_measurements(study)
    before = {name: (tmp_path / name).read_bytes() for name in (CSV, PARQUET)}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measurements._ParquetFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_measurements(study)
    assert before == {name: (tmp_path / name).read_bytes() for name in (CSV, PARQUET)}
    assert not list(tmp_path.glob("*.writing"))
