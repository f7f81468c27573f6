"""Plots of many variants: no two look alike, the baseline is black, no text covers another, axes have labels."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from support.small_studies import TINY, finished, recipe, rows

from megapromoe.benchmark.report import draw as draw_benchmark
from megapromoe.config.resolve import resolve
from megapromoe.evaluation import image_metrics_report
from megapromoe.planning.machines import GIB, MACHINES, Assumptions
from megapromoe.planning.plot import draw as draw_plan
from megapromoe.planning.search import search
from megapromoe.plot_lines import MAX_LINES, Curve, draw_curves, label_log_axis, log_ticks, name_ends, spread
from megapromoe.plot_styles import BASELINE_COLOUR, DISTINCT, MEMBERS, Style, area_colours, assign, assign_families
from megapromoe.run_lines import DENOISING_LOSS
from megapromoe.studies.evaluation_plots import draw_evaluations
from megapromoe.studies.image_plots import draw_images
from megapromoe.studies.plots import draw_compute, draw_cost, draw_experts, draw_routing

NAMES = [f"promoe_without_part_{n}" for n in range(23)]


def triples(styles):
    return {(style.colour, style.line, style.marker) for style in styles.values()}


@pytest.mark.parametrize("place", (0, 7, 23))
def test_24_variants_have_24_styles_and_the_baseline_is_black_at_any_position(place):
    for baseline in ("dense", "zz", "_a"):
        names = [*NAMES[:place], baseline, *NAMES[place:]]
        styles = assign(names, baseline)
        assert list(styles) == names and len(triples(styles)) == 24
        assert [name for name in names if styles[name].colour == BASELINE_COLOUR] == [baseline]
        assert styles[baseline] == Style("#000000", "-", "o")
        # Colour and line style alone tell the lines apart, where a marker is small.
        assert len({(style.colour, style.line) for style in styles.values()}) == 24


def test_no_style_is_used_twice_up_to_the_largest_number():
    assert len(triples(assign(range(DISTINCT)))) == DISTINCT == 240
    assert BASELINE_COLOUR not in {style.colour for style in assign(range(DISTINCT)).values()}


@pytest.mark.parametrize(("families", "members"), [(1, 24), (2, 4), (6, MEMBERS), (6, 41), (7, 3), (24, 1)])
def test_points_of_variants_have_styles_of_their_own(families, members):
    keys = [(f"v{f}", m) for f in range(families) for m in range(min(members, 240 // families))]
    keys += [("dense", 0), ("dense", 1)]
    for order in (keys, keys[::-1]):
        styles = assign_families(order, "dense")
        assert list(styles) == order and len(triples(styles)) == len(order)
        assert {key for key, style in styles.items() if style.is_baseline} == {("dense", 0), ("dense", 1)}
    if 1 < families <= 6 and members <= MEMBERS:
        assert len({style.colour for style in styles.values()}) == families + 1


def study_of(tmp_path, count, axes=None):
    """A study of `count` variants whose curves end close together, with figures of drawn images at three steps."""
    names = [*NAMES[: count - 1], "dense"]
    variants = {name: {} for name in names[:-1]}
    variants["dense"] = {"settings": {"model.router": "dense"}, "without": list(axes or {})}
    steps = {"train.steps": 40}
    made = recipe(variants=variants, baseline="dense", axes=axes or {}, settings=TINY | steps)
    study = finished(tmp_path, made, lambda task: 0.5 + 0.001 * task.seed)
    for task in study.tasks:
        nth = names.index(task.variant)
        file = study.run(task) / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()[:-1]]
        for line in lines:
            step = line["step"]
            line[DENOISING_LOSS] = 0.25 + 1.2 / (step + 3) * (1 + 0.2 * math.sin(nth + step / 9)) + 0.0007 * nth
            line["memory_bytes"] = (600 + 5 * nth) * 2**20
            if "load_entropy" in line:
                line["load_entropy"] = 0.9 + 0.004 * nth - 0.2 / step
                line["dead_experts"] = int(3 * math.exp(-step / (4 + nth)))
                line["expert_load"] = [[9, *(3 + nth % 5 for _ in layer[1:])] for layer in line["expert_load"]]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        records = [
            {"step": step, "guidance": g, "count": 500, "figures": {"Fréchet distance (X)": 900 / step + nth % 5 + g}}
            for step in (10, 20, 40)
            for g in (1.0, 1.5)
        ]
        (study.run(task) / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return study


def pictures(study):
    results = rows(study)
    drawn = {"experts": draw_experts(study, results), "compute": draw_compute(study, results)}
    drawn |= {"routing": draw_routing(study, results), "cost": draw_cost(study, results, "a note")}
    return {
        name: figure
        for name, figure in (
            drawn | {"images": draw_images(study, results), "evaluations": draw_evaluations(study, results)}
        ).items()
        if figure
    }


def overlapping(figure):
    """Pairs of texts whose boxes cover one another by more than a pixel, as the renderer draws them."""
    FigureCanvasAgg(figure).draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    hidden = {tick for ax in figure.findobj(match=lambda a: hasattr(a, "get_xticks")) for tick in unseen_ticks(ax)}
    boxes = [(t.get_text(), Text.get_window_extent(t)) for t in texts if t not in hidden]
    return [
        (first, other)
        for (first, a), (other, b) in itertools.combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


def unseen_ticks(ax):
    """Labels that matplotlib keeps and does not draw: of ticks outside the limits, of axes that are switched off."""
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        slack = 1e-9 * (high - low)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not ax.axison or not low - slack <= tick.get_loc() <= high + slack:
                yield from (tick.label1, tick.label2)


@pytest.mark.full
@pytest.mark.parametrize("count", (1, 3, 12, 24))
def test_no_text_covers_another_in_the_pictures_of_a_study(tmp_path, count):
    drawn = pictures(study_of(tmp_path, count))
    assert set(drawn) == {"compute", "cost", "images", "evaluations"} | ({"routing"} if count > 1 else set())
    for name, figure in drawn.items():
        assert not overlapping(figure), name


@pytest.mark.full
def test_no_text_covers_another_where_variants_have_points(tmp_path):
    drawn = pictures(study_of(tmp_path, 3, {"model.num_experts": [2, 4, 8, 16]}))
    assert set(drawn) == {"experts", "compute", "routing", "cost", "images", "evaluations"}
    for name, figure in drawn.items():
        assert not overlapping(figure), name


def test_the_overlap_measure_detects_overlapping_texts():
    figure = Figure()
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "another")
    assert overlapping(figure) == [("one", "another")]


def panels_of(count, place):
    styles = assign(NAMES[: count - 1] + ["dense"], "dense")
    curves = [Curve([1, 2, 3], [3.0, 2.0, 1.0], name, style) for name, style in styles.items()]
    return draw_curves(place, curves, "title", lambda ax: ax.set(xlabel="step", ylabel="loss"))


def test_curves_that_end_in_one_point_have_labels_that_do_not_overlap():
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = panels_of(MAX_LINES, figure)
    name_ends(panels)
    assert len(panels) == 1 and {text.get_text() for text in panels[0].texts} - {""} == {
        *NAMES[: MAX_LINES - 1],
        "dense",
    }
    assert not overlapping(figure)


@pytest.mark.full
def test_more_become_small_multiples_each_with_the_baseline_in_black():
    figure = Figure(figsize=(8, 9), layout="constrained")
    panels = panels_of(24, figure)
    name_ends(panels)
    assert [ax.get_title() for ax in panels] == [*NAMES, "dense"]
    for ax in panels:
        shown = [line.get_color() for line in ax.lines if not line.get_label().startswith("_")]
        assert BASELINE_COLOUR in shown and len(shown) == 2 - (ax.get_title() == "dense")
    assert not overlapping(figure)


def test_places_of_labels_are_apart_and_in_order():
    generator = np.random.default_rng(0)
    for wanted in (generator.random(12), np.zeros(12), np.ones(12), generator.normal(size=9)):
        places = spread(list(wanted), 0.08)
        apart = np.diff(np.array(places)[np.argsort(wanted, kind="stable")])
        assert apart.min() >= 0.08 - 1e-12 and min(places) >= -1e-12 and max(places) <= 1 + 1e-12
    assert spread([0.2, 0.5, 0.9], 0.1) == pytest.approx([0.2, 0.5, 0.9]), "labels with room stay beside their lines"


@pytest.mark.parametrize(
    ("low", "high"), [(0.25, 0.31), (1.0, 1.02), (0.4, 2.4), (2.6e10, 9e11), (1e3, 1e9), (14, 130), (1e-5, 3e-5)]
)
def test_a_log_axis_has_labels_over_less_than_a_decade_too(low, high):
    assert 3 <= len(log_ticks(low, high)) <= 9
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    ax.plot([low, high], [low, high])
    for which in ("x", "y"):
        label_log_axis(ax, which)
    FigureCanvasAgg(figure).draw()
    for axis in (ax.xaxis, ax.yaxis):
        start, end = axis.get_view_interval()
        shown = [tick.label1.get_text() for tick in axis.get_major_ticks() if start <= tick.get_loc() <= end]
        assert len(shown) >= 3 and all(shown) and len(set(shown)) == len(shown)
    assert not overlapping(figure)


@pytest.mark.parametrize(
    ("rates", "text"), [((1, 1), "the same number"), ((1, 1.004), "at most 0.4 %"), ((1, 1.5), "at most 50 %")]
)
def test_differences_of_operations_are_shown_in_per_cent(tmp_path, rates, text):
    study = finished(tmp_path, recipe(axes={}, variants={"a": {}, "b": {}}))
    results = rows(study)
    for row in results:
        row["training_flops"] = 1e9 * rates["ab".index(row["variant"])]
    (ax,) = draw_compute(study, results).axes
    assert text in ax.get_title() and "factor" not in ax.get_title()


@pytest.mark.full
@pytest.mark.parametrize("names", (1, 4, 12, 24))
def test_no_text_covers_another_in_the_picture_of_an_evaluation(tmp_path, monkeypatch, names):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    record = {"figures": {"Fréchet distance (X)": 1.0}, "count": 500}
    scales = [1 + 0.125 * n for n in range(names)]
    image_metrics_report.plot([record | {"step": s, "guidance": g} for g in scales for s in (1, 2)], tmp_path / "x.png")
    assert not overlapping(drawn[0])


@pytest.mark.full
@pytest.mark.parametrize(("top", "memory"), [(1, 80), (24, 80), (24, 10)])
def test_bars_of_memory_fill_the_picture_of_a_plan_and_have_their_figures(tmp_path, monkeypatch, top, memory):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    machine = replace(MACHINES["h100"], memory=memory * GIB)
    result = search(resolve("promoe_xl"), 8, machine, Assumptions())
    draw_plan(result.fitting[:top], machine, result.limit, "promoe_xl", tmp_path / "x.png")
    (figure,) = drawn
    assert not overlapping(figure)
    (ax,) = figure.axes
    longest = max(plan.memory.peak for plan in result.fitting[:top]) / GIB
    assert 0.75 < longest / ax.get_xlim()[1] < 0.85
    peaks = [plan.memory.peak for plan in result.fitting[:top]]
    figures = [f"{peak / GIB:.1f} GiB, {peak / machine.memory:.0%}" for peak in peaks]
    assert figures == [text.get_text().strip() for text in ax.texts]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any("beyond this axis" in name for name in names) == (machine.memory / GIB > ax.get_xlim()[1])


@pytest.mark.full
@pytest.mark.parametrize(("scenes", "count"), [(1, 1), (18, 4), (30, 12)])
def test_bars_of_a_benchmark_differ_in_colour_or_hatch(scenes, count):
    ratio = {"ratio": {"median": 1.1, "low": 1.05, "high": 1.2}}
    contenders = {"dense": ratio} | {f"way {n}": ratio for n in range(count)}
    names = ("size", "experts", "images", "routing")
    cases = [dict(zip(names, ("digits", 4, n, "real"), strict=True), contenders=contenders) for n in range(scenes)]
    figure = draw_benchmark(cases, "title")
    assert not overlapping(figure)
    bars = [drawn[0] for drawn in figure.axes[0].containers if isinstance(drawn, BarContainer)]
    assert len(bars) == len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == count


def test_areas_have_different_colours():
    for count in (1, 12, 24, 100):
        assert len(set(area_colours(count))) == count
