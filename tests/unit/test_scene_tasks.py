"""The six tasks on scenes: their prompts are held out, the reader reads real scenes, and damaged scenes are wrong."""

from pathlib import Path

import numpy as np
import pytest

from megapromoe.data.scenes.combinations import DIGIT, Description, Group, held_out_parts
from megapromoe.data.scenes.draws import Draws
from megapromoe.data.scenes.scenes import DigitImages, Scenes
from megapromoe.evaluation import scene_tasks
from megapromoe.evaluation.scene_reader import ReadDigit, SceneReader, arrangements
from megapromoe.evaluation.scene_tasks import TASKS, ceiling, is_right, main, prompts, real_scene, scores


@pytest.fixture(scope="module")
def reader():
    return SceneReader()


@pytest.fixture(scope="module")
def pictures(reader):
    """A real scene of each prompt that is read as right: prompt, pixels, the digits that are read."""
    digits, kept = DigitImages("test"), []
    all_prompts = prompts()
    images = np.stack([real_scene(p.stated, digits, Draws(3, "test", i)) for i, p in enumerate(all_prompts)])
    for p, image, read in zip(all_prompts, images, reader.read(images), strict=True):
        if is_right(p.stated, read):
            kept.append((p, image, read))
    assert len(kept) > 0.9 * len(all_prompts)
    return kept


def test_prompts_of_five_tasks_are_held_out_combinations():
    held, trained = prompts(), prompts(held_out=False)
    assert {p.task for p in held} == {p.task for p in trained} == set(TASKS)
    for p in held:
        if p.task != "single object":
            assert held_out_parts(p.stated), p
    assert not [p for p in trained if held_out_parts(p.stated)]
    texts = {task: [p.text for p in held if p.task == task] for task in TASKS}
    assert texts["single object"][8] == "a picture of an eight" and len(texts["single object"]) == 10
    assert "a picture of a zero and a two" in texts["two objects"] and len(texts["two objects"]) == 9
    assert "a picture of three ones" in texts["counting"] and len(texts["counting"]) == 6
    assert "a picture of a red five" in texts["colours"] and len(texts["colours"]) == 12
    assert "a picture of a one above a zero" in texts["position"] and len(texts["position"]) == 56
    assert "a picture of a zero below a one" in texts["position"]
    assert len(texts["colour attribution"]) == 12 and all(" and a" in text for text in texts["colour attribution"])
    for p in held:
        if p.task == "colour attribution":
            assert len(held_out_parts(Description(p.stated.groups))) == 1, "one of the two bound pairs is held out"


def test_held_out_prompts_are_no_captions_of_training():
    data = Scenes(600)
    captions = {data.scene_at(index).caption for index in range(600)}
    texts = {p.text.removeprefix("a picture of ") for p in prompts() if p.task != "single object"}
    assert not [c for c in captions for text in texts if c == text or c == f"a picture of {text}"]


def test_real_scenes_are_read_nearly_without_errors():
    counts = ceiling(16)
    assert set(counts) == set(TASKS) and all(16 <= total <= 56 for _, total in counts.values())
    assert all(right / total > 0.87 for right, total in counts.values()), counts
    assert 0.95 < scene_tasks.overall(counts) <= 1


