"""`megapromoe plan`: finds the best parallel layout on given GPUs, and estimates memory, time and cost."""

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from megapromoe.commands.command_line import file_errors, positive, positive_number, whole_number
from megapromoe.commands.options import DEFAULT_PRESET, OVERRIDES, config_options, resolve_options
from megapromoe.commands.plan_rehearsal import rehearse
from megapromoe.config.options import Config
from megapromoe.config.renamed_options import present_words
from megapromoe.io import write_json
from megapromoe.planning.explain import (
    costs,
    experts_in_parallel,
    memory_lines,
    reasons,
    settings,
    table,
    traffic_lines,
)
from megapromoe.planning.machines import GIB, MACHINES, Assumptions, Machine
from megapromoe.planning.memory import Budget
from megapromoe.planning.search import Plan, PlanError, Search, describe, fold, search

EPILOG = f"""\
examples:
  megapromoe plan --preset promoe_xl --nodes 8 --gpu h100
  megapromoe plan --preset promoe_xl --experts 64 --nodes 8 --plot memory.png
  megapromoe plan --preset promoe_l --gpus-per-node 4 --memory-gib 40 --gpu a100 --top 20
  megapromoe plan --preset promoe_xl --nodes 512 --global-batch 4096 --report plans.json
  megapromoe plan --preset promoe_xl --nodes 512 --global-batch 4096 --rehearse 17

For every combination of tp, ep, ZeRO stage and recompute it estimates the memory of the fullest GPU, all
communication of a step and the time of a step. It starts nothing, and needs neither a GPU nor torch. Of layouts
with about the same speed it proposes the simplest; experts are spread over nodes only where that is 25% faster
or nothing else fits. Settings on the command line, such as parallel.tp=2, stay fixed. Accumulation also stays
fixed unless nothing fits, because batch statistics depend on it.

Memory and bytes come from formulas that are tested against real runs; times are estimates from data sheets
and from the printed assumptions. Measure the time of a step before you rely on them.

{OVERRIDES}"""
JOB = False

FREE = (
    "parallel.tp",
    "parallel.ep",
    "parallel.expert_tp",
    "parallel.recompute",
    "train.deepspeed",
    "train.accumulation",
)
LAUNCHED = ("promoe_s", "promoe_b", "promoe_l", "promoe_xl")  # presets that have a launcher, for nodes of 8 GPUs


def arguments(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    parser.add_argument("--nodes", metavar="N", type=positive, default=1, help="number of nodes; default: 1")
    parser.add_argument("--gpu", choices=tuple(MACHINES), default="h100", help="the kind of GPU; default: h100")
    parser.add_argument("--gpus-per-node", metavar="N", type=positive, default=8, help="GPUs in a node; default: 8")
    parser.add_argument("--experts", metavar="E", type=positive, help="short for model.num_experts=E")
    parser.add_argument("--global-batch", metavar="N", type=positive, help="short for train.global_batch=N")
    parser.add_argument("--top", metavar="N", type=positive, default=8, help="number of layouts to list; default: 8")
    parser.add_argument(
        "--report", metavar="FILE", type=Path, help="write all layouts with all their values to this JSON file"
    )
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="plot the memory of the listed layouts, as .png, .svg or .pdf"
    )
    parser.add_argument(
        "--rehearse",
        metavar="RANK",
        type=whole_number(0),
        help="run this rank of the best layout here, without its cluster, and compare it with the plan",
    )
    parser.add_argument(
        "--trace",
        metavar="RUN",
        type=Path,
        help="rehearse with the rows of the experts in the routing trace of a run, instead of even ones",
    )
    figures = parser.add_argument_group("values that replace those of the data sheet and the assumptions")
    for name, text in (
        ("--memory-gib", "memory of a GPU in GiB"),
        ("--tflops", "dense bf16 TFLOP/s of a GPU"),
        ("--hbm-gbs", "memory bandwidth of a GPU in GB/s"),
        ("--nvlink-gbs", "bandwidth between GPUs of a node in GB/s, in each direction"),
        ("--network-gbs", "bandwidth between nodes for each GPU in GB/s, in each direction"),
        (
            "--storage-gbs",
            "measured GB/s at which all ranks together write to the run's folder, to estimate the time of saves",
        ),
        ("--imbalance", "rows of the fullest rank's experts, relative to the mean; default: 1.25"),
        ("--usable", "share of the memory to plan with; default: 0.9"),
        ("--efficiency", "share of the peak FLOP/s that large matrix products reach; default: 0.6"),
    ):
        figures.add_argument(name, metavar="X", type=positive_number, help=text)


def run(options: argparse.Namespace, launch) -> int:
    short = {"model.num_experts": options.experts, "train.global_batch": options.global_batch}
    options.overrides = [*options.overrides, *(f"{key}={value}" for key, value in short.items() if value is not None)]
    world = options.nodes * options.gpus_per_node
    if options.trace is not None and options.rehearse is None:
        raise PlanError(f"--trace {options.trace}: is for a rehearsal; add --rehearse RANK")
    with file_errors():
        machine, assume = _machine(options), _assumptions(options)
        _check_pictures(options.plot)
        config = resolve_options(options, None)
        options.overrides = present_words(options.overrides)  # a part of the proposed command
        fixed = frozenset(word.partition("=")[0].strip() for word in options.overrides) & set(FREE)
        result = search(config, world, machine, assume, fixed)
        if options.report:
            _write_json(options.report, result, machine, assume)
        if options.plot:
            from megapromoe.planning.plot import draw

            title = f"{options.preset or options.config or DEFAULT_PRESET} on {world} x {machine.name}"
            draw([plan for plan, _ in fold(result.fitting)[: options.top]], machine, result.limit, title, options.plot)
    print("\n".join(_lines(options, config, result, machine, assume)), flush=True)
    if options.rehearse is not None:
        print(flush=True)
        for line in rehearse(result.best.config, world, options.rehearse, options.trace):
            print(line, flush=True)
    return 0


