"""Images from a checkpoint of `megapromoe train`, as a tensor.

megapromoe train --preset digits --run-dir runs/digits
python examples/sample_checkpoint.py runs/digits
"""

import sys
from pathlib import Path

from megapromoe.diffusion.image_grid import generate
from megapromoe.sampling.run_model import load_model


def main(run: Path) -> None:
    model, config, step = load_model(run)  # the averaged weights of the newest checkpoint
    labels = [3, 1, 4, 1]
    images = generate(model, config, labels, indices=list(range(len(labels))))
    low, high = images.min(), images.max()
    print(f"step {step}: images {tuple(images.shape)}, values from {float(low):.2f} to {float(high):.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
