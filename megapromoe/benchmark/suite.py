"""Many scenes in one run: measured one by one, each written down at once, so that an interrupted run goes on.

A scene is one experiment at one size, number of experts, micro-batch and routing. The figures of a run lie in
`benchmark.json` in its folder; a repeated command measures what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from megapromoe.benchmark import baselines
from megapromoe.benchmark.layer import BenchmarkError, Settings, measure_layer
from megapromoe.benchmark.machine import describe, keep_memory
from megapromoe.benchmark.models import measure_sample, measure_step
from megapromoe.benchmark.traffic import measure_traffic
from megapromoe.config.options import Config
from megapromoe.config.resolve import resolve
from megapromoe.distributed import runtime
from megapromoe.io import write_json

EXPERIMENTS = ("layer", "step", "sample", "traffic")
SIZES = ("digits", "s", "b", "l", "xl")
FILE = "benchmark.json"
# Images of a micro-batch where none are asked for: on a GPU enough to fill it, on a CPU few enough to wait for.
IMAGES = {
    "cuda": {"layer": 64, "step": 64, "sample": 64, "traffic": 2},
    "cpu": {"layer": 8, "step": 2, "sample": 1, "traffic": 2},
}
DIGITS_IMAGES = 128  # of 16 tokens each
# Where none are asked for. In whole models all those that share our parameters would tell the layer's story again.
CONTENDERS = {
    "layer": baselines.CONTENDERS,
    "step": baselines.CONTENDERS[:3],
    "sample": baselines.CONTENDERS[:3],
    "traffic": baselines.CONTENDERS,
}
UNTIMED = ("load", "peak")  # facts of a machine that differ from run to run


@dataclass(frozen=True)
class Scene:
    """What is measured: an experiment at a size, with E experts (None: the preset's), B images and a routing."""

    experiment: str
    size: str
    experts: int
    images: int
    routing: str
    ranks: int = 1

    @property
    def key(self) -> str:
        ranks = f" on {self.ranks} ranks" if self.experiment == "traffic" else ""
        return f"{self.experiment} {self.size} E{self.experts} B{self.images} {self.routing}{ranks}"

    @property
    def config(self) -> Config:
        return config_of(self.size, self.experts)


def config_of(size: str, experts: int | None = None) -> Config:
    """The preset of a size, with another number of experts. Raises ConfigError for a number that cannot be."""
    preset = "digits" if size == "digits" else f"promoe_{size}"
    return resolve(preset, overrides=() if experts is None else [f"model.num_experts={experts}"])


def scenes(
    experiments: Sequence[str],
    sizes: Sequence[str],
    experts: Sequence[int],
    images: Sequence[int],
    routings: Sequence[str],
    ranks: Sequence[int],
    device: str,
) -> list[Scene]:
    """All combinations; without experts the preset's, without images those of `IMAGES`."""
    found = []
    for experiment in experiments:
        for size in sizes:
            usual = DIGITS_IMAGES if size == "digits" and experiment != "traffic" else IMAGES[device][experiment]
            for E in experts or [config_of(size).model.num_experts]:
                for B in images or [usual]:
                    for routing in routings:
                        found += [
                            Scene(experiment, size, E, B, routing, n)
                            for n in (ranks if experiment == "traffic" else (1,))
                        ]
    return found


def run(
    wanted: Sequence[Scene],
    settings: Settings,
    out: Path,
    command: str,
    again: bool = False,
    starts: Callable[[Scene], None] = lambda scene: None,
) -> dict[str, Any]:
    """Measures the scenes that `out` does not hold yet (`again`: all of them), and returns all that it holds then.

    Args:
        settings: for all scenes; `images` is the scene's, and without contenders they are the experiment's usual.
        starts: called before each scene.

    Figures of another machine or with other settings are not mixed in: BenchmarkError, or with `again` they go.
    """
    file = out / FILE
    torch.set_num_threads(settings.threads)
    kept = settings.device.type == "cpu" and keep_memory()
    machine = describe(settings.device, settings.dtype, settings.threads, kept)
    facts = {"machine": machine, "settings": _plain(settings)}
    document: dict[str, Any] = {**facts, "commands": [], "scenes": {}}
    if file.is_file():
        held, differ = _opened(file, facts)
        if differ and not again:
            raise BenchmarkError(
                f"{file}: its figures were measured otherwise ({'; '.join(differ)});"
                " give another --out, or --again to begin anew"
            )
        document = document if differ else held
    if command not in document["commands"]:
        document["commands"].append(command)
    missing = [scene for scene in wanted if again or scene.key not in document["scenes"]]
    with _job(missing, settings):
        for scene in missing:
            starts(scene)
            document["scenes"][scene.key] = {**vars(scene), **_measure(scene, settings)}
            write_json(file, document, indent=1, parents=True, concurrent=True)
    return document


def _contenders(scene: Scene, settings: Settings) -> tuple[str, ...]:
    return settings.contenders or CONTENDERS[scene.experiment]


def _measure(scene: Scene, settings: Settings) -> dict[str, Any]:
    settings = replace(settings, images=scene.images, contenders=_contenders(scene, settings))
    if scene.experiment == "traffic":
        return measure_traffic(scene.config, scene.routing, settings, scene.ranks)
    measure = {"layer": measure_layer, "step": measure_step, "sample": measure_sample}[scene.experiment]
    return measure(scene.config, scene.routing, settings)


def _plain(settings: Settings) -> dict[str, Any]:
    """The settings that all scenes share, as JSON."""
    said = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "images"}
    return said | {"device": str(settings.device), "dtype": str(settings.dtype), "contenders": [*settings.contenders]}


def _opened(file: Path, facts: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a file holds, and in which facts it differs. Raises BenchmarkError if it is damaged."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        there = {**document["machine"], **document["settings"]}
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{file}: is damaged ({error!r}); remove it, or give another --out") from error
    here = {**facts["machine"], **facts["settings"]}
    return document, [
        f"{name}: {there.get(name)!r} there, {value!r} now"
        for name, value in here.items()
        if name not in UNTIMED and there.get(name) != value
    ]


@contextmanager
def _job(scenes: Sequence[Scene], settings: Settings) -> Iterator[None]:
    """A torch.distributed job of this process alone, if a scene has DeepSpeed's layer, which wants one."""
    names = {name for s in scenes if s.experiment != "traffic" for name in _contenders(s, settings)}
    if not any(name.startswith("deepspeed") for name in names):
        yield
        return
    runtime.prepare()
    runtime.start(runtime.Launch("python"), timeout=600)
    torch.set_num_threads(settings.threads)
    try:
        yield
    finally:
        runtime.stop()