def _lines(options: argparse.Namespace, config: Config, result: Search, machine: Machine, assume: Assumptions):
    best, world = result.best, options.nodes * options.gpus_per_node
    yield (
        f"layouts of {world} GPUs: {len(result.fitting)} fit {result.limit / GIB:.1f} GiB each,"
        f" {len(result.too_large)} do not, {result.impossible} cannot run (sizes that do not divide, refused settings)"
    )
    yield ""
    yield from table(fold(result.fitting)[: options.top])
    yield ""
    yield f"best: {describe(best)}"
    yield f"  {costs(best)}"
    yield from (f"  {line}" for line in reasons(result, machine))
    yield from experts_in_parallel(result)
    yield ""
    yield from memory_lines(best)
    yield from traffic_lines(best, machine, assume)
    yield ""
    yield from _saves(best, options.storage_gbs)
    yield ""
    yield assume.in_words(machine)
    yield ""
    yield "start it:"
    yield f"  {_command(options, config, best)}"


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
    """The command line that starts the training. Plain srun works with and without ports reserved by SLURM."""
    chosen = settings(best, config)
    words = [word for word in options.overrides if word.partition("=")[0].strip() not in chosen]
    words += [f"{key}={value}" for key, value in chosen.items()]
    if options.preset in LAUNCHED and options.config is None and options.gpus_per_node == 8:
        return shlex.join(["sbatch", f"--nodes={options.nodes}", f"launchers/{options.preset}.sh", *words])
    recipe = ["--preset", options.preset] if options.preset else []
    recipe += ["--config", str(options.config)] if options.config else []
    recipe = recipe or ["--preset", DEFAULT_PRESET]
    name, number = options.preset or "planned", str(options.gpus_per_node)
    start = ["srun", f"--nodes={options.nodes}"]
    start += [f"--ntasks-per-node={number}", f"--gpus-per-node={number}"]
    return shlex.join([*start, "megapromoe", "train", *recipe, "--run-dir", f"runs/{name}", *words])


def _machine(options: argparse.Namespace) -> Machine:
    changed = {
        "memory": options.memory_gib and int(options.memory_gib * GIB),
        "peak": options.tflops and options.tflops * 1e12,
        "hbm": options.hbm_gbs and options.hbm_gbs * 1e9,
        "nvlink": options.nvlink_gbs and options.nvlink_gbs * 1e9,
        "network": options.network_gbs and options.network_gbs * 1e9,
    }
    changed = {name: value for name, value in changed.items() if value is not None}
    machine = replace(MACHINES[options.gpu], gpus_per_node=options.gpus_per_node, **changed)
    return replace(machine, name=f"{machine.name}, changed") if changed else machine


def _assumptions(options: argparse.Namespace) -> Assumptions:
    changed = {"imbalance": options.imbalance, "usable": options.usable, "products": options.efficiency}
    wrong = [
        f"--{option} {value}"
        for option, value in (("usable", options.usable), ("efficiency", options.efficiency))
        if value is not None and value > 1
    ]
    if options.imbalance is not None and options.imbalance < 1:
        raise PlanError(f"--imbalance {options.imbalance}: must be at least 1: the fullest rank has at least the mean")
    if wrong:
        raise PlanError(f"{', '.join(wrong)}: must be at most 1, a share")
    return replace(Assumptions(), **{name: value for name, value in changed.items() if value is not None})


def _check_pictures(path: Path | None) -> None:
    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise PlanError(f"--plot {path}: must end in .png, .svg or .pdf")


def _write_json(path: Path, result: Search, machine: Machine, assume: Assumptions) -> None:
    """Writes all layouts, those that fit first; times in seconds, sizes in bytes."""
    content = {
        "estimates": True,
        "machine": asdict(machine),
        "assumptions": asdict(assume),
        "limit_bytes": result.limit,
        "layouts": [_entry(plan, plan.memory.peak <= result.limit) for plan in (*result.fitting, *result.too_large)],
    }
    write_json(path, content, indent=1)


def _disk(plan: Plan) -> dict:
    """Numbers of files, and bytes of each and of all together."""
    from megapromoe.checkpoint.disk_space import disk

    usage = disk(plan.config, plan.time.total)
    return asdict(usage) | {"peak_bytes": usage.peak, "written_bytes": usage.written}


def _entry(plan: Plan, fits: bool) -> dict:
    return {
        "fits": fits,
        **asdict(plan.layout),
        "deepspeed": plan.config.train.deepspeed,
        "recompute": plan.config.parallel.recompute,
        "accumulation": plan.config.train.accumulation,
        "memory_bytes": {name: getattr(plan.memory, name) for name in (*Budget.LINES, "update", "host", "peak")},
        "step_seconds": plan.time.total,
        "seconds": asdict(plan.time),
        "images_per_second": plan.images_per_second,
        "mfu": plan.mfu,
        "hours": plan.hours,
        "disk": _disk(plan),
    }
