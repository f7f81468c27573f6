"""The text and the JSON of `megapromoe plan`."""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from megapromoe.commands.options import DEFAULT_PRESET
from megapromoe.config.options import Config
from megapromoe.number_text import significant
from megapromoe.planning.calibration import Calibration, calibration_lines, describe_layout
from megapromoe.planning.explain import (
    costs,
    experts_in_parallel,
    memory_lines,
    reasons,
    settings,
    table,
    traffic_lines,
)
from megapromoe.planning.machines import GIB, Machine
from megapromoe.planning.memory import Budget
from megapromoe.planning.published import applies, published_lines
from megapromoe.planning.scaling import Point, cost_of, efficiency
from megapromoe.planning.search import Plan, Search, describe, fold

LAUNCHED = ("promoe_s", "promoe_b", "promoe_l", "promoe_xl")  # presets that have a launcher, for nodes of 8 GPUs


def plan_lines(
    options: argparse.Namespace, config: Config, result: Search, machine: Machine, calibration: Calibration
) -> Iterator[str]:
    """The text of a plan for one number of nodes: layouts, the best one with its reasons, and the command."""
    best, assume = result.best, calibration.assume
    world = best.layout.world
    yield (
        f"layouts of {world} GPUs: {len(result.fitting)} fit {result.limit / GIB:.1f} GiB each,"
        f" {len(result.too_large)} do not, {result.impossible} cannot run (sizes that do not divide, refused settings)"
    )
    yield ""
    yield from table(fold(result.fitting)[: options.top])
    yield ""
    yield f"best: {describe(best)}"
    yield f"  {costs(best)}"
    if options.num_images is not None:
        cost = cost_of(best, options.num_images)
        yield (
            f"  {options.num_images:,} images: {cost.steps:,} steps, {significant(cost.hours)} hours,"
            f" {significant(cost.gpu_hours)} GPU-hours"
        )
    if applies(options.preset, best, machine):
        yield from (f"  {line}" for line in published_lines(options.preset, best, machine, assume))
    yield from (f"  {line}" for line in reasons(result, machine))
    yield from experts_in_parallel(result)
    yield ""
    yield from memory_lines(best)
    yield from traffic_lines(best, machine, assume)
    yield ""
    yield from _saves(best, options.storage_gbs)
    yield ""
    yield from assumption_lines(replace(calibration, machine=machine))
    yield ""
    yield "start it:"
    yield f"  {_command(options, config, best)}"


def assumption_lines(calibration: Calibration) -> Iterator[str]:
    """The calibration, if there are measurements, then the machine and the assumptions."""
    if calibration.is_measured:
        yield from calibration_lines(calibration)
        yield ""
    yield calibration.assume.in_words(calibration.machine, calibration.is_measured)


def _saves(best: Plan, storage_gbs: float | None) -> Iterator[str]:
    """What the run writes and the disk space it needs; the time only if the write bandwidth is given."""
    from megapromoe.checkpoint.disk_space import disk

    usage, t = disk(best.config, best.time.total), best.config.train
    yield f"what the {t.steps:,} steps write"
    every = [f"every {t.save_every:,} steps" if t.save_every else "the last step"]
    every += [f"{t.save_minutes:g} minutes after the one before, at the estimated speed"] if t.save_minutes else []
    most = f"at most {usage.most_checkpoints} at once, {_size(usage.most_checkpoints * usage.checkpoint)}"
    count = f"{usage.checkpoints:7,}{'' if usage.exact else ' (estimated)'}"
    yield f"  checkpoints {count} of {_size(usage.checkpoint)} ({' or '.join(every)}); {most}"
    if usage.snapshots:
        kept = f"all kept, {_size(usage.snapshots * usage.snapshot)}"
        yield f"  snapshots   {usage.snapshots:7,} of {_size(usage.snapshot)} (averages alone); {kept}"
    if usage.pictures:
        most = _size(usage.pictures * usage.picture)
        yield f"  pictures    {usage.pictures:7,} of at most {_size(usage.picture)} (samples); {most}"
    yield f"  {_size(usage.peak)} of disk, and the logs"
    if storage_gbs is None:
        yield "  for the time of saves give --storage-gbs; `megapromoe check --run-dir` measures it"
        return
    checkpoint_seconds, total_seconds = (size / storage_gbs / 1e9 for size in (usage.checkpoint, usage.written))
    yield (
        f"  a checkpoint is written in {_seconds(checkpoint_seconds)}, all of {_size(usage.written)} in"
        f" {_seconds(total_seconds)}, during training, which stops only while the state is copied to host memory"
    )
    between = best.time.total * t.steps / usage.checkpoints
    if checkpoint_seconds > between:
        yield f"  longer than the {_seconds(between)} between two saves, so training would wait; save less often"


