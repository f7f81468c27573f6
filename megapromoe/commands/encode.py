"""`megapromoe encode`: converts a folder of images, or published latents, to large shards for training."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from megapromoe.commands.command_line import (
    CommandError,
    InterruptedCommand,
    file_errors,
    positive,
    takes_no_settings,
)

if TYPE_CHECKING:
    from megapromoe.data.encode import EncodedImages
    from megapromoe.data.importing import PublishedLatents
    from megapromoe.distributed.runtime import LaunchEnvironment

EPILOG = """\
--images is a folder with one folder for each class, which contain images of any size and mode at any depth.
--autoencoder is a folder of diffusers' AutoencoderKL or AutoencoderTiny, a name on the Hugging Face hub, or "none" for
pixels. --npz is a folder of published latents: CLASS/NAME.npz with `latent` and `latent_flip`. Unreadable files are
left out and listed in the manifest. Under torchrun, srun or mpirun the ranks share the work. Repeat the command
after an interruption: finished shards are kept. Check the result with megapromoe data check DIR and data show DIR.

examples:
  megapromoe encode --images imagenet/train --autoencoder stabilityai/sd-vae-ft-ema --out latents/train --dry-run
  torchrun --nproc-per-node 8 -m megapromoe encode --images imagenet/train \\
      --autoencoder sd-vae-ft-ema --out latents/train --batch 64 --workers 12
  megapromoe encode --images photos --autoencoder none --resolution 64 --out pixels
  megapromoe train --preset promoe_b --run-dir runs/b data.source=latents data.path=latents/train

