"""`megapromoe data`: checks, shows and benchmarks a folder of latents or text features."""

import argparse
import time
from pathlib import Path

from megapromoe.commands.command_line import positive, takes_no_settings
from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import resolve
from megapromoe.number_text import significant
from megapromoe.planning import cost
from megapromoe.planning.machines import MACHINES

EPILOG = """\
  megapromoe data check DIR                    reads every record: checksums, finite values, labels, classes
  megapromoe data show DIR --out sheet.png     a contact sheet: images and mirror images, a row for each class
  megapromoe data check DIR --text-encoder minilm    encodes some captions again, and compares the text features
  megapromoe data speed DIR --workers 4        images/s that the data loader reaches, and that a model needs

DIR is a folder written by `megapromoe encode`. `show` decodes with the autoencoder in the manifest; --autoencoder
gives its path on this machine, and "none" shows the first three channels of the latents as colours. Of captioned
images it shows the first --count with their captions.

exit codes: 0 no problem, 1 DIR has problems, each printed in a line"""
JOB = False

LOW, HIGH = 0.4, 2.5  # valid range of the standard deviation after scaling; latents scaled twice by 0.18215 have 0.18
SAME_FEATURES = 0.02  # largest difference of features that are encoded again; rounding to bfloat16 gives 0.004
SHARE = 0.5  # share of the peak FLOP/s that a fast training run may reach; a high assumption


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "megapromoe data check|show|speed DIR [options]"
    takes_no_settings(parser)
    parser.add_argument("action", choices=("check", "show", "speed"), help="what to do; see below")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of latents or text features")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("sheet.png"),
        help="show: the picture to write; default sheet.png",
    )
    parser.add_argument("--autoencoder", metavar="PATH", help="show: the autoencoder; default: the one in the manifest")
    parser.add_argument(
        "--class", metavar="C", dest="classes", type=int, nargs="+", help="show: classes to show; default: the first 16"
    )
    parser.add_argument("--text-encoder", metavar="PATH", help="check: the encoder that made the text features")
    parser.add_argument("--count", metavar="N", type=positive, default=8, help="show: images of each class; default 8")
    parser.add_argument("--device", default="cpu", help="show: device that decodes; default cpu")
    parser.add_argument(
        "--workers", metavar="N", type=positive, default=1, help="speed: threads, like data.workers; default 1"
    )
    parser.add_argument("--batch", metavar="N", type=positive, default=64, help="speed: images in a batch; default 64")
    parser.add_argument(
        "--seconds", metavar="S", type=positive, default=10, help="speed: seconds to measure; default 10"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="speed: folder for copies of the shards, like data.cache"
    )


def run(options: argparse.Namespace, launch) -> int:
    return {"check": _check, "show": _show, "speed": _speed}[options.action](options)


def _check(options: argparse.Namespace) -> int:
    from megapromoe.data import latents, teacher, text_features

    text = text_features.text_folder(options.folder)
    if options.text_encoder and text is None:
        raise text_features.TextFeaturesError(f"--text-encoder: {options.folder} holds no text features; leave it out")
    problems = [] if text == options.folder else _check_latents(options.folder)
    if text is not None:
        problems += _check_text(text, options)
        if text != options.folder:
            identity = latents.read_manifest(options.folder).identity
            if text_features.read_text_manifest(text).latents_sha256 != identity:
                problems.append(f"{text} belongs to other latents than {options.folder}; encode again")
                print(problems[-1])
    elif (options.folder / text_features.FOLDER).is_dir():
        problems.append(f"{options.folder / text_features.FOLDER} is not finished; repeat megapromoe encode")
        print(problems[-1])
    if (options.folder / teacher.FOLDER).is_dir():
        problems += _check_teacher(options.folder)
    print(f"{len(problems)} problems" if problems else "no problems")
    return 1 if problems else 0


def _check_teacher(folder: Path) -> list[str]:
    """Checks the teacher's features beside latents; prints what they are and their problems, and returns these."""
    from megapromoe.data.datasets import DatasetError
    from megapromoe.data.latents import Latents, check
    from megapromoe.data.teacher import teacher_beside

    try:
        features = teacher_beside(Latents(folder))
        problems = check(features.folder)
    except DatasetError as error:
        problems = [str(error)]
    else:
        print(*_facts(features.folder, features.manifest), sep="\n")
    for problem in problems:
        print(problem)
    return problems


