"""`megapromoe convert`: converts a checkpoint from one format to another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megapromoe.commands.command_line import CommandError, byte_size, file_errors, refuse_other_words
from megapromoe.commands.options import checkpoint_config, checkpoint_config_options, weights_choice

if TYPE_CHECKING:
    from megapromoe.config.options import Config
    from megapromoe.conversion.diffusers_folder import FolderParts

FORMATS = ("ours", "published", "safetensors", "diffusers", "deepspeed")
EPILOG = """\
The values of all tensors stay equal to the bit. docs/convert.md describes what is read and what is refused.

formats:
  ours         a run directory (SOURCE may also be one of its checkpoints/step-XXXXXXXX); as DEST, a run that
               `megapromoe train --config DEST/config.yaml --run-dir DEST` continues
  published    a .pth of the ProMoE release, with EMA and optimizer: ProMoE (TC, EC), DiT, TC-DiT, EC-DiT, DiffMoE; as
               SOURCE also what training of DiT, SiT, REPA and DiffMoE saves (model, ema, opt, args), or a state_dict
  safetensors  one file with all state, or only weights (--weights); as SOURCE also several files with their index
               (*.safetensors.index.json)
  diffusers    as DEST, a folder that megapromoe.diffusers.ProMoEPipeline.from_pretrained opens: weights of one kind,
               the sampling method, guidance and names of classes of the run, and the autoencoder of --vae; as SOURCE
               such a folder, also after save_pretrained, or a folder of diffusers' DiTTransformer2DModel
  deepspeed    a folder of latest and global_stepN/ with mp_rank_* and layer_*_expert_* files; as SOURCE also with the
               float32 shards of ZeRO-1 and ZeRO-2

A published .pth does not contain its configuration: give it by --preset or --config, unless the file has the args of
DiT, SiT or REPA. Nor does it contain the training objective: give --objective. Weights of SiT become a run with
model.time_input=sit.

examples:
  megapromoe convert promoe_l.pth runs/promoe_l --to ours --preset promoe_l
  megapromoe convert SiT-XL-2-256.pt runs/sit_xl --to ours --preset dit_xl --objective sit
  megapromoe convert runs/promoe_l promoe_l.pth --to published --step 500000
  megapromoe convert runs/promoe_l promoe_l.safetensors --to safetensors --weights ema
  megapromoe convert runs/promoe_l promoe_l_pipeline --to diffusers --max-shard-size 5GB
  megapromoe convert unknown.pth --what

