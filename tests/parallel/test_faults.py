"""What spoils a run's files or saves: nothing worse than the steps since the last checkpoint is lost.

`programs/test_killed_jobs.py` kills and stops whole jobs.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.fuzz import warnings_of
from support.levels import full
from support.processes import WorkerFailed, run
from support.training_runs import QUICK, losses, state, train
from support.trajectory import small

import megapromoe.checkpoint.manager as checkpoint_module
from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.step_folders import choose_checkpoint, folder_of, steps_in
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.parallelize import build


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A run of six steps on two ranks, with checkpoints of steps 3 and 6, for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(2, train, str(folder), "parallel.ep=2")
    return folder


@pytest.fixture
def copied(sound, tmp_path) -> Path:
    """A copy of that run."""
    return shutil.copytree(sound, tmp_path / "run")


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """A run of three steps on two ranks."""
    folder = tmp_path_factory.mktemp("short") / "run"
    run(2, train, str(folder), "parallel.ep=2", "train.steps=3")
    return folder


# ---- saves that are cut short


def killed_in(place: str, folder: str, rank: int) -> None:
    """Trains; the rank's process ends without a word at `place` of the save of step 6."""
    real_write, real_commit = checkpoint_module.write_rank, checkpoint_module.commit

    def write_rank(staging, number, tensors, parts, step):
        if step == 6 and torch.distributed.get_rank() == rank and place == "write":
            (staging / f"rank-{number:05d}.safetensors").write_bytes(b"half a file")
            os._exit(9)
        return real_write(staging, number, tensors, parts, step)

    def commit(*arguments):
        if arguments[3]["step"] == 6 and place == "commit":
            os._exit(9)
        return real_commit(*arguments)

    checkpoint_module.write_rank, checkpoint_module.commit = write_rank, commit
    train(folder, "parallel.ep=2")


@pytest.mark.parametrize("place, rank", [("write", 1), full("write", 0), full("commit", 0)])
def test_killed_during_a_save(place, rank, sound, tmp_path, fault_table):
    cut = tmp_path / "cut"
    with pytest.raises(WorkerFailed, match="died without a word"):
        run(2, killed_in, place, str(cut), rank)
    assert steps_in(cut / "checkpoints") == [3]
    assert (cut / "checkpoints" / "step-00000006.writing").exists()
    run(2, train, str(cut), "parallel.ep=2")
    assert steps_in(cut / "checkpoints") == [3, 6]
    assert not list((cut / "checkpoints").glob("*.writing"))
    expected, actual = state(sound, 6), state(cut, 6)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    when = {"write": f"rank {rank} killed while it writes its file", "commit": "killed between shards and manifest"}[
        place
    ]
    fault_table.append(
        (when, "the previous checkpoint is used, identical state afterwards", "3 steps, one save interval")
    )


# ---- damage


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.full
def test_the_newest_whole_checkpoint_is_used(copied, tmp_path, fault_table):
    straight, spoilt = tmp_path / "straight", copied
    run(2, train, str(straight), "parallel.ep=2", "train.steps=9")
    spoil(folder_of(spoilt / "checkpoints", 6) / "rank-00001.safetensors")
    run(2, train, str(spoilt), "parallel.ep=2", "train.steps=9")
    assert losses(spoilt) == losses(straight)
    Checkpoint(folder_of(spoilt / "checkpoints", 6)).verify()  # made anew on the way
    fault_table.append(
        (
            "a flipped bit in the newest checkpoint",
            "the file is named, the previous checkpoint is used, identical losses",
            "3 steps",
        )
    )

    for step in (3, 6, 9):
        spoil(folder_of(spoilt / "checkpoints", step) / "rank-00000.safetensors")
    with pytest.raises(WorkerFailed, match=r"none of the checkpoints \[3, 6, 9\] is whole"):
        run(2, train, str(spoilt), "parallel.ep=2", "train.steps=12")


def test_step_folders_without_a_complete_checkpoint_are_named_and_no_new_run_starts(
    copied, tmp_path, caplog, fault_table
):
    checkpoints = copied / "checkpoints"
    old, new = (folder_of(checkpoints, step) for step in (3, 6))
    lines = losses(copied)
    (new / "manifest.json").rename(tmp_path / "kept.json")
    (messages,) = run(1, resumed_with_warnings, str(checkpoints))
    assert messages[0] == 3 and f"{new}: has no manifest.json" in messages[1]
    assert choose_checkpoint(checkpoints) == old and f"{new}: has no manifest.json" in caplog.text  # by `sample`
    (old / "manifest.json").unlink()
    with pytest.raises(WorkerFailed, match="holds step-00000003, step-00000006, none a whole checkpoint of its step"):
        run(2, train, str(copied), "parallel.ep=2")
    assert losses(copied) == lines and old.is_dir() and new.is_dir()
    fault_table.append(
        ("the manifests of all checkpoints are lost", "named and refused; nothing is started or removed", "nothing")
    )


