"""The section `evaluate` of a recipe: evaluates images that are sampled from the checkpoints of each training.

    evaluate:
      num: 500                # images for each guidance scale
      guidance: [1.0, 1.5]    # the scales; without it, the scale of the task's `sample.guidance`
      steps: 15               # sampling steps; without it, the task's `sample.steps`
      every: 100              # training steps between the checkpoints; without it, only the last checkpoint
      reference: data         # as `megapromoe evaluate --reference`: the training data, a file, a folder, or `scenes`:
                              # the six tasks, for runs on scenes
      split: train            # as --split, for a reference that is a data set: train or test
      features: digits        # as --features: a classifier's name, or an Inception file; default: as the data
      autoencoder: DIR        # as --autoencoder, for models of latents
      ranks: 1                # processes of an evaluation; without it, those of the training, with its launcher
      launcher: []            # what starts them; without it, the launcher of the training

Each key except the last two is an option of `megapromoe evaluate`, which the study runs after each training. The
recipe's `weights` selects the evaluated weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapromoe.config.options import Config
from megapromoe.config.reader import ONE_UP, ZERO_UP, option, read_fields, suggest
from megapromoe.evaluation.names import CLASSIFIER_FEATURES, CLASSIFIERS, DATA, NUM_TASKS, SCENES

PUBLISHED = 50_000  # number of images in published results


@dataclass(frozen=True)
class ImageEvaluation:
    """The section `evaluate` of a recipe; see the module docstring."""

    num: int = option(0, "images for each guidance scale", within=ONE_UP)
    guidance: tuple[float, ...] = option((), "guidance scales", kind=list)
    steps: int = option(0, "of the sampler; 0: as the task's sample.steps", within=ZERO_UP)
    every: int = option(0, "training steps between the evaluated checkpoints; 0: the last alone", within=ZERO_UP)
    reference: str = option(DATA, "real images")
    split: str = option("train", "of a reference that is a data set", ("train", "test"))
    features: str | None = option(None, "the network that judges", kind=str)
    autoencoder: str | None = option(None, "decodes latents", kind=str)
    ranks: int = option(0, "processes of an evaluation; 0: those of the training", within=ZERO_UP)
    launcher: tuple[str, ...] = option((), "what starts them; default: the launcher of the training", kind=list)

    def scales(self, config: Config) -> tuple[float, ...]:
        """The guidance scales at which a task of this configuration is evaluated."""
        return self.guidance or (config.sample.guidance,)

    def sampler_steps(self, config: Config) -> int:
        """Number of sampling steps for a task of this configuration."""
        return self.steps or config.sample.steps

    def training_steps(self, config: Config) -> tuple[int, ...]:
        """The steps whose checkpoints are evaluated, ascending; the last step is always one of them."""
        last = config.train.steps
        return (*range(self.every, last, self.every), last) if self.every else (last,)


def read_image_evaluation(content: Mapping[str, Any]) -> tuple[ImageEvaluation, list[str]]:
    """Reads the section from plain values; returns it and a sentence for each problem."""
    values, problems = read_fields(ImageEvaluation, content, "evaluate.")
    if content.get("num") is None:
        problems.append(
            f"evaluate.num: is missing; give the number of images for each guidance scale, such as 500"
            f" (published results use {PUBLISHED:,})"
        )
    scales = [as_scale(scale) for scale in values.get("guidance", ())]
    if None in scales or len(set(scales)) < len(scales) or ("guidance" in values and not scales):
        rule = "must be a list of different numbers, 0 or more, such as [1.0, 1.5]; 1 is no guidance"
        problems.append(f"evaluate.guidance = {values['guidance']!r}: {rule}")
    values["guidance"] = tuple(scale for scale in scales if scale is not None)
    for name, known in (("features", CLASSIFIERS), ("reference", (DATA, SCENES, *CLASSIFIERS))):
        value = values.get(name)
        if value is not None and value not in known and not _looks_like_a_path(value):
            problems.append(f"evaluate.{name} = {value!r}: is neither a file nor a name; {suggest(value, known)}")
        elif value is not None and value not in known and Path(value).exists():
            values[name] = str(Path(value).resolve())  # absolute, since jobs run in other folders
    if values.get("autoencoder") and Path(values["autoencoder"]).is_dir():  # otherwise it is a name on the hub
        values["autoencoder"] = str(Path(values["autoencoder"]).resolve())
    values["launcher"] = tuple(map(str, values.get("launcher", ())))
    return ImageEvaluation(**values), problems


def problems_of(evaluation: ImageEvaluation, config: Config) -> list[str]:
    """Reasons why a task of this configuration cannot be evaluated, each with the remedy."""
    problems = []
    source, reference = config.data.source, evaluation.reference
    if config.model.has_text or reference == SCENES:
        return _problems_of_scores(evaluation, config)
    judge = evaluation.features or (source if reference == DATA else reference)
    if judge not in CLASSIFIERS and evaluation.features is None:
        problems.append(
            f"evaluate.features: there is no classifier for {judge!r}; give the file of the standard Inception, or"
            f" {' or '.join(CLASSIFIERS)}"
        )
    if judge in CLASSIFIERS and evaluation.num <= CLASSIFIER_FEATURES:
        problems.append(
            f"evaluate.num = {evaluation.num}: too few for the covariance of the {CLASSIFIER_FEATURES} features of the"
            f" classifier {judge}; give {CLASSIFIER_FEATURES + 1} or more"
        )
    if source == "latents" and evaluation.autoencoder is None:
        problems.append("evaluate.autoencoder: is missing; models of latents need the autoencoder that decodes them")
    if source == "latents" and reference == DATA:
        problems.append(
            "evaluate.reference = 'data': the runs train on latents, which are no images to compare with; give an .npz"
            " or a folder of pictures"
        )
    return problems


def _problems_of_scores(evaluation: ImageEvaluation, config: Config) -> list[str]:
    """Reasons why a task cannot be scored on the six tasks of scenes."""
    if not config.model.has_text:
        return ["evaluate.reference = 'scenes': is for models of texts, model.condition = 'text'"]
    if evaluation.reference != SCENES:
        return [f"evaluate.reference = {evaluation.reference!r}: models of texts are scored on 'scenes'; set it"]
    problems = []
    if evaluation.num < NUM_TASKS:
        problems.append(f"evaluate.num = {evaluation.num}: too few for {NUM_TASKS} tasks; give more")
    unused = {"features": evaluation.features is not None, "autoencoder": evaluation.autoencoder is not None}
    unused["split"] = evaluation.split != "train"
    problems += [f"evaluate.{name}: the six tasks have none; remove it" for name, given in unused.items() if given]
    return problems


def as_scale(value: Any) -> float | None:
    """A guidance scale; None for an invalid value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def _looks_like_a_path(value: str) -> bool:
    return bool(value) and ("/" in value or bool(Path(value).suffix) or Path(value).exists())
