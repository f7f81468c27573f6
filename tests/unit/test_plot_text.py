"""Names that users give are drawn as they are written, in every plot that shows one."""

import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from support.small_studies import finished, recipe, rows

from megapromoe.cli import main
from megapromoe.evaluation import image_metrics_report
from megapromoe.plot_text import legible, literal
from megapromoe.routing_analysis import figures
from megapromoe.routing_analysis.observe import Routing, Tokens
from megapromoe.studies.plots import draw_all, draw_compute, draw_experts, draw_routing

NAMES = (r"$\bad{$", "$x$", "_x", "5 $ or 6 $", r"a\$b", "猫", "Жук", "a\nb", "50 %_{^", "naïve")


def drawn(text, **options):
    """The pixels of a text, and its width."""
    figure = Figure(figsize=(4, 0.5))
    canvas = FigureCanvasAgg(figure)
    figure.text(0.05, 0.5, text, **options)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_as_it_is_written(name):
    shown = drawn(literal(name))
    assert (shown < 128).any()
    expected = legible(name) if name != "_x" else " _x"
    np.testing.assert_array_equal(shown, drawn(expected, parse_math=False))


def test_characters_that_the_font_lacks_are_escaped():
    assert legible("猫 Жук naïve\n\udcff") == r"\u732b Жук naïve\n\udcff"


def labels(figure):
    """All texts of a figure that are drawn, as they are."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def routing():
    """Ten classes, two layers, three experts."""
    rng, C, L, E = np.random.default_rng(0), len(NAMES), 2, 3
    tokens = Tokens(rng.normal(size=(L, 40, 2)), rng.integers(-1, E, (L, 40)), np.arange(40) % C)
    return Routing(
        (1, 3),
        (0.5,),
        rng.integers(1, 50, (1, L, C, E)),
        rng.integers(0, 50, (L, E + 1)),
        rng.integers(-1, E, (L, C, 16)),
        rng.normal(size=(C, 1, 8, 8)),
        np.arange(C),
        tokens,
    )


@pytest.mark.full
def test_names_of_classes_in_pictures_of_routing():
    observed = routing()
    shares, apart = np.ones((2, 10, 3)), np.zeros((2, 10, 10))
    drawn_figures = {
        "draw": figures.routing_figure(observed, NAMES, 4),
        "shares": figures.shares_figure(observed, NAMES),
        "maps": figures.maps_figure(observed, NAMES, 4),
        "scatter": figures.scatter_figure(observed, observed.tokens.x_LTD, [0, 1], NAMES),
        "subsets": figures.subsets_figure(observed, NAMES, shares, apart),
    }
    for name, figure in drawn_figures.items():
        shown = labels(figure)
        assert {literal(class_name) for class_name in NAMES} <= set(shown), name


@pytest.mark.full
def test_names_of_models_values_and_networks_in_the_pictures_of_a_study(tmp_path):
    made = recipe(
        preset="fashion",
        variants={"_promoe": {}, "промо": {}},
        baseline="_promoe",
        axes={"data.path": [r"$\bad{$", "$x$"], "model.num_experts": [2, 4]},
    )
    study = finished(tmp_path, made, lambda task: 0.5 + 0.01 * task.seed)
    for task in study.tasks:
        records = [
            {"step": step, "guidance": 1.0, "count": 9, "figures": {r"Fréchet distance ($\bad{$)": 2.0 + task.seed}}
            for step in (1, 3)
        ]
        (study.run(task) / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    paths = draw_all(study, rows(study), r"a note of $\bad{$")
    pictures = ["differences", "loss_experts", "loss_compute", "routing", "cost", "images", "evaluations"]
    assert [path.stem for path in paths] == pictures


def test_a_model_whose_name_begins_with_an_underscore_is_in_the_legends(tmp_path):
    study = finished(tmp_path, recipe(variants={"_promoe": {}}))
    for draw in (draw_experts, draw_compute, draw_routing):
        figure = draw(study, rows(study))
        axes = figure.axes
        shown = [text.get_text() for ax in axes if ax.get_legend() for text in ax.get_legend().get_texts()]
        shown += [text.get_text() for ax in axes for text in ax.texts]  # at the ends of lines
        shown += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        assert any("_promoe" in text for text in shown), draw


def test_the_name_of_a_network_in_the_picture_of_an_evaluation(tmp_path):
    record = {"figures": {r"Fréchet distance ($\bad{$)": 1.0}, "count": 9}
    guidance = [record | {"step": 3, "guidance": g} for g in (1.0, 2.0)]
    steps = [record | {"step": step, "guidance": 1.0} for step in (1, 2)]
    for name, records in (("guidance", guidance), ("steps", steps)):
        image_metrics_report.plot(records, tmp_path / f"{name}.png")
        assert Image.open(tmp_path / f"{name}.png").size[0] > 300


def test_the_name_of_a_configuration_in_the_picture_of_a_plan(tmp_path):
    file = tmp_path / r"$\bad{$.yaml"
    file.write_text("data: {source: synthetic}")
    words = ["plan", "--config", str(file), "--nodes", "1", "--gpus-per-node", "8", "--top", "2"]
    assert main([*words, "--plot", str(tmp_path / "x.png")]) == 0
    assert Image.open(tmp_path / "x.png").size[0] > 300
