"""What is counted of the routing of models of texts: words and groups of tokens, against counts by hand."""

import numpy as np
import pytest

from megapromoe.data.scenes.combinations import DIGIT
from megapromoe.data.scenes.recorded import NO_GROUP, group_of_tokens
from megapromoe.data.scenes.scenes import Scenes
from megapromoe.routing_analysis import text_figures
from megapromoe.routing_analysis.captioned_images import BACKGROUND, NO_COLOUR, groups_of_scenes
from megapromoe.routing_analysis.observe import Routing
from megapromoe.routing_analysis.text_routing import GroupRows, TextRouting, word_loads, words_of


def test_words_are_without_case_and_punctuation():
    assert words_of("A cat's Café, 'two' well-known dogs... (dogs)!") == {
        "a",
        "cat's",
        "café",
        "two",
        "well-known",
        "dogs",
    }
    assert words_of(" .,- ") == set()


def test_loads_of_words_are_means_over_images():
    captions = ["red three"] * 6 + ["blue three"] * 7
    rows_NE = np.array([[8, 0]] * 6 + [[2, 6]] * 6 + [[6, 2]])
    words = word_loads(rows_NE[None], captions)
    assert words.words == ("blue", "red") and words.count_W.tolist() == [7, 6]  # all captions have "three"
    blue = rows_NE[6:] / 8
    np.testing.assert_allclose(words.load_LWE[0], [blue.mean(0), [1, 0]])
    np.testing.assert_allclose(words.without_LWE[0], [[1, 0], blue.mean(0)])
    np.testing.assert_allclose(words.lift_LWE[0, 1], [1 / blue[:, 0].mean(), 0])
    np.testing.assert_allclose(words.error_LWE[0, 1], blue.std(0, ddof=1) / np.sqrt(7))
    np.testing.assert_allclose(words.standard_errors_LWE, (words.load_LWE - words.without_LWE) / words.error_LWE)


def test_words_that_few_captions_have_or_lack_are_left_out():
    captions = ["a b c"] * 4 + ["a b"] + ["a"] * 5
    rows = np.ones((1, 10, 2), dtype=int)
    words = word_loads(rows, captions)
    assert words.words == ("b",)
    assert (words.lift_LWE == 1).all() and not words.standard_errors_LWE.any()
    assert word_loads(rows, ["a"] * 10).words == ()


@pytest.mark.parametrize("side", [8, 4, 2])
def test_a_token_shows_the_digit_whose_ink_is_in_it(side):
    data, patch, kinds = Scenes(60, seed=5), 16 // side, set()
    for number in range(len(data)):
        scene = data.scene_at(number)
        group_S = group_of_tokens(scene, side)
        for token, group in enumerate(group_S):
            row, column = divmod(token, side)
            ink = [0] * len(scene.boxes)
            for y in range(row * patch, (row + 1) * patch):
                for x in range(column * patch, (column + 1) * patch):
                    for g, boxes in enumerate(scene.boxes):
                        inside = any(0 <= y - top < DIGIT and 0 <= x - left < DIGIT for top, left in boxes)
                        ink[g] += bool(inside and scene.pixels[y, x].any())
            assert group == (NO_GROUP if not any(ink) else ink.index(max(ink)))
            kinds.add(int(group))
    assert kinds >= {0, 1}


def test_tokens_of_scenes_have_the_digit_and_the_colour_of_their_caption():
    data = Scenes(80, seed=3)
    scenes = [data.scene_at(number) for number in range(len(data))]
    digits, colours = groups_of_scenes(scenes, 8)
    for number, scene in enumerate(scenes):
        shown = {digits.names[g] for g in digits.group_NS[number]} - {BACKGROUND}
        assert shown == {digits.names[1 + group.digit] for group in scene.shown.groups}
        named = {colours.names[g] for g in colours.group_NS[number]} - {BACKGROUND}
        assert named == {group.colour or NO_COLOUR for group in scene.stated.groups}
        assert ((digits.group_NS[number] == 0) == (colours.group_NS[number] == 0)).all()
        for token in np.flatnonzero(colours.group_NS[number]):
            top, left = (int(2 * place) for place in divmod(token, 8))
            assert scene.pixels[top : top + 2, left : left + 2].any()


@pytest.mark.full
def test_many_layers_experts_and_strange_captions_fit_a_picture():
    rng = np.random.default_rng(0)
    L, E, N = 36, 16, 12
    blocks = tuple(range(L))
    rows = rng.integers(0, 50, (3, L, N, E))
    visits, experts = rng.integers(0, 50, (L, E + 1)), rng.integers(-1, E, (L, N, 16))
    images = rng.normal(size=(N, 16, 8, 8))
    routing = Routing(blocks, (0.1, 0.5, 0.9), rows.sum(2, keepdims=True), visits, experts, images, np.zeros(N, int))
    captions = tuple(["$\\alpha", "\u00e9\u4e2d", "a " * 99, ""] * 3)
    groups = GroupRows("digit", tuple(f"group {g}" for g in range(11)), rng.integers(0, 9, (3, L, 11, E)))
    measured = TextRouting(routing, captions, rows, (groups,))
    maps = text_figures.captions_figure(measured, 4)
    assert len(maps.axes) == (1 + 4) * 10
    words = word_loads(rows.sum(0), [f"some {'$x_y' if n % 2 else 'word'}" for n in range(N)])
    bits_ML = {"digit": rng.random((3, L)), "word": np.zeros((3, L))}
    for figure in (
        maps,
        text_figures.groups_figure(blocks, groups),
        text_figures.words_figure(blocks, words),
        text_figures.information_figure(blocks, routing.levels, bits_ML),
    ):
        assert figure.get_figheight() < 35 and figure.get_figwidth() < 16
        figure.canvas.draw()
