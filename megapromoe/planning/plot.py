"""Plots planned memory: a stacked bar for each layout, and the limit."""

from collections.abc import Sequence
from pathlib import Path

from megapromoe.io import atomic_write
from megapromoe.planning.machines import GIB, Machine
from megapromoe.planning.memory import Budget
from megapromoe.planning.search import Plan
from megapromoe.plot_styles import STACKED
from megapromoe.plot_text import literal


def draw(plans: Sequence[Plan], machine: Machine, limit: float, title: str, path: Path) -> None:
    """Writes the plot; the suffix of `path` is the type. Raises ValueError for a type that matplotlib lacks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.45 * len(plans)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"{number}  {_name(plan)}" for number, plan in enumerate(plans, start=1)]
    left = [0.0] * len(plans)
    for line, colour in zip(Budget.LINES, STACKED, strict=True):
        widths = [getattr(plan.memory, line) / GIB for plan in plans]
        axes.barh(names, widths, left=left, color=colour, label=line, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    # The axis ends at the bars, not at the memory of the GPU, which may be far larger and would make them tiny.
    width = 1.25 * max(left)
    marks = (
        (limit, "--", f"limit, {limit / GIB:.0f} GiB"),
        (machine.memory, "-", f"{machine.name}, {machine.memory / GIB:.0f} GiB"),
    )
    for place, style, label in marks:
        if place / GIB <= width:
            axes.axvline(place / GIB, color="black", linestyle=style, label=label)
        else:
            axes.plot([], [], color="black", linestyle=style, label=f"{label},\nbeyond this axis")
    for y, (plan, end) in enumerate(zip(plans, left, strict=True)):
        share = f" {plan.memory.peak / GIB:.1f} GiB, {plan.memory.peak / machine.memory:.0%} "
        axes.text(end, y, share, va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, width)
    axes.set_xlabel(f"GiB of the fullest GPU (estimates), and per cent of its {machine.memory / GIB:.0f}")
    axes.set_title(literal(title))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    with atomic_write(path if path.suffix else path.with_suffix(".png")) as file:
        figure.savefig(file, format=path.suffix.lstrip(".") or "png", dpi=150)


def _name(plan: Plan) -> str:
    parallel = plan.config.parallel
    words = [f"tp {parallel.tp} ep {parallel.ep}", literal(plan.config.train.deepspeed)]
    words += ["split"] * parallel.expert_tp + [f"recompute {parallel.recompute}"] * (parallel.recompute != "none")
    words += [f"states over {parallel.shard_ranks}"] * bool(parallel.shard_ranks)
    return f"{' '.join(words)}\n{1e3 * plan.time.total:.0f} ms"
