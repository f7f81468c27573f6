"""`megapromoe evaluate`: FID and related metrics of a run or of a set of images; six tasks of a run on scenes."""

import argparse
import json
import logging
from pathlib import Path

from megapromoe.commands.options import run_option
from megapromoe.commands.sample import drawing_options, generation_request, num_option
from megapromoe.config.options import ConfigError
from megapromoe.evaluation.names import DATA, SCENES
from megapromoe.imports import uncollected

EPILOG = """\
Samples images from the run in --run-dir, or reads --images, and compares them with real images. Start it under
torchrun, srun or mpirun to divide the work; repeat it to continue after an interruption, or to evaluate the same
images with another network. With --every-step it evaluates each checkpoint that the run keeps and each snapshot of its
averages, for a curve over training.
Results are printed and, with --run-dir, appended to evaluation.jsonl in the folder of the run.

The feature network (--features):
  digits, fashion_mnist   a small classifier, trained by this command on the real images; default for such data
  FILE                    the standard Inception, recognized by the hash of its published file:
                            inception-2015-12-05.pt                   TorchScript, from NVIDIA's metrics
                            pt_inception-2015-12-05-6726825d.pth      weights, from pytorch-fid; also gives sFID
                          or other TorchScript: uint8 (N, 3, H, W) -> features (N, D), or a tuple of them, spatial
                          features and class probabilities. A TorchScript file is a program that runs when it is
                          loaded: an unknown one needs --sha256.
Only the standard Inception gives an FID; other networks give a Fréchet distance (NAME).

A run on scenes is scored on six tasks instead: the share of pictures that show exactly what their prompt names, and
that share divided by what real scenes reach. The prompts name combinations that training never shows; --seen: that it
shows. The pictures are divided over the tasks.

examples:
  megapromoe evaluate --run-dir runs/digits --num-images 1797 --guidance 1 1.5 2 --plot guidance.png
  megapromoe evaluate --run-dir runs/digits --num-images 500 --guidance 1 1.5 --every-step --plot training.png
  torchrun --nproc-per-node 8 -m megapromoe evaluate --run-dir runs/xl --num-images 50000 --guidance 1.0 1.5 \\
      --autoencoder models/sd-vae --reference VIRTUAL_imagenet256_labeled.npz --features inception.pth
  megapromoe evaluate --images samples.npz --reference photos/ --features inception.pth
  megapromoe evaluate --run-dir runs/scenes --num-images 600 --guidance 1 3 5

Overrides: section `sample` only."""
JOB = True


def arguments(parser: argparse.ArgumentParser) -> None:
    run_option(parser, "sample from the run in this folder", required=False)
    parser.add_argument(
        "--images", metavar="PATH", type=Path, help="evaluate this .npz or folder of images instead of a run"
    )
    num_option(parser, "with --run-dir: number of images for each guidance scale; published results use 50000")
    parser.add_argument(
        "--reference",
        metavar="PATH",
        help="real images: an .npz in the layout of guided-diffusion, a folder of images, digits, fashion_mnist, or"
        " data, the training data of the run (the default with --run-dir); scenes: the six tasks",
    )
    parser.add_argument(
        "--split",
        choices=("train", "test"),
        default="train",
        help="split of a reference that is a data set; default: train",
    )
    parser.add_argument("--features", metavar="NAME", help="the feature network, see below")
    parser.add_argument("--sha256", metavar="HEX", help="the hash that the file of the feature network must have")
    parser.add_argument(
        "--standard-inception",
        action="store_true",
        help="declare that an unknown file holds the standard Inception; the records note this declaration",
    )
    parser.add_argument(
        "--samples", metavar="DIR", type=Path, help="folder for the sampled images; default: RUN/evaluation"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each set instead of a table")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="with --run-dir: write a PNG of the distance over the guidance scale or over the steps",
    )
    parser.add_argument(
        "--seen", action="store_true", help="of a run on scenes: prompts of combinations that training shows"
    )
    drawing_options(parser, several_steps=True)
    parser.add_argument(
        "--every-step",
        action="store_true",
        help="instead of --step: evaluate each checkpoint that the run keeps and each snapshot of its averages"
        " (train.snapshot_every), at each guidance scale",
    )


