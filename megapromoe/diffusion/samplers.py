"""Samplers, which turn noise into images with classifier-free guidance.

    predict = guided(model, Labels(labels_B, null_class), scale=1.5)
    images_BCHW = sample(predict, image_noise(seed, indices, shape), "heun", steps=50)

Samplers draw no random numbers: the caller passes the initial noise and, for ancestral sampling, the noise of each
step, drawn for each image. So an image depends on the others of its batch only if the output of the model does, see
`ModelConfig.images_depend_on_batch`. All images have the same time in a step. It is a Python number, so decisions that
depend on it need not wait for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megapromoe.config import extensions
from megapromoe.config.options import SAMPLING_METHODS
from megapromoe.diffusion.objectives import TIME_SCALE
from megapromoe.diffusion.solvers import NoiseAt, make_solver

Predict = Callable[[Tensor, float], Tensor]
"""(x_BCHW, model time in [0, 1000]) -> raw output (B, C or 2C, H, W)."""
Progress = Callable[[int], None]
"""Called with the number of finished steps."""
Sampler = Callable[[Predict, Tensor, int, float, NoiseAt | None, Progress], Tensor]
"""(predict, initial noise (B, C, H, W), steps, shift, noise of each step, progress) -> images (B, C, H, W)."""


class Condition(Protocol):
    """What the images of a batch show: classes, or texts (`nn.text_condition.TextCondition`)."""

    def is_null(self) -> Tensor:
        """Whether each image is without a condition, bool (B,)."""

    def select(self, rows: Tensor, num_conditional: int) -> Any:
        """What the model takes for the images `rows`, int64 (n,); all but the first `num_conditional` are null."""

    def part(self, start: int, stop: int) -> "Condition":
        """The conditions of images start .. stop - 1."""

    def to(self, device: torch.device | str) -> "Condition":
        """The conditions on a device."""


@dataclass(frozen=True)
class Labels:
    """Classes of images, see `Condition`.

    Attributes:
        labels_B: class of each image, int64.
        null_class: the label of images without a class.
    """

    labels_B: Tensor
    null_class: int

    def is_null(self) -> Tensor:
        """Whether each image has the null class, bool (B,)."""
        return self.labels_B == self.null_class

    def select(self, rows: Tensor, num_conditional: int) -> Tensor:
        """Labels of the images `rows`; all but the first `num_conditional` are the null class."""
        y = self.labels_B[rows].clone()
        y[num_conditional:] = self.null_class
        return y

    def part(self, start: int, stop: int) -> "Labels":
        """The labels of images start .. stop - 1."""
        return Labels(self.labels_B[start:stop], self.null_class)

    def to(self, device: torch.device | str) -> "Labels":
        """The labels on a device."""
        return Labels(self.labels_B.to(device), self.null_class)


def guided(
    model: Callable,
    condition: Condition,
    scale: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
    two_calls: bool = False,
) -> Predict:
    """Returns the model as a function of (x, time) for fixed conditions, with classifier-free guidance.

    The guided prediction is v_null + scale · (v_cond - v_null) on all C channels; a learned variance is that of the
    conditional pass. Both passes are one model call with the images ordered [conditional | null], or `two_calls`. If
    guidance is not active (scale 1, or a time outside of the interval), only the conditional pass is run. Images
    without a condition get the null pass.

    Args:
        model: called as model(x, t_B, labels or texts, num_conditional=n) -> (raw output, auxiliary output); the first
            n images are conditional.
        condition: class or text of each image, on the device of the model.
        scale: guidance scale; 1 is no guidance.
        low, high: guidance is active at times (model time / 1000) from low to high, both included.
        two_calls: for a model whose output depends on its batch (`ModelConfig.images_depend_on_batch`): one call with
            the conditional images and one with all images as null images. The number of calls depends only on scale
            and time, not on conditions, so that all ranks of an expert-parallel group make the same calls.

    Source: Ho and Salimans 2022; Kynkäänniemi et al. 2024 (guidance interval); two calls: sample.py of the ProMoE
    release.
    """
    is_null_B = condition.is_null()
    conditional_N = torch.nonzero(~is_null_B)[:, 0]
    null_N = torch.nonzero(is_null_B)[:, 0]
    all_B = torch.arange(len(is_null_B), device=is_null_B.device)
    n = len(conditional_N)

    def call(x_BCHW: Tensor, time: float, rows: Tensor, num_conditional: int) -> Tensor:
        """Raw output for images `rows`, the first `num_conditional` with their conditions, the others without."""
        y = condition.select(rows, num_conditional)
        t = torch.full((len(rows),), time, dtype=torch.float32, device=x_BCHW.device)
        return model(x_BCHW[rows], t, y, num_conditional=num_conditional)[0].float()

    def both_passes(x_BCHW: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """Raw outputs for the n conditional images, and for all images as null images."""
        if not two_calls:
            both = call(x_BCHW, time, torch.cat([conditional_N, all_B]), n)
            return both[:n], both[n:].clone()
        # Without conditional images the first call has one null image, and its output is not used.
        first = call(x_BCHW, time, conditional_N if n else all_B[:1], n)
        return first[:n], call(x_BCHW, time, all_B, 0)

    def predict(x_BCHW: Tensor, time: float) -> Tensor:
        is_active = scale != 1 and low <= time / TIME_SCALE <= high
        if not is_active or (n == 0 and not two_calls):
            rows_B = torch.cat([conditional_N, null_N])
            out = call(x_BCHW, time, rows_B, n)
            return torch.empty_like(out).index_copy_(0, rows_B, out)
        C = x_BCHW.shape[1]
        conditional, result = both_passes(x_BCHW, time)
        null = result[conditional_N, :C]
        guided_N = torch.cat([null + scale * (conditional[:, :C] - null), conditional[:, C:]], dim=1)
        return result.index_copy_(0, conditional_N, guided_N)

    return predict


@torch.no_grad()
def sample(
    predict: Predict,
    noise_BCHW: Tensor,
    method: str,
    steps: int,
    shift: float = 1.0,
    noise_at: NoiseAt | None = None,
    progress: Progress | None = None,
    objective: str = "rf",
) -> Tensor:
    """Returns images (B, C, H, W), float32, after `steps` steps of a method.

    Args:
        predict: raw output of the model, see `guided`.
        noise_BCHW: unit normal, on the device of the model.
        method: "euler" or "heun" for rectified flow, "ddpm" or "ddim" for DDPM; "unipc" or "dpm_solver++", of the
            library diffusers, for both; or what names a user's `Sampler`, see `config/extensions.py`.
        steps: number of steps; Heun calls the model twice in each except the last.
        shift: of the noise levels, as in training; only for rectified flow.
        noise_at: unit normal of step k = 1 .. steps-1, like `noise_BCHW`; only for "ddpm".
        progress: called after each step with the number of finished steps.
        objective: what the model predicts, see `objectives.make_objective`; only for the methods of diffusers.

    Raises:
        ValueError: unknown method, steps out of range, "ddpm" without `noise_at`, or images of another shape.
        MethodUnavailable: the method needs diffusers, which is not installed.
        ExtensionError: a user's sampler that cannot be loaded or has changed.
    """
    if method not in SAMPLING_METHODS and not extensions.SAMPLER.accepts(method):
        raise ValueError(f"sample.method: {method!r} is not known; use one of {', '.join(SAMPLING_METHODS)}")
    if steps < 1:
        raise ValueError(f"sample.steps: {steps} is below 1")
    done = progress or (lambda step: None)
    images = noise_BCHW.float()
    if method in SAMPLING_METHODS:
        solver = make_solver(method, steps, shift, objective)
        for i, time in enumerate(solver.times):
            images = solver.step(i, predict(images, time), images, noise_at)
            if finished := solver.finished(i):
                done(finished)
    else:
        images = extensions.SAMPLER.load(method)(predict, images, steps, shift, noise_at, done)
    if not isinstance(images, Tensor) or images.shape != noise_BCHW.shape:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"sample.method = {method!r}: returned {shape}, must be images {tuple(noise_BCHW.shape)}")
    return images.float()
