"""Output of the preflight: a table for people; a JSON file and a list of faulty nodes for programs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megapromoe.io import write_text
from megapromoe.preflight.verdict import FAIL, WARN, Cluster, Limits, Row, Verdict

COLUMNS = {"check": 14, "nodes": 22, "result": 48, "limit": 26, "verdict": 7}  # widths; longer text is wrapped


def table(verdict: Verdict) -> str:
    """The table of all rows, the remedies of those that did not pass, and the verdict."""
    lines = [_line({name: name for name in COLUMNS})]
    for row in verdict.rows:
        cells = {"check": row.check, "nodes": _nodes(row), "result": row.result, "limit": row.limit}
        cells["verdict"] = row.verdict
        lines += _wrapped(cells)
    not_passed = [row for row in verdict.rows if row.verdict in (FAIL, WARN)]
    remedies = dict.fromkeys(f"{r.check}, {', '.join(r.blame) or _nodes(r)}: {r.remedy}" for r in not_passed)
    if remedies:
        lines += ["", "what to do"]
        for remedy in remedies:
            lines += textwrap.wrap(remedy, 118, initial_indent="  ", subsequent_indent="    ")
    return "\n".join([*lines, "", f"preflight {verdict.sentence}"])


def _nodes(row: Row) -> str:
    if len(row.nodes) <= 3:
        return ", ".join(row.nodes) or "-"
    return f"{len(row.nodes)} nodes" if not row.blame else f"{row.nodes[0]}, {row.nodes[1]} +{len(row.nodes) - 2}"


def _wrapped(cells: dict[str, str]) -> Iterator[str]:
    parts = {name: textwrap.wrap(cells[name], width) or [""] for name, width in COLUMNS.items()}
    for i in range(max(map(len, parts.values()))):
        yield _line({name: part[i] if i < len(part) else "" for name, part in parts.items()})


def _line(cells: dict[str, str]) -> str:
    return "  ".join(f"{cells[name]:{width}}" for name, width in COLUMNS.items()).rstrip()


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def as_json(cluster: Cluster, limits: Limits, verdict: Verdict) -> dict[str, Any]:
    """All findings, the limits and the verdict, as a value for `json.dumps`."""
    findings = {
        stage: {str(rank): _plain(value) for rank, value in by_rank.items()}
        for stage, by_rank in cluster.findings.items()
    }
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "exit_code": verdict.exit_code,
        "verdict": verdict.sentence,
        "bad_nodes": list(verdict.bad_nodes),
        "rows": [asdict(row) for row in verdict.rows],
        "limits": asdict(limits),
        "world": cluster.world,
        "nodes": {node: cluster.ranks_on(node) for node in cluster.nodes},
        "expected": cluster.expected,
        "hang": asdict(cluster.hang) if cluster.hang else None,
        "found": findings,
    }


def write_reports(
    cluster: Cluster, limits: Limits, verdict: Verdict, report: Path | None, bad_nodes: Path | None
) -> list[str]:
    """Writes the requested files; returns a message for each that could not be written."""
    names = "".join(f"{node}\n" for node in verdict.bad_nodes)
    everything = json.dumps(as_json(cluster, limits, verdict), indent=2) + "\n"
    problems = []
    for file, text in ((bad_nodes, names), (report, everything)):
        try:
            if file is not None:
                write_text(file, text, parents=True)
        except OSError as error:
            problems.append(f"{error.filename or file}: {error.strerror or error}; write it to another place")
    return problems
