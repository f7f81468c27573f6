"""Runs of tiny models of texts whose images are drawn, with an encoder of words in place of a library's."""

from pathlib import Path

from support.latent_folders import Arrays, write
from support.sampled_runs import stirred_run
from support.text_folders import WordEncoder

from megapromoe.data.autoencoder import Pixels
from megapromoe.data.captions import CaptionedItem
from megapromoe.data.encode_text import TextJob, encode_text
from megapromoe.sampling import prompt_features
from megapromoe.sampling.generation import generate_images

COUNT = 20
TEXT = ("model.condition=text", "model.num_classes=1000", "model.in_channels=3", "model.positions=rope")
TEXT = (*TEXT, "model.text_width=6", "model.text_tokens=5", "data.source=latents", "model.num_experts=3")


def captioned_pixels(folder: Path) -> Path:
    """Records of 3 x 8 x 8 pixels, with captions such as "some 7", whose features a `WordEncoder` made."""
    source = Arrays(count=COUNT, shape=(3, 8, 8), mirror="none", stochastic=False)
    source.manifest_fields |= {"autoencoder": Pixels(3).identity, "resolution": 8}
    write(folder, source)
    items = [CaptionedItem(item.path, 0, f"some {i}") for i, item in enumerate(source.scan.items)]
    encode_text(TextJob(items, WordEncoder(), folder / "text", "bfloat16", beside=folder))
    return folder


def text_run(folder: str, *overrides: str) -> None:
    """A run directory with a checkpoint of step 3, and its data in `data` within it."""
    data = captioned_pixels(Path(folder) / "data")
    stirred_run(folder, *TEXT, f"data.path={data}", *overrides)


def open_words(name: str, device="cpu", max_tokens: int | None = None) -> WordEncoder:
    """In place of `open_text_encoder`: the encoder of words, and for the name "other" another one."""
    return WordEncoder(sha256="ef" * 32 if name == "other" else "ab" * 32)


def generate_from_words(request, launch) -> list[Path]:
    """`generate_images` in a process of its own, with the encoder of words."""
    prompt_features.open_text_encoder = open_words
    return generate_images(request, launch)
