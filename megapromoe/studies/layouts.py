"""The layouts in which the runs of a study were trained, from the starts that each run has recorded.

Every layout trains the same function, so a layout says nothing about a loss; it belongs to the speed and the memory of
a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.studies.grid import Task
from megapromoe.studies.json_files import read_json
from megapromoe.studies.study import Study

SIZES = ("tp", "ep", "dp")  # of the process groups that are named in a table


def layouts_of(study: Study, task: Task) -> list[str]:
    """The layouts of the starts of a run, such as "tp1 ep2 dp4", each once, oldest first. Raises StudyError."""
    starts: Any = read_json(RunDirectory(study.run(task)).environment)
    texts = []
    for start in starts if isinstance(starts, list) else []:
        layout = start.get("layout") if isinstance(start, dict) else None
        if isinstance(layout, dict):
            texts.append(" ".join(f"{name}{layout[name]}" for name in SIZES if name in layout))
    return list(dict.fromkeys(texts))


def columns(study: Study, task: Task) -> dict[str, Any]:
    """The columns of results.csv on the processes of a run; None where a run has recorded no start."""
    starts: Any = read_json(RunDirectory(study.run(task)).environment) or []
    worlds = [start["layout"]["world"] for start in starts if "world" in (start.get("layout") or {})]
    return {"ranks": worlds[-1] if worlds else None, "layout": "; ".join(layouts_of(study, task)) or None}


def note(rows: Sequence[dict[str, Any]]) -> str:
    """A sentence for results.md, if the rows have several layouts; else ""."""
    layouts = list(dict.fromkeys(row["layout"] for row in rows if row.get("layout")))
    if len(layouts) < 2:
        return ""
    return (
        f" Runs have several layouts ({', '.join(layouts)}; column layout of results.csv): losses are comparable, but"
        " images/s and memory only at one layout."
    )
