"""All measurements of a study in long form, for other programs: a row for each run, step and metric.

================  ======================================================================================
task, variant     name of the run and of its variant
seed              of the run
KEY               a column for each axis of the study, and for each setting in which its runs differ
source            training (metrics.jsonl), evaluation (of sampled images), fixed draws (the loss of `collect`)
step              training step
metric, value     name of the metric and its value, with all digits
guidance, images  of an evaluation: the guidance scale and the number of images; else empty
================  ======================================================================================

measurements.csv and measurements.parquet hold the same rows, written run by run, so that memory does not grow with the
study. Metrics that are lists, such as the load of each expert, stay in metrics.jsonl. In the CSV, a missing value is an
empty field, and an empty text is "".
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megapromoe.config.options import to_dict
from megapromoe.io import atomic_path, atomic_write
from megapromoe.studies.collect import LOSS
from megapromoe.studies.curves import figures
from megapromoe.studies.grid import Task
from megapromoe.studies.json_files import metrics, read_json
from megapromoe.studies.study import Study

CSV, PARQUET = "measurements.csv", "measurements.parquet"
TRAINING, EVALUATION, FIXED_DRAWS = "training", "evaluation", "fixed draws"
Row = dict[str, Any]


class Columns:
    """The columns of both files.

    Attributes:
        types: name -> type of its values: int, float, bool or str; each value may be missing.
        settings: name of a task -> its values on the axes, None where an axis does not apply, and on the settings in
            which the tasks differ.
    """

    def __init__(self, study: Study):
        flat = {task.name: _flat(task) for task in study.tasks}
        first = flat[study.tasks[0].name]
        known = {*study.recipe.axes, *study.recipe.seed_settings}  # columns of their own
        differing = [
            key for key in first if key not in known and any(settings[key] != first[key] for settings in flat.values())
        ]
        raw = {
            task.name: {key: task.point.get(key) for key in study.recipe.axes}
            | {key: flat[task.name][key] for key in differing}
            for task in study.tasks
        }
        kinds = {key: _type_of(values[key] for values in raw.values()) for key in (*study.recipe.axes, *differing)}
        self.settings = {
            name: {key: _as(kinds[key], value) for key, value in values.items()} for name, values in raw.items()
        }
        self.types: dict[str, type] = {"task": str, "variant": str, "seed": int, **kinds}
        self.types |= {"source": str, "step": int, "metric": str, "value": float, "guidance": float, "images": int}


def write_measurements(study: Study) -> tuple[list[Path], dict[str, str]]:
    """Writes both files; returns their paths, and the reason for a file that is not written. Raises OSError.

    Parquet is left out without pyarrow, and both are left out if there is no measurement.
    """
    columns = Columns(study)
    if not any(True for task in study.tasks for _ in rows_of(study, task, columns)):
        reason = "no run has logged a step yet"
        return [], {CSV: reason, PARQUET: reason}
    paths = [study.folder / CSV]
    has_pyarrow = importlib.util.find_spec("pyarrow") is not None
    with ExitStack() as stack:
        table = stack.enter_context(atomic_write(study.folder / CSV))
        table.write((",".join(map(_cell, columns.types)) + "\n").encode())
        parquet = None
        if has_pyarrow:
            paths.append(study.folder / PARQUET)
            parquet = _ParquetFile(stack.enter_context(atomic_path(study.folder / PARQUET)), columns.types)
            stack.callback(parquet.close)
        for task in study.tasks:
            rows = list(rows_of(study, task, columns))
            table.writelines((",".join(_cell(row[name]) for name in columns.types) + "\n").encode() for row in rows)
            if parquet is not None:
                parquet.write(rows)
    return paths, {} if has_pyarrow else {PARQUET: "it needs pyarrow: pip install 'megapromoe[data]'"}


def rows_of(study: Study, task: Task, columns: Columns) -> Iterator[Row]:
    """The rows of one run, each with all columns; None where it has no value."""
    run: Row = dict.fromkeys(columns.types) | {"task": task.name, "variant": task.variant, "seed": task.seed}
    run |= columns.settings[task.name]
    for line in metrics(study.run(task)):
        step = line.get("step")
        for name, value in line.items():
            if name != "step" and isinstance(step, int) and _is_number(value):
                yield run | {"source": TRAINING, "step": step, "metric": name, "value": float(value)}
    for figure in figures(study, task):
        row = {"source": EVALUATION, "step": figure["step"], "metric": figure["figure"]}
        row |= {"guidance": float(figure["guidance"]), "images": figure["count"], "value": float(figure["value"])}
        yield run | row
    record = read_json(study.loss_file(task))
    if record is not None:
        yield run | {"source": FIXED_DRAWS, "step": record["step"], "metric": LOSS, "value": float(record["loss"])}


class _ParquetFile:
    """Writes rows of known types into a Parquet file, one group of rows for each call."""

    def __init__(self, path: Path, columns: Mapping[str, type]):
        import pyarrow
        import pyarrow.parquet

        types = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_(), str: pyarrow.string()}
        self._pyarrow = pyarrow
        self._schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, rows: Sequence[Row]) -> None:
        if rows:
            self._writer.write_table(self._pyarrow.Table.from_pylist(rows, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _flat(task: Task) -> Row:
    content = to_dict(task.config)
    return {f"{section}.{key}": value for section, part in content.items() for key, value in part.items()}


def _type_of(values: Iterable[Any]) -> type:
    """The narrowest type of a column; str, as JSON, for lists and mixed values."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and kinds:
        return float if float in kinds else int
    return kinds.pop() if len(kinds) == 1 and kinds <= {bool, str} else str


def _as(kind: type, value: Any) -> Any:
    """A value of a column of this type."""
    if value is None or isinstance(value, str) or kind is not str:
        return value if value is None or kind is str else kind(value)
    return json.dumps(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    """A field of a CSV line: numbers with all digits, texts quoted where needed."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return repr(value)
    plain = value and not any(character in value for character in ',"\n\r')
    return value if plain else '"' + value.replace('"', '""') + '"'
