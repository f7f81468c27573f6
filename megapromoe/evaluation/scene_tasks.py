"""Six tasks on scenes, which mirror those of GenEval: does a picture show what its prompt names?

Prompts name combinations that training never shows. A picture is right if it shows exactly the digits of its prompt, in
the colours that the prompt names, in the relation that it names. GenEval accepts further objects except in counting; we
do not. The score of a task is the share of right pictures, the overall score the mean over tasks.

`python -m megapromoe.evaluation.scene_tasks` prints the ceiling: the scores of real scenes, which a perfect model would
reach, because the reader makes mistakes.

Source: Ghosh et al. 2023, "GenEval: an object-focused framework for evaluating text-to-image alignment".
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megapromoe.data.scenes.combinations import (
    COLOUR_NAMES,
    Description,
    Group,
    colour_combinations,
    count_combinations,
    is_held_out_pair,
    pair_combinations,
    place_combinations,
)
from megapromoe.data.scenes.draws import Draws
from megapromoe.data.scenes.scenes import DigitImages, arrange, paint, relations_of
from megapromoe.data.scenes.wording import prompt
from megapromoe.diffusion.noise import permutation
from megapromoe.evaluation.scene_reader import ReadDigit, SceneReader

Counts = dict[str, tuple[int, int]]
"""For each task: right pictures, and all pictures."""

TASKS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
CEILING_SEED, CEILING_IMAGES = 0, 400  # real scenes of each task, at least


@dataclass(frozen=True)
class Prompt:
    """A prompt of a task.

    Attributes:
        task: one of `TASKS`.
        text: the prompt in words.
        stated: what a picture must show.
    """

    task: str
    text: str
    stated: Description


def prompts(held_out: bool = True) -> list[Prompt]:
    """All prompts, by task.

    Args:
        held_out: of combinations that training never shows; otherwise of those that it shows. "single object" has no
            combination: its ten prompts are the same, and the pictures of a test are new.
    """
    stated: dict[str, list[Description]] = {task: [] for task in TASKS}
    stated["single object"] = [Description((Group(1, d),)) for d in range(10)]
    stated["two objects"] = [Description((Group(1, a), Group(1, b))) for a, b in pair_combinations(held_out)]
    stated["counting"] = [Description((Group(n, d),)) for n, d in count_combinations(held_out)]
    stated["colours"] = [Description((Group(1, d, c),)) for c, d in colour_combinations(held_out)]
    stated["position"] = [
        Description((Group(1, a), Group(1, b)), (relation,)) for a, relation, b in place_combinations(held_out)
    ]
    stated["colour attribution"] = _attributions(held_out)
    return [Prompt(task, prompt(s), s) for task, descriptions in stated.items() for s in descriptions]


def prompts_in_turn(count: int, held_out: bool = True) -> list[Prompt]:
    """`count` prompts: task after task in turn, and of a task its prompts in turn, in a fixed random order.

    The first prompts of a longer list are those of a shorter one.
    """
    of_task: dict[str, list[Prompt]] = {task: [] for task in TASKS}
    for shown in prompts(held_out):
        of_task[shown.task].append(shown)
    order = {task: permutation(0, f"prompts, {task}", 0, len(some)) for task, some in of_task.items()}
    chosen = []
    for number in range(count):
        number_of_task, task = divmod(number, len(TASKS))
        some = of_task[TASKS[task]]
        chosen.append(some[order[TASKS[task]][number_of_task % len(some)]])
    return chosen


def _attributions(held_out: bool) -> list[Description]:
    """Two digits in two colours: for each held-out colour and digit another group that training shows.

    Without `held_out`, both are shown in training. The other group is chosen by a fixed rule.
    """
    descriptions = []
    shown = list(colour_combinations(held_out=False))
    for number, (colour, digit) in enumerate(colour_combinations(held_out)):
        others = [(c, d) for c, d in shown if c != colour and d != digit and not is_held_out_pair(digit, d)]
        other_colour, other_digit = others[7 * number % len(others)]
        groups = (Group(1, digit, colour), Group(1, other_digit, other_colour))
        descriptions.append(Description(groups if number % 2 else groups[::-1]))
    return descriptions


def is_right(stated: Description, digits: Sequence[ReadDigit]) -> bool:
    """Whether a picture with these digits shows exactly what is stated."""
    if len(digits) != stated.count or any(digit.digit is None for digit in digits):
        return False
    boxes = []
    for group in stated.groups:
        members = [d for d in digits if d.digit == group.digit and group.colour in (None, d.colour)]
        if len(members) != group.count:
            return False
        boxes.append([d.box for d in members])
    return set(stated.relations) <= set(relations_of(boxes))


def real_scene(stated: Description, digits: DigitImages, draws: Draws) -> np.ndarray:
    """A picture, uint8 (CANVAS, CANVAS, 3), of what is stated, with random colours where it names none."""
    groups = tuple(Group(g.count, g.digit, g.colour or draws.one_of(COLOUR_NAMES)) for g in stated.groups)
    while True:
        boxes = arrange(groups, draws)
        if set(stated.relations) <= set(relations_of(boxes)):
            return paint(groups, boxes, digits, draws)


def scores(shown: Sequence[Prompt], images_BHWC: np.ndarray, reader: SceneReader) -> Counts:
    """For each task: right pictures, and all pictures.

    Args:
        shown: the prompt of each picture.
        images_BHWC: uint8 (B, CANVAS, CANVAS, 3).
    """
    counts = {task: [0, 0] for task in TASKS if any(p.task == task for p in shown)}
    for shown_prompt, digits in zip(shown, reader.read(images_BHWC), strict=True):
        counts[shown_prompt.task][0] += is_right(shown_prompt.stated, digits)
        counts[shown_prompt.task][1] += 1
    return {task: (right, total) for task, (right, total) in counts.items()}


def ceiling(images: int = CEILING_IMAGES, seed: int = CEILING_SEED, held_out: bool = True) -> Counts:
    """The scores of real scenes, made of digits of the test split.

    Args:
        images: at least so many for each task, the same number for each of its prompts.
    """
    all_prompts = prompts(held_out)
    shown = []
    for task in TASKS:
        of_task = [p for p in all_prompts if p.task == task]
        shown += [p for p in of_task for _ in range(math.ceil(images / len(of_task)))]
    digits = DigitImages("test")
    pictures = [real_scene(p.stated, digits, Draws(seed, "ceiling", i)) for i, p in enumerate(shown)]
    return scores(shown, np.stack(pictures), SceneReader())


def overall(counts: Counts) -> float:
    """The mean over tasks of the share of right pictures."""
    return sum(right / total for right, total in counts.values()) / len(counts)


def table(counts: Counts) -> str:
    """Scores as a Markdown table, with the standard error of each."""
    lines = ["| task | pictures | right | % | standard error |", "|---|---|---|---|---|"]
    for task, (right, total) in counts.items():
        share = right / total
        error = math.sqrt(share * (1 - share) / total)
        lines.append(f"| {task} | {total} | {right} | {100 * share:.1f} | {100 * error:.1f} |")
    return "\n".join([*lines, f"| overall | | | {100 * overall(counts):.1f} | |"])


def main(words: Sequence[str] | None = None) -> int:
    """Prints the ceiling as a table."""
    parser = argparse.ArgumentParser(prog="python -m megapromoe.evaluation.scene_tasks", description=main.__doc__)
    parser.add_argument(
        "--num-images",
        type=int,
        metavar="N",
        default=CEILING_IMAGES,
        help="least number of scenes for each task; default 400",
    )
    parser.add_argument("--seed", type=int, metavar="N", default=CEILING_SEED, help="default 0")
    parser.add_argument("--seen", action="store_true", help="prompts of combinations that training shows")
    options = parser.parse_args(words)
    if options.num_images < 1:
        parser.error(f"--num-images {options.num_images}: must be at least 1")
    print(table(ceiling(options.num_images, options.seed, held_out=not options.seen)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
