"""Programs that stand for the training and the evaluation of a study's tasks: they only leave the files of both."""

import sys
import time
from pathlib import Path

from support.small_studies import TINY, recipe

from megapromoe.studies.study import plan

BOTH = """\
import json, os, pathlib, signal, sys, time, yaml
def word(name): return sys.argv[sys.argv.index(name) + 1]
def words(name):
    rest = sys.argv[sys.argv.index(name) + 1 :]
    return rest[: next((i for i, w in enumerate(rest) if w.startswith("--")), len(rest))]
run = pathlib.Path(word("--run-dir"))
study = run.parent.parent
with open(study / "starts", "a") as file:
    file.write(f"{sys.argv[3]} {run.name}\\n")
def train():
    config = yaml.safe_load(pathlib.Path(word("--config")).read_text())
    step = config["train"]["steps"]
    (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (run / f"checkpoints/step-{step:08d}/manifest.json").write_text("{}")
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s}) + "\\n" for s in range(1, step + 1)))
def record(step, scale, value=5.0):
    known = {"reference": word("--reference"), "split": word("--split"), "features": word("--features")}
    line = {"step": int(step), "guidance": float(scale), "count": int(word("--num-images"))}
    line["weights"] = word("--weights")
    line |= {"classes": "balanced", "only": None, "autoencoder": None, "asked": known}
    line |= {"sample": {"steps": int(word("--steps"))}, "figures": {"distance (X)": value}}
    with open(run / "evaluation.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
def evaluate():
    for step in words("--step"):
        for scale in words("--guidance"):
            record(step, scale)
"""


def stand_in(folder, code: str = "train() if sys.argv[3] == 'train' else evaluate()") -> list[str]:
    """A launcher that runs `code`; behind it come -m, megapromoe, and the command, which is `sys.argv[3]`."""
    script = folder / "stand_in.py"
    script.write_text(BOTH + code + "\n")
    return [sys.executable, str(script)]


def starts(study) -> list[str]:
    """What was started, in order: "train NAME" and "evaluate NAME"."""
    file = study.folder / "starts"
    return file.read_text().splitlines() if file.exists() else []


SECTION = {"num": 200, "guidance": [1.0, 2.0], "steps": 4, "every": 2, "features": "digits"}
FOUR = {key: value for key, value in TINY.items() if key != "train.save_every"} | {"train.steps": 4}


def evaluating_study(tmp_path, code="train() if sys.argv[3] == 'train' else evaluate()", **changes):
    made = {"settings": FOUR, "axes": {}, "evaluate": SECTION, "launcher": stand_in(tmp_path, code)}
    return plan(tmp_path / "s", recipe(**(made | changes)))


def training_stand_in(tmp_path, code: str) -> list[str]:
    """A launcher that runs `code` in place of the training; it finds the task's config and folder as `c` and `run`."""
    script = tmp_path / "stand_in.py"
    head = """\
import json, os, pathlib, signal, sys, time, yaml
def words(name): return pathlib.Path(sys.argv[sys.argv.index(name) + 1])
c, run = yaml.safe_load(words("--config").read_text()), words("--run-dir")
def save(step):
    (run / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
    (run / f"checkpoints/step-{step:08d}/manifest.json").write_text("{}")
saved = max((int(p.name[5:]) for p in run.glob("checkpoints/step-*")), default=0)
"""
    script.write_text(head + code)
    return [sys.executable, str(script)]


def wait_until(condition, process, limit=120):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
