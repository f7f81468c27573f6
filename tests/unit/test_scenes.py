"""Scenes: determined by seed and index; captions are true; held-out combinations are never in training."""

import hashlib
import json
import re
from itertools import product

import numpy as np
import pytest

from megapromoe.data.datasets import DatasetError
from megapromoe.data.scenes import combinations
from megapromoe.data.scenes.combinations import CANVAS, COLOURS, DIGIT, Description, Group, held_out_parts
from megapromoe.data.scenes.draws import Draws
from megapromoe.data.scenes.scenes import DigitImages, Scenes
from megapromoe.data.scenes.wording import caption, prompt

COUNT = 1800
GOLDEN = "81fe626faf386a0d"  # the first 50 scenes of seed 0: trained models depend on them


@pytest.fixture(scope="module")
def scenes():
    data = Scenes(COUNT)
    return [data.scene_at(index) for index in range(COUNT)]


def facts(s) -> dict[str, set]:
    """The combinations in a scene, from its digits and their places alone."""
    digits = [(g.digit, g.colour, box) for g, boxes in zip(s.shown.groups, s.boxes, strict=True) for box in boxes]
    names = {digit for digit, _, _ in digits}
    result = {
        "colour": {(colour, digit) for digit, colour, _ in digits},
        "count": {(len(boxes), g.digit) for g, boxes in zip(s.shown.groups, s.boxes, strict=True)},
        "pair": {(a, b) for a, b in product(names, names) if a < b},
        "place": set(),
    }
    for a, b in product(names, names):
        if a == b:
            continue
        first, second = ([box for digit, _, box in digits if digit == name] for name in (a, b))
        for axis, relation in ((0, "above"), (1, "left of")):
            if max(box[axis] for box in first) + DIGIT <= min(box[axis] for box in second):
                result["place"].add((a, relation, b))
                result["place"].add((b, combinations.OPPOSITE[relation], a))
    return result


HELD_OUT = {
    "colour": (combinations.colour_combinations, 12, 48),
    "count": (combinations.count_combinations, 6, 24),
    "pair": (combinations.pair_combinations, 9, 36),
    "place": (combinations.place_combinations, 56, 232),
}


@pytest.mark.parametrize("kind", HELD_OUT)
def test_training_never_shows_a_held_out_combination_and_shows_the_others(kind, scenes):
    listed, held, others = HELD_OUT[kind]
    held_out, trained = set(listed(True)), set(listed(False))
    assert len(held_out) == held and len(trained) == others and not held_out & trained
    shown = set().union(*(facts(s)[kind] for s in scenes))
    assert not shown & held_out
    assert len(shown & trained) > 0.85 * len(trained)
    test_split = Scenes(COUNT // 2, split="test")
    assert set().union(*(facts(test_split.scene_at(i))[kind] for i in range(len(test_split)))) & held_out


def test_every_word_of_a_held_out_combination_is_in_training():
    colours = list(combinations.colour_combinations(True))
    assert {colour for colour, _ in colours} == set(COLOURS) and {digit for _, digit in colours} == set(range(10))
    assert held_out_parts(Description((Group(2, 4, "red"), Group(1, 5, "red")), ("above",))) == ["2 of 4", "red 5"]
    assert held_out_parts(Description((Group(1, 0, "green"), Group(1, 2, "red")))) == ["0 and 2"]
    assert held_out_parts(Description((Group(1, 3, "red"), Group(1, 5, "green")), ("above",))) == []
    above = Description((Group(1, 1, "red"), Group(1, 0, "green")), ("above",))
    assert held_out_parts(above) == ["1 above 0"] and held_out_parts(above.swapped()) == ["0 below 1"]


def test_train_and_test_are_made_of_different_images():
    train, test = DigitImages("train"), DigitImages("test")
    assert len(train.images) + len(test.images) == 1797 and len(test.images) == 300
    assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in test.images}
    assert min(len(images) for images in test.of_digit) > 20
    with pytest.raises(DatasetError, match="split 'val': must be one of train, test"):
        Scenes(3, split="val")


def test_a_scene_depends_on_seed_split_and_index_only(scenes):
    again = Scenes(3)
    assert again.scene_at(2).to_dict() == scenes[2].to_dict() and (again.scene_at(2).pixels == scenes[2].pixels).all()
    others = [Scenes(3, seed=1).scene_at(2), Scenes(3, split="test").scene_at(2), again.scene_at(1)]
    assert all((other.pixels != scenes[2].pixels).any() for other in others)
    digest = hashlib.sha256()
    for s in scenes[:50]:
        digest.update(json.dumps(s.to_dict()).encode() + s.pixels.tobytes())
    assert digest.hexdigest()[:16] == GOLDEN
    with pytest.raises(IndexError, match="scene 3 of 3"):
        again.scene_at(3)


