"""Files for `plan --measured`: recorded runs, and made-up ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megapromoe.config.resolve import resolve, to_yaml

RECORDED = Path(__file__).parents[1] / "golden" / "measured"
BEGAN = 1_700_000_000  # seconds since 1970 of the newest start: 2023-11-14T22:13:20+00:00


def recorded_run(name: str) -> Path:
    """A recorded run: its config.yaml, environment.json (without host and command) and metrics.jsonl (speeds alone)."""
    return RECORDED / name


def benchmark() -> dict[str, Any]:
    """A benchmark.json with one step of the size digits in float32 on a CPU."""
    phases = {
        "forward": {"median": 0.050, "low": 0.045, "high": 0.055},
        "backward": {"median": 0.100, "low": 0.095, "high": 0.110},
        "update": {"median": 0.010, "low": 0.010, "high": 0.010},
    }
    rounds = {"forward": [0.045, 0.050, 0.055], "backward": [0.095, 0.100, 0.110], "update": [0.01] * 3}
    step = {"experiment": "step", "size": "digits", "experts": 8, "images": 64, "routing": "real", "ranks": 1}
    return {
        "machine": {"device": "AMD EPYC", "kind": "cpu", "dtype": "float32", "peak": {"flop_per_second": 109e9}},
        "settings": {"compile": False, "rounds": 3},
        "commands": [],
        "scenes": {
            "step digits E8 B64 real": {
                **step,
                "contenders": {"ours": {"seconds": phases, "rounds": rounds}, "bmm": {"cannot": "no room"}},
            },
            "layer digits E8 B64 real": {**step, "experiment": "layer", "contenders": {}},
        },
    }


def write_run(
    folder: Path,
    speeds: Sequence[float],
    world: int,
    before: Sequence[float] = (),
    overrides: Sequence[str] = (),
    load: list[list[float]] | None = None,
    more: dict[str, float] | None = None,
) -> Path:
    """Writes a run of the preset digits with a log line for each speed in images per second; returns its folder.

    Args:
        before: speeds of an earlier start.
        load: of the experts, in each line.
        more: values of each line.
    """
    config = resolve("digits", overrides=overrides, world=world)
    starts = [{"started": "2023-11-14T21:13:20+00:00", "layout": {"world": 1}}] if before else []
    starts.append({"started": "2023-11-14T22:13:20+00:00", "layout": {"world": world}})
    lines = [{"step": i + 1, "wall_time": BEGAN - 100 + i, "images_per_second": v} for i, v in enumerate(before)]
    for i, speed in enumerate(speeds):
        line: dict[str, Any] = {"step": len(before) + i + 1, "wall_time": BEGAN + 10 + i, "images_per_second": speed}
        lines.append(line | (more or {}) | ({} if load is None else {"expert_load": load}))
    write_files(folder, to_yaml(config), starts, lines)
    return folder


def write_files(folder: Path, config: str, starts: Any, lines: Sequence[Any]) -> None:
    """Writes the files of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    (folder / "environment.json").write_text(json.dumps(starts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_json(path: Path, content: Any) -> Path:
    file = path.with_suffix(".json")
    file.write_text(json.dumps(content))
    return file


def _write_run_of(path: Path, content: Any) -> Path:
    lines = content["lines"] if isinstance(content["lines"], list) else [content["lines"]]
    write_files(path, yaml.safe_dump(content["config"]), content["starts"], lines)
    return path


def _run_content() -> dict[str, Any]:
    folder = recorded_run("two-64")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][:6]
    config = {"train": {"global_batch": 64, "deepspeed": "fp32_zero1"}, "parallel": {"ep": 1}}
    return {"config": config, "starts": json.loads((folder / "environment.json").read_text()), "lines": lines}


# Name -> content of recorded or made-up measurements, and what writes a content to a path.
SOURCES: dict[str, tuple[Callable[[], Any], Callable[[Path, Any], Path]]] = {
    "check": (lambda: json.loads((RECORDED / "check.json").read_text()), _write_json),
    "benchmark": (benchmark, _write_json),
    "run": (_run_content, _write_run_of),
}
