"""`megapromoe evaluate`: FID and its kin, of a run or of a set of images."""

import argparse
import json
import logging
from pathlib import Path

from megapromoe.commands.options import run_option
from megapromoe.commands.sample import drawing_options, generation_request, num_option
from megapromoe.config.options import ConfigError

EPILOG = """\
Draws --num images from --run (or takes --images) and compares them with real ones. Start it under torchrun,
srun or mpirun to share out the work; repeat it to go on where it was stopped, or to evaluate the same images
by another network. With --every-step each checkpoint that the run keeps, and each snapshot of its averages, is
drawn from, for a curve over training.
Figures go to the screen and, with --run, to evaluation.jsonl in its folder.

The network that looks at the images (--features):
  digits, fashion_mnist   a small classifier, trained on the spot on the real images; the default on such data
  FILE                    the standard Inception, known by its hash, as published:
                            inception-2015-12-05.pt                   TorchScript, of NVIDIA's metrics
                            pt_inception-2015-12-05-6726825d.pth      weights, of pytorch-fid; also gives sFID
                          or other TorchScript: uint8 (N, 3, H, W) -> features (N, D), or a tuple of them, spatial
                          features and class probabilities. A TorchScript is a program that runs when it is loaded:
                          an unknown one needs --sha256.
Only the standard Inception makes an FID; other networks make a Fréchet distance (NAME).

examples:
  megapromoe evaluate --run runs/digits --num 1797 --guidance 1 1.5 2 --plot guidance.png
  megapromoe evaluate --run runs/digits --num 500 --guidance 1 1.5 --every-step --plot training.png
  torchrun --nproc-per-node 8 -m megapromoe evaluate --run-dir runs/xl --num-images 50000 --guidance 1.0 1.5 \\
      --autoencoder models/sd-vae --reference VIRTUAL_imagenet256_labeled.npz --features inception.pth
  megapromoe evaluate --images samples.npz --reference photos/ --features inception.pth

Overrides: section `sample` only."""
JOB = True


def arguments(parser: argparse.ArgumentParser) -> None:
    run_option(parser, "draw from the run in this folder", required=False)
    parser.add_argument("--images", metavar="PATH", type=Path, help="or: evaluate this .npz or folder of pictures")
    num_option(parser, "with --run: images to draw for each guidance scale; published figures are of 50000")
    parser.add_argument(
        "--reference",
        metavar="PATH",
        help="real images: an .npz in the layout of guided-diffusion, a folder of pictures, digits, fashion_mnist, or"
        " data, what the run trains on (the default with --run)",
    )
    parser.add_argument(
        "--split", choices=("train", "test"), default="train", help="of a reference that is a data set; default: train"
    )
    parser.add_argument("--features", metavar="NAME", help="the network that looks at the images, see below")
    parser.add_argument("--sha256", metavar="HEX", help="the hash that its file must have")
    parser.add_argument(
        "--standard-inception",
        action="store_true",
        help="you know that an unknown file holds the standard Inception; the records keep your word",
    )
    parser.add_argument("--samples", metavar="DIR", type=Path, help="where drawn images stay; default: RUN/evaluation")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each set instead of a table")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="with --run: a PNG of the distance over guidance, or over the steps",
    )
    drawing_options(parser, several_steps=True)
    parser.add_argument(
        "--every-step",
        action="store_true",
        help="each checkpoint that the run keeps and each snapshot of its averages (train.snapshot_every), instead of"
        " --step; a set for each of them and each guidance scale",
    )


def run(options: argparse.Namespace, launch) -> int:
    _check(options)
    from megapromoe.distributed import runtime

    runtime.prepare()
    from megapromoe.evaluation import image_metrics, image_metrics_report

    steps, options.step = tuple(options.step or ()), None  # a request has one step, or the last
    request = None
    if options.run is not None:
        request = generation_request(options, options.samples or options.run / "evaluation")
    evaluation = image_metrics.Evaluation(
        request=request,
        images=options.images,
        reference=options.reference or image_metrics.DATA,
        split=options.split,
        features=options.features,
        sha256=options.sha256,
        declared_standard=options.standard_inception,
        every_step=options.every_step,
        steps=steps,
    )
    records = image_metrics.evaluate(evaluation, launch)
    if launch.rank == 0:
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        print("\n".join(lines) if options.json else image_metrics_report.table(records), flush=True)
        if options.run is not None:
            file = options.run / "evaluation.jsonl"
            if image_metrics_report.append(records, file) < len(records):
                logging.getLogger(__name__).info("%s: had these figures of the same request already", file)
        if options.plot is not None:
            image_metrics_report.plot(records, options.plot)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together, all at once."""
    wrong = []
    if (options.run is None) == (options.images is None):
        wrong.append("--run, --images: give one of them, a run to draw from or images that are there")
    elif options.run is not None and options.num is None:
        wrong.append("--num: is needed with --run, the number of images to draw")
    elif options.images is not None:
        drawing = {"--num": options.num, "--guidance": options.guidance, "--class": options.only}
        drawing |= {
            f"--{n}": getattr(options, n) for n in ("classes", "step", "steps", "seed", "method", "autoencoder")
        }
        drawing |= {"--samples": options.samples, "--plot": options.plot, "overrides": options.overrides}
        drawing |= {"--tp": options.tp > 1, "--ep": options.ep > 1, "--every-step": options.every_step}
        wrong += [f"{name}: is for drawing from a --run, not for --images" for name, value in drawing.items() if value]
        if options.reference is None:
            wrong.append("--reference: is needed with --images, the real ones to compare with")
    if options.every_step and options.step is not None:
        wrong.append(
            f"--every-step, --step {' '.join(map(str, options.step))}: give one of them, all checkpoints that are kept"
            " or some"
        )
    if wrong:
        raise ConfigError(wrong)