def test_the_data_set_gives_pixels_of_one_class(scenes):
    images, labels = Scenes(COUNT).read(np.array([7, 3]))
    assert images.shape == (2, 3, CANVAS, CANVAS) and images.dtype == np.float32 and labels.tolist() == [0, 0]
    assert np.allclose((images[1].transpose(1, 2, 0) + 1) * 127.5, scenes[3].pixels, atol=1e-4)


def test_digits_do_not_overlap_and_all_ink_is_in_their_boxes(scenes):
    for s in scenes:
        boxes = [box for places in s.boxes for box in places]
        assert [len(places) for places in s.boxes] == [g.count for g in s.shown.groups]
        assert 1 <= len(boxes) <= 4
        covered = np.zeros((CANVAS, CANVAS), int)
        for top, left in boxes:
            covered[top : top + DIGIT, left : left + DIGIT] += 1
        assert covered.max() == 1 and covered.sum() == len(boxes) * DIGIT**2
        assert not s.pixels[covered == 0].any()


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PHRASE = re.compile(
    rf"^(?P<count>an?|two|three|four) (?:(?P<before>{'|'.join(COLOURS)}) )?(?P<digit>{'|'.join(DIGITS)}|\d)"
    r"(?P<plural>e?s)?"
    rf"(?: in (?P<after>{'|'.join(COLOURS)}))?$"
)
BETWEEN = {
    "above": "above|over|on top of|higher than",
    "below": "below|under|beneath|lower than",
    "left of": "to the left of|left of|on the left of",
    "right of": "to the right of|right of|on the right of",
}


def understood(text: str) -> Description:
    """What a caption states, by a grammar that shares nothing with the wording; checks articles and plurals."""
    text = re.sub(r"^(a picture of|an image of|a drawing of|a scene with) ", "", text)
    verb = re.match(r"there (is|are) ", text)
    text = text[verb.end() :] if verb else text
    relations: tuple[str, ...] = ()
    parts = re.split(r" together with | with | and ", text)
    for relation, words in BETWEEN.items():
        if len(split := re.split(rf" (?:{words}) ", text)) == 2 and not relations:
            parts, relations = split, (relation,)
    groups = []
    for number, part in enumerate(parts):
        match = PHRASE.match(part)
        assert match, f"{part!r} of {text!r}"
        count = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}[match["count"]]
        assert (count > 1) == bool(match["plural"]), part
        assert (match["plural"] == "es") == (count > 1 and match["digit"] == "six"), part
        if count == 1:
            next_word = part.split()[1]
            assert (match["count"] == "an") == next_word.startswith(("8", "eight")), part
        if verb and number == 0:
            assert (verb[1] == "are") == (count > 1), text
        digit = int(match["digit"]) if match["digit"].isdigit() else DIGITS.index(match["digit"])
        assert not (match["before"] and match["after"])
        groups.append(Group(count, digit, match["before"] or match["after"]))
    return Description(tuple(groups), relations)


def test_captions_state_what_is_true_in_correct_and_varied_words(scenes):
    for s in scenes:
        meaning = understood(s.caption)
        assert meaning in (s.stated, s.stated.swapped()), s.caption
        bare = tuple(Group(g.count, g.digit) for g in s.shown.groups)
        assert s.stated.groups in (s.shown.groups, bare)
        assert set(s.stated.relations) <= set(s.shown.relations) and len(s.stated.relations) < 2
        if len({g.digit for g in s.shown.groups}) < len(s.shown.groups):
            assert s.stated.groups == s.shown.groups, "the groups differ in their colours alone"
    texts = {s.caption for s in scenes}
    assert len(texts) > 0.6 * COUNT
    for word in (" in ", "there are", "there is", "a drawing of", "6", "sixes", "an eight", "beneath", "on top of"):
        assert any(word in text for text in texts), word
    assert {(len(s.stated.groups), len(s.stated.relations)) for s in scenes} == {(1, 0), (2, 0), (2, 1)}


def test_wording_of_given_descriptions():
    stated = Description((Group(2, 3, "red"), Group(1, 7, "blue")), ("above",))
    assert prompt(stated) == "a picture of two red threes above a blue seven"
    left = Description((Group(1, 8), Group(4, 6)), ("left of",))
    assert prompt(left) == "a picture of an eight to the left of four sixes"
    assert prompt(Description((Group(1, 8, "red"), Group(1, 6)))) == "a picture of a red eight and a six"
    assert all(understood(caption(stated, Draws(0, "words", i))) in (stated, stated.swapped()) for i in range(50))


def test_draws_are_uniform_and_independent_of_each_other():
    values = [Draws(0, "die", index).below(6) for index in range(600)]
    assert all(70 < values.count(face) < 130 for face in range(6))
    draws = Draws(5, "die", 3)
    sequence = [draws.below(1000) for _ in range(200)]
    assert len(set(sequence)) > 150
    again = Draws(5, "die", 3)
    assert [again.below(1000) for _ in range(200)] == sequence
    assert sorted(Draws(1, "cards", 0).shuffled(range(50))) == list(range(50))
    assert 30 < sum(Draws(2, "coin", index).happens(25) for index in range(200)) < 70
