"""Images from a folder that diffusers opens.

megapromoe train --preset digits --run-dir runs/digits
megapromoe convert runs/digits digits_pipeline --to diffusers
python examples/diffusers_pipeline.py digits_pipeline digits.png
"""

import sys
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

from megapromoe.diffusers import ProMoEPipeline


def main(folder: Path, picture: Path) -> None:
    pipe = ProMoEPipeline.from_pretrained(folder)  # .to("cuda") on a GPU
    pipe.set_progress_bar_config(disable=True)
    labels = pipe.get_label_ids(["3", "1", "4", "1"])
    images = pipe(class_labels=labels, generator=torch.Generator().manual_seed(0)).images
    make_image_grid(images, rows=1, cols=len(images), resize=64).save(picture)
    print(f"{picture.name}: {len(images)} images {images[0].size}, router {pipe.transformer.config['router']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
