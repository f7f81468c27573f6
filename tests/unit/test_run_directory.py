"""The run directory: what it records, whom it refuses, and that a refusal changes nothing."""

import fcntl
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megapromoe.checkpoint.environment import git_state
from megapromoe.checkpoint.history import progress
from megapromoe.checkpoint.manifest import seal
from megapromoe.checkpoint.origin import Origin, OtherRun
from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError
from megapromoe.config.options import to_dict
from megapromoe.config.resolve import resolve

FIXED = ("train.steps=2500", "train.lr=1e-3", "sample.steps=50")  # the preset is tuned now and then
CONFIG = resolve("digits", overrides=FIXED)


def files(folder: Path) -> dict[str, bytes]:
    """Content of everything under a folder but the lock."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in folder.rglob("*")
        if p.name != "run.lock"
    }


def start(folder: Path, config=CONFIG, world: int = 1, **options) -> RunDirectory:
    """Opens, logs a step and closes."""
    with RunDirectory.open(folder, config, world, **options) as run:
        run.metrics.write_text('{"step": 1}\n')
        return run


def refusal(folder: Path, config=CONFIG) -> str:
    """The message with which `open` refuses; `state` must say the same, and nothing may change."""
    before = files(folder) if folder.is_dir() else None
    with pytest.raises(RunDirectoryError) as error:
        RunDirectory.open(folder, config, 1)
    with pytest.raises(RunDirectoryError, match=re.escape(str(error.value))):
        RunDirectory(folder).state(config)
    assert (files(folder) if folder.is_dir() else None) == before
    return str(error.value)


def test_a_new_run_explains_itself(tmp_path):
    run = start(tmp_path / "runs" / "a", resolve("digits", overrides=[*FIXED, "parallel.tp=2"]), 4, launcher="torchrun")
    assert resolve(file=run.config_file) == resolve("digits", overrides=[*FIXED, "parallel.tp=2"])
    assert run.checkpoints.is_dir()
    assert not run.samples.exists() and not run.tensorboard.exists(), "whoever writes to them makes them"
    (entry,) = json.loads(run.environment.read_text())
    assert entry["launcher"] == "torchrun"
    assert (entry["layout"]["world"], entry["layout"]["tp"], entry["layout"]["dp"]) == (4, 2, 2)
    assert {"megapromoe", "python", "torch", "deepspeed"} <= set(entry["versions"])
    assert entry["changed"] == {}


def test_each_start_adds_an_entry_with_its_changes(tmp_path):
    start(tmp_path)
    start(tmp_path, resolve("digits", overrides=[*FIXED, "train.steps=9000", "parallel.ep=2", "sample.steps=7"]), 2)
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert first["changed"] == {}
    assert second["changed"] == {"parallel.ep": [1, 2], "sample.steps": [50, 7], "train.steps": [2500, 9000]}
    assert resolve(file=tmp_path / "config.yaml").train.steps == 9000


def test_another_model_data_or_optimizer_is_refused_with_all_differences(tmp_path):
    start(tmp_path)
    changes = [
        "model.depth=6",
        "data.condition_dropout=0.2",
        "diffusion.shift=3",
        "train.beta2=0.99",
        "train.global_batch=64",
    ]
    message = refusal(tmp_path, resolve("digits", overrides=[*FIXED, *changes, "train.lr=1e-4"]))
    for change in changes:
        assert change.split("=")[0] in message
    assert "the run has 4, not 6" in message
    assert "train.lr" not in message
    assert "--run-dir" in message


def test_force_lets_a_named_field_change_and_no_other(tmp_path):
    start(tmp_path)
    config = resolve("digits", overrides=[*FIXED, "data.condition_dropout=0.2", "train.seed=3"])
    with pytest.raises(RunDirectoryError) as error:
        RunDirectory.open(tmp_path, config, 1, force=["data.condition_dropout"])
    assert "train.seed" in str(error.value) and "data.condition_dropout" not in str(error.value)
    start(tmp_path, config, force=["data.condition_dropout", "train.seed"])
    assert resolve(file=tmp_path / "config.yaml") == config


def test_a_field_missing_in_the_stored_config_has_its_default(tmp_path):
    start(tmp_path)
    file = tmp_path / "config.yaml"
    kept = [line for line in file.read_text().splitlines() if "rcl_weight" not in line]
    file.write_text("\n".join(kept))
    start(tmp_path)
    file.write_text("\n".join(kept))
    assert "model.rcl_weight: the run has 1.0, not 0.5" in refusal(
        tmp_path, resolve("digits", overrides=[*FIXED, "model.rcl_weight=0.5"])
    )


def test_a_strangers_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose")
    assert "thesis.tex" in refusal(tmp_path)
    assert not (tmp_path / "run.lock").exists()


def test_a_start_that_was_killed_early_does_not_block_the_next(tmp_path):
    for _ in range(2):
        RunDirectory.open(tmp_path, CONFIG, 1).close()
        (tmp_path / "config.yaml").unlink()
    (tmp_path / "checkpoints" / "step-00000001").mkdir()
    assert "checkpoints" in refusal(tmp_path)


def test_a_checkpoint_of_unknown_data_can_be_trained_on_any(tmp_path):
    """As of a converted checkpoint, whose configuration says nothing about its data."""
    unknown = resolve("promoe_s", overrides=["data.flip=false"])
    start(tmp_path, unknown)
    chosen = resolve("promoe_s", overrides=["data.source=synthetic", "data.size=99", "data.flip=true"])
    manifest = {"config": to_dict(unknown)}
    Origin("run", None, chosen).check(tmp_path, manifest)
    assert "changes" in RunDirectory(tmp_path).state(chosen)
    start(tmp_path, chosen)
    assert "data.size: the run has 99, not 98" in refusal(tmp_path, resolve(file=write_config(tmp_path, 98)))
    other = resolve("promoe_s", overrides=["data.source=synthetic", "model.depth=10"])
    with pytest.raises(OtherRun, match="model.depth") as error:
        Origin("run", None, other).check(tmp_path, manifest)
    assert "data." not in str(error.value)


def write_config(folder: Path, size: int) -> Path:
    file = folder.with_suffix(".yaml")
    file.write_text((folder / "config.yaml").read_text().replace("size: 99", f"size: {size}"))
    return file


# ---- a start that takes no step

OTHER = {
    "model": ["model.depth=6"],
    "batch": ["train.global_batch=64"],
    "objective": ["diffusion.shift=3"],
    "layout": ["parallel.ep=2"],
}


@pytest.mark.parametrize("fault", ["before it is recorded", "after it is recorded"])
@pytest.mark.parametrize("other", OTHER)
def test_a_start_that_took_no_step_does_not_claim_the_folder(tmp_path, other, fault, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "run"
    run = RunDirectory.claim(folder, CONFIG, 2)
    if fault.startswith("after"):
        run.record()
        failed = run.identity()
    run.close()
    assert folder.exists() == fault.startswith("after")
    config = resolve("digits", overrides=[*FIXED, *OTHER[other]])
    state = RunDirectory(folder).state(config, progress="continues")
    with RunDirectory.open(folder, config, 2) as corrected:
        assert resolve(file=corrected.config_file) == config
        entries = json.loads(corrected.environment.read_text())
    if fault.startswith("before"):
        assert state == f"{folder}: a new run" and len(entries) == 1
    elif other == "layout":
        assert len(entries) == 2, "the same run, which goes on"
    else:
        key = OTHER[other][0].partition("=")[0]
        message = f"its run took no step and becomes a new run with the new config (different: {key})"
        assert message in state and message in caplog.text
        assert len(entries) == 1 and corrected.identity() != failed and entries[0]["changed"] == {}


@pytest.mark.parametrize(
    "left",
    [
        "metrics.jsonl",
        "samples/step-00000010.png",
        "checkpoints/step-00000010/manifest.json",
        "checkpoints/step-00000010.writing/part",
        "branches/main-after-5/branch.json",
    ],
)
def test_a_run_that_left_anything_of_a_step_is_still_refused(tmp_path, left):
    RunDirectory.open(tmp_path, CONFIG, 1).close()
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text("{}")
    assert "model.depth: the run has 4, not 6" in refusal(tmp_path, resolve("digits", overrides=["model.depth=6"]))


def test_a_config_that_no_start_has_recorded_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {depth: 6}\n")
    assert "model.depth: the run has 6, not 4" in refusal(tmp_path)


def test_a_claim_writes_nothing_but_its_lock(tmp_path):
    (tmp_path / "logs").mkdir()
    with RunDirectory.claim(tmp_path, CONFIG, 1):
        assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "run.lock"]
        assert "live run" in refusal(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]
    run = start(tmp_path / "run")
    before = files(run.folder)
    with RunDirectory.claim(run.folder, resolve("digits", overrides=[*FIXED, "train.lr=3e-3"]), 2):
        assert files(run.folder) == before
    assert files(run.folder) == before and run.lock_file.exists()


def test_a_folder_that_was_there_stays(tmp_path):
    RunDirectory.claim(tmp_path, CONFIG, 1).close()
    assert tmp_path.is_dir() and not any(tmp_path.iterdir())


def test_a_start_that_opened_a_removed_lock_takes_the_new_one(tmp_path, monkeypatch):
    """The first start fails between the second one's opening and locking of run.lock."""
    folder, taken = tmp_path / "run", []
    first = RunDirectory.claim(folder, CONFIG, 1)
    take = RunDirectory._take_lock

    def slowly(run: RunDirectory, only_read: bool = False) -> None:
        if not taken:
            stale = run.lock_file.open("r+")
            first.close()
            fcntl.flock(stale, fcntl.LOCK_EX)
            run._lock = stale
        else:
            take(run, only_read)
        taken.append(run)

    monkeypatch.setattr(RunDirectory, "_take_lock", slowly)
    with RunDirectory.claim(folder, CONFIG, 1):
        assert len(taken) == 2
        monkeypatch.setattr(RunDirectory, "_take_lock", take)
        assert "live run" in refusal(folder)


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_path_that_can_be_no_folder_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="--run-dir"):
        RunDirectory.open(tmp_path / name, CONFIG, 1)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    "name, content", [("config.yaml", "model: [1"), ("config.yaml", "text"), ("environment.json", "[{")]
)
def test_damaged_files_are_named(tmp_path, name, content):
    start(tmp_path)
    (tmp_path / name).write_text(content)
    assert f"{tmp_path / name}: is damaged" in refusal(tmp_path)


