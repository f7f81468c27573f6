"""Shows a checkpoint of any format: sizes, layout, norms of its tensors; or how two checkpoints differ.

    python tools/inspect_checkpoint.py PATH [OTHER] [--config FILE | --preset NAME] [--json]

PATH and OTHER may be of different formats: a run directory or step folder, a published .pth, .safetensors, a
diffusers or a DeepSpeed folder; see `convert_checkpoint.py --help`. What does not say which model it is of, such as a
.pth, is read with --config or --preset, or with what the other says. Kinds: master (the weights), exp_avg and
exp_avg_sq (AdamW's moments), ema (averaged weights).

With OTHER, each line has the largest absolute difference and the norm of the difference over the norm of PATH's.

examples:
  inspect_checkpoint.py runs/digits
  inspect_checkpoint.py runs/digits/checkpoints/step-00000250 runs/digits/checkpoints/step-00000500
  inspect_checkpoint.py runs/promoe_l promoe_l.pth --json

exit codes: 0 shown, 1 a checkpoint cannot be read, 2 the command or the config is wrong
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    options = arguments(argv)

    from megapromoe.checkpoint.format import CheckpointError
    from megapromoe.config import resolve  # after the arguments: torch takes seconds to import
    from megapromoe.config.options import ConfigError
    from megapromoe.conversion.stream import ConversionError

    try:
        config = None
        if options.config or options.preset:
            config = resolve(preset=options.preset, file=options.config)
        return inspect(options, config)
    except ConfigError as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return 2
    except (ConversionError, CheckpointError, OSError) as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("inspect_checkpoint: interrupted", file=sys.stderr)
        return 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint")
    parser.add_argument("other", type=Path, metavar="OTHER", nargs="?", help="another one to compare it with")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML of the run, such as its config.yaml")
    parser.add_argument("--preset", metavar="NAME", help="a recipe instead; `megapromoe show` lists them")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint of PATH; default: the latest")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(argv)


def inspect(options: argparse.Namespace, config) -> int:
    from tqdm import tqdm

    from megapromoe.conversion.compare import differences, norms

    state, other = open_both(options, config)
    said = facts(state, options.path)
    total = state.nbytes + (other.nbytes if other else 0)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        if other is None:
            said["tensors"] = {
                name: {"shape": list(state.shapes[name]), "norm": norm}
                for name, norm in norms(state, bar.update).items()
            }
        else:
            found, apart = differences(state, other, bar.update)
            said |= {"other": facts(other, options.other), "apart": apart}
            said["differences"] = [vars(one) for one in found]
    if options.json:
        print(json.dumps(said))
    elif other is None:
        print_norms(said, state)
    else:
        print_differences(said)
    return 0


def open_both(options: argparse.Namespace, config) -> tuple:
    """The two states; the second is None without OTHER. Each may lend the other its config."""
    from megapromoe.conversion.formats import detect, open_state

    if options.other is None:
        return open_state(options.path, config=config, step=options.step), None
    if config is None and detect(options.path) == "published":
        other = open_state(options.other)
        return open_state(options.path, config=other.config, step=options.step), other
    state = open_state(options.path, config=config, step=options.step)
    lent = state.config if detect(options.other) == "published" else None
    return state, open_state(options.other, config=config or lent)


def facts(state, path: Path) -> dict:
    files = [state.where] if state.where.is_file() else sorted(p for p in state.where.rglob("*") if p.is_file())
    return {
        "path": str(path),
        "format": state.format,
        "step": state.step,
        "updates": state.updates,
        "kinds": list(state.kinds),
        "parameters": sum(math.prod(shape) for shape in state.shapes.values()),
        "buffers": len(state.buffers),
        "layout": state.layout,
        "files": {file.name: file.stat().st_size for file in files},
        "notes": state.notes,
    }


def print_facts(said: dict) -> None:
    size = sum(said["files"].values())
    print(f"{said['path']}: {said['format']}, step {said['step']} ({said['updates']} updates)")
    print(f"  {said['parameters']:,} parameters, {said['buffers']} buffers; kinds: {', '.join(said['kinds'])}")
    print(f"  saved as {said['layout']}; {len(said['files'])} files, {size:,} bytes")
    for note in said["notes"]:
        print(f"  note: {note}")


def print_norms(said: dict, state) -> None:
    print_facts(said)
    width = max(map(len, said["tensors"]))
    print(f"\n{'norm of':{width}}  {'shape':>16}  " + "  ".join(f"{kind:>12}" for kind in state.kinds))
    for name, one in said["tensors"].items():
        values = "  ".join(f"{one['norm'][kind]:12.6g}" for kind in state.kinds)
        print(f"{name:{width}}  {'x'.join(map(str, one['shape'])):>16}  {values}")
    totals = (math.hypot(*(one["norm"][kind] for one in said["tensors"].values())) for kind in state.kinds)
    print(f"{'all':{width}}  {'':>16}  " + "  ".join(f"{total:12.6g}" for total in totals))


def print_differences(said: dict) -> None:
    print_facts(said)
    print_facts(said["other"])
    for line in said["apart"]:
        print(f"apart: {line}")
    found = [one for one in said["differences"] if one["largest"] > 0 or math.isnan(one["largest"])]
    print(f"\n{len(said['differences']) - len(found)} of {len(said['differences'])} tensors are equal to the bit")
    if found:
        width = max(len(one["name"]) for one in found)
        print(f"{'differs':{width}}  {'kind':10}  {'largest':>12}  {'relative':>12}")
        for one in found:
            print(f"{one['name']:{width}}  {one['kind']:10}  {one['largest']:12.4g}  {one['relative']:12.4g}")


if __name__ == "__main__":
    sys.exit(main())