def _size(size: int) -> str:
    gigabytes = size / 1e9
    if gigabytes < 0.1:
        return f"{size / 1e6:.3g} MB"
    return f"{gigabytes:,.0f} GB" if gigabytes >= 1000 else f"{gigabytes:#.4g} GB"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _command(options: argparse.Namespace, config: Config, best: Plan) -> str:
    """The command line that starts the training. Plain srun works with and without ports reserved by SLURM.

    The number of tasks is given because an allocation has one of its own, which srun would take.
    """
    nodes = best.layout.world // options.gpus_per_node
    chosen = settings(best, config)
    words = [word for word in options.overrides if word.partition("=")[0].strip() not in chosen]
    words += [f"{key}={value}" for key, value in chosen.items()]
    if options.preset in LAUNCHED and options.config is None and options.gpus_per_node == 8 and options.gpu != "cpu":
        return shlex.join(["sbatch", f"--nodes={nodes}", f"launchers/{options.preset}.sh", *words])
    recipe = ["--preset", options.preset] if options.preset else []
    recipe += ["--config", str(options.config)] if options.config else []
    recipe = recipe or ["--preset", DEFAULT_PRESET]
    name, number = options.preset or "planned", str(options.gpus_per_node)
    start = ["srun", f"--nodes={nodes}", f"--ntasks={best.layout.world}", f"--ntasks-per-node={number}"]
    start += [f"--gpus-per-node={number}"] if options.gpu != "cpu" else []
    return shlex.join([*start, "megapromoe", "train", *recipe, "--run-dir", f"runs/{name}", *words])


def points_json(points: Sequence[Point], num_images: int | None) -> dict[str, Any]:
    """The points of a table of nodes and experts, as JSON."""
    rows = []
    for p in points:
        row: dict[str, Any] = {"nodes": p.nodes, "experts": p.experts, "problem": p.problem}
        if p.plan is not None:
            row |= {**asdict(cost_of(p.plan, num_images)), "efficiency": efficiency(points, p), **entry(p.plan, True)}
        rows.append(row)
    return {"num_images": num_images, "points": rows}


def compared_json(plans: Sequence[tuple[str, Plan]], num_images: int | None) -> dict[str, Any]:
    """Two best plans, as JSON."""
    rows = [{"name": name, **asdict(cost_of(plan, num_images)), **entry(plan, True)} for name, plan in plans]
    return {"num_images": num_images, "compared": rows}


def search_json(result: Search, num_images: int | None) -> dict[str, Any]:
    """All layouts, those that fit first, the best of all first; times in seconds, sizes in bytes."""
    cost = {} if num_images is None else {"num_images": num_images, "cost": asdict(cost_of(result.best, num_images))}
    return cost | {
        "limit_bytes": result.limit,
        "layouts": [entry(plan, plan.memory.peak <= result.limit) for plan in (*result.fitting, *result.too_large)],
    }


def assumed_json(calibration: Calibration) -> dict[str, Any]:
    """The machine, the assumptions, and where measurements replaced them."""
    content: dict[str, Any] = {"estimates": True, "machine": asdict(calibration.machine)}
    content["assumptions"] = asdict(calibration.assume)
    if not calibration.is_measured:
        return content
    steps = [
        {
            "source": c.step.source,
            "layout": asdict(c.step.layout),
            "layout_in_words": describe_layout(c.step.config, c.step.layout),
            "forward_and_backward_alone": not c.step.whole_step,
            "fitted": c.fitted,
            "assumed_seconds": c.assumed,
            "calibrated_seconds": c.calibrated,
            "measured_seconds": c.step.seconds,
            "quartiles": [c.step.low, c.step.high],
            "values": c.step.count,
            "factor": c.factor,
        }
        for c in calibration.compared
    ]
    values = [asdict(value) | {"factor": value.factor} for value in calibration.values]
    return content | {"calibration": {"values": values, "steps": steps, "notes": list(calibration.notes)}}


def _disk(plan: Plan) -> dict:
    """Numbers of files, and bytes of each and of all together."""
    from megapromoe.checkpoint.disk_space import disk

    usage = disk(plan.config, plan.time.total)
    return asdict(usage) | {"peak_bytes": usage.peak, "written_bytes": usage.written}


def entry(plan: Plan, fits: bool) -> dict[str, Any]:
    """A plan as JSON; times in seconds, sizes in bytes."""
    seconds = asdict(plan.time)
    del seconds["asynchronous"]  # of the machine
    return {
        "fits": fits,
        **asdict(plan.layout),
        "deepspeed": plan.config.train.deepspeed,
        "recompute": plan.config.parallel.recompute,
        "accumulation": plan.config.train.accumulation,
        "memory_bytes": {name: getattr(plan.memory, name) for name in (*Budget.LINES, "update", "host", "peak")},
        "step_seconds": plan.time.total,
        "seconds": seconds,
        "images_per_second": plan.images_per_second,
        "mfu": plan.mfu,
        "hours": plan.hours,
        "disk": _disk(plan),
    }
