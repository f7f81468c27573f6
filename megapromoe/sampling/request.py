"""What to generate from a run: which images, of which classes, from which weights, and into which files."""

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
from megapromoe.sampling.run_model import CheckpointId, run_config

CLASSES = ("balanced", "random")
PREVIEW_FORMATS = (".png", ".npz")
_OTHER_FILES = (".png", ".jpg", ".npy", ".pt", ".zip", ".safetensors")  # names that were not meant for a folder


@dataclass(frozen=True)
class GenerationRequest:
    """Images to generate: a *set*, or a *preview* with some images of each class in one file.

    Attributes:
        run: the run directory.
        out: of a set, a folder for PNG files, or an .npz in the layout of guided-diffusion (with several `scales`, each
            has a folder `guidance-SCALE` in it, or a file with that in its name); of a preview, a .png of a grid with a
            row for each class, or an .npz of float arrays.
        num: images of a set; of a preview, images of each class, numbered class by class.
        classes: of a set: "balanced": they take turns; "random": drawn for each image.
        only: the classes to choose from; None is all.
        scales: guidance scales, a set of images for each; none: the run's.
        step, weights: of the checkpoint, see `load_model`.
        overrides: `sample.key=value` settings.
        autoencoder: decodes latents, see `decoding.open_decoder`.
        tp, ep: ranks over which a model too large for one is split.
        named: put the scale into the name even if there is only one.
        preview: a preview, no set.
        complete_name: add the step, and a digest of all else that the images depend on, to the name of `out`, so that
            requests which differ have different names.
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

    def outputs(self) -> list[tuple[Config, Path]]:
        """The run's config for each guidance scale, and where its images go. Raises SampleError or ConfigError."""
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
        """The run's config, if `world` ranks can meet the request. Raises SampleError or ConfigError, for all ranks."""
        outputs = self.outputs()
        config = outputs[0][0]
        expert_tp = config.parallel.expert_tp
        check(replace(config, parallel=ParallelConfig(tp=self.tp, ep=self.ep, expert_tp=expert_tp)))
        problems = self._class_problems(config)
        problems += self._preview_problems(config) if self.preview else self._set_problems()
        if len({place for _, place in outputs}) < len(outputs):
            problems.append(f"guidance = {', '.join(map(str, self.scales))}: each scale once")
        group = math.lcm(self.tp, self.ep * (self.tp if expert_tp else 1))
        if world % group:
            problems.append(f"tp {self.tp}, ep {self.ep}: need a multiple of {group} ranks, not {world}")
        if problems:
            raise SampleError("; ".join(problems))
        return config

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
        if self.out.suffix in _OTHER_FILES:
            problems.append(f"out = {self.out}: give a folder, for PNG files, or a name that ends in .npz")
        return problems

    def _preview_problems(self, config: Config) -> list[str]:
        problems = []
        if self.num < 1:
            problems.append(f"count = {self.num}: must be at least 1")
        if len(self.scales) > 1:
            problems.append(f"guidance = {', '.join(map(str, self.scales))}: one scale, or --num for a set of each")
        if self.out.suffix not in PREVIEW_FORMATS:
            problems.append(f"out = {self.out}: must end in {' or '.join(PREVIEW_FORMATS)}")
        if self.out.suffix == ".png" and self.autoencoder is None:
            try:
                check_channels(config.model.in_channels)
            except SampleError as error:
                problems.append(str(error))
        return problems

    def labels(self, config: Config) -> np.ndarray:
        """The class of each image, int64 (N,)."""
        choice = np.array(range(config.model.num_classes) if self.only is None else self.only, dtype=np.int64)
        if self.preview:
            return choice.repeat(self.num)
        index = np.arange(self.num)
        if self.classes == "random":
            index = (uniforms(config.sample.seed, "image class", index) * len(choice)).astype(np.int64)
        return choice[index % len(choice)]

    def identity(self, config: Config, decoder: Autoencoder | None) -> dict[str, Any]:
        """What, beside the checkpoint, the images of a set depend on: all that a repeated command must share."""
        return {
            "num": self.num,
            "classes": self.classes,
            "only": None if self.only is None else list(self.only),
            "weights": self.weights,
            "sample": asdict(config.sample),
            "autoencoder": None if decoder is None else decoder.identity["sha256"],
        }

    def with_complete_name(self, config: Config, decoder: Autoencoder | None) -> GenerationRequest:
        """The request with the `out` that `complete_name` asks for: step-00000300-1a2b3c.png. Its step is known."""
        facts = [self.step, self.preview, [str(scale) for scale in self.scales], self.identity(config, decoder)]
        name = f"{self.out.stem}-{self.step:08d}-{sha256_of_json(facts)[:6]}{self.out.suffix}"
        return replace(self, out=self.out.with_name(name))

    def identity_at(self, checkpoint: CheckpointId, config: Config, decoder: Autoencoder | None) -> dict[str, Any]:
        """`identity` with the checkpoint; kept with an unfinished set, and in a finished one."""
        return {
            "step": checkpoint.step,
            "checkpoint": checkpoint.sha256,
            **self.identity(config, decoder),
        }