exit codes: 0 done, 1 failed, 2 the command is wrong, 76 a rank hung (repeat the command)"""
JOB = True
CONNECT_TIMEOUT = 3600.0  # seconds in which all ranks must connect; listing the files may take each half of it


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = """\
megapromoe encode --images DIR --autoencoder PATH --out DIR [options]
       megapromoe encode --npz DIR --out DIR [options]"""
    takes_no_settings(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="DIR", help="a folder with one folder of images for each class")
    source.add_argument("--npz", type=Path, metavar="DIR", help="published latents, one file for each image")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        required=True,
        help="the output folder: new, or from an interrupted run of the same command",
    )
    parser.add_argument(
        "--autoencoder", metavar="PATH", help='autoencoder for --images: a folder, a name on the hub, or "none"'
    )
    parser.add_argument(
        "--resolution", type=positive, metavar="N", default=256, help="side of the crop, in pixels; default 256"
    )
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="channels of pixels; default 3")
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="stored data type; default float16"
    )
    parser.add_argument(
        "--values", choices=("posterior", "latent"), default="posterior", help="content of --npz; default posterior"
    )
    parser.add_argument(
        "--scale", type=float, default=0.18215, help="scale of --npz: latents = raw * scale; default 0.18215, of SD"
    )
    parser.add_argument("--one-class", action="store_true", help="put all files into one class")
    parser.add_argument(
        "--class-order",
        choices=("name", "number"),
        default="name",
        help="order of class folders, which get labels from 0: names as text, or as numbers (0 1 2 10, not 0 1 10 2)",
    )
    parser.add_argument("--batch", type=positive, metavar="N", default=32, help="images encoded at once; default 32")
    parser.add_argument("--workers", type=positive, metavar="N", default=2, help="number of reading threads; default 2")
    parser.add_argument(
        "--shard-size", type=positive, metavar="N", default=32768, help="files in a shard; default 32768"
    )
    parser.add_argument("--device", help="device that encodes; default: cuda if available, else cpu")
    parser.add_argument(
        "--step-timeout",
        type=positive,
        metavar="SECONDS",
        default=900,
        help="with several ranks: seconds without a finished batch after which a rank counts as hung; default 900",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")


def run(options: argparse.Namespace, launch: LaunchEnvironment) -> int:
    if options.images and not options.autoencoder:
        raise CommandError('--images needs --autoencoder: a folder, a name on the hub, or "none" for pixels')
    if options.one_class and options.class_order == "number":
        raise CommandError("--class-order number: with --one-class there are no classes to order; remove one of them")
    from megapromoe.distributed.agreement import connected_ranks

    log = logging.getLogger("megapromoe")
    log.setLevel(logging.INFO)  # every rank logs its shards with the time
    for handler in log.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    try:
        with file_errors():
            if launch.world == 1:
                return _encode(options, launch)
            with connected_ranks(launch, CONNECT_TIMEOUT, options.step_timeout, "--step-timeout") as ranks:
                code = _encode(options, launch)
                ranks.wait_for_all()  # reports ranks that hang
                return code
    except KeyboardInterrupt as error:
        raise InterruptedCommand("interrupted; repeat the command to continue") from error


def _encode(options: argparse.Namespace, launch: LaunchEnvironment) -> int:
    from megapromoe.data.encode import encode
    from megapromoe.distributed import watchdog
    from megapromoe.work_progress import Progress

    watchdog.starting("listing the files and opening the autoencoder")
    source = _open_source(options, launch.local_rank)
    total = len(source.scan.items)
    if launch.rank == 0:
        _print_plan(source, total, options.shard_size, launch.world)
    if options.dry_run:
        return 0
    with Progress(total, "image", "encoding", enabled=launch.rank == 0) as progress:
        manifest = encode(source, options.out, launch.rank, launch.world, options.shard_size, progress=progress.update)
    if manifest:
        left_out = f", {len(manifest.skipped)} files left out (see its manifest.json)" if manifest.skipped else ""
        print(f"{options.out}: {manifest.records:,} records{left_out}")
    return 0


def _open_source(options: argparse.Namespace, local_rank: int) -> EncodedImages | PublishedLatents:
    import torch

    from megapromoe.data.autoencoder import AutoencoderError, open_autoencoder
    from megapromoe.data.encode import EncodedImages
    from megapromoe.data.images import scan
    from megapromoe.data.importing import PublishedLatents

    device = options.device
    if device is None:
        count = torch.cuda.device_count()
        device = f"cuda:{local_rank % count}" if count else "cpu"
    if options.images:
        files = scan(options.images, one_class=options.one_class, class_order=options.class_order)
        autoencoder = open_autoencoder(options.autoencoder, device, options.channels)
        return EncodedImages(
            options.images, files, autoencoder, options.resolution, options.batch, options.workers, options.dtype
        )
    source = PublishedLatents(
        options.npz,
        options.values,
        options.scale,
        workers=options.workers,
        dtype=options.dtype,
        one_class=options.one_class,
        class_order=options.class_order,
    )
    if options.autoencoder:  # only its identity is stored: the files do not name their autoencoder
        autoencoder = open_autoencoder(options.autoencoder, device)
        shape = autoencoder.latent_shape(source.manifest_fields["resolution"])
        if shape != source.manifest_fields["shape"]:
            raise AutoencoderError(
                f"autoencoder {options.autoencoder!r} makes latents of shape {shape}, but the files have"
                f" shape {source.manifest_fields['shape']}; give the autoencoder that made them"
            )
        source.manifest_fields |= {
            "autoencoder": autoencoder.identity,
            "scale": autoencoder.scale,
            "shift": autoencoder.shift,
        }
    return source


def _print_plan(source: EncodedImages | PublishedLatents, files: int, shard_size: int, world: int) -> None:
    """Prints what will be written, to stderr."""
    import sys

    from megapromoe.data.encode import record_bytes

    for note in source.scan.notes:
        print(f"note: {note}", file=sys.stderr)
    size = record_bytes(source.manifest_fields)
    shards = -(-files // shard_size)
    facts, skipped = source.manifest_fields, source.scan.skipped
    print(
        f"{files:,} files of {len(source.scan.class_names)} classes"
        + (f" ({len(skipped)} others are left out, such as {skipped[0][0]})" if skipped else "")
        + f" -> {'x'.join(map(str, facts['shape']))} {facts['dtype']}, {size:,} bytes a record,"
        f" {files * size / 1e9:.3g} GB in {shards} shards over {world} ranks",
        file=sys.stderr,
    )