def _check_latents(folder: Path) -> list[str]:
    """Checks latents; prints what they are and their problems, and returns these."""
    from megapromoe.data.latents import check, read_manifest, scaled_deviation
    from megapromoe.work_progress import Progress

    manifest = read_manifest(folder)
    total = manifest.records * manifest.record_bytes
    with Progress(total, "B", "checking") as progress:
        problems = check(folder, progress.update)
    for problem in problems:
        print(problem)
    for line in _facts(folder, manifest):
        print(line)
    deviation, records = scaled_deviation(folder)
    print(f"  scale {_short(manifest.scale)}, shift {_short(manifest.shift)}")
    print(f"  standard deviation after scaling: {deviation:.3g} ({records:,} records)")
    if not LOW <= deviation <= HIGH:
        rule = f"a model expects about 1 ({LOW} to {HIGH})"
        print(f"  warning: {rule}; check the scale. Latents that are stored scaled need scale 1")
    return problems


def _check_text(folder: Path, options: argparse.Namespace) -> list[str]:
    """Checks text features; prints what they are and their problems, and returns these."""
    from megapromoe.data.text_features import TextFeatures, check_text, text_bytes
    from megapromoe.work_progress import Progress

    data = TextFeatures(folder)
    m, tokens = data.manifest, data.tokens
    with Progress(text_bytes(m), "B", "checking text") as progress:
        problems = check_text(folder, progress.update)
    for problem in problems:
        print(problem)
    made_by, size = m.encoder, text_bytes(m) / 1e9
    print(f"{folder}: {len(data):,} captions, width {m.width} {m.dtype}, {size:.3g} GB in {len(m.shards)} shards")
    print(f"  by {made_by['name']} ({made_by['kind']}) {made_by['sha256'][:12]}")
    print(f"  {tokens.min()} to {tokens.max()} tokens, mean {tokens.mean():.3g}; {m.cut:,} cut at {m.max_tokens}")
    print(f"  the first: {data.caption(0)!r}")
    if m.skipped:
        print(f"  {len(m.skipped)} captions left out; the first:")
        for place, reason in m.skipped[:5]:
            print(f"    {place}: {reason}")
    if options.text_encoder:
        from megapromoe.data.encode_text import largest_difference
        from megapromoe.data.text_encoder import open_text_encoder

        encoder = open_text_encoder(options.text_encoder, options.device, m.max_tokens)
        difference, compared = largest_difference(data, encoder)
        print(f"  encoded again: largest difference {difference:.3g} of the largest feature ({compared} captions)")
        if not difference <= SAME_FEATURES:
            problems.append(f"{folder}: the encoder gives other features; encode again")
            print(problems[-1])
    return problems


def _facts(folder: Path, manifest):
    autoencoder = manifest.autoencoder
    views = {"stored": "and mirror image", "exact": "mirrored when read", "none": "without mirror image"}
    values = "mean and log-variance" if manifest.stochastic else "values"
    size = manifest.records * manifest.record_bytes / 1e9
    classes, shards = len(manifest.class_names), len(manifest.shards)
    yield f"{folder}: {manifest.records:,} records of {classes} classes in {shards} shards, {size:.3g} GB"
    yield f"  {'x'.join(map(str, manifest.shape))} {manifest.dtype}, {values}, image {views[manifest.mirror]}"
    yield f"  of {manifest.resolution}x{manifest.resolution} images ({manifest.crop})"
    yield f"  by {autoencoder['name'] or 'an unnamed autoencoder'} {autoencoder['sha256'][:12]}".rstrip()
    if normalisation := autoencoder.get("normalisation"):
        yield f"  each channel is normalised: {normalisation}"
    if manifest.rounding is not None:
        error = "rounding error of the stored mean over the posterior's deviation"
        yield f"  {error}: {manifest.rounding:.3g} (root mean squares)"
    if manifest.skipped:
        yield f"  {len(manifest.skipped)} files left out; the first:"
        yield from (f"    {path}: {reason}" for path, reason in manifest.skipped[:5])


def _short(values: tuple[float, ...]) -> str:
    """One number if all channels have the same, else one for each channel, of many channels the range."""
    if len(set(values)) > 4:
        return f"{min(values):g} to {max(values):g} by channel"
    return ", ".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))


