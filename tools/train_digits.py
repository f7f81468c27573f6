"""The main example: trains a ProMoE on the digits with four processes, samples images and writes a report.

    python tools/train_digits.py [--run-dir runs/digits] [--ranks 4] [section.key=value ...]

Trains the `digits` preset with tensor parallelism 2, expert parallelism 2 and ZeRO-1, and writes samples.png,
loss.png, routing.png, report.json and report.md into the run directory. Repeat the command to resume training, or to
write the report of a finished run again. Exits with 1 if training fails, or if too few generated digits are classified
correctly after the preset's number of steps; after another number of steps the accuracy is only printed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import checkout  # noqa: F401, makes the package importable in this process and in those that train

from megapromoe.commands.renamed_flags import with_new_names

REQUIRED_ACCURACY = 0.95
SAMPLES = 500


def main() -> int:
    """Runs the job and returns its exit code."""
    options = arguments()
    start = time.perf_counter()
    print(f"training on {options.ranks} processes in {options.run}", flush=True)
    code = train(options.run, options.ranks, options.overrides)
    if code:
        return code
    trained = time.perf_counter() - start
    print(f"training took {trained:.0f} s with start-up; sampling {SAMPLES} digits", flush=True)

    import torch  # slow to import

    from megapromoe.distributed import runtime

    runtime.prepare()
    from megapromoe.evaluation.report import write_report

    torch.set_num_threads(1)  # such small matrix products are slower with several threads
    report = write_report(options.run, SAMPLES, {"the last training command": trained})
    print()
    print((options.run / "report.md").read_text(encoding="utf-8"))
    for name in ("samples.png", "loss.png", "routing.png", "report.md", "report.json"):
        print(options.run / name)
    print(f"total time: {time.perf_counter() - start:.0f} s")
    if report["steps"] != default_steps():
        print(
            f"accuracy {report['accuracy']:.1%} after {report['steps']} steps; {REQUIRED_ACCURACY:.0%} are required"
            f" only after the default of {default_steps()} steps"
        )
    elif report["accuracy"] < REQUIRED_ACCURACY:
        print(f"accuracy {report['accuracy']:.1%} is below {REQUIRED_ACCURACY:.0%}", file=sys.stderr)
        return 1
    return 0


def default_steps() -> int:
    """The preset's number of steps, for which the accuracy is required."""
    from megapromoe.config.resolve import resolve

    return resolve("digits").train.steps


def arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    run = Path("runs/digits")
    parser.add_argument(
        "--run-dir", type=Path, dest="run", default=run, metavar="DIR", help=f"run directory; default: {run}"
    )
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="processes; default: 4")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="other settings")
    words, notices = with_new_names(sys.argv[1:], {"--run": "--run-dir"})
    options = parser.parse_intermixed_args(words)
    for notice in notices:
        print(f"train_digits: {notice}", file=sys.stderr)
    if options.ranks < 1:
        parser.error(f"--ranks {options.ranks}: must be at least 1")
    if wrong := [text for text in options.overrides if not re.match(r"\w+\.\w+=", text)]:
        parser.error(f"{' '.join(wrong)}: must be section.key=value")
    return options


def train(run: Path, ranks: int, overrides: list[str]) -> int:
    """Trains until the preset's last step; returns the launcher's exit code."""
    degree = 2 if ranks % 2 == 0 else 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "megapromoe", "train", "--preset", "digits", "--run-dir", str(run)]
    command += [f"parallel.tp={degree}", f"parallel.ep={degree}", *overrides]
    # One thread per process, because all processes share the cores.
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
