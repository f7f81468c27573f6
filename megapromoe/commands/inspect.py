"""`megapromoe inspect`: sizes, layout and norms of a checkpoint, or how two checkpoints differ."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapromoe.checkpoint.weights import AVERAGE
from megapromoe.commands.command_line import file_errors, takes_no_settings
from megapromoe.commands.options import checkpoint_config, checkpoint_config_options
from megapromoe.config.options import Config
from megapromoe.planning.cost import parameters

if TYPE_CHECKING:
    from megapromoe.conversion.state import State

EPILOG = """\
PATH and OTHER may be of different formats: a run directory or step folder, a published .pth, .safetensors, a
diffusers or a DeepSpeed folder; see `megapromoe convert --help`. A checkpoint without a configuration, such as a
.pth, is read with --config or --preset, or with the configuration of the other one. Kinds: master (the weights),
exp_avg and exp_avg_sq (AdamW's moments), ema (averaged weights), ema=DECAY (those of each further train.ema_decay).

For a run directory, its checkpoints and its abandoned branches are listed too.

With OTHER, each line shows the largest absolute difference, and the norm of the difference relative to that of PATH.

examples:
  megapromoe inspect runs/digits
  megapromoe inspect runs/digits/checkpoints/step-00000250 runs/digits/checkpoints/step-00000500
  megapromoe inspect runs/promoe_l promoe_l.pth --json

exit codes: 0 shown, 1 a checkpoint cannot be read, 2 the command or the config is wrong"""
JOB = False


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "megapromoe inspect PATH [OTHER] [options]"
    takes_no_settings(parser)
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint")
    parser.add_argument("other", type=Path, metavar="OTHER", nargs="?", help="another checkpoint, to compare with PATH")
    checkpoint_config_options(parser, "YAML of the run, such as its config.yaml")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint in PATH; default: the latest")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace, launch: None) -> int:
    from megapromoe.conversion.formats import with_latest

    def report_with(step: int | None) -> tuple[dict[str, Any], State]:
        if options.other is None:
            return _report(options, step, None)
        return with_latest(options.other, None, lambda other_step: _report(options, step, other_step))

    with file_errors():
        report, state = with_latest(options.path, options.step, report_with)
    if options.json:
        print(json.dumps(report))
    elif options.other is None:
        _print_norms(report, state.kinds)
    else:
        _print_differences(report)
    return 0


def _report(options: argparse.Namespace, step: int | None, other_step: int | None) -> tuple[dict[str, Any], State]:
    """The report, and the state at PATH."""
    from megapromoe.checkpoint.run_directory import RunDirectory
    from megapromoe.conversion.compare import differences, norms
    from megapromoe.work_progress import Progress

    state, other = _open_both(options, checkpoint_config(options, []), step, other_step)
    report = _facts(state, options.path)
    if (checkpoints := RunDirectory(options.path).checkpoints).is_dir():
        report |= _history(checkpoints.parent)
    total = state.nbytes + (other.nbytes if other else 0)
    with Progress(total, "B", "reading") as progress:
        if other is None:
            report["tensors"] = {
                name: {"shape": list(state.shapes[name]), "norm": norm}
                for name, norm in norms(state, progress.update).items()
            }
        else:
            tensors, apart = differences(state, other, progress.update)
            report |= {"other": _facts(other, options.other), "apart": apart}
            report["differences"] = [vars(tensor) for tensor in tensors]
    return report, state


def _open_both(
    options: argparse.Namespace, config: Config | None, step: int | None, other_step: int | None
) -> tuple[State, State | None]:
    """The two states; the second is None without OTHER. Either may supply the config of the other."""
    from megapromoe.conversion.formats import detect, open_state

    def opened(path: Path, config: Config | None, step: int | None = None) -> State:
        # A run directory contains its objective.
        return open_state(
            path, config=config, step=step, objective=None if detect(path) == "ours" else options.objective
        )

    if options.other is None:
        return opened(options.path, config, step), None
    if config is None and detect(options.path) == "published":
        other = opened(options.other, None, other_step)
        return opened(options.path, other.config, step), other
    state = opened(options.path, config, step)
    other_config = state.config if detect(options.other) == "published" else None
    return state, opened(options.other, config or other_config, other_step)


def _facts(state: State, path: Path) -> dict[str, Any]:
    count = parameters(state.config.model)
    averages = state.averages
    warning = averages[AVERAGE].warning(AVERAGE) if AVERAGE in averages else ""
    files = [state.where] if state.where.is_file() else sorted(p for p in state.where.rglob("*") if p.is_file())
    return {
        "path": str(path),
        "format": state.format,
        "step": state.step,
        "updates": state.known_updates,
        "kinds": list(state.kinds),
        "parameters": count.total,
        "trained_parameters": count.trainable,
        "buffers": len(state.buffers),
        "layout": state.layout,
        "files": {file.name: file.stat().st_size for file in files},
        "notes": [*state.notes, *([warning] if warning else [])],
        "initial_share": averages[AVERAGE].initial_share if AVERAGE in averages else None,
        "averages": {
            kind: {"decay": average.decay, "initial_share": average.initial_share, "updates": average.updates}
            for kind, average in averages.items()
        },
    }


def _history(folder: Path) -> dict[str, Any]:
    """The checkpoints of a run and its abandoned branches."""
    from megapromoe.checkpoint.history import left_branches
    from megapromoe.checkpoint.run_directory import RunDirectory
    from megapromoe.checkpoint.step_folders import snapshot_steps, step_folders

    run = RunDirectory(folder)
    checkpoints = [
        {"step": folder.step, "updates": folder.updates, "branch": folder.branch, "run": folder.run}
        for folder in step_folders(run.checkpoints)
    ]
    branches = [
        {
            "folder": str(branch.folder),
            "name": branch.name,
            "after": branch.after,
            "steps": list(branch.steps),
            "left": branch.left,
        }
        | {"reason": branch.reason, "snapshots": list(branch.snapshots)}
        for branch in left_branches(run)
    ]
    snapshots = snapshot_steps(run.snapshots)
    return {"checkpoints": checkpoints, "snapshots": snapshots, "left_branches": branches}


def _print_facts(report: dict[str, Any]) -> None:
    from megapromoe.checkpoint.average import share_in_words

    size = sum(report["files"].values())
    if report["updates"] is not None:
        updates = f"{report['updates']:,} updates"
    elif "exp_avg" in report["kinds"]:
        updates = "converted, with moments that start at zero: updates not known"
    else:
        updates = "weights without moments: updates not known"
    print(f"{report['path']}: {report['format']}, step {report['step']} ({updates})")
    fixed = report["parameters"] - report["trained_parameters"]
    table = f"{report['trained_parameters']:,} trained, {fixed:,} the constant table of positions"
    kinds = ", ".join(report["kinds"])
    print(f"  {report['parameters']:,} parameters ({table}), {report['buffers']} buffers; kinds: {kinds}")
    print(f"  saved as {report['layout']}; {len(report['files'])} files, {size:,} bytes")
    for kind, average in report["averages"].items():
        name = kind if average["decay"] is None else f"{kind}, decay {average['decay']:g}"
        named = f" ({name})" if len(report["averages"]) > 1 else ""
        print(f"  averaged weights{named}: {share_in_words(average['initial_share'])}")
    for note in report["notes"]:
        print(f"  note: {note}")
    if checkpoints := report.get("checkpoints"):
        listed = ", ".join(
            f"{checkpoint['step']}" + ("" if checkpoint["updates"] is not None else " (damaged)")
            for checkpoint in checkpoints
        )
        print(f"  checkpoints of the run: {listed}; branch {checkpoints[-1]['branch']!r}")
    if snapshots := report.get("snapshots"):
        print(f"  snapshots of its averaged weights: {', '.join(map(str, snapshots))}")
    for branch in report.get("left_branches", []):
        steps = ", ".join(map(str, branch["steps"])) or "none"
        steps += f", snapshots {', '.join(map(str, branch['snapshots']))}" if branch["snapshots"] else ""
        print(f"  branch {branch['name']!r} was left after step {branch['after']} ({branch['left']}): steps {steps}")
        print(f"    in {branch['folder']}: {branch['reason']}")


def _print_norms(report: dict[str, Any], kinds: tuple[str, ...]) -> None:
    _print_facts(report)
    width = max(map(len, report["tensors"]))
    print(f"\n{'norm of':{width}}  {'shape':>16}  " + "  ".join(f"{kind:>12}" for kind in kinds))
    for name, tensor in report["tensors"].items():
        values = "  ".join(f"{tensor['norm'][kind]:12.6g}" for kind in kinds)
        print(f"{name:{width}}  {'x'.join(map(str, tensor['shape'])):>16}  {values}")
    totals = (math.hypot(*(tensor["norm"][kind] for tensor in report["tensors"].values())) for kind in kinds)
    print(f"{'all':{width}}  {'':>16}  " + "  ".join(f"{total:12.6g}" for total in totals))


def _print_differences(report: dict[str, Any]) -> None:
    _print_facts(report)
    _print_facts(report["other"])
    for line in report["apart"]:
        print(f"apart: {line}")
    compared = report["differences"]
    differing = [tensor for tensor in compared if tensor["largest"] > 0 or math.isnan(tensor["largest"])]
    print(f"\n{len(compared) - len(differing)} of {len(compared)} tensors are equal to the bit")
    if differing:
        width = max(len(tensor["name"]) for tensor in differing)
        print(f"{'differs':{width}}  {'kind':10}  {'largest':>12}  {'relative':>12}")
        for tensor in differing:
            figures = f"{tensor['largest']:12.4g}  {tensor['relative']:12.4g}"
            print(f"{tensor['name']:{width}}  {tensor['kind']:10}  {figures}")
