"""Measures many cases in one run and saves each as soon as it is measured, so that an interrupted run can be continued.

A case is one experiment with one size, number of experts, micro-batch and routing. The results of a run are in
`benchmark.json` in its folder; repeating the command measures what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megapromoe.benchmark import baselines
from megapromoe.benchmark.layer import BenchmarkError, Settings, measure_layer
from megapromoe.benchmark.machine import describe, keep_memory
from megapromoe.benchmark.models import measure_sample, measure_step
from megapromoe.benchmark.routing_patterns import RECORDED
from megapromoe.benchmark.traffic import measure_traffic
from megapromoe.config.options import Config
from megapromoe.config.resolve import resolve
from megapromoe.distributed import runtime
from megapromoe.io import write_json
from megapromoe.routing_trace import TraceError, fullest_over_mean, read_trace, trace_file

EXPERIMENTS = ("layer", "step", "sample", "traffic")
SIZES = ("digits", "s", "b", "l", "xl")
FILE = "benchmark.json"
# Default micro-batches: on a GPU large enough to use all of it, on a CPU small enough to take little time.
IMAGES = {
    "cuda": {"layer": 64, "step": 64, "sample": 64, "traffic": 2},
    "cpu": {"layer": 8, "step": 2, "sample": 1, "traffic": 2},
}
DIGITS_IMAGES = 128  # of 16 tokens each
# Defaults. In whole models the other contenders with our parameters would only repeat the results of the layer.
CONTENDERS = {
    "layer": baselines.CONTENDERS,
    "step": baselines.CONTENDERS[:3],
    "sample": baselines.CONTENDERS[:3],
    "traffic": baselines.CONTENDERS,
}
VARYING_FACTS = ("load", "peak")  # of a machine, different in each run


@dataclass(frozen=True)
class BenchmarkCase:
    """What is measured: an experiment with a size, a number of experts, of images and of ranks, and a routing."""

    experiment: str
    size: str
    experts: int
    images: int
    routing: str
    ranks: int = 1

    @property
    def key(self) -> str:
        """Identifies the case in `benchmark.json`."""
        ranks = f" on {self.ranks} ranks" if self.experiment == "traffic" else ""
        return f"{self.experiment} {self.size} E{self.experts} B{self.images} {self.routing}{ranks}"

    @property
    def config(self) -> Config:
        """The configuration of the model."""
        return config_of(self.size, self.experts)


def config_of(size: str, experts: int | None = None) -> Config:
    """The preset of a size, with another number of experts. Raises ConfigError for an impossible number."""
    preset = "digits" if size == "digits" else f"promoe_{size}"
    return resolve(preset, overrides=() if experts is None else [f"model.num_experts={experts}"])


def cases(
    experiments: Sequence[str],
    sizes: Sequence[str],
    experts: Sequence[int],
    images: Sequence[int],
    routings: Sequence[str],
    ranks: Sequence[int],
    device: str,
) -> list[BenchmarkCase]:
    """All combinations; if `experts` is empty, the preset's number; if `images` is empty, those of `IMAGES`."""
    combinations = []
    for experiment in experiments:
        for size in sizes:
            default = DIGITS_IMAGES if size == "digits" and experiment != "traffic" else IMAGES[device][experiment]
            for E in experts or [config_of(size).model.num_experts]:
                for B in images or [default]:
                    for routing in routings:
                        combinations += [
                            BenchmarkCase(experiment, size, E, B, routing, n)
                            for n in (ranks if experiment == "traffic" else (1,))
                        ]
    return combinations


def replay(
    settings: Settings, wanted: Sequence[BenchmarkCase], trace: Path, step: int | None, block: int | None
) -> Settings:
    """The settings with the rows of a recorded step of a training run, for the routing "recorded".

    Args:
        wanted: the cases, whose sizes must be those of the run where they replay it.
        trace: a run directory, or its routing_trace.jsonl.
        step: the recorded step; None: the last one.
        block: the block that a measurement of one layer replays; None: the one whose fullest expert has most.

    Raises TraceError if the trace cannot be read or does not fit the cases.
    """
    last = read_trace(trace) if step is None else read_trace(trace, step, step)
    blocks, rows_ME = last.blocks, last.rows_NME[-1]
    at = f"{trace_file(trace)}, step {last.steps_N[-1]}"
    if block is not None and block not in blocks:
        raise TraceError(f"{at}: has no block {block} with experts; give one of {', '.join(map(str, blocks))}")
    most_uneven = int(np.argmax(np.nan_to_num(fullest_over_mean(rows_ME))))
    chosen = most_uneven if block is None else blocks.index(block)
    models = {"step", "sample"} & {case.experiment for case in wanted if case.routing == RECORDED}
    for layer in range(len(blocks)) if models else [chosen]:
        if not rows_ME[layer].any():
            raise TraceError(f"{at}: block {blocks[layer]} has no rows, a batch of null images; give another step")
    for case in wanted:
        m = case.config.model
        if case.routing != RECORDED:
            continue
        if m.num_experts != rows_ME.shape[1]:
            raise TraceError(
                f"{at}: has {rows_ME.shape[1]} experts, and {case.key} has {m.num_experts}; give --sizes and --experts"
                " that fit"
            )
        if case.experiment in models and len(m.moe_blocks) != len(blocks):
            raise TraceError(
                f"{at}: has {len(blocks)} blocks with experts, and {case.key} has {len(m.moe_blocks)}; measure the size"
                " of the run, or a layer alone"
            )
    return replace(settings, recorded=tuple(map(tuple, rows_ME.tolist())), recorded_layer=chosen)