@pytest.mark.full
def test_the_documents_show_the_ceiling_as_it_is_printed(capsys):
    assert main([]) == 0
    page = (Path(__file__).parents[2] / "docs" / "text_to_image.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page


def wrong(pictures, reader, change) -> tuple[int, int]:
    """Changes every picture that `change` accepts; returns how many are judged right afterwards, and their number."""
    changed = [(p, change(p, image.copy(), read)) for p, image, read in pictures]
    expected, images = zip(*((p, image) for p, image in changed if image is not None), strict=True)
    counts = scores(expected, np.stack(images), reader)
    return sum(right for right, _ in counts.values()), sum(total for _, total in counts.values())


def test_a_missing_digit_is_wrong(pictures, reader):
    def erase(p, image, read):
        top, left = read[0].box
        image[top : top + DIGIT, left : left + DIGIT] = 0
        return image

    right, total = wrong(pictures, reader, erase)
    assert right == 0 and total > 90


def test_a_wrong_colour_is_wrong(pictures, reader):
    def recolour(p, image, read):
        return image[:, :, ::-1] if p.task in ("colours", "colour attribution") and "green" not in p.text else None

    def swapped_colours(p, image, read):
        if p.task != "colour attribution":
            return None
        boxes = [np.s_[d.box[0] : d.box[0] + DIGIT, d.box[1] : d.box[1] + DIGIT] for d in read]
        colours = [image[box].reshape(-1, 3).max(axis=0) / 255 for box in boxes]
        for box, colour in zip(boxes, colours[::-1], strict=True):
            image[box] = (image[box].max(axis=2)[:, :, None] * colour).round()
        return image

    # Red and blue are exchanged: what is white or purple stays nearly the same.
    right, total = wrong(
        [item for item in pictures if not {"white", "purple"} & set(item[0].text.split())], reader, recolour
    )
    assert right == 0 and total >= 5
    right, total = wrong(pictures, reader, swapped_colours)
    assert right == 0 and total >= 10


def test_a_swapped_order_is_wrong(pictures, reader):
    def swap(p, image, read):
        if p.task != "position":
            return None
        if {"above", "below"} & set(p.text.split()):
            return np.concatenate([image[DIGIT:], image[:DIGIT]])
        return np.concatenate([image[:, DIGIT:], image[:, :DIGIT]], axis=1)

    aligned = [item for item in pictures if all(0 in d.box or DIGIT in d.box for d in item[2])]
    right, total = wrong(aligned, reader, swap)
    assert right <= 1 and total > 40  # a diagonal scene whose prompt names the other axis stays right


def test_another_digit_is_wrong(pictures, reader):
    other = DigitImages("test")

    def replace(p, image, read):
        top, left = read[0].box
        box = np.s_[top : top + DIGIT, left : left + DIGIT]
        colour = image[box].reshape(-1, 3).max(axis=0)
        image[box] = (other.of_digit[(read[0].digit + 5) % 10][3][:, :, None] * colour).round()
        return image

    right, total = wrong(pictures, reader, replace)
    assert right <= 0.02 * total and total > 90


def test_no_picture_at_all_is_right(reader):
    some_prompts = prompts()[::4]
    blank = np.zeros((len(some_prompts), 16, 16, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, blank.shape, dtype=np.uint8)
    grey = np.full_like(blank, 128)
    for images in (blank, noise, grey):
        assert sum(right for right, _ in scores(some_prompts, images, reader).values()) == 0
    assert reader.read(blank[:2]) == [(), ()]
    assert all(d.digit is None for digits in reader.read(noise) for d in digits)


def test_the_judge_takes_exactly_what_is_named():
    three, seven = ReadDigit(3, "red", (0, 4)), ReadDigit(7, "blue", (8, 2))
    above = Description((Group(1, 3, "red"), Group(1, 7, "blue")), ("above",))
    assert is_right(above, [three, seven]) and is_right(above.swapped(), [three, seven])
    assert is_right(Description((Group(1, 7), Group(1, 3))), [three, seven])
    assert not is_right(above, [three]) and not is_right(above, [three, seven, seven])
    assert not is_right(Description(above.groups, ("below",)), [three, seven])
    assert not is_right(Description(above.groups, ("left of",)), [three, seven])
    assert not is_right(Description((Group(1, 3, "blue"), Group(1, 7, "red"))), [three, seven])
    assert not is_right(above, [three, ReadDigit(None, "blue", (8, 2))])
    twins = Description((Group(1, 3, "red"), Group(1, 3, "blue")))
    assert is_right(twins, [three, ReadDigit(3, "blue", (8, 2))]) and not is_right(twins, [three, three])


def test_every_scene_is_one_of_the_arrangements_that_the_reader_tries():
    sets = {frozenset(places) for places in arrangements()}
    assert len(sets) == len(arrangements()) == 275  # at every pixel; scenes start at multiples of 4
    data = Scenes(200)
    for index in range(200):
        boxes = [box for places in data.scene_at(index).boxes for box in places]
        assert frozenset(row * 9 + column for row, column in boxes) in sets


def test_other_pictures_are_refused(reader):
    with pytest.raises(ValueError, match=r"pictures float32 \(16, 16, 3\) are not scenes"):
        reader.read(np.zeros((1, 16, 16, 3), np.float32))