def resumed_with_warnings(root: str):
    """The step that a run would go on from, and what was said on the way."""
    with warnings_of() as messages:
        config = small(*QUICK)
        mesh = make_mesh(1, 1, False, 60)
        engine = Engine(build(config, mesh), config, mesh)
        resumed = checkpoint_module.resume(Path(root), engine, EMA(engine, [0.5]))
    return resumed.checkpoint.manifest["step"], "\n".join(messages)


def from_step(folder: str, step: int) -> None:
    import megapromoe.training.loop as loop

    real = loop.train
    loop.train = lambda config, where, launch: real(config, where, launch, step)
    train(folder, "parallel.ep=2", "train.steps=9")


@pytest.mark.full
def test_a_requested_step_is_used_or_refused(copied):
    before = losses(copied)
    run(2, from_step, str(copied), 3)
    assert losses(copied)[:6] == before and len(losses(copied)) == 9
    with pytest.raises(WorkerFailed, match=r"no complete checkpoint of step 5; there are 3, 6, 9"):
        run(2, from_step, str(copied), 5)
    spoil(folder_of(copied / "checkpoints", 6) / "rank-00001.safetensors")
    with pytest.raises(WorkerFailed, match="rank-00001.safetensors: bytes changed"):
        run(2, from_step, str(copied), 6)


def test_a_shard_of_another_step_is_named(copied, fault_table):
    old, new = (folder_of(copied / "checkpoints", s) / "rank-00001.safetensors" for s in (3, 6))
    new.write_bytes(old.read_bytes())
    with pytest.raises(WorkerFailed, match="rank-00001.safetensors: is of step 3, not 6"):
        run(2, from_step, str(copied), 6)
    fault_table.append(("a shard of another step, --step", "the file and its step are named, refused", "nothing"))


# ---- saves that fail


def without_room(folder: str, steps: int, room: int) -> None:
    """Trains on a disk that has `room` bytes from the second save on."""
    real = checkpoint_module.shutil.disk_usage

    def disk_usage(path):
        full = steps_in(Path(folder) / "checkpoints")
        return real(path)._replace(free=room) if full else real(path)

    checkpoint_module.shutil.disk_usage = disk_usage
    train(folder, "parallel.ep=2", f"train.steps={steps}", "train.save_every=1", "train.max_failed_saves=3")


@pytest.mark.full
def test_a_full_disk_is_reported_and_training_continues_up_to_a_limit(tmp_path, fault_table):
    with pytest.raises(WorkerFailed, match=r"3 checkpoints in a row .* no room, need [\d,]+ bytes, have 1,000"):
        run(2, without_room, str(tmp_path), 9, 1000)
    assert steps_in(tmp_path / "checkpoints") == [1]
    assert len(losses(tmp_path)) == 4, "training went on over two failed saves"
    Checkpoint(folder_of(tmp_path / "checkpoints", 1)).verify()
    fault_table.append(
        (
            "disk full",
            "the bytes needed and free are named, training continues, ends after train.max_failed_saves",
            "the saves",
        )
    )


def unwritable(folder: str, rank: int) -> None:
    """One rank's files cannot be written from step 4 on, once."""
    real = checkpoint_module.write_rank

    def write_rank(staging, number, tensors, parts, step):
        if step == 2 and number == rank:
            return real(staging / "gone", number, tensors, parts, step) or real(
                staging, number, {"x": "no tensor"}, [], step
            )
        return real(staging, number, tensors, parts, step)

    checkpoint_module.write_rank = write_rank
    checkpoint_module.CheckpointManager.__init__ = _impatient(checkpoint_module.CheckpointManager.__init__)
    train(folder, "parallel.ep=2", "train.steps=4", "train.save_every=1")


def _impatient(real):
    def init(self, root, engine, ema, commit_timeout):
        real(self, root, engine, ema, 3.0)

    return init


@pytest.mark.parametrize("rank", [full(0), 1])
def test_a_save_that_one_rank_cannot_write_leaves_the_others_valid(rank, tmp_path, fault_table):
    run(2, unwritable, str(tmp_path), rank)
    assert steps_in(tmp_path / "checkpoints") == [1, 3, 4]
    for step in (1, 3, 4):
        Checkpoint(folder_of(tmp_path / "checkpoints", step)).verify()
    assert len(losses(tmp_path)) == 4
    fault_table.append(
        (f"rank {rank} cannot write its file", "named, training continues, the next save is complete", "that save")
    )


def failing(folder: str, place: str, kind: type[BaseException]) -> None:
    """From the second save on, something in the manager's thread raises what nobody expects there."""

    def raises(name: str):
        real = getattr(checkpoint_module, name)

        def function(*arguments):
            if steps_in(Path(folder) / "checkpoints"):
                raise kind("made to fail")
            return real(*arguments)

        setattr(checkpoint_module, name, function)

    raises(place)
    checkpoint_module.CheckpointManager.__init__ = _impatient(checkpoint_module.CheckpointManager.__init__)
    train(folder, "parallel.ep=2", "train.save_every=1", "train.max_failed_saves=2")


