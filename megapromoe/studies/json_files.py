"""Reads the JSON files of a study and its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megapromoe.run_lines import metrics_of
from megapromoe.studies.recipe import StudyError


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order."""
    return metrics_of(run / "metrics.jsonl")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file; None if the file does not exist. Raises StudyError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StudyError([f"{path}: is damaged ({error}); remove it and repeat the command"]) from error