def run(options: argparse.Namespace, launch) -> int:
    _check(options)
    from megapromoe.distributed import runtime

    runtime.prepare()
    with uncollected():
        from megapromoe.evaluation import image_metrics, image_metrics_report, scene_scores

    is_scored = _is_scored(options)
    steps, options.step = tuple(options.step or ()), None  # a request has one step; None is the last
    request = None
    if options.run is not None:
        request = generation_request(options, options.samples or options.run / "evaluation")
    evaluation = image_metrics.Evaluation(
        request=request,
        images=options.images,
        reference=options.reference or (SCENES if is_scored else DATA),
        split=options.split,
        features=options.features,
        sha256=options.sha256,
        declared_standard=options.standard_inception,
        every_step=options.every_step,
        steps=steps,
    )
    if is_scored:
        records, table = scene_scores.evaluate_scenes(evaluation, launch, not options.seen), scene_scores.table
    else:
        records, table = image_metrics.evaluate(evaluation, launch), image_metrics_report.table
    if launch.rank == 0:
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        print("\n".join(lines) if options.json else table(records), flush=True)
        if options.run is not None:
            file = options.run / "evaluation.jsonl"
            if image_metrics_report.append(records, file) < len(records):
                logging.getLogger(__name__).info("%s: already contains these results of the same request", file)
        if options.plot is not None:
            image_metrics_report.plot(records, options.plot)
    return 0


def _is_scored(options: argparse.Namespace) -> bool:
    """Whether the run is a model of texts, which the six tasks score. Raises ConfigError for options of the other."""
    from megapromoe.sampling.run_model import run_config

    has_text = options.run is not None and run_config(options.run).model.has_text
    if has_text:
        rule = "is for models of classes; a model of texts is scored on the six tasks of scenes"
        classes = {"--class": options.only, "--labels": options.labels, "--autoencoder": options.autoencoder}
        classes |= {"--features": options.features, "--sha256": options.sha256}
        classes |= {"--standard-inception": options.standard_inception, "--split": options.split != "train"}
        classes[f"--reference {options.reference}"] = options.reference not in (None, DATA, SCENES)
        wrong = [f"{name}: {rule}" for name, value in classes.items() if value]
    else:
        texts = {"--seen": options.seen, f"--reference {SCENES}": options.reference == SCENES}
        wrong = [f"{name}: is for runs on scenes, models of texts" for name, value in texts.items() if value]
    if wrong:
        raise ConfigError(wrong)
    return has_text


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError that lists all options that cannot be combined."""
    wrong = []
    if (options.run is None) == (options.images is None):
        wrong.append("--run-dir, --images: give one of them, a run to sample from or existing images")
    elif options.run is not None and options.num_images is None:
        wrong.append("--num-images: is needed with --run-dir, the number of images to sample")
    elif options.images is not None:
        drawing = {"--num-images": options.num_images, "--guidance": options.guidance, "--class": options.only}
        drawing |= {f"--{n}": getattr(options, n) for n in ("labels", "step", "steps", "seed", "method", "autoencoder")}
        drawing |= {"--samples": options.samples, "--plot": options.plot, "overrides": options.overrides}
        drawing |= {"--tp": options.tp > 1, "--ep": options.ep > 1, "--every-step": options.every_step}
        rule = "is for sampling from a --run-dir, not for --images"
        wrong += [f"{name}: {rule}" for name, value in drawing.items() if value]
        if options.reference is None:
            wrong.append("--reference: is needed with --images, the real images to compare with")
    if options.every_step and options.step is not None:
        wrong.append(
            f"--every-step, --step {' '.join(map(str, options.step))}: give one of them, for all checkpoints"
            " or for some"
        )
    if wrong:
        raise ConfigError(wrong)