exit codes: 0 done, 1 the checkpoint cannot be read or written, 2 the command or the config is wrong"""
JOB = False


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = """\
megapromoe convert SOURCE DEST --to FORMAT [options] [section.key=value ...]
       megapromoe convert SOURCE --what"""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the checkpoint to read")
    parser.add_argument("dest", type=Path, metavar="DEST", nargs="?", help="what to write")
    parser.add_argument("--to", choices=FORMATS, help="the format of DEST")
    parser.add_argument(
        "--from", dest="form", choices=("auto", *FORMATS), default="auto", help="the format of SOURCE; default: auto"
    )
    checkpoint_config_options(parser, "YAML of the run, such as its config.yaml")
    parser.add_argument(
        "--weights",
        type=weights_choice,
        metavar="WEIGHTS",
        help="write only weights: averaged (ema), averaged with one of several decays (ema=DECAY), or as trained"
        " (master); default: ema for diffusers, all state for safetensors; published and deepspeed contain trained and"
        " averaged weights, of which ema=DECAY chooses the average",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="step of the checkpoint to read from a run; default: the latest"
    )
    parser.add_argument(
        "--vae",
        metavar="DIR",
        help="diffusers: add the AutoencoderKL of the run's latents, from a local folder with safetensors",
    )
    parser.add_argument(
        "--id2label",
        type=Path,
        metavar="FILE",
        help='diffusers: names of classes, a JSON file such as {"0": "tench"}; default: those of the data of the run',
    )
    parser.add_argument(
        "--max-shard-size",
        type=byte_size,
        metavar="SIZE",
        help="diffusers: most bytes of weights in a file, such as 5GB or 500MB; default: 10GB",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DEST if it is a checkpoint")
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="also convert tensors with NaN or infinity, and print a note"
    )
    parser.add_argument(
        "--what", action="store_true", help="list the content of SOURCE without loading or writing tensors"
    )


def run(options: argparse.Namespace, launch: None) -> int:
    _check(options)
    from megapromoe.distributed import runtime

    runtime.prepare()
    with file_errors():
        return _list(options) if options.what else _convert(options)


def _check(options: argparse.Namespace) -> None:
    """Raises CommandError for options that cannot be combined."""
    refuse_other_words(options, "SOURCE and DEST are the only paths")
    if not options.what and (options.dest is None or options.to is None):
        raise CommandError("give DEST and --to FORMAT, or --what to list the content of SOURCE")
    if options.what and (options.dest or options.to):
        raise CommandError("--what writes nothing: remove DEST and --to")
    if options.to != "diffusers":
        given = {"--vae": options.vae, "--id2label": options.id2label, "--max-shard-size": options.max_shard_size}
        if flags := [flag for flag, value in given.items() if value is not None]:
            raise CommandError(f"{', '.join(flags)}: only for --to diffusers; leave out")
    if options.what and (options.objective or options.allow_nonfinite):
        raise CommandError("--what reads no tensors: remove --objective and --allow-nonfinite")
    if options.overrides and not (options.config or options.preset):
        raise CommandError(f"{options.overrides[0]}: settings change a --config or --preset; give one")


def _convert(options: argparse.Namespace) -> int:
    from megapromoe.conversion.exports import export, exported_bytes, written_weights
    from megapromoe.conversion.formats import open_state, with_latest
    from megapromoe.conversion.state import State, with_one_average
    from megapromoe.work_progress import Progress

    config = checkpoint_config(options, options.overrides)

    def convert(step: int | None) -> tuple[State, list[str]]:
        state = open_state(options.source, options.form, config, step, options.objective)
        weights, again, nonfinite = options.weights, options.overwrite, options.allow_nonfinite
        parts = _folder_parts(options, state.config) if options.to == "diffusers" else None
        total = exported_bytes(state, options.to, weights)
        with Progress(total, "B", f"writing {options.dest}") as progress:
            return state, export(state, options.dest, options.to, weights, again, progress.update, nonfinite, parts)

    state, notes = with_latest(options.source, options.step, convert)
    for note in (*state.notes, *notes):
        print(f"note: {note}")
    alone = options.weights or ("ema" if options.to == "diffusers" else None)
    average = None if alone is None else with_one_average(state, alone).average
    if average and alone and (warning := average.warning(alone)):
        print(f"warning: {warning}")
    print(f"written: {written_weights(state, options.to, options.weights)}")
    print(f"{options.dest}: {options.to}, step {state.step}, from {state.where} ({state.format})")
    return 0


def _folder_parts(options: argparse.Namespace, config: Config) -> FolderParts:
    """What --vae, --id2label and --max-shard-size add to a folder of diffusers.

    Raises CommandError for an autoencoder that is no folder, SampleError for one that is not that of the run's latents,
    ConversionError for names that cannot be read.
    """
    from megapromoe.conversion.diffusers_folder import SHARD_BYTES, FolderParts, read_labels
    from megapromoe.sampling.decoding import open_decoder

    vae = None
    if options.vae is not None:
        if not Path(options.vae).is_dir():
            raise CommandError(f"--vae {options.vae}: is no folder; give the local folder of the autoencoder")
        decoder = open_decoder(config, options.vae, "cpu")
        vae = getattr(decoder, "model", None)
    id2label = None if options.id2label is None else read_labels(options.id2label)
    return FolderParts(options.max_shard_size or SHARD_BYTES, vae, id2label)


def _list(options: argparse.Namespace) -> int:
    from megapromoe.conversion.formats import list_tensors, with_latest

    facts, tensors = with_latest(options.source, options.step, lambda step: list_tensors(options.source, step))
    for key, value in facts.items():
        print(f"{key}: {value}")
    width = max((len(name) for name in tensors), default=0)
    for name, entry in tensors.items():
        kind = str(entry.dtype).removeprefix("torch.")
        print(f"{name:{width}}  {kind:8}  {'x'.join(map(str, entry.shape)) or 'scalar':>16}  {entry.nbytes:>14,}")
    print(f"{len(tensors)} tensors, {sum(entry.nbytes for entry in tensors.values()):,} bytes")
    return 0
