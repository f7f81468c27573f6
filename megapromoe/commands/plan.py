"""`megapromoe plan`: finds the best parallel layout on given GPUs, and estimates memory, time and cost."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from megapromoe.commands.command_line import (
    CommandError,
    file_errors,
    image_count,
    positive,
    positive_number,
    whole_number,
)
from megapromoe.commands.options import DEFAULT_PRESET, OVERRIDES, config_options, resolve_options
from megapromoe.commands.plan_rehearsal import rehearse
from megapromoe.commands.plan_report import (
    assumed_json,
    assumption_lines,
    compared_json,
    plan_lines,
    points_json,
    search_json,
)
from megapromoe.config.options import Config, ConfigError
from megapromoe.config.presets import PRESETS
from megapromoe.config.renamed_options import present_words
from megapromoe.io import write_json
from megapromoe.planning.calibration import Calibration, calibrate
from megapromoe.planning.machines import CPU, CPU_ASSUMPTIONS, GIB, MACHINES, Assumptions, Machine
from megapromoe.planning.measurements import Measured, gpu_of, read_measurements
from megapromoe.planning.scaling import Point, compare_lines, make_point, point_lines
from megapromoe.planning.search import Plan, PlanError, Search, fold, search

EPILOG = f"""\
examples:
  megapromoe plan --preset promoe_xl --nodes 8 --gpu h100
  megapromoe plan --preset promoe_xl --experts 64 --nodes 8 --plot memory.png
  megapromoe plan --preset promoe_l --gpus-per-node 4 --memory-gib 40 --gpu a100 --top 20
  megapromoe plan --preset promoe_xl --nodes 512 --global-batch 4096 --report plans.json
  megapromoe plan --preset promoe_xl --nodes 1 2 4 8 --experts 8 16 --num-images 128M
  megapromoe plan --compare dit_l promoe_l --gpu a800 --gpus-per-node 4
  megapromoe plan --preset promoe_xl --nodes 8 --measured check.json runs/small --validate runs/large
  megapromoe plan --preset promoe_xl --nodes 512 --global-batch 4096 --rehearse 17

For every combination of tp, ep, ZeRO stage and recompute it estimates the memory of the fullest GPU, all
communication of a step and the time of a step. It starts nothing, and needs neither a GPU nor torch. Of layouts
with about the same speed it proposes the simplest; experts are spread over nodes only where that is 25% faster
or nothing else fits. Settings on the command line, such as parallel.tp=2, stay fixed. Accumulation also stays
fixed unless nothing fits, because batch statistics depend on it.

Memory and bytes come from formulas that are tested against real runs; times are estimates from data sheets
and from the printed assumptions. Measure the time of a step before you rely on them: --measured takes reports
of `megapromoe check`, benchmark.json files and run directories, replaces the assumed rates by measured ones, and
prints the steps of the runs beside the estimates.

