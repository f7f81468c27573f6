"""A request to generate images from a run: number, classes or prompts, weights and output files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megapromoe.config.options import Config, ParallelConfig
from megapromoe.config.resolve import check
from megapromoe.data.autoencoder import Autoencoder
from megapromoe.diffusion.image_grid import SampleError, check_channels
from megapromoe.diffusion.noise import uniforms
from megapromoe.io import sha256_of_json
from megapromoe.sampling.prompt_features import PromptEncoder
from megapromoe.sampling.prompts import Prompt, digest
from megapromoe.sampling.run_model import CheckpointId, run_config

CLASSES = ("balanced", "random")
PREVIEW_FORMATS = (".png", ".npz")
# Suffixes of names that were probably not meant for a folder.
_OTHER_FILES = (".png", ".jpg", ".npy", ".pt", ".zip", ".safetensors")


@dataclass(frozen=True)
class GenerationRequest:
    """Images to generate: a *set*, or a *preview* with some images of each class in one file.

    A model of texts takes `prompts` in place of classes. Images are then numbered prompt by prompt.

    Attributes:
        run: the run directory.
        out: for a set, a folder for PNG files, or an .npz in the layout of guided-diffusion. With several `scales`,
            each gets a subfolder `guidance-SCALE`, or a file with that suffix. For a preview, a .png with a grid, one
            row per class, or an .npz of float arrays.
        num: for a set, the number of images; for a preview, the number of images per class, numbered class by class;
            with prompts the number of images of each.
        classes: for a set, "balanced": classes in turn; "random": a random class for each image.
        only: the classes to use; None: all.
        scales: guidance scales, with one set of images for each; empty: that of the run.
        step, weights: see `load_model`.
        overrides: settings `sample.key=value`.
        autoencoder: autoencoder that decodes latents, see `decoding.open_decoder`.
        tp, ep: degrees of tensor and expert parallelism, for a model that does not fit on one rank.
        named: add the scale to the name even if there is only one.
        preview: whether this is a preview.
        complete_name: add the step and a hash of everything else that the images depend on to the name of `out`, so
            that different requests have different names.
        prompts: what the images show, for a model of texts; None: classes.
        text_encoder: folder or name of the encoder of the prompts; None: as the captions of the run name it.
        geneval: write a set in the layout of GenEval, of prompts of its file.
    """

    run: Path
    out: Path
    num: int
    classes: str = "balanced"
    only: tuple[int, ...] | None = None
    scales: tuple[float | str, ...] = ()
    step: int | None = None
    weights: str = "ema"
    overrides: tuple[str, ...] = ()
    autoencoder: str | None = None
    tp: int = 1
    ep: int = 1
    named: bool = False
    preview: bool = False
    complete_name: bool = False
    prompts: tuple[Prompt, ...] | None = None
    text_encoder: str | None = None
    geneval: bool = False

    def outputs(self) -> list[tuple[Config, Path]]:
        """The config of the run and the output path for each guidance scale. Raises SampleError or ConfigError."""
        scales: list[tuple[str, ...]] = [(f"sample.guidance={scale}",) for scale in self.scales] or [()]
        configs = [run_config(self.run, (*self.overrides, *scale)) for scale in scales]
        if len(configs) == 1 and not self.named:
            return [(configs[0], self.out)]
        names = [f"guidance-{config.sample.guidance:.12g}" for config in configs]
        if self.out.suffix == ".npz":
            places = [self.out.with_name(f"{self.out.stem}-{name}.npz") for name in names]
        else:
            places = [self.out / name for name in names]
        return list(zip(configs, places, strict=True))

    def checked(self, world: int) -> Config:
        """Checks the request for `world` ranks and returns the config of the run.

        Raises SampleError or ConfigError, the same on all ranks.
        """
        outputs = self.outputs()
        config = outputs[0][0]
        expert_tp = config.parallel.expert_tp
        check(replace(config, parallel=ParallelConfig(tp=self.tp, ep=self.ep, expert_tp=expert_tp)))
        problems = self._condition_problems(config)
        problems += self._preview_problems(config) if self.preview else self._set_problems()
        if len({place for _, place in outputs}) < len(outputs):
            problems.append(f"guidance = {', '.join(map(str, self.scales))}: give each scale once")
        group = math.lcm(self.tp, self.ep * (self.tp if expert_tp else 1))
        if world % group:
            problems.append(f"tp {self.tp}, ep {self.ep}: need a multiple of {group} ranks, not {world}")
        if problems:
            raise SampleError("; ".join(problems))
        return config

    def _condition_problems(self, config: Config) -> list[str]:
        """Classes for a model of texts, and the reverse."""
        if not config.model.has_text:
            text = {"prompts": self.prompts is not None, "the text encoder": self.text_encoder is not None}
            rule = "are for model.condition = 'text'; the run has classes, see --class"
            return [f"{name}: {rule}" for name, given in text.items() if given] or self._class_problems(config)
        problems = []
        if self.only is not None or self.classes != CLASSES[0]:
            problems.append(
                "classes: the run has model.condition = 'text' and no classes; leave them out, and give --prompt TEXT,"
                " --prompts FILE or --geneval"
            )
        elif self.prompts is None:
            problems.append(
                f"{self.run}: is a model with model.condition = 'text'; give --prompt TEXT, --prompts FILE or --geneval"
            )
        elif not self.prompts:
            problems.append("prompts: at least one is needed")
        return problems

    def _class_problems(self, config: Config) -> list[str]:
        if self.only is None:
            return []
        last = config.model.num_classes - 1
        problems = []
        if wrong := [c for c in self.only if not 0 <= c <= last]:
            problems.append(f"class {', '.join(map(str, wrong))}: the run's classes are 0..{last}")
        if not self.only:
            problems.append("classes: at least one is needed")
        return problems

    def _set_problems(self) -> list[str]:
        problems = []
        if self.num < 1:
            problems.append(f"num = {self.num}: must be at least 1")
        if self.classes not in CLASSES:
            problems.append(f"classes = {self.classes!r}: must be {' or '.join(CLASSES)}")
        if self.geneval and self.out.suffix == ".npz":
            problems.append(f"out = {self.out}: GenEval reads a folder; give the name of one")
        elif self.out.suffix in _OTHER_FILES:
            problems.append(f"out = {self.out}: give a folder, for PNG files, or a name that ends in .npz")
        return problems

    def _preview_problems(self, config: Config) -> list[str]:
        problems = []
        if self.num < 1:
            problems.append(f"count = {self.num}: must be at least 1")
        if len(self.scales) > 1:
            problems.append(
                f"guidance = {', '.join(map(str, self.scales))}: give one scale, or --num-images for a set of each"
            )
        if self.out.suffix not in PREVIEW_FORMATS:
            problems.append(f"out = {self.out}: must end in {' or '.join(PREVIEW_FORMATS)}")
        if self.out.suffix == ".png" and self.autoencoder is None:
            try:
                check_channels(config.model.in_channels)
            except SampleError as error:
                problems.append(str(error))
        return problems

    def labels(self, config: Config) -> np.ndarray:
        """The class of each image, or the number of its prompt, int64 (N,)."""
        if self.prompts is not None:
            return np.arange(len(self.prompts)).repeat(self.num)
        choice = np.array(range(config.model.num_classes) if self.only is None else self.only, dtype=np.int64)
        if self.preview:
            return choice.repeat(self.num)
        index = np.arange(self.num)
        if self.classes == "random":
            index = (uniforms(config.sample.seed, "image class", index) * len(choice)).astype(np.int64)
        return choice[index % len(choice)]

    def noise_of(self, config: Config, labels: np.ndarray, numbers: range) -> tuple[list[int], list[int]]:
        """The seed and the number of each of the images `numbers`, which determine its noise.

        Images of a prompt with a seed of its own are numbered from 0, so they do not depend on the other prompts.

        Args:
            labels: see `labels`.
        """
        seeds, indices = [config.sample.seed] * len(numbers), list(numbers)
        for row, number in enumerate(numbers):
            if self.prompts is not None and (seed := self.prompts[labels[number]].seed) is not None:
                seeds[row], indices[row] = seed, number % self.num
        return seeds, indices

    def identity(
        self, config: Config, decoder: Autoencoder | None, encoder: PromptEncoder | None = None
    ) -> dict[str, Any]:
        """Everything except the checkpoint that the images depend on; it must be the same in a repeated command."""
        shown: dict[str, Any] = {"classes": self.classes, "only": None if self.only is None else list(self.only)}
        if self.prompts is not None:
            shown = {"prompts": digest(self.prompts), "text_encoder": None if encoder is None else encoder.identity}
        return {
            "num": self.num,
            **shown,
            "weights": self.weights,
            "sample": asdict(config.sample),
            "autoencoder": None if decoder is None else decoder.identity["sha256"],
        }

    def with_complete_name(
        self, config: Config, decoder: Autoencoder | None, encoder: PromptEncoder | None = None
    ) -> GenerationRequest:
        """The request with the name of `out` for `complete_name`, such as step-00000300-1a2b3c.png; needs `step`."""
        identity = self.identity(config, decoder, encoder)
        content = [self.step, self.preview, [str(scale) for scale in self.scales], identity]
        name = f"{self.out.stem}-{self.step:08d}-{sha256_of_json(content)[:6]}{self.out.suffix}"
        return replace(self, out=self.out.with_name(name))

    def identity_at(
        self,
        checkpoint: CheckpointId,
        config: Config,
        decoder: Autoencoder | None,
        encoder: PromptEncoder | None = None,
    ) -> dict[str, Any]:
        """`identity` with the checkpoint. It is stored with incomplete and complete sets."""
        return {
            "step": checkpoint.step,
            "checkpoint": checkpoint.sha256,
            **self.identity(config, decoder, encoder),
        }
