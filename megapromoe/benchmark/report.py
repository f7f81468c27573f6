"""The figures of a run as Markdown and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megapromoe.benchmark.suite import BenchmarkError
from megapromoe.io import atomic_write, write_bytes, write_text

HEADINGS = {
    "layer": "The MoE layer, forward and backward",
    "step": "The training step",
    "sample": "Sampling",
    "traffic": "What travels",
}
ROWS = "alltoall_base_"  # the collective that takes rows to experts
GOAL = 1.05  # of a dense layer's time


def write_report(document: dict[str, Any], out: Path) -> list[Path]:
    """Writes benchmark.md and a picture for each timed experiment into a folder; returns the files."""
    pictures = []
    for experiment in HEADINGS:
        found = [s for s in document["scenes"].values() if s["experiment"] == experiment]
        if experiment != "traffic" and any("ratio" in f for s in found for f in s["contenders"].values()):
            path = out / f"benchmark-{experiment}.png"
            with atomic_write(path) as file:
                draw(found, HEADINGS[experiment]).savefig(file, format="png", dpi=110)
            pictures.append(path)
    text = markdown(document, {p.stem.removeprefix("benchmark-"): p.name for p in pictures})
    write_text(out / "benchmark.md", text, parents=True)
    return [out / "benchmark.md", *pictures]


def fill(page: Path, document: dict[str, Any], out: Path) -> None:
    """Puts the report between the page's marks for this kind of device, and the pictures beside the page.

    The marks are `<!-- begin cpu -->` and `<!-- end cpu -->`, or cuda. Raises BenchmarkError if the page lacks them.
    """
    kind = document["machine"]["kind"]
    text = page.read_text(encoding="utf-8")
    marks = f"<!-- begin {kind} -->", f"<!-- end {kind} -->"
    if not all(text.count(mark) == 1 for mark in marks) or text.index(marks[0]) > text.index(marks[1]):
        raise BenchmarkError(f"{page}: needs the lines {marks[0]} and {marks[1]}, once each, to be filled between them")
    names = {}
    for path in write_report(document, out)[1:]:
        names[path.stem.removeprefix("benchmark-")] = name = f"{path.stem}-{kind}.png"
        write_bytes(page.with_name(name), path.read_bytes())
    before, after = text.split(marks[0])[0], text.split(marks[1])[1]
    write_text(page, f"{before}{marks[0]}\n\n{markdown(document, names)}\n{marks[1]}{after}")


def markdown(document: dict[str, Any], pictures: dict[str, str]) -> str:
    """All tables; `pictures` experiment -> file to show."""
    machine, settings = document["machine"], document["settings"]
    peak = machine["peak"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("megapromoe", "torch", "deepspeed", "cuda"))
    lines = [
        f"{machine['device']}, {machine['threads']} threads of {machine['cores']} cores, {machine['dtype']};"
        f" {versions.removesuffix(', cuda None')}. Measured matmul peak {rate(peak['flop_per_second'])}"
        f" (side {peak['side']}). Medians of {settings['rounds']} rounds in random order, {machine['clock']},"
        f" memory {machine['memory']};"
        f" load of the machine at the start {machine['load']:.1f}.",
        "",
        *(f"    {command}" for command in document["commands"]),
        "",
    ]
    for experiment, heading in HEADINGS.items():
        found = [s for s in document["scenes"].values() if s["experiment"] == experiment]
        if not found:
            continue
        lines += [f"### {heading}", ""]
        if experiment in pictures:
            lines += [f"![time over the dense model's]({pictures[experiment]})", ""]
        if experiment == "traffic":
            lines += [*_traffic(found), ""]
        else:
            lines += [*_timed(found, peak["flop_per_second"]), "", *_counted(found), ""]
        if any("parts" in s for s in found):
            lines += ["Parts of ours, ms forward + backward, and their share of the whole:", "", *_parts(found), ""]
        if reasons := [*_reasons(found)]:
            lines += [*reasons, ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _named(scene: dict) -> list[str]:
    return [scene["size"], str(scene["experts"]), str(scene["images"]), scene["routing"]]


def _timed(found: list[dict], peak: float) -> list[str]:
    phases = list(dict.fromkeys(p for s in found for f in _ran(s).values() for p in f["seconds"]))
    phases = phases if len(phases) > 1 else []
    heads = ["size", "E", "B", "routing", "contender", *(f"{p} ms" for p in phases), "whole ms (quartiles)"]
    heads += ["× dense (95 %)", "× dense per FLOP", "images/s", "tokens/s", "FLOP/s", "of peak"]
    rows = []
    for scene in found:
        dense_flops = scene["contenders"].get("dense", {}).get("flops", {}).get("useful")
        for name, f in _ran(scene).items():
            total, useful, ratio = f["total"], f["flops"]["useful"], f.get("ratio")
            per_flop = digits(ratio["median"] * dense_flops / useful) if ratio else ""
            rows.append(
                _named(scene)
                + [name, *(ms(f["seconds"][p]["median"]) for p in phases)]
                + [f"{ms(total['median'])} ({ms(total['low'])}–{ms(total['high'])})"]
                + [f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else "", per_flop]
                + [digits(scene["images"] / total["median"]), digits(scene["tokens"] / total["median"])]
                + [rate(useful / total["median"]), f"{useful / total['median'] / peak:.0%}"]
            )
    return _table(heads, rows)


def _counted(found: list[dict]) -> list[str]:
    heads = ["size", "E", "B", "routing", "contender", "useful FLOPs", "done / useful", "peak MiB", "× necessary"]
    heads += ["kernels", "allocations", "host waits", "dropped rows"]
    rows = []
    for scene in found:
        for name, f in _ran(scene).items():
            counts, memory, useful = f["counts"]["total"], f["memory"], f["flops"]["useful"]
            waits = counts["gpu_waits"] or sum(counts["waits"].values())
            rows.append(
                _named(scene)
                + [name, digits(useful / 1e9) + " G", f"{counts['flops'] / useful:.2f}"]
                + [f"{memory.get('allocator_peak', memory['peak']) / 2**20:.1f}"]
                + [f"{memory['peak'] / memory['necessary']:.2f}" if "necessary" in memory else ""]
                + [str(counts["kernels"]), str(counts["allocations"]), str(waits), f"{f['dropped']:.0%}"]
            )
    return _table(heads, rows)


def _parts(found: list[dict]) -> list[str]:
    found = [s for s in found if "parts" in s]
    names = list(found[0]["parts"])
    rows = []
    for scene in found:
        whole = scene["contenders"]["ours"]["total"]["median"]
        cells = []
        for part in scene["parts"].values():
            forward, backward = (part[phase]["median"] for phase in ("forward", "backward"))
            cells.append(f"{ms(forward)} + {ms(backward)} ({(forward + backward) / whole:.0%})")
        rows.append(_named(scene) + cells)
    return _table(["size", "E", "B", "routing", *names], rows)


def _traffic(found: list[dict]) -> list[str]:
    heads = ["size", "E", "B", "routing", "ranks", "contender", "all-to-all forward", "backward", "bytes", "bound"]
    heads += ["bytes / bound", "other collectives", "bytes of others"]
    rows = []
    for scene in found:
        for name, f in _ran(scene).items():
            calls = [f[phase]["collectives"].get(ROWS, 0) for phase in ("forward", "backward")]
            sent = sum(phase["sent"].get(ROWS, 0) for phase in f.values())
            bound = sum(phase["bound"] for phase in f.values())
            others = sum(sum(phase["collectives"].values()) for phase in f.values()) - sum(calls)
            of_others = sum(sum(phase["sent"].values()) for phase in f.values()) - sent
            over = f"{sent / bound:.3f}" if bound else ""
            cells = [*map(str, calls), f"{sent:,}", f"{bound:,}", over, str(others), f"{of_others:,}"]
            rows.append(_named(scene) + [str(scene["ranks"]), name, *cells])
    return _table(heads, rows)


def _reasons(found: list[dict]) -> Iterator[str]:
    """Who could not run, why and where."""
    where: dict[tuple[str, str], list[str]] = {}
    for scene in found:
        for name, f in scene["contenders"].items():
            if "cannot" in f:
                where.setdefault((name, f["cannot"]), []).append(" ".join(_named(scene)))
    for (name, reason), places in where.items():
        yield f"* {name} did not run: {reason} ({', '.join(places)})."


def _ran(scene: dict) -> dict[str, dict]:
    return {name: f for name, f in scene["contenders"].items() if "cannot" not in f}


def draw(found: list[dict], title: str) -> Figure:
    """Time over the dense model's: a group of bars for each scene, lines at 1 and at the goal."""
    shown = [s for s in found if any("ratio" in f for f in _ran(s).values())]
    names = list(dict.fromkeys(n for s in shown for n in _ran(s) if n != "dense"))
    figure = Figure(figsize=(max(7.0, 1.0 * len(shown) + 3), 4.6), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: pyplot would keep a list of all figures
    ax = figure.subplots()
    for number, name in enumerate(names):
        here = [(i, s["contenders"][name]["ratio"]) for i, s in enumerate(shown) if name in _ran(s)]
        place = [i + (number - (len(names) - 1) / 2) * 0.8 / len(names) for i, _ in here]
        heights = [r["median"] for _, r in here]
        errors = [[r["median"] - r["low"] for _, r in here], [r["high"] - r["median"] for _, r in here]]
        ax.bar(place, heights, 0.74 / len(names), label=name, yerr=errors, error_kw={"linewidth": 0.8})
    ax.axhline(1, color="black", linewidth=0.8)
    ax.axhline(GOAL, color="black", linewidth=0.8, linestyle="--", label=f"goal {GOAL}")
    labels = [f"{s['size']} E{s['experts']} B{s['images']}\n{s['routing']}" for s in shown]
    ax.set_xticks(range(len(shown)), labels, fontsize=7)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    ax.tick_params(axis="y", which="both", labelsize=7)
    ax.set_ylabel("time over the dense model's", fontsize=8)
    ax.set_title(title, fontsize=11)
    ax.legend(fontsize=7, ncols=len(names) + 1, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    return figure


def digits(value: float, most: int = 3) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(most - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{places}f}"


def ms(seconds: float) -> str:
    return digits(1000 * seconds)


def rate(flop_per_second: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if flop_per_second >= u), (1, ""))
    return f"{digits(flop_per_second / unit)} {name}"