{OVERRIDES}"""
JOB = False

FREE = (
    "parallel.tp",
    "parallel.ep",
    "parallel.expert_tp",
    "parallel.recompute",
    "parallel.shard_ranks",
    "train.deepspeed",
    "train.accumulation",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    parser.add_argument(
        "--nodes",
        metavar="N",
        type=positive,
        nargs="+",
        default=[1],
        help="number of nodes; several: a table of them. default: 1",
    )
    parser.add_argument(
        "--gpu",
        choices=(*MACHINES, "cpu"),
        help="the kind of GPU; cpu: processes of one core each. default: that of --measured, else h100",
    )
    parser.add_argument(
        "--gpus-per-node",
        metavar="N",
        type=positive,
        help="GPUs in a node; default: 8, of gb200 4, of cpu the ranks of the largest run",
    )
    parser.add_argument(
        "--experts",
        metavar="E",
        type=positive,
        nargs="+",
        help="short for model.num_experts=E; several: a table of them",
    )
    parser.add_argument("--global-batch", metavar="N", type=positive, help="short for train.global_batch=N")
    parser.add_argument("--top", metavar="N", type=positive, default=8, help="number of layouts to list; default: 8")
    parser.add_argument(
        "--num-images",
        metavar="N",
        type=image_count,
        help="show the cost of training on N images, such as 128M, in place of that of train.steps",
    )
    parser.add_argument(
        "--compare",
        metavar=("A", "B"),
        nargs=2,
        help="compare two presets or YAML files on the same GPUs, in place of --preset and --config",
    )
    parser.add_argument(
        "--measured",
        metavar="PATH",
        type=Path,
        nargs="+",
        help="replace assumed rates by measured ones: reports of `megapromoe check`, benchmark.json, run directories",
    )
    parser.add_argument(
        "--validate",
        metavar="PATH",
        type=Path,
        nargs="+",
        help="run directories, or benchmark.json files, whose steps are predicted and not used by --measured",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object in place of the text")
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
    figures = parser.add_argument_group(
        "values that replace those of the data sheet and the assumptions; --measured replaces them where it measured"
    )
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
    with file_errors():
        measured, validated = read_measurements(options.measured or []), read_measurements(options.validate or [])
        _refuse_combinations(options)
        _complete(options, measured, validated)
        assume = _assumptions(options)
        _check_pictures(options.plot)
        calibration = calibrate(measured, _machine(options), assume, validated)
        if options.compare:
            content, lines = _comparison(options, calibration)
        elif len(options.nodes) > 1 or len(options.experts or []) > 1:
            content, lines = _table(options, calibration)
        else:
            content, lines = _single(options, calibration)
        if options.report:
            write_json(options.report, content(), indent=1)
    if options.json:
        print(json.dumps(content(), indent=1), flush=True)
    else:
        for line in lines:
            print(line, flush=True)
    return 0


Answer = tuple[Callable[[], dict[str, Any]], Iterable[str]]  # what makes the JSON, and lines of text


def _single(options: argparse.Namespace, calibration: Calibration) -> Answer:
    """The plan for one number of nodes and of experts."""
    world = options.nodes[0] * options.gpus_per_node
    options.overrides = _words(options, next(iter(options.experts or []), None))
    config = resolve_options(options, None)
    options.overrides = present_words(options.overrides)  # a part of the proposed command
    machine = calibration.machine.for_job(world)
    result = search(config, world, machine, calibration.assume, _fixed(options.overrides))
    if options.plot:
        from megapromoe.planning.plot import draw

        title = f"{options.preset or options.config or DEFAULT_PRESET} on {world} x {machine.name}"
        draw([plan for plan, _ in fold(result.fitting)[: options.top]], machine, result.limit, title, options.plot)
    lines: Iterable[str] = plan_lines(options, config, result, machine, calibration)
    if options.rehearse is not None:
        lines = chain(lines, [""], rehearse(result.best.config, world, options.rehearse, options.trace))
    return lambda: assumed_json(calibration) | search_json(result, options.num_images), lines


def _table(options: argparse.Namespace, calibration: Calibration) -> Answer:
    """The best plan of each combination of nodes and experts."""
    points = []
    for experts in options.experts or [None]:
        words = _words(options, experts)
        config = resolve_options(_with(options, overrides=words), None)
        points += [_point(config, nodes, options, calibration, words) for nodes in sorted(set(options.nodes))]
    if not any(p.plan for p in points):
        raise PlanError(points[0].problem)
    return lambda: assumed_json(calibration) | points_json(points, options.num_images), [
        *point_lines(points, options.num_images),
        "",
        *assumption_lines(calibration),
    ]


def _point(
    config: Config, nodes: int, options: argparse.Namespace, calibration: Calibration, words: list[str]
) -> Point:
    world = nodes * options.gpus_per_node
    result: Search | PlanError | ConfigError
    try:
        result = search(config, world, calibration.machine.for_job(world), calibration.assume, _fixed(words))
    except (PlanError, ConfigError) as error:
        result = error
    return make_point(config, nodes, result)


def _comparison(options: argparse.Namespace, calibration: Calibration) -> Answer:
    """The best plans of two configurations on the same GPUs."""
    world = options.nodes[0] * options.gpus_per_node
    machine = calibration.machine.for_job(world)
    words = _words(options, next(iter(options.experts or []), None))
    plans: list[tuple[str, Plan]] = []
    for name in options.compare:
        preset, file = (name, None) if name in PRESETS else (None, Path(name))
        if file is not None and not file.is_file():
            raise CommandError(f"--compare {name}: is neither a preset nor a file; `megapromoe show` lists the presets")
        config = resolve_options(_with(options, preset=preset, config=file, overrides=words), None)
        plans.append((name, search(config, world, machine, calibration.assume, _fixed(words)).best))
    return lambda: assumed_json(calibration) | compared_json(plans, options.num_images), [
        *compare_lines(plans, options.num_images),
        "",
        *assumption_lines(calibration),
    ]


def _with(options: argparse.Namespace, **changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), **changed})


def _fixed(words: Sequence[str]) -> frozenset[str]:
    return frozenset(word.partition("=")[0].strip() for word in words) & set(FREE)


def _words(options: argparse.Namespace, experts: int | None) -> list[str]:
    """The overrides, with those that --experts and --global-batch are short for."""
    short = {"model.num_experts": experts, "train.global_batch": options.global_batch}
    return [*options.overrides, *(f"{key}={value}" for key, value in short.items() if value is not None)]


def _refuse_combinations(options: argparse.Namespace) -> None:
    """Raises CommandError for options that cannot be combined."""
    several = len(options.nodes) > 1 or len(options.experts or []) > 1
    if options.rehearse is not None and (several or options.compare or options.json):
        raise CommandError(
            f"--rehearse {options.rehearse}: runs a rank of one plan and prints text; give one number of --nodes and of"
            " --experts, without --compare and --json"
        )
    if options.trace is not None and options.rehearse is None:
        raise CommandError(f"--trace {options.trace}: is for a rehearsal; add --rehearse RANK")
    if several and options.plot:
        raise CommandError("--plot: shows the layouts of one plan; give one number of --nodes and of --experts")
    if options.compare and (several or options.plot or options.preset or options.config):
        raise CommandError(
            "--compare A B: takes the place of --preset and --config, with one number of --nodes and of --experts and"
            " without --plot"
        )


def _complete(options: argparse.Namespace, measured: Measured, validated: Measured) -> None:
    """Sets --gpu, --gpus-per-node and the configuration that are not given, by the measurements.

    Without --preset and --config the plan is for the model of the first measured run.
    """
    steps = (*measured.steps, *validated.steps)
    if options.validate and not validated.steps:
        raise CommandError("--validate: has no measured steps; give run directories")
    if options.gpu is None:
        device = measured.device or validated.device
        options.gpu = gpu_of(device) or "h100"
        if gpu_of(device) is None and (options.measured or options.validate):
            shown = f"were made on {device}" if device else "do not name their device"
            raise CommandError(f"--gpu: the measurements {shown}; give the kind of GPU, {', '.join(MACHINES)} or cpu")
    if options.gpus_per_node is None:
        ranks = max((step.layout.world for step in steps), default=1)
        options.gpus_per_node = ranks if options.gpu == "cpu" else MACHINES[options.gpu].gpus_per_node
    runs = [path for path in options.measured or [] if path.is_dir()]
    if runs and not (options.preset or options.config or options.compare):
        options.config = runs[0] / "config.yaml"


def _machine(options: argparse.Namespace) -> Machine:
    changed = {
        "memory": options.memory_gib and int(options.memory_gib * GIB),
        "peak": options.tflops and options.tflops * 1e12,
        "hbm": options.hbm_gbs and options.hbm_gbs * 1e9,
        "nvlink": options.nvlink_gbs and options.nvlink_gbs * 1e9,
        "network": options.network_gbs and options.network_gbs * 1e9,
    }
    changed = {name: value for name, value in changed.items() if value is not None}
    machine = replace((MACHINES | {"cpu": CPU})[options.gpu], gpus_per_node=options.gpus_per_node, **changed)
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
    return replace(
        CPU_ASSUMPTIONS if options.gpu == "cpu" else Assumptions(),
        **{name: value for name, value in changed.items() if value is not None},
    )


def _check_pictures(path: Path | None) -> None:
    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise PlanError(f"--plot {path}: must end in .png, .svg or .pdf")
