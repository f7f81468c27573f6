"""The stages of a GPU run as command lines, and a summary of the results of each stage.

=======  ==========================================================================================
tests    tests that need a GPU, and the golden cases with the torch of that machine
step     training step of L and XL compared with a loop over experts and a dense model, eager, compiled and captured
profile  steps of L with torch's profiler: the longest kernels, and the time in which the device is idle
layer    the MoE layer of S, L and XL compared with a loop over experts and a dense layer
train    200 steps of digits and 50 of L by `megapromoe train`, through DeepSpeed in bf16
=======  ==========================================================================================
"""

from __future__ import annotations

import json
import signal
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from megapromoe.number_text import significant
from megapromoe.run_lines import DENOISING_LOSS, current_names

STAGES = ("tests", "step", "profile", "layer", "train")  # the most important first
TESTS = (
    "tests/unit/test_gpu.py",
    "tests/unit/test_gpu_model.py",
    "tests/unit/test_golden.py",
    "tests/parallel/test_published_run.py",
)
QUICK_TESTS = TESTS[:3]


@dataclass(frozen=True)
class StageCommand:
    """A process of a stage.

    Args:
        name: of the process and its log.
        words: of its command line, after the Python interpreter.
        stop: the signal on which it saves its results and ends early.
        settings: variables of its environment.
    """

    name: str
    words: tuple[str, ...]
    stop: signal.Signals = signal.SIGINT
    settings: tuple[tuple[str, str], ...] = ()


def stage_commands(stage: str, out: Path, device: str, quick: bool, seconds: float) -> list[StageCommand]:
    """The processes of a stage, in order. They run in the root of the checkout.

    Args:
        stage: one of `STAGES`.
        out: the folder of the run; the stage writes into `out / stage`.
        device: cuda or cpu.
        quick: the smallest model and few steps, to test that everything runs.
        seconds: time limit of the stage.
    """
    folder = out / stage
    if stage == "tests":
        report = ("-q", "-rs", "-p", "no:cacheprovider", f"--junitxml={folder / 'report.xml'}")
        words = ("-m", "pytest", *report, *(QUICK_TESTS if quick else TESTS))
        # Tests that train use gloo processes on the CPU, so DeepSpeed must not use the GPU.
        return [StageCommand("pytest", words, settings=(("DS_ACCELERATOR", "cpu"),))]
    if stage in ("step", "layer"):
        return _benchmarks(stage, folder, device, quick)
    if stage == "profile":
        model = ("--preset", "digits", "--batch", "8", "--steps", "2") if quick else ("--preset", "promoe_l")
        limit = ("--seconds", f"{seconds / 2:.0f}")  # the table and the trace take time too
        words = ("-m", "megapromoe.benchmark.profile_step", *model, *limit, "--device", device, "--out", str(folder))
        return [StageCommand("profile", words)]
    return _trainings(folder, device, quick)


def _benchmarks(stage: str, folder: Path, device: str, quick: bool) -> list[StageCommand]:
    base = ("-m", "megapromoe", "benchmark", stage, "--device", device)
    if quick:
        few = ("--quick", "--routing", "real", "--implementations", "ours", "dense")
        return [StageCommand("eager", (*base, *few, "--out", str(folder / "eager")))]
    if stage == "layer":
        what = ("--sizes", "s", "l", "xl", "--implementations", "ours", "loop", "dense", "--rounds", "15")
        return [StageCommand("eager", (*base, *what, "--out", str(folder / "eager")))]
    sizes = ("--sizes", "l", "xl", "--rounds", "7")
    eager = (*sizes, "--implementations", "ours", "loop", "dense", "--out", str(folder / "eager"))
    compiled = (*sizes, "--implementations", "ours", "dense", "--compile", "--out", str(folder / "compiled"))
    captured = (*compiled[:-1], str(folder / "captured"), "--capture")
    return [
        StageCommand("eager", (*base, *eager)),
        StageCommand("compiled", (*base, *compiled)),
        StageCommand("captured", (*base, *captured)),
    ]


def _trainings(folder: Path, device: str, quick: bool) -> list[StageCommand]:
    precision = "bf16" if device == "cuda" else "fp32"
    base = ("-m", "megapromoe", "train")
    digits = ["--preset", "digits", "--run-dir", str(folder / "digits"), f"train.deepspeed={precision}_zero1"]
    if quick:
        digits += ["train.steps=4", "train.log_every=2", "train.global_batch=32"]
        digits += ["train.sample_every=0", "train.warmup=0"]
    else:
        digits += ["train.steps=200"]
    commands = [StageCommand("digits", (*base, *digits), signal.SIGTERM)]
    if not quick:
        large = ["--preset", "promoe_l", "--run-dir", str(folder / "promoe_l"), f"train.deepspeed={precision}_zero1"]
        large += ["train.steps=50", "train.log_every=5", "train.global_batch=64", "train.save_every=0"]
        large += ["data.source=synthetic"]
        commands.append(StageCommand("promoe_l", (*base, *large), signal.SIGTERM))
    return commands


# ---- summaries of results


def stage_figures(stage: str, folder: Path) -> list[str]:
    """The results of a stage so far, a line each; empty if it has no files yet."""
    lines: list[str] = []
    for path in sorted(folder.rglob(_FIGURES[stage][0])):
        lines += _FIGURES[stage][1](path)
    return lines


def _tests(path: Path) -> list[str]:
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return [f"{total - failed - errors - skipped} passed, {failed + errors} failed, {skipped} skipped"]


def _benchmark(path: Path) -> list[str]:
    lines = []
    for key, case in json.loads(path.read_text(encoding="utf-8"))["scenes"].items():
        cells = []
        for name, figures in case["contenders"].items():
            if "cannot" in figures:
                cells.append(f"{name} did not run ({figures['cannot']})")
                continue
            ratio = f" ({figures['ratio']['median']:.2f} × dense)" if "ratio" in figures and name != "dense" else ""
            cells.append(f"{name} {1000 * figures['total']['median']:.4g} ms{ratio}")
        lines.append(f"{path.parent.name}, {key}: {'; '.join(cells)}")
    return lines


def _profile(path: Path) -> list[str]:
    figures = json.loads(path.read_text(encoding="utf-8"))
    line = f"{1000 * figures['seconds']:.4g} ms for a step of {figures['images']} images, {figures['dtype']}"
    if figures["mfu"] is not None:
        line += f", {figures['mfu']:.1%} of the peak in the data sheet"
    if figures["device_busy"] is not None:
        line += f"; the device is busy {figures['device_busy']:.0%} of the step"
    kernels = [
        f"{1000 * kernel['seconds']:.4g} ms in {kernel['calls']:.4g} calls: {kernel['name'][:100]}"
        for kernel in figures["kernels"]
    ]
    return [line, *kernels]


def _training(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        return []
    last = current_names(json.loads(lines[-1]))
    loss = last.get(DENOISING_LOSS)
    text = "no finite loss" if loss is None else f"denoising loss {loss:.4f}"
    line = f"{path.parent.name}: step {last['step']}, {text}, {significant(last['images_per_second'])} images/s"
    return [line + (f", {last['mfu']:.1%} of the peak in the data sheet" if "mfu" in last else "")]


_FIGURES = {
    "tests": ("report.xml", _tests),
    "step": ("benchmark.json", _benchmark),
    "layer": ("benchmark.json", _benchmark),
    "profile": ("profile.json", _profile),
    "train": ("metrics.jsonl", _training),
}
