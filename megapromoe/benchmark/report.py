"""The results of a run as Markdown tables and plots."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megapromoe.benchmark.measure import paired_ratio, total_seconds
from megapromoe.benchmark.suite import BenchmarkError
from megapromoe.io import atomic_write, write_bytes, write_text
from megapromoe.plot_lines import label_log_axis
from megapromoe.plot_styles import COLOURS, HATCHES, assign

HEADINGS = {
    "layer": "The MoE layer, forward and backward",
    "step": "The training step",
    "sample": "Sampling",
    "traffic": "Bytes between ranks",
}
ROWS = "alltoall_base_"  # the collective that sends rows to experts and back
GOAL = 1.05  # time over that of the dense layer
CASES_PER_ROW = 9  # of a plot


def write_report(document: dict[str, Any], out: Path) -> list[Path]:
    """Writes benchmark.md, and a plot for each timed experiment, into a folder; returns the files."""
    pictures = []
    for experiment in HEADINGS:
        cases = [s for s in document["scenes"].values() if s["experiment"] == experiment]
        if experiment != "traffic" and any("ratio" in f for s in cases for f in s["contenders"].values()):
            path = out / f"benchmark-{experiment}.png"
            with atomic_write(path) as file:
                draw(cases, HEADINGS[experiment]).savefig(file, format="png", dpi=110)
            pictures.append(path)
    text = markdown(document, {p.stem.removeprefix("benchmark-"): p.name for p in pictures})
    write_text(out / "benchmark.md", text, parents=True)
    return [out / "benchmark.md", *pictures]


def fill(page: Path, document: dict[str, Any], out: Path) -> None:
    """Writes the report between the marks for this kind of device in a page, and the plots into the folder of the page.

    The marks are `<!-- begin cpu -->` and `<!-- end cpu -->`, or cuda. Raises BenchmarkError if the page has not both.
    """
    kind = document["machine"]["kind"]
    text = page.read_text(encoding="utf-8")
    marks = f"<!-- begin {kind} -->", f"<!-- end {kind} -->"
    if not all(text.count(mark) == 1 for mark in marks) or text.index(marks[0]) > text.index(marks[1]):
        raise BenchmarkError(
            f"{page}: needs the lines {marks[0]} and {marks[1]}, once each and in this order; add them"
        )
    names = {}
    for path in write_report(document, out)[1:]:
        names[path.stem.removeprefix("benchmark-")] = name = f"{path.stem}-{kind}.png"
        write_bytes(page.with_name(name), path.read_bytes())
    before, after = text.split(marks[0])[0], text.split(marks[1])[1]
    write_text(page, f"{before}{marks[0]}\n\n{markdown(document, names)}\n{marks[1]}{after}")


def markdown(document: dict[str, Any], pictures: dict[str, str]) -> str:
    """All tables as Markdown. `pictures`: experiment -> file name of its plot."""
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
        cases = [s for s in document["scenes"].values() if s["experiment"] == experiment]
        if not cases:
            continue
        lines += [f"### {heading}", ""]
        if experiment in pictures:
            lines += [f"![time over the dense model's]({pictures[experiment]})", ""]
        if experiment == "traffic":
            lines += [*_traffic(cases), ""]
        else:
            lines += [*_timed(cases, peak["flop_per_second"]), "", *_counted(cases), ""]
        if any("parts" in s for s in cases):
            lines += ["Parts of ours, ms forward + backward, and their share of the total:", "", *_parts(cases), ""]
        if reasons := [*_reasons(cases)]:
            lines += [*reasons, ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _named(case: dict) -> list[str]:
    return [case["size"], str(case["experts"]), str(case["images"]), case["routing"]]


def _timed(cases: list[dict], peak: float) -> list[str]:
    phases = list(dict.fromkeys(p for s in cases for f in _ran(s).values() for p in f["seconds"]))
    phases = phases if len(phases) > 1 else []
    heads = ["size", "E", "B", "routing", "contender", *(f"{p} ms" for p in phases), "total ms (quartiles)"]
    heads += ["× dense (95 %)"]
    has_update = "update" in phases
    if has_update:  # the update is longer with more parameters, however fast the products are
        heads += ["forward and backward × dense (95 %)"]
    heads += ["× dense per FLOP", "images/s", "tokens/s", "FLOP/s", "of peak"]
    rows = []
    for case in cases:
        dense_rounds = case["contenders"].get("dense", {}).get("rounds")
        dense_flops = case["contenders"].get("dense", {}).get("flops", {}).get("useful")
        for name, f in _ran(case).items():
            total, useful, ratio = f["total"], f["flops"]["useful"], f.get("ratio")
            per_flop = digits(ratio["median"] * dense_flops / useful) if ratio else ""
            rows.append(
                _named(case)
                + [name, *(ms(f["seconds"][p]["median"]) for p in phases)]
                + [f"{ms(total['median'])} ({ms(total['low'])}–{ms(total['high'])})"]
                + [_ratio(ratio) if ratio else ""]
                + ([_without_update(f["rounds"], dense_rounds)] if has_update else [])
                + [per_flop]
                + [digits(case["images"] / total["median"]), digits(case["tokens"] / total["median"])]
                + [rate(useful / total["median"]), f"{useful / total['median'] / peak:.0%}"]
            )
    return _table(heads, rows)


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _without_update(rounds: dict[str, list[float]], dense: dict[str, list[float]] | None) -> str:
    """Forward and backward over those of the dense model, round by round."""
    if dense is None:
        return ""
    ours, reference = (total_seconds({p: v for p, v in r.items() if p != "update"}) for r in (rounds, dense))
    return _ratio(asdict(paired_ratio(ours, reference)))


def _counted(cases: list[dict]) -> list[str]:
    heads = ["size", "E", "B", "routing", "contender", "useful FLOPs", "done / useful", "peak MiB", "× necessary"]
    heads += ["kernels", "allocations", "host waits", "dropped rows"]
    rows = []
    for case in cases:
        for name, f in _ran(case).items():
            counts, memory, useful = f["counts"]["total"], f["memory"], f["flops"]["useful"]
            waits = counts["gpu_waits"] or sum(counts["waits"].values())
            rows.append(
                _named(case)
                + [name, digits(useful / 1e9) + " G", f"{counts['flops'] / useful:.2f}"]
                + [f"{memory.get('allocator_peak', memory['peak']) / 2**20:.1f}"]
                + [f"{memory['peak'] / memory['necessary']:.2f}" if "necessary" in memory else ""]
                + [str(counts["kernels"]), str(counts["allocations"]), str(waits), f"{f['dropped']:.0%}"]
            )
    return _table(heads, rows)


def _parts(cases: list[dict]) -> list[str]:
    cases = [s for s in cases if "parts" in s]
    names = list(cases[0]["parts"])
    rows = []
    for case in cases:
        total = case["contenders"]["ours"]["total"]["median"]
        cells = []
        for part in case["parts"].values():
            forward, backward = (part[phase]["median"] for phase in ("forward", "backward"))
            cells.append(f"{ms(forward)} + {ms(backward)} ({(forward + backward) / total:.0%})")
        rows.append(_named(case) + cells)
    return _table(["size", "E", "B", "routing", *names], rows)


def _traffic(cases: list[dict]) -> list[str]:
    heads = ["size", "E", "B", "routing", "ranks", "contender", "all-to-all forward", "backward", "bytes", "bound"]
    heads += ["bytes / bound", "other collectives", "bytes of others"]
    rows = []
    for case in cases:
        for name, f in _ran(case).items():
            calls = [f[phase]["collectives"].get(ROWS, 0) for phase in ("forward", "backward")]
            sent = sum(phase["sent"].get(ROWS, 0) for phase in f.values())
            bound = sum(phase["bound"] for phase in f.values())
            others = sum(sum(phase["collectives"].values()) for phase in f.values()) - sum(calls)
            other_bytes = sum(sum(phase["sent"].values()) for phase in f.values()) - sent
            over = f"{sent / bound:.3f}" if bound else ""
            cells = [*map(str, calls), f"{sent:,}", f"{bound:,}", over, str(others), f"{other_bytes:,}"]
            rows.append(_named(case) + [str(case["ranks"]), name, *cells])
    return _table(heads, rows)


def _reasons(cases: list[dict]) -> Iterator[str]:
    """The contenders that could not run, with the reason and the cases."""
    places_of: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, f in case["contenders"].items():
            if "cannot" in f:
                places_of.setdefault((name, f["cannot"]), []).append(" ".join(_named(case)))
    for (name, reason), places in places_of.items():
        yield f"* {name} did not run: {reason} ({', '.join(places)})."


def _ran(case: dict) -> dict[str, dict]:
    return {name: f for name, f in case["contenders"].items() if "cannot" not in f}


def draw(cases: list[dict], title: str) -> Figure:
    """Plots time over that of the dense model: a group of bars for each case, lines at 1 and at the goal."""
    shown = [s for s in cases if any("ratio" in f for f in _ran(s).values())]
    names = list(dict.fromkeys(n for s in shown for n in _ran(s) if n != "dense"))
    rows = [shown[i : i + CASES_PER_ROW] for i in range(0, len(shown), CASES_PER_ROW)]
    figure = Figure(figsize=(1.15 * min(len(shown), CASES_PER_ROW) + 2.5, 1.2 + 3.0 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which would keep all figures in memory
    panels = list(figure.subplots(len(rows), 1, sharey=True, squeeze=False).flatten())
    styles = assign(names)
    for ax, row in zip(panels, rows, strict=True):
        for number, name in enumerate(names):
            ratios = [(i, s["contenders"][name]["ratio"]) for i, s in enumerate(row) if name in _ran(s)]
            x = [i + (number - (len(names) - 1) / 2) * 0.8 / len(names) for i, _ in ratios]
            heights = [r["median"] for _, r in ratios]
            errors = [[r["median"] - r["low"] for _, r in ratios], [r["high"] - r["median"] for _, r in ratios]]
            style = {"color": styles[name].colour, "hatch": HATCHES[number // len(COLOURS) % len(HATCHES)]}
            ax.bar(x, heights, 0.74 / len(names), label=name, yerr=errors, error_kw={"linewidth": 0.8}, **style)
        ax.axhline(1, color="black", linewidth=1.2, label="dense")
        ax.axhline(GOAL, color="black", linewidth=0.8, linestyle="--", label=f"goal {GOAL}")
        labels = [f"{s['size']} E{s['experts']} B{s['images']}\n{s['routing']}" for s in row]
        ax.set_xticks(range(len(row)), labels, fontsize=7)
        ax.set_xlim(-0.7, min(len(shown), CASES_PER_ROW) - 0.3)
        ax.set_ylabel("time over the dense model's", fontsize=8)
    for ax in panels:
        label_log_axis(ax, "y")
        ax.tick_params(axis="y", labelsize=7)
    figure.suptitle(title, fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=4, loc="outside lower center", frameon=False)
    return figure


def digits(value: float, significant: int = 3) -> str:
    """The value with so many significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(significant - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{decimals}f}"


def ms(seconds: float) -> str:
    """Seconds as milliseconds."""
    return digits(1000 * seconds)


def rate(flop_per_second: float) -> str:
    """FLOP/s with a decimal prefix, such as "1.23 T"."""
    unit, name = next(((u, n) for u, n in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if flop_per_second >= u), (1, ""))
    return f"{digits(flop_per_second / unit)} {name}"
