"""Converts a checkpoint between formats, tensor by tensor, bit by bit.

    python tools/convert_checkpoint.py SOURCE DEST --to FORMAT [--config FILE | --preset NAME]
    python tools/convert_checkpoint.py SOURCE --what

formats:
  ours         a run directory (SOURCE may also be one of its checkpoints/step-XXXXXXXX); as DEST, a run that
               `megapromoe train --config DEST/config.yaml --run DEST` continues
  published    a .pth of the ProMoE release, with EMA and optimizer: ProMoE (TC, EC), DiT, TC-DiT, EC-DiT, DiffMoE
  safetensors  one file with all state, or weights alone (--weights)
  diffusers    a folder of config.json and diffusion_pytorch_model.safetensors; weights alone
  deepspeed    a folder of latest and global_stepN/ with mp_rank_* and layer_*_expert_* files

A published .pth does not say which model it is of: give the config.

examples:
  convert_checkpoint.py promoe_l.pth runs/promoe_l --to ours --preset promoe_l
  convert_checkpoint.py runs/promoe_l promoe_l.pth --to published --step 500000
  convert_checkpoint.py runs/promoe_l promoe_l.safetensors --to safetensors --weights ema
  convert_checkpoint.py unknown.pth --what

exit codes: 0 done, 1 the checkpoint cannot be read or written, 2 the command or the config is wrong
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

FORMATS = ("ours", "published", "safetensors", "diffusers", "deepspeed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    options = arguments(argv)

    from megapromoe.distributed import runtime  # torch takes seconds to import; help should not wait for it

    runtime.prepare()
    from megapromoe.checkpoint.format import CheckpointError
    from megapromoe.config.options import ConfigError
    from megapromoe.conversion.stream import ConversionError

    try:
        return listing(options) if options.what else convert(options)
    except ConfigError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    except (ConversionError, CheckpointError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert_checkpoint: interrupted", file=sys.stderr)
        return 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the checkpoint to read")
    parser.add_argument("dest", type=Path, metavar="DEST", nargs="?", help="what to write")
    parser.add_argument("--to", choices=FORMATS, help="the format of DEST")
    parser.add_argument("--from", dest="form", choices=("auto", *FORMATS), default="auto", help="default: auto")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML of the run, such as its config.yaml")
    parser.add_argument("--preset", metavar="NAME", help="a recipe instead; `megapromoe show` lists them")
    parser.add_argument("--weights", choices=("ema", "master"), help="which, where a file holds weights alone")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint of several; default: the latest")
    parser.add_argument("--overwrite", action="store_true", help="replace a DEST that is a checkpoint")
    parser.add_argument("--what", action="store_true", help="list what SOURCE holds; nothing is loaded or written")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over the config's")
    words = list(sys.argv[1:] if argv is None else argv)
    overrides = [word for word in words if re.match(r"\w+\.\w+=", word)]
    options = parser.parse_args([word for word in words if word not in overrides])
    options.overrides += overrides
    if options.overrides != overrides:
        parser.error(f"{options.overrides[0]}: SOURCE and DEST are the only paths; settings are section.key=value")
    if not options.what and (options.dest is None or options.to is None):
        parser.error("give DEST and --to FORMAT, or --what to list what SOURCE holds")
    if options.what and (options.dest or options.to):
        parser.error("--what writes nothing: leave DEST and --to out")
    if options.overrides and not (options.config or options.preset):
        parser.error(f"{options.overrides[0]}: settings go over --config or --preset; give one")
    return options


def convert(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megapromoe.config.resolve import resolve
    from megapromoe.conversion.exports import export
    from megapromoe.conversion.formats import open_state

    config = None
    if options.config or options.preset:
        config = resolve(preset=options.preset, file=options.config, overrides=options.overrides)
    state = open_state(options.source, options.form, config, options.step)
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, disable=None, desc=options.to) as bar:
        notes = export(state, options.dest, options.to, options.weights, options.overwrite, bar.update)
    for note in (*state.notes, *notes):
        print(f"note: {note}")
    print(f"{options.dest}: {options.to}, step {state.step}, from {state.where} ({state.format})")
    return 0


def listing(options: argparse.Namespace) -> int:
    from megapromoe.conversion.formats import list_tensors

    facts, tensors = list_tensors(options.source, options.step)
    for key, value in facts.items():
        print(f"{key}: {value}")
    width = max((len(name) for name in tensors), default=0)
    for name, one in tensors.items():
        kind = str(one.dtype).removeprefix("torch.")
        print(f"{name:{width}}  {kind:8}  {'x'.join(map(str, one.shape)) or 'scalar':>16}  {one.nbytes:>14,}")
    print(f"{len(tensors)} tensors, {sum(one.nbytes for one in tensors.values()):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
