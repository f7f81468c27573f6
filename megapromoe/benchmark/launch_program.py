"""Counts what the host issues in a training step: operators, generated kernels and messages, for models and layouts.

No time is measured, and no GPU is needed: operators run on CPU tensors, at the depth of a preset and a small width.
The folder --out gets launches.json, with the name and number of every operator, and launches.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from megapromoe.benchmark.launches import IMAGES, MODELS, Issued, count_blocks, count_step, count_update, narrow
from megapromoe.benchmark.moved_bytes import UPDATE_MINIMUM
from megapromoe.config.options import Config
from megapromoe.distributed import runtime
from megapromoe.distributed.mesh import make_mesh
from megapromoe.errors import UserError
from megapromoe.io import write_json, write_text
from megapromoe.nn.dit import DiT
from megapromoe.versions import versions

MINUTES = 60
PHASES = {
    "forward": "forward",
    "loss": "loss",
    "backward": "backward",
    "deepspeed forward": "+ DeepSpeed forward",
    "deepspeed backward": "+ DeepSpeed backward",
    "norm": "norm",
    "update": "update",
    "ema": "averages",
}

_EPILOG = """\
examples:
  count_launches.py --out runs/launches                             all models, on one rank and with ep 2, some minutes
  count_launches.py --models promoe_xl --ranks 1 --out runs/xl      one model on one rank

exit codes: 0 counted, 1 a count failed, 2 the command line is invalid, 130 interrupted"""


def main(argv: Sequence[str]) -> int:
    """Runs a command line; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        document = count(options.models, options.ranks, options.modes)
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "launches.json", document, indent=1)
        write_text(options.out / "launches.md", markdown(document))
    except UserError as error:
        print(f"count_launches: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"count_launches: {place}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("count_launches: interrupted", file=sys.stderr)
        return 130
    print(markdown(document))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="count_launches.py",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help=f"presets; default: {' '.join(MODELS)}")
    add("--ranks", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="ranks and ep; default: 1 2")
    add("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"], help="default: both")
    add("--out", type=Path, default=Path("runs/launches"), metavar="DIR", help="default: runs/launches")
    return parser


def count(models: Sequence[str], ranks: Sequence[int], modes: Sequence[str]) -> dict[str, Any]:
    """Counts all combinations that exist: dense models are not counted with ep.

    Returns JSON: "steps", a list of cases with "model", "ranks", "mode", "parameters" of the model, "phases", those
    of rank 0 as in `launches.count_step`, and on one rank, eager, "fused_update", as in `launches.count_update` with
    `train.adamw_backend=fused`; "blocks", mode -> `launches.count_blocks`; "images" of a rank's micro-batch, and
    versions.
    """
    steps = []
    for world in ranks:
        with tempfile.TemporaryDirectory() as folder:
            names = [name for name in models if world == 1 or not name.startswith("dit")]
            arguments = (world, folder, names, tuple(modes))
            multiprocessing.start_processes(_rank, arguments, nprocs=world, start_method="spawn")
            steps += json.loads((Path(folder) / "steps.json").read_text())
    blocks = {mode: count_blocks(mode == "compiled") for mode in modes}
    return {"steps": steps, "blocks": blocks, "images": IMAGES, **versions(("megapromoe", "torch", "deepspeed"))}


def _rank(rank: int, world: int, folder: str, models: Sequence[str], modes: Sequence[str]) -> None:
    torch.set_num_threads(1)
    runtime.use_cpu()
    runtime.prepare()
    launch = runtime.LaunchEnvironment("python", rank, world, rank, world)
    runtime.init_process_group(launch, 60 * MINUTES, dist.FileStore(f"{folder}/store", world))
    try:
        mesh = make_mesh(ep=world)
        steps = []
        for name in models:
            for mode in modes:
                config = narrow(name, f"parallel.ep={world}", f"train.global_batch={IMAGES * world}")
                phases = _figures(count_step(config, mesh, mode == "compiled"))
                parameters = sum(p.numel() for p in DiT(config.model).parameters())
                case = {"model": name, "ranks": world, "mode": mode, "parameters": parameters}
                if (world, mode) == (1, "eager"):
                    case["fused_update"] = _figures(count_update(_fused(config), mesh))
                steps.append({**case, "phases": phases})
        if rank == 0:
            (Path(folder) / "steps.json").write_text(json.dumps(steps))
        dist.barrier()
    finally:
        runtime.destroy_process_group()


def _figures(phases: dict[str, Issued]) -> dict[str, dict[str, Any]]:
    return {phase: {"launches": issued.launches, **vars(issued)} for phase, issued in phases.items()}


def _fused(config: Config) -> Config:
    return replace(config, train=replace(config.train, adamw_backend="fused"))


def markdown(document: dict[str, Any]) -> str:
    """Three tables: launches of every phase, bytes of the blocks, bytes of both updates on one rank."""
    lines = [
        f"Launches of a training step, {document['images']} images a rank, one of them null; torch {document['torch']},"
        f" DeepSpeed {document['deepspeed']}.",
        "",
        *_rows(["model", "ranks", "mode", *PHASES.values(), "messages"]),
    ]
    for step in document["steps"]:
        figures = [step["phases"][phase] for phase in PHASES]
        launches = [f"{figure['launches']:,}" for figure in figures]
        messages = sum(figure["messages"] for figure in figures)
        lines += _rows([step["model"], step["ranks"], step["mode"], *launches, messages], head=False)
    head = ["block", "mode", "forward", "backward", "minimum", "over it"]
    lines += [
        "",
        "Moved by elementwise operators of a block, in activations (D bf16 numbers a token).",
        "",
        *_rows(head),
    ]
    for mode, blocks in document["blocks"].items():
        for name, figure in blocks.items():
            moved = [figure["forward"], figure["backward"], figure["minimum"]]
            over = (figure["forward"] + figure["backward"]) / figure["minimum"]
            lines += _rows([name, mode, *(f"{value:.1f}" for value in moved), f"{over:.2f}"], head=False)
    minimum = sum(UPDATE_MINIMUM.values())
    lines += ["", "Launches, and bytes for each parameter that an update moves, on one rank.", ""]
    head = ["model", "train.adamw_backend", "launches", "norm", "update", "averages", "all", "minimum", "over it"]
    lines += _rows(head)
    for step in document["steps"]:
        if (step["ranks"], step["mode"]) == (1, "eager"):
            for backend, phases in (("torch", step["phases"]), ("fused", step["fused_update"])):
                figures = [phases[phase] for phase in ("norm", "update", "ema")]
                moved = [figure["moved"] / step["parameters"] for figure in figures]
                cells = [*(f"{value:.1f}" for value in (*moved, sum(moved))), minimum, f"{sum(moved) / minimum:.2f}"]
                launches = sum(figure["launches"] for figure in figures)
                lines += _rows([step["model"], backend, launches, *cells], head=False)
    return "\n".join(lines) + "\n"


def _rows(cells: Sequence[Any], head: bool = True) -> list[str]:
    row = f"| {' | '.join(map(str, cells))} |"
    return [row, f"|{'---|' * len(cells)}"] if head else [row]