@pytest.mark.parametrize(
    "place, kind", [("commit", TypeError), full("commit", SystemExit), full("write_rank", MemoryError)]
)
def test_a_save_that_fails_in_any_way_is_a_failed_save(place, kind, tmp_path, fault_table):
    with pytest.raises(WorkerFailed, match="2 checkpoints in a row were not saved"):
        run(2, failing, str(tmp_path), place, kind)
    assert steps_in(tmp_path / "checkpoints") == [1] and len(losses(tmp_path)) == 4
    what = f"{kind.__name__} in the thread that saves"
    fault_table.append((what, "named, training continues, ends after train.max_failed_saves", "the saves"))


def not_removable(folder: str) -> None:
    import megapromoe.checkpoint.retention as retention

    def rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    retention.shutil.rmtree = rmtree
    train(folder, "parallel.ep=2", "train.save_every=1", "train.keep_last=1")


@pytest.mark.full
def test_an_old_checkpoint_that_cannot_be_removed_is_no_failed_save(tmp_path):
    run(2, not_removable, str(tmp_path))
    assert steps_in(tmp_path / "checkpoints")[-1] == 6


def test_a_save_stalls_training_for_a_copy_only(sound):
    lines = [json.loads(line) for line in (sound / "metrics.jsonl").read_text().splitlines()]
    (saved,) = [line for line in lines if "save_stall_ms" in line]
    manifest = Checkpoint(folder_of(sound / "checkpoints", 3)).manifest
    written = sum(entry["size"] for entry in manifest["ranks"])
    assert 0.9 * written < saved["save_bytes"] < written
    assert manifest["run"] == Checkpoint(folder_of(sound / "checkpoints", 6)).manifest["run"]


def with_a_spike(folder: str, factor: float) -> None:
    """The gradient of step 25 is `factor` times too large."""
    from megapromoe.engine.engine import Engine

    real, calls = Engine.micro_step, []

    def micro_step(self, *inputs, loss):
        calls.append(1)
        scale = factor if len(calls) == 25 else 1.0

        def scaled(prediction, auxiliary):
            total, report = loss(prediction, auxiliary)
            return total * scale, report

        return real(self, *inputs, loss=scaled)

    Engine.micro_step = micro_step
    train(folder, "parallel.ep=2", "train.steps=30", "train.spike_factor=20")


def test_a_loss_spike_is_skipped(tmp_path, fault_table):
    run(2, with_a_spike, str(tmp_path), 1e6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    norms = [line["gradient_norm"] for line in lines]
    assert norms[24] > 1e4 * max(norms[20:24]), "the spike is in the log"
    manifest = Checkpoint(folder_of(tmp_path / "checkpoints", 30)).manifest
    assert manifest["step"] == 30 and manifest["updates"] == 29
    assert max(norms[25:]) < 10 * max(norms[15:24]), "it did not hurt"
    fault_table.append(
        ("a gradient a million times too large, train.spike_factor 20", "no rank updates, samples logged", "that step")
    )


def test_some_checkpoints_are_kept_for_good(tmp_path):
    run(1, train, str(tmp_path), "train.save_every=1", "train.keep_last=2", "train.keep_every=3", "train.steps=8")
    assert steps_in(tmp_path / "checkpoints") == [3, 5, 6, 7, 8]


# ---- what may not change unasked


def with_allowed(folder: str, allow: tuple[str, ...], *overrides: str) -> None:
    import megapromoe.training.loop as loop

    real = loop.train
    loop.train = lambda config, where, launch: real(config, where, launch, None, allow)
    train(folder, "parallel.ep=2", *overrides)


@pytest.mark.parametrize(
    "change", ["data.seed=7", *map(full, ("train.seed=7", "data.size=32", "train.global_batch=8"))]
)
def test_another_stream_is_refused_without_a_flag(change, short, tmp_path, fault_table):
    folder = shutil.copytree(short, tmp_path / "run")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "run.lock"}
    key = change.partition("=")[0]
    with pytest.raises(WorkerFailed, match=key):
        run(2, train, str(folder), "parallel.ep=2", change)
    assert {p: p.read_bytes() for p in before} == before
    run(2, with_allowed, str(folder), (key,), change)
    assert len(losses(folder)) == 6
    fault_table.append((f"{key} changed", "refused with the list of differences; continues with --allow", "nothing"))


def read_only(folder: str) -> None:
    """A file system that turns read-only after the first save."""
    real = checkpoint_module.shutil.disk_usage

    def disk_usage(path):
        if steps_in(Path(folder) / "checkpoints"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path)

    checkpoint_module.shutil.disk_usage = disk_usage
    train(folder, "parallel.ep=2", "train.save_every=1")


def test_a_read_only_folder_is_named(tmp_path, fault_table):
    with pytest.raises(WorkerFailed, match=r"3 checkpoints in a row .*checkpoints: Read-only file system"):
        run(2, read_only, str(tmp_path))
    assert steps_in(tmp_path / "checkpoints") == [1]
    fault_table.append(("a file system turns read-only", "named, ends after train.max_failed_saves", "the saves"))
