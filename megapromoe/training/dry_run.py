"""What a start of training would do, and what it would be refused for, found without starting: `train --dry-run`.

It opens the data as a start does, but copies none to `data.cache`, and it writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from megapromoe.checkpoint.history import first_step, progress
from megapromoe.checkpoint.manifest import CheckpointError
from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError, RunInUse
from megapromoe.config.deepspeed_file import load_deepspeed
from megapromoe.config.options import Config
from megapromoe.data.datasets import Dataset, DatasetError
from megapromoe.data.sources import open_dataset
from megapromoe.errors import ExitCode, UserError, Violations
from megapromoe.planning.cost import memory_per_rank, parameters
from megapromoe.planning.machines import GIB


class StartRefused(Violations):
    """A start that would be refused; `violations` lists every reason that a dry run can find."""

    subject = "this start"
    exit_code = ExitCode.MISCONFIGURED


def examine_start(
    config: Config,
    folder: Path,
    allow: Iterable[str] = (),
    from_step: int | None = None,
    fork: str | None = None,
) -> tuple[str, Dataset | None, StartRefused | None]:
    """What a start would find in its folder and in its data; changes nothing.

    Args:
        allow, from_step, fork: see `loop.train`.

    Returns what the start would do with the folder, its data set, or None if it cannot be used, and why the start would
    be refused, if it would be.
    """
    problems: list[UserError] = []
    run, dataset, state = RunDirectory(folder), None, f"{folder}: refused, see below"
    try:
        begins = progress(run, from_step, fork)
        state = run.state(config, allow, begins, first_step(run, from_step, fork))
    except (RunDirectoryError, CheckpointError) as error:
        problems.append(error)
    try:
        dataset = open_dataset(replace(config, data=replace(config.data, cache="")))
    except DatasetError as error:
        problems.append(error)
    if not problems:
        return state, dataset, None
    refused = StartRefused(map(str, problems))
    refused.on_all_ranks = all(error.on_all_ranks for error in problems)
    if all(isinstance(error, RunInUse) for error in problems):
        refused.exit_code = ExitCode.FAILED  # the folder may be free at another time
    return state, dataset, refused


def summary(config: Config, world: int, dataset: Dataset | None, state: str) -> Iterator[str]:
    """A line for each thing that a start is made of.

    Args:
        world: ranks.
        dataset: None if it cannot be opened.
        state: what the start would do with its folder.
    """
    model, train, layout, count = config.model, config.train, config.layout(world), parameters(config.model)
    deepspeed = load_deepspeed(config)
    zero = deepspeed.get("zero_optimization", {})
    experts = ""
    if model.moe_blocks:
        experts = f", {model.num_experts} routed experts (top {model.top_k}) in {len(model.moe_blocks)} of them"
    yield (
        f"model       {model.router}, {model.depth} blocks of hidden size {model.hidden_size}{experts}:"
        f" {count.trainable:,} trainable parameters, {count.active:,} active"
    )
    yield f"data        {_data(config, dataset)}"
    parallel = f"tensor parallel {layout.tp} x data parallel {layout.dp}"
    if model.moe_blocks:
        parallel += f", expert parallel {layout.ep} x expert data parallel {layout.edp}"
        parallel += f", each expert over {layout.etp} ranks" if layout.etp > 1 else ""
    yield f"layout      {world} rank{'s' * (world > 1)}: {parallel}"
    yield (
        f"batch       {train.global_batch} images = micro-batch {layout.micro_batch} x data parallel {layout.dp}"
        f" x accumulation {train.accumulation}"
    )
    precision = "bf16, with fp32 masters" if deepspeed.get("bf16", {}).get("enabled") else "fp32"
    recompute = "" if config.parallel.recompute == "none" else f", recomputes {config.parallel.recompute}"
    yield f"precision   {precision}; ZeRO stage {zero.get('stage', 0)} ({train.deepspeed}){recompute}"
    then = f"cosine to {train.min_lr:g}" if train.schedule == "cosine" else "constant"
    clip = f"gradient norm at most {train.clip:g}" if train.clip else "no clipping"
    yield (
        f"optimizer   AdamW of {train.optimizer}: learning rate {train.lr:g}, {train.warmup:,} steps of warm-up, then"
        f" {then}; {clip}; weight decay {train.weight_decay:g}; averages decay by {train.ema:g}"
    )
    saves = f"a checkpoint every {train.save_every:,}" if train.save_every else "a checkpoint of the last alone"
    yield f"steps       {train.steps:,}, {saves}, the newest {train.keep} kept; logged every {train.log_every:,}"
    memory = memory_per_rank(config, world).device / GIB
    size = f"{memory:,.3g} GiB" if memory >= 1 else f"{1024 * memory:,.3g} MiB"
    yield f"memory      {size} of states on the fullest rank's device, beside activations"
    yield f"folder      {state}".replace("\n  ", "\n            ")


def _data(config: Config, dataset: Dataset | None) -> str:
    data = config.data
    name = "synthetic, random latents" if data.source == "synthetic" else f"{data.source} {data.path}".rstrip()
    if dataset is None:
        return f"{name}: refused, see below"
    shape = " x ".join(map(str, dataset.shape))
    flips = ", half of them mirrored" if data.flip else ""
    epochs = config.train.steps * config.train.global_batch / len(dataset)
    return f"{name}: {len(dataset):,} records of {shape}, {dataset.num_classes:,} classes{flips}; {epochs:,.1f} epochs"
