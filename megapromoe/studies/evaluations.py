"""Evaluations of a study: the checkpoints to evaluate, their existing results, and the command that evaluates them.

Results are in `evaluation.jsonl` of each run, to which `megapromoe evaluate` appends a line for each set of images. A
line belongs to the study if it matches the recipe. Lines of other evaluations, run by hand, are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapromoe.planning.cost import flops_per_image
from megapromoe.run_lines import lines_of
from megapromoe.studies.grid import Task
from megapromoe.studies.image_evaluation import ImageEvaluation
from megapromoe.studies.recipe import Recipe

RECORDS = "evaluation.jsonl"  # file name in a run directory


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one training run, a separate job of the study that starts when the training is done."""

    task: Task
    section: ImageEvaluation
    weights: str

    @property
    def name(self) -> str:
        """The name of the job. It differs from all trainings, whose names end in their seed."""
        return f"{self.task.name}-evaluation"

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the checkpoints to evaluate, ascending."""
        return self.section.training_steps(self.task.config)

    @property
    def scales(self) -> tuple[float, ...]:
        """Guidance scales."""
        return self.section.scales(self.task.config)

    def flops(self, steps: int) -> int:
        """Operations to sample the images of this number of checkpoints; guidance runs the model twice."""
        passes = sum(1 if scale == 1 else 2 for scale in self.scales) * self.section.sampler_steps(self.task.config)
        return flops_per_image(self.task.config.model).forward * passes * self.section.num * steps

    def is_of(self, record: Mapping[str, Any]) -> bool:
        """Whether a line of `evaluation.jsonl` matches this evaluation, at any step and scale."""
        section = self.section
        wanted = {"count": section.num, "weights": self.weights, "autoencoder": section.autoencoder}
        requested = {"reference": section.reference, "split": section.split, "features": section.features}
        wanted |= {"asked": requested}
        wanted |= {"classes": "balanced", "only": None}
        sampler = record.get("sample", {}).get("steps")
        return wanted.items() <= record.items() and sampler == section.sampler_steps(self.task.config)

    def missing_steps(self, run: Path) -> tuple[int, ...]:
        """The steps without results at one or more scales.

        Args:
            run: the run directory.
        """
        records = (record for record in lines_of(run / RECORDS) if self.is_of(record))
        known = {(record.get("step"), record.get("guidance")) for record in records}
        return tuple(step for step in self.steps if any((step, scale) not in known for scale in self.scales))

    def words(self, run: Path) -> list[str]:
        """Arguments of `megapromoe` that evaluate the missing steps."""
        section = self.section
        words = ["evaluate", "--run-dir", str(run), "--num-images", str(section.num), "--weights", self.weights]
        words += ["--guidance", *map(repr, self.scales)]
        words += ["--steps", str(section.sampler_steps(self.task.config)), "--reference", section.reference]
        words += ["--split", section.split]
        words += ["--features", section.features] if section.features else []
        words += ["--autoencoder", section.autoencoder] if section.autoencoder else []
        return [*words, "--step", *map(str, self.missing_steps(run))]

    def in_words(self) -> str:
        """Images, scales and steps of the evaluation, for messages."""
        scales = ", ".join(f"{scale:g}" for scale in self.scales)
        steps = ", ".join(f"{step:,}" for step in self.steps[:5]) + (", ..." if len(self.steps) > 5 else "")
        plural = "s" if len(self.steps) > 1 else ""
        return f"{self.section.num:,} images at guidance {scales} of step{plural} {steps}"


def evaluation_of(recipe: Recipe, task: Task) -> Evaluation | None:
    """The evaluation of a task; None for a study without evaluations."""
    return None if recipe.evaluate is None else Evaluation(task, recipe.evaluate, recipe.weights)
