"""Images of prompts as a tensor, in one process.

    images = images_of_prompts(Path("runs/scenes"), ["a red three", "two blue ones"], count=4)

`generation.py` generates the same images with several ranks, into files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megapromoe.diffusion.image_grid import SampleError, chunk_ranges, generate
from megapromoe.sampling.prompt_features import condition_of, open_prompt_encoder
from megapromoe.sampling.prompts import Prompt, prompt_of
from megapromoe.sampling.request import GenerationRequest
from megapromoe.sampling.run_model import load_model


def images_of_prompts(
    run: Path,
    prompts: Sequence[str | Prompt],
    count: int = 1,
    step: int | None = None,
    weights: str = "ema",
    overrides: Iterable[str] = (),
    text_encoder: str | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Generates `count` images of each prompt, prompt by prompt: (prompts · count, C, H, W) float32, about [-1, 1].

    They are latents if the run was trained on latents of an autoencoder.

    Args:
        run: the run directory, of a model with `model.condition=text`.
        prompts: texts; an empty one generates images without a condition.
        step, weights: see `load_model`.
        overrides: settings `sample.key=value`.
        text_encoder: folder or name of the encoder; None: as the captions of the run name it.
        device: of the encoder, the model and the images.

    Raises SampleError for a prompt that is longer than the texts of the training, or for another text encoder than that
    of the run; and what `load_model` raises.
    """
    chosen = tuple(prompt_of(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)
    request = GenerationRequest(
        run, Path("images.npz"), count, step=step, weights=weights, overrides=tuple(overrides), prompts=chosen
    )
    config = request.checked(world=1)
    encoder = open_prompt_encoder(config, text_encoder, device)
    encoder.check(chosen)
    features = encoder.encode(prompt.text for prompt in chosen)
    del encoder  # a device need not hold it together with the model
    model, config, _ = load_model(run, step, weights, device, request.overrides)
    labels = request.labels(config)
    parts = []
    for numbers in chunk_ranges(len(labels), config.sample.batch):
        texts = [chosen[prompt].text for prompt in labels[numbers.start : numbers.stop]]
        seeds, indices = request.noise_of(config, labels, numbers)
        condition = condition_of(features, texts, config.model.text_tokens)
        parts.append(generate(model, config, condition, indices, seeds=seeds))
    images = torch.cat(parts)
    if not images.isfinite().all():
        raise SampleError(f"{run}: generates values that are not finite")
    return images
