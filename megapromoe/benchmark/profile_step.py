"""Profiles training steps with torch's profiler: the longest kernels, and the time in which the device is idle.

    python -m megapromoe.benchmark.profile_step --preset promoe_l --batch 64 --device cuda --out DIR

Writes `profile.txt`, a table of kernels; `trace.json.gz` for https://ui.perfetto.dev; and `profile.json`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from megapromoe.benchmark.layer import BenchmarkError, Settings
from megapromoe.benchmark.measure import make_clock
from megapromoe.benchmark.models import Batch
from megapromoe.benchmark.updates import make_update
from megapromoe.config.options import Config
from megapromoe.config.resolve import resolve
from megapromoe.distributed.mesh import UNSHARDED
from megapromoe.errors import UserError
from megapromoe.io import atomic_path, write_json, write_text
from megapromoe.nn.compile import compile_model
from megapromoe.nn.parallelize import build
from megapromoe.number_text import significant
from megapromoe.planning import cost
from megapromoe.planning.machines import peak_flops

WARMUP = 3  # steps
ROWS = 40  # of the table
TOP = 10  # kernels in profile.json


def profile_step(config: Config, settings: Settings, steps: int, seconds: float, out: Path) -> dict[str, Any]:
    """Profiles up to `steps` training steps (forward with loss, backward, clipped AdamW) of one model on one batch.

    The duration of a step is measured without the profiler, which slows down the host.

    Args:
        config: of the model and the optimizer.
        settings: images, device, dtype, seed and compile; contenders and rounds are not used.
        steps: at most so many, at least one.
        seconds: no step starts after so many.
        out: folder for the files, made if needed.

    Returns the content of `profile.json`.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    step = _training_step(config, settings)
    clock = make_clock(settings.device, settings.threads)
    for _ in range(WARMUP):
        step()
    timed = [clock.time({"step": step})["step"]]
    while len(timed) < steps and time.monotonic() < deadline:
        timed.append(clock.time({"step": step})["step"])

    gpu = settings.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    profiled = 0
    with profile(activities=activities) as profiler:
        while not profiled or (profiled < steps and time.monotonic() < deadline):
            step()
            profiled += 1
        if gpu:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    table = events.table(sort_by=f"self_{settings.device.type}_time_total", row_limit=ROWS)
    write_text(out / "profile.txt", table + "\n")
    # Torch compresses a file whose name ends with .gz, so the temporary name must end with it too.
    with atomic_path(out / "trace.json.gz") as staging:
        compressed = staging.with_name("trace.writing.json.gz")
        profiler.export_chrome_trace(str(compressed))
        compressed.replace(staging)

    device_type = DeviceType.CUDA if gpu else DeviceType.CPU
    kernels = [
        (e.self_device_time_total if gpu else e.self_cpu_time_total, e) for e in events if e.device_type == device_type
    ]
    kernels = sorted(((t, e) for t, e in kernels if not e.is_user_annotation), key=lambda pair: -pair[0])
    busy = sum(t for t, _ in kernels) / 1e6 / profiled
    seconds_of_step = sorted(timed)[len(timed) // 2]
    flops = cost.flops_per_image(config.model).training * settings.images
    peak = peak_flops(torch.cuda.get_device_name(settings.device)) if gpu else None
    figures = {
        "images": settings.images,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "compile": settings.compile,
        "steps_timed": len(timed),
        "steps_profiled": profiled,
        "seconds": seconds_of_step,
        "images_per_second": settings.images / seconds_of_step,
        "flop_per_second": flops / seconds_of_step,
        "mfu": flops / seconds_of_step / peak if peak else None,
        # Kernels of one stream do not overlap; in the rest of the step the device waits for the host.
        "device_seconds": busy if gpu else None,
        "device_busy": min(busy / seconds_of_step, 1.0) if gpu else None,
        "kernels": [
            {"name": e.key, "calls": e.count / profiled, "seconds": t / 1e6 / profiled} for t, e in kernels[:TOP]
        ],
    }
    write_json(out / "profile.json", figures, indent=1)
    return figures


def _training_step(config: Config, settings: Settings) -> Callable[[], None]:
    """A training step on random latents, whose phases have their names in the profile."""
    torch.manual_seed(settings.seed)
    model = build(config, UNSHARDED).to(settings.device, settings.dtype).train()
    if settings.compile:
        compile_model(model)
    batch, update = Batch(config, settings), make_update(model, config.train, settings.compile)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with record_function("forward"):
            loss = batch.loss(model)
        with record_function("backward"):
            loss.backward()
        with record_function("update"):
            update.step()

    return step


def _config_of(preset: str) -> Config:
    """A preset. Raises BenchmarkError for a model of texts, since the measured batches have classes; ConfigError."""
    config = resolve(preset)
    if config.model.has_text:
        raise BenchmarkError(f"--preset {preset}: is conditioned by text; profile one that is conditioned by classes")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="profile_step", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--preset", default="promoe_l", help="default: promoe_l")
    add("--batch", type=int, default=64, metavar="B", help="images of a micro-batch; default: 64")
    add("--steps", type=int, default=5, metavar="N", help="steps to profile; default: 5")
    add("--seconds", type=float, default=300.0, metavar="S", help="no step starts after so many seconds; default: 300")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    add("--compile", action="store_true", help="train.compile=true")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    options = parser.parse_args(argv)
    gpu = options.device == "cuda"
    settings = Settings(
        device=torch.device(options.device),
        dtype=torch.bfloat16 if gpu else torch.float32,
        threads=torch.get_num_threads(),
        rounds=1,
        images=options.batch,
        contenders=(),
        compile=options.compile,
    )
    try:
        figures = profile_step(_config_of(options.preset), settings, options.steps, options.seconds, options.out)
    except UserError as error:
        print(f"profile_step: {error}", file=sys.stderr)
        return error.exit_code
    print((options.out / "profile.txt").read_text(encoding="utf-8"))
    print(f"{1000 * figures['seconds']:.4g} ms per step, {significant(figures['images_per_second'])} images/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