def test_one_live_run_owns_the_folder_and_a_dead_one_does_not(tmp_path):
    code = (
        "import sys, time; from megapromoe.config.resolve import resolve;"
        "from megapromoe.checkpoint.run_directory import RunDirectory;"
        "run = RunDirectory.open(sys.argv[1], resolve('digits'), 1); print('open', flush=True);"
        "time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert owner.stdout.readline() == b"open\n"
        assert f"live run (pid {owner.pid} on " in refusal(tmp_path)
    finally:
        owner.kill()
        owner.communicate()
    start(tmp_path)


def test_text_of_a_lock_that_is_none_is_quoted_as_well_as_can_be(tmp_path):
    run = RunDirectory.open(tmp_path, CONFIG, 1)
    run.lock_file.write_bytes(b"pid \xff\x00 on host")
    assert "in use by a live run (pid \ufffd\x00 on host)" in refusal(tmp_path)
    run.close()
    start(tmp_path)


def test_close_frees_the_folder_in_the_same_process(tmp_path):
    run = RunDirectory.open(tmp_path, CONFIG, 1)
    refusal(tmp_path)
    run.close()
    run.close()
    start(tmp_path)


def test_a_refused_start_frees_the_lock_it_took(tmp_path):
    start(tmp_path)
    refusal(tmp_path, resolve("digits", overrides=[*FIXED, "model.depth=6"]))
    start(tmp_path)


def test_every_run_has_an_identity_of_its_own_which_stays(tmp_path):
    identities = [start(tmp_path / name).identity() for name in "abc"]  # within a second, by the same process
    assert len(set(identities)) == 3
    for name, identity in zip("abc", identities, strict=True):
        RunDirectory(tmp_path / name).close()
        assert RunDirectory(tmp_path / name).identity() == identity
    entries = json.loads((tmp_path / "a" / "environment.json").read_text())
    del entries[0]["run"]  # as an earlier version wrote it
    (tmp_path / "a" / "environment.json").write_text(json.dumps(entries))
    assert len(RunDirectory(tmp_path / "a").identity()) == 12


def test_state_describes_what_a_start_would_do_and_changes_nothing(tmp_path):
    folder = tmp_path / "run"
    assert "new run" in RunDirectory(folder).state(CONFIG)
    assert not folder.exists()
    run = start(folder)
    before = files(folder), run.lock_file.read_text()
    assert "no checkpoint yet" in run.state(CONFIG, progress=progress(run))
    assert (files(folder), run.lock_file.read_text()) == before
    for step in ("step-00000500", "step-00001000", "step-00001500.writing"):
        (run.checkpoints / step).mkdir()
    for step in ("step-00000500", "step-00001000"):
        (run.checkpoints / step / "manifest.json").write_text("{}")
    copy = run.checkpoints / "step-00009999"  # no checkpoint: its manifest is of another step
    copy.mkdir()
    (copy / "manifest.json").write_text(seal({"step": 500, "updates": 500}))
    state = run.state(resolve("digits", overrides=[*FIXED, "train.lr=2e-3"]), progress=progress(run))
    assert "continues from step-00001000" in state
    assert "train.lr: 0.001 -> 0.002" in state


def test_git_state_is_of_the_checkout_that_tracks_the_file(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    tracked, stranger = tmp_path / "tracked.py", tmp_path / "stranger.py"
    tracked.write_text("")
    stranger.write_text("")
    assert git_state(tracked) is None
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-q", "-m", "first")
    assert git_state(tracked) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert git_state(stranger) is None
    tracked.write_text("changed")
    assert git_state(tracked)["dirty"]
