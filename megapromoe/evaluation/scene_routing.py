"""Real scenes that show the prompts of the six tasks, whose routing is recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megapromoe.config.options import Config
from megapromoe.data.latents import read_manifest
from megapromoe.data.scenes.draws import Draws
from megapromoe.data.scenes.recorded import ink_of_tokens
from megapromoe.data.scenes.scenes import DigitImages
from megapromoe.evaluation.scene_tasks import TASKS, prompts, real_scene
from megapromoe.nn.text_condition import TextCondition
from megapromoe.routing_analysis.captioned_images import NO_TOKEN_GROUP, CaptionedImages, TokenGroups
from megapromoe.sampling.prompt_features import condition_of, open_prompt_encoder
from megapromoe.sampling.prompts import prompt_of

TASK, TASK_OF_INK = "task", "task of tokens with ink"


def images_of_tasks(text_encoder: str | None, seed: int = 0) -> Callable[[Config, str, int], CaptionedImages]:
    """Returns a function that makes equally many images of each task, with digits of the test split.

    The prompts are those of combinations that training never shows, in turn. The function raises SampleError if the
    text encoder of the run cannot be used.

    Args:
        text_encoder: folder or name of the encoder; None: as the captions of the run name it.
        seed: of the pictures.
    """

    def make(config: Config, device: str, count: int) -> CaptionedImages:
        all_prompts = prompts()
        shown = []
        for task in TASKS:
            of_task = [p for p in all_prompts if p.task == task]
            shown += [of_task[i % len(of_task)] for i in range(max(1, count // len(TASKS)))]
        texts = tuple(p.text for p in shown)
        encoder = open_prompt_encoder(config, text_encoder, device)
        encoder.check([prompt_of(text) for text in texts])
        features = encoder.encode(texts)
        digits = DigitImages("test")
        pixels = np.stack([real_scene(p.stated, digits, Draws(seed, "tasks", i)) for i, p in enumerate(shown)])
        manifest = read_manifest(Path(config.data.path))
        scale, shift = (
            np.array(values, dtype=np.float32)[:, None, None] for values in (manifest.scale, manifest.shift)
        )
        clean_NCHW = (pixels.transpose(0, 3, 1, 2).astype(np.float32) - shift) * scale
        task_NS = np.repeat(np.array([[TASKS.index(p.task)] for p in shown]), config.model.tokens, axis=1)
        patch = config.model.patch_size
        has_ink_NS = np.stack([ink_of_tokens(picture.any(axis=2), patch) > 0 for picture in pixels])
        groups = (
            TokenGroups(TASK, TASKS, task_NS),
            TokenGroups(TASK_OF_INK, TASKS, np.where(has_ink_NS, task_NS, NO_TOKEN_GROUP)),
        )

        def condition(part: slice) -> TextCondition:
            return condition_of(features, texts[part], config.model.text_tokens)

        return CaptionedImages(clean_NCHW, list(range(len(shown))), texts, condition, groups)

    return make