def _show(options: argparse.Namespace) -> int:
    from megapromoe.data.autoencoder import NONE, open_autoencoder
    from megapromoe.data.caption_sheet import caption_sheet
    from megapromoe.data.contact_sheet import contact_sheet, first_pictures
    from megapromoe.data.latents import Latents, LatentsError
    from megapromoe.data.text_features import TextFeatures, text_folder

    text = text_folder(options.folder)
    if text == options.folder:
        raise LatentsError(f"{options.folder} holds text features without images; see them with megapromoe data check")
    data = Latents(options.folder)
    classes = options.classes or list(range(min(data.num_classes, 16)))
    if wrong := [label for label in classes if not 0 <= label < data.num_classes]:
        raise LatentsError(f"--class {wrong[0]}: {options.folder} has classes 0..{data.num_classes - 1}")
    made_by = data.manifest.autoencoder
    name = made_by["name"] if options.autoencoder is None else options.autoencoder
    if not name:
        raise LatentsError(f"{options.folder} does not name its autoencoder: give --autoencoder PATH, or none")
    pixels = made_by["kind"] == "pixels"
    autoencoder = None
    if pixels or name != NONE:
        autoencoder = open_autoencoder(name, options.device, data.shape[0] if pixels else 3)
    if text is None:
        sheet = contact_sheet(data, classes, options.count, autoencoder)
        content = f"{len(classes)} classes, up to {options.count} images each, next to their mirror images"
    else:
        indices, captions = range(min(options.count, len(data))), TextFeatures(text)
        sheet = caption_sheet(first_pictures(data, indices, autoencoder), [captions.caption(i) for i in indices])
        content = f"the first {len(indices)} images with their captions"
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(options.out)
    except (OSError, ValueError) as error:  # Pillow raises ValueError for an unknown file name extension
        raise LatentsError(f"--out {options.out}: {error}; give the name of a .png that can be written") from error
    print(f"{options.out}: {content}")
    return 0


def _speed(options: argparse.Namespace) -> int:
    from megapromoe.data.caption_batches import captions_beside
    from megapromoe.data.latents import Latents
    from megapromoe.data.node_cache import cache_shards
    from megapromoe.data.sample_stream import SampleStream, prefetch
    from megapromoe.data.text_features import text_folder

    data = Latents(options.folder)
    if options.cache:
        data = Latents(options.folder, cache_shards(options.folder, options.cache, data.manifest))
    captions = captions_beside(data) if text_folder(options.folder) else None
    loader = SampleStream(data, 0, 0.1, data.manifest.mirror != "none", data.num_classes, captions)
    size = options.batch
    batches = prefetch(loader, (range(i * size, (i + 1) * size) for i in range(1 << 40)), options.workers)
    try:
        for _ in range(options.workers + 1):  # batches that were prepared before the measurement
            next(batches)
        start, used, count = time.perf_counter(), time.process_time(), 0
        while (seconds := time.perf_counter() - start) < options.seconds:
            next(batches)
            count += size
        used = time.process_time() - used
    finally:
        batches.close()
    rate = count / seconds
    shape = "x".join(map(str, data.shape))
    if captions:
        shape += f" with captions of {captions.max_tokens} tokens, width {captions.text.width}"
    print(f"{significant(rate)} images/s in {options.workers} threads, {shape}, batches of {size}")
    print(f"{significant(count / used)} images per second of CPU time: the rate of one core that is otherwise idle")
    if (preset := preset_of_shape(data.shape)) is None:
        return 0  # without a model of this shape there is nothing to compare with
    peak = MACHINES["h100"].peak
    need = SHARE * peak / cost.flops_per_image(resolve(preset).model).training
    estimate = f"estimate: {SHARE:.0%} of {peak / 1e12:.0f} TFLOP/s"
    print(f"{preset} at {shape} on one H100 takes at most {significant(need)} images/s ({estimate})")
    print(f"8 H100 with this many threads each get {rate / need:.2g} times the images that they need")
    return 0


def preset_of_shape(shape: tuple[int, int, int]) -> str | None:
    """The preset to compare with data of this shape: promoe_xl, or the first with this input; None without one."""
    models = {name: resolve(name).model for name in ("promoe_xl", *PRESETS)}
    fits = (name for name, m in models.items() if (m.in_channels, m.input_size, m.input_size) == shape)
    return next(fits, None)
