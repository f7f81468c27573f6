"""The text files of a run's folder and of its user under damage: what a start makes of them."""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.fuzz import HARMLESS, NAMED, SILENT, Damage, Tally, Target, damage, outcome_of, snapshot, warnings_of
from support.fuzz_data import latents_config, write

from megapromoe.checkpoint import environment
from megapromoe.checkpoint.origin import OtherRun
from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError
from megapromoe.config.class_groups import ClassGroupError, read_groups
from megapromoe.config.deepspeed_file import find_ds_configs, load_deepspeed
from megapromoe.config.options import ConfigError, to_dict
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.io import write_text
from megapromoe.studies.recipe import RECIPES, StudyError, read_recipe
from megapromoe.training.metrics import rewind

GROUPS = 'animals: [2, 3, "5-7"]\nvehicles: [0, 1, 8, 9]\n'
LINES, RESUMED = 12, 9  # of metrics.jsonl, and the step from which the run goes on


def fuzz_run_folder(root: Path, flips: int, seed: int) -> list[Tally]:
    """`RunDirectory.open` on a run of two starts, as a third start calls it: a tally for each file that it reads."""
    folder, config = root / "run", latents_config(write(root / "latents", shard_size=4))
    for _ in range(2):
        RunDirectory.open(folder, config, 1).close()
    write_text(folder / "checkpoints" / "step-00000003" / "manifest.json", "{}", parents=True)
    restore = snapshot(folder)
    git_state, environment.git_state = environment.git_state, lambda file: None  # three processes a start

    origin = RunDirectory(folder).origin(config)
    manifest = {"run": origin.run, "data": origin.data, "config": to_dict(config)}  # of the run's checkpoints

    def read() -> list[Any]:
        state = RunDirectory(folder).state(config)
        with RunDirectory.open(folder, config, 1) as run:
            origin = run.origin(config)
            origin.check(folder, manifest)
            return [origin.run, state, origin.data]

    try:
        expected = read()
        restore()

        def classify(_: Damage) -> str:
            with warnings_of() as messages:
                try:
                    value = read()
                except (RunDirectoryError, OtherRun) as error:
                    assert str(folder) in str(error) or "data.path" in str(error), error
                    return NAMED
            if value == expected:
                return HARMLESS
            changes = value[1] != expected[1] and "; changes" in value[1]  # named by the dry run and environment.json
            return NAMED if changes or any(str(folder) in message for message in messages) else SILENT

        names = ("config.yaml", "environment.json", "run.lock")
        targets = [Target(f"run folder: {name}", [folder / name], classify, reset=restore) for name in names]
        return [damage(target, flips, seed) for target in targets] + [_held_lock(folder, flips, seed)]
    finally:
        environment.git_state = git_state


def _held_lock(folder: Path, flips: int, seed: int) -> Tally:
    """The lock of a live run, whose text a second start quotes: refused whatever it says."""
    lock, config = folder / "run.lock", latents_config(folder.parent / "latents")

    def classify(_: Damage) -> str:
        lock.touch()
        with open(lock, "rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            opened = outcome_of(lambda: RunDirectory.open(folder, config, 1).close(), RunDirectoryError, None)
            shown = outcome_of(lambda: RunDirectory(folder).state(config), RunDirectoryError, None)
        return NAMED if opened == shown == NAMED else SILENT

    return damage(Target("run folder: run.lock of a live run", [lock], classify), flips, seed)


def fuzz_metrics(root: Path, flips: int, seed: int) -> Tally:
    """The steps of the lines of metrics.jsonl, by which a resumed run drops later ones; values it does not read."""
    root.mkdir(exist_ok=True)
    file = root / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step, "gradient_norm": 0.25}) for step in range(1, LINES + 1)]
    file.write_text("\n".join(lines) + "\n")

    def read() -> list[int]:
        rewind(file, RESUMED)
        return [json.loads(line)["step"] for line in file.read_text().splitlines()]

    restore = snapshot(root)
    expected = read()
    restore()

    def classify(_: Damage) -> str:
        with warnings_of() as messages:
            value = read() if file.exists() else expected  # nothing reads a log that is not there
        if value == expected:
            return HARMLESS
        return NAMED if any(str(file) in message for message in messages) else SILENT

    return damage(Target("run folder: metrics.jsonl (its steps)", [file], classify, reset=restore), flips, seed)


def fuzz_user_files(root: Path, flips: int, seed: int) -> list[Tally]:
    """Texts that a user writes. They have no hash: a digit that becomes another one is another setting."""
    root.mkdir(exist_ok=True)
    config, recipe, groups, deepspeed = (root / n for n in ("config.yaml", "recipe.yaml", "groups.yaml", "ds.json"))
    config.write_text(to_yaml(resolve("digits")))
    recipe.write_text((RECIPES / "digits.yaml").read_text())
    groups.write_text(GROUPS)
    deepspeed.write_text((find_ds_configs() / "bf16_zero1.json").read_text())
    readers: list[tuple[str, Path, Callable[[], Any], type[Exception]]] = [
        ("user's config.yaml", config, lambda: resolve(file=config), ConfigError),
        ("user's recipe of a study", recipe, lambda: read_recipe(recipe), StudyError),
        ("user's groups of classes", groups, lambda: list(read_groups(groups, 10).items()), ClassGroupError),
        (
            "user's DeepSpeed JSON",
            deepspeed,
            lambda: load_deepspeed(resolve("digits", overrides=[f"train.deepspeed={deepspeed}"])),
            ConfigError,
        ),
    ]
    tallies = []
    for name, file, read, refusals in readers:
        expected = read()
        classify = _plain(read, refusals, expected)
        tallies.append(damage(Target(name, [file], classify), flips, seed))
    return tallies


def _plain(read: Callable[[], Any], refusals: type[Exception], expected: Any) -> Callable[[Damage], str]:
    return lambda _: outcome_of(read, refusals, expected)
