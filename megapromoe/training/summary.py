"""A summary of a run in a few lines, for the head of a training log or a dry run, and the closing lines. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.step_folders import folder_of
from megapromoe.config.data_options import UNSET
from megapromoe.config.deepspeed_file import load_deepspeed
from megapromoe.config.extensions import shown
from megapromoe.config.options import Config
from megapromoe.number_text import clock_text, significant
from megapromoe.planning.cost import flops_per_image, parameters
from megapromoe.planning.memory import placement_in_words
from megapromoe.run_lines import DENOISING_LOSS

if TYPE_CHECKING:
    from megapromoe.data.datasets import Dataset
    from megapromoe.training.run_clock import RunClock


def summary(
    config: Config,
    world: int,
    folder: Path,
    begins: str,
    dataset: Dataset | None = None,
    device: str = "",
) -> list[str]:
    """Lines with model, parameters, data, steps, batch, layout, precision, optimizer, device and run.

    Args:
        world: ranks of the job.
        folder: the run directory.
        begins: where the run begins, such as "begins at step 0".
        dataset: the opened data; None: its size is left out.
        device: name of the device of each rank; "" leaves the line out.

    Raises ConfigError if the layout does not fit the number of ranks, or for a refused `train.deepspeed`.
    """
    rows = {
        "model": _model(config),
        "parameters": parameters(config.model).in_words,
        "data": _data(config, dataset),
        "steps": _steps(config, dataset),
        "batch": _batch(config, world),
        "layout": _layout(config, world),
        "experts": placement_in_words(config, world) or "",
        "precision": _precision(config),
        "optimizer": _optimizer(config),
        "device": device,
        "run": f"{folder}: {begins}",
    }
    return [f"{name:10} {text}" for name, text in rows.items() if text]


def starting(sentences: Sequence[str]) -> list[str]:
    """Lines on the weights of `train.init_from`, to follow those of `summary`."""
    return [f"{'start':10} {sentence}" for sentence in sentences]


def experts(sentences: Sequence[str]) -> list[str]:
    """Lines on the ranks of the routed experts, to follow those of `summary`."""
    return [f"{'experts':10} {sentence}" for sentence in sentences]


def _model(config: Config) -> str:
    m = config.model
    blocks = f"{m.depth} blocks of width {m.hidden_size}"
    if m.moe_blocks:
        blocks += f", {len(m.moe_blocks)} of them with {m.num_experts} experts, {m.top_k} for a token"
    if m.conditional_blocks:
        blocks += f", {len(m.conditional_blocks)} of them with separate weights for null images"
    flops = significant(flops_per_image(m).training / 1e9)
    return f"{shown(m.router)}, {blocks}; {flops} GFLOP to train on an image"


def _data(config: Config, dataset: Dataset | None) -> str:
    data, m = config.data, config.model
    where = f"{data.source} at {data.path}" if data.path else data.source
    if data.source == UNSET:
        where = "not chosen yet (data.source)"
    if data.source == "synthetic":
        where += " (random numbers, nothing can be learnt from them)"
    if dataset is None:
        kind = f"captions of up to {m.text_tokens} tokens" if m.has_text else f"{m.num_classes:,} classes"
        return f"{where}: records of {m.in_channels}x{m.input_size}x{m.input_size}, {kind}"
    shape = "x".join(map(str, dataset.shape))
    kind = f"captions of up to {m.text_tokens} tokens" if m.has_text else f"{dataset.num_classes:,} classes"
    return f"{where}: {len(dataset):,} records of {shape}, {kind}"


def _steps(config: Config, dataset: Dataset | None) -> str:
    t = config.train
    images = t.steps * t.global_batch
    text = f"{t.steps:,} of {t.global_batch:,} images, {images:,} in all"
    return text if dataset is None else f"{text}, {significant(images / len(dataset))} passes over the data"


def _batch(config: Config, world: int) -> str:
    layout, t = config.layout(world), config.train
    text = (
        f"{t.global_batch:,} images = {layout.micro_batch:,} for a rank x data parallel {layout.dp}"
        f" x accumulation {t.accumulation}"
    )
    if stratum := config.data.condition_dropout_stratum:
        dropped = config.data.dropped_per_stratum
        null = layout.micro_batch // stratum * dropped
        text += f"; {null} of a rank's micro-batch are null images, {dropped} of each {stratum}"
    return text


def _layout(config: Config, world: int) -> str:
    stage = load_deepspeed(config).get("zero_optimization", {}).get("stage", 0)
    return f"{world} rank{'s' * (world > 1)}: {', '.join(_degrees(config, world))}; ZeRO {stage}"


def _degrees(config: Config, world: int) -> Iterator[str]:
    layout = config.layout(world)
    yield f"tensor parallel tp {layout.tp}"
    if config.model.moe_blocks:
        yield f"expert parallel ep {layout.ep}" + (f" with expert_tp {layout.etp}" if layout.etp > 1 else "")
    yield f"data parallel dp {layout.dp}" + (f" in shards of {layout.dp_shard}" if layout.shard_ranks else "")


def _precision(config: Config) -> str:
    bf16 = load_deepspeed(config).get("bf16", {}).get("enabled", False)
    return f"{'bf16 with fp32 master weights' if bf16 else 'fp32'} ({config.train.deepspeed})"


def _optimizer(config: Config) -> str:
    t = config.train
    rate = f"learning rate {t.lr:g}, {t.schedule}" + (f" after {t.warmup:,} steps of warm-up" if t.warmup else "")
    if t.schedule == "wsd":
        rate += f", decay ({t.decay_shape}) from step {t.decay_start_step:,}"
    clip = f"gradient norm clipped to {t.max_grad_norm:g}" if t.max_grad_norm else "gradient norm not clipped"
    name = f"AdamW ({t.adamw_backend})"
    if t.optimizer == "muon":
        name = f"Muon (learning rate {t.muon_lr or t.lr:g}, {t.muon_scale}) and {name}"
    return f"{name}, {rate}; {clip}; {_averages(t.ema_decays)}"


def _averages(decays: Sequence[float]) -> str:
    if len(decays) == 1:
        return f"averaged weights with decay {decays[0]:g}"
    return f"{len(decays)} averages of the weights, with decays {', '.join(f'{decay:g}' for decay in decays)}"


PREVIEW_CLASSES = 10  # classes in the suggested command for samples


def closing_lines(
    config: Config,
    folder: Path,
    step: int,
    last: Mapping[str, float | None] | None,
    clock: RunClock,
    prompt: str | None = None,
) -> Iterator[str]:
    """Yields the last lines of a training log: steps, loss, time, checkpoint and, for a complete run, the next command.

    Args:
        folder: the run directory.
        step: the last completed and saved step.
        last: values of the last logged step, see `Metrics.last`.
        clock: clock of the run.
        prompt: a caption of the training data, for a model of texts.
    """
    t = config.train
    loss = (last or {}).get(DENOISING_LOSS)
    reached = "" if loss is None else f"; denoising loss {loss:.4f} over the last logged steps"
    yield f"{'done' if step >= t.steps else 'stopped'}: step {step:,} of {t.steps:,}{reached}"
    yield f"trained for {clock_text(clock.elapsed)}, of which {clock_text(clock.of_this_start)} since the last start"
    yield f"checkpoint: {folder_of(RunDirectory(folder).checkpoints, step)}"
    if step >= t.steps and (command := sample_command(config, folder, prompt)):
        yield f"next: {command}"


def sample_command(config: Config, folder: Path, prompt: str | None = None) -> str | None:
    """A shell command that generates some images of a run: a picture, or arrays if the model generates latents.

    Args:
        prompt: for a model of texts.

    Returns None for a model of texts without a prompt.
    """
    model = config.model
    ending = "png" if model.in_channels in (1, 3) else "npz"
    words = ["megapromoe", "sample", "--run-dir", str(folder), "--out", str(folder / f"samples.{ending}")]
    if model.has_text:
        return None if prompt is None else shlex.join([*words, "--prompt", prompt])
    if model.num_classes > PREVIEW_CLASSES:  # all classes would take long
        words += ["--class", *map(str, range(PREVIEW_CLASSES)), "--count", "4"]
    return shlex.join(words)