def run(
    wanted: Sequence[BenchmarkCase],
    settings: Settings,
    out: Path,
    command: str,
    again: bool = False,
    starts: Callable[[BenchmarkCase], None] = lambda case: None,
) -> dict[str, Any]:
    """Measures cases and saves them in the folder `out`; returns the content of its `benchmark.json`.

    Args:
        wanted: the cases. Those that `out` has already are skipped.
        settings: of all cases; `images` is replaced by that of the case, empty `contenders` by the default.
        out: the folder, made if needed.
        command: the command line, which is saved too.
        again: measure the cases that `out` has already too.
        starts: called before each case.

    Raises BenchmarkError if `out` has results of another machine or of other settings; with `again` they are removed.
    """
    file = out / FILE
    torch.set_num_threads(settings.threads)
    kept = settings.device.type == "cpu" and keep_memory()
    machine = describe(settings.device, settings.dtype, settings.threads, kept)
    facts = {"machine": machine, "settings": _plain(settings)}
    document: dict[str, Any] = {**facts, "commands": [], "scenes": {}}
    if file.is_file():
        saved, differences = _open(file, facts)
        if differences and not again:
            raise BenchmarkError(
                f"{file}: has results of another machine or with other settings ({'; '.join(differences)});"
                " use another --out, or --again to remove them and start again"
            )
        document = document if differences else saved
    if command not in document["commands"]:
        document["commands"].append(command)
    missing = [case for case in wanted if again or case.key not in document["scenes"]]
    with _job(missing, settings):
        for case in missing:
            starts(case)
            document["scenes"][case.key] = {**vars(case), **_measure(case, settings)}
            write_json(file, document, indent=1, parents=True, concurrent=True)
    return document


def _contenders(case: BenchmarkCase, settings: Settings) -> tuple[str, ...]:
    return settings.contenders or CONTENDERS[case.experiment]


def _measure(case: BenchmarkCase, settings: Settings) -> dict[str, Any]:
    settings = replace(settings, images=case.images, contenders=_contenders(case, settings))
    if case.experiment == "traffic":
        return measure_traffic(case.config, case.routing, settings, case.ranks)
    measure = {"layer": measure_layer, "step": measure_step, "sample": measure_sample}[case.experiment]
    return measure(case.config, case.routing, settings)


def _plain(settings: Settings) -> dict[str, Any]:
    """The settings that are the same for all cases, as JSON."""
    left_out = {"images"} if settings.recorded else {"images", "recorded", "recorded_layer"}
    left_out |= set() if settings.capture else {"capture"}  # folders of earlier versions do not have it
    plain = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in left_out}
    if settings.recorded:
        plain["recorded"] = [[*rows_E] for rows_E in settings.recorded]
    return plain | {"device": str(settings.device), "dtype": str(settings.dtype), "contenders": [*settings.contenders]}


def _open(file: Path, facts: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The content of a file, and its differences from `facts`. Raises BenchmarkError if it is damaged."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        saved = {**document["machine"], **document["settings"]}
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{file}: is damaged ({error!r}); remove it, or use another --out") from error
    current = {**facts["machine"], **facts["settings"]}
    return document, [
        f"{name}: {saved.get(name)!r} in the file, {value!r} now"
        for name, value in current.items()
        if name not in VARYING_FACTS and saved.get(name) != value
    ]


@contextmanager
def _job(cases: Sequence[BenchmarkCase], settings: Settings) -> Iterator[None]:
    """Within it a torch.distributed job of one process runs, if a case has DeepSpeed's layer, which needs one."""
    names = {name for case in cases if case.experiment != "traffic" for name in _contenders(case, settings)}
    if not any(name.startswith("deepspeed") for name in names):
        yield
        return
    runtime.prepare()
    runtime.init_process_group(runtime.LaunchEnvironment("python"), timeout=600)
    torch.set_num_threads(settings.threads)
    try:
        yield
    finally:
        runtime.destroy_process_group()
