"""Fine-tuning on other classes against training from scratch: digits 5 to 9 from a model of the digits 0 to 4.

    python examples/finetune_digits.py runs/finetune

Every command is printed before it runs. Both runs of a seed take the same steps on the same stream of samples; their
losses are those of the weights as trained, over fixed draws of digits that no run has seen.
"""

import shlex
import statistics
import sys
from pathlib import Path

from PIL import Image

from megapromoe import cli
from megapromoe.data.digits_file import read_digits
from megapromoe.evaluation.heldout import objective_loss, open_held_out
from megapromoe.sampling.run_model import load_model

TEST_EVERY = 5  # every fifth digit is held out


def write_folders(folder: Path) -> None:
    """Writes the digits as pictures: old/train with 0 to 4, new/train and new/test with 5 to 9, a folder for each."""
    images, labels = read_digits()
    for number, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        split = "test" if number % TEST_EVERY == 0 else "train"
        place = folder / ("old" if label < 5 else "new") / split / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(place / f"{number:04d}.png")


def command(*words: str) -> None:
    print(f"$ {shlex.join(['megapromoe', *words])}")
    if code := cli.main(list(words)):
        raise SystemExit(code)


def held_out_loss(run: Path, draws: int) -> float:
    model, config, _ = load_model(run, weights="master")
    dataset, _ = open_held_out(config)
    return objective_loss(model, config, dataset, draws)[0]


def main(folder: Path, old_steps: int = 500, steps: int = 100, seeds: int = 3, draws: int = 8192, *more: str) -> None:
    write_folders(folder / "pictures")
    for name in ("old/train", "new/train", "new/test"):
        pixels = ["--autoencoder", "none", "--resolution", "8", "--channels", "1"]
        command("encode", "--images", f"{folder}/pictures/{name}", *pixels, "--out", f"{folder}/latents/{name}")
    train = ["train", "--preset", "digits", "model.num_classes=5", "data.source=latents", *more]
    base = folder / "base"
    command(*train, "--run-dir", str(base), f"data.path={folder}/latents/old/train", f"train.steps={old_steps}")
    losses: dict[str, list[float]] = {"scratch": [], "tuned": []}
    for seed in range(seeds):
        data = [f"data.path={folder}/latents/new/train", f"data.test_path={folder}/latents/new/test"]
        settings = [*data, f"train.steps={steps}", f"train.seed={seed}", f"data.seed={seed}"]
        for name, of_base in losses.items():
            weights = [f"train.init_from={base}", "train.init_classes=new"] if name == "tuned" else []
            run = folder / f"{name}-{seed}"
            command(*train, "--run-dir", str(run), *settings, *weights)
            of_base.append(held_out_loss(run, draws))
    print(f"loss after {steps} steps on digits that were held out")
    for seed, (scratch, tuned) in enumerate(zip(*losses.values(), strict=True)):
        print(f"seed {seed}: from scratch {scratch:.4f}, fine-tuned {tuned:.4f}, difference {tuned - scratch:+.4f}")
    mean = statistics.mean(tuned - scratch for scratch, tuned in zip(*losses.values(), strict=True))
    print(f"mean difference {mean:+.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
