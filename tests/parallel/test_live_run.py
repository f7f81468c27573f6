"""Commands that read the latest checkpoint of a run that replaces its checkpoints meanwhile: they look again."""

import json
import logging
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.levels import full
from support.sampled_runs import ALONE, as_job

from megapromoe import cli
from megapromoe.checkpoint import latest
from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.latest import TRIES, read_latest
from megapromoe.checkpoint.manifest import CheckpointError, read_manifest, seal
from megapromoe.checkpoint.step_folders import steps_in
from megapromoe.evaluation import image_metrics
from megapromoe.evaluation.image_metrics import Evaluation
from megapromoe.sampling.generation import generate_images
from megapromoe.sampling.request import GenerationRequest
from megapromoe.sampling.run_model import CheckpointRemoved, load_model


@pytest.fixture
def live(run, tmp_path) -> Path:
    """A run with one checkpoint, of step 3."""
    return Path(shutil.copytree(run, tmp_path / "live"))


def replace_newest(folder: Path) -> None:
    """What a run with train.keep_last=1 does: the next checkpoint takes its name, then the one before is removed."""
    checkpoints = folder / "checkpoints"
    (old,) = steps_in(checkpoints)
    new = shutil.copytree(checkpoints / f"step-{old:08d}", checkpoints / f"step-{old + 1:08d}.writing")
    content = json.loads((new / "manifest.json").read_text())
    (new / "manifest.json").write_text(seal(content | {"step": old + 1}))
    new.rename(checkpoints / f"step-{old + 1:08d}")
    (checkpoints / f"step-{old:08d}" / "manifest.json").unlink()
    shutil.rmtree(checkpoints / f"step-{old:08d}")


def replaced_while_read(folder: Path, times: int, place: str = "verify") -> None:
    """Lets the first reads find their checkpoint replaced: before its manifest, its hashes, or its tensors are read."""
    real, calls = getattr(Checkpoint, place), []

    def read(self, *arguments):
        if len(calls) < times and (folder in self.folder.parents if place != "__init__" else True):
            calls.append(1)
            replace_newest(folder)
        return real(self, *arguments)

    setattr(Checkpoint, place, read)


@pytest.fixture
def replaced(live, monkeypatch):
    """`replaced_while_read` of this process, until the test ends."""

    def replaced_here(times: int, place: str = "verify") -> None:
        monkeypatch.setattr(Checkpoint, place, getattr(Checkpoint, place))
        replaced_while_read(live, times, place)

    return replaced_here


@pytest.mark.parametrize("place", ["__init__", "verify", "read_range"])
@pytest.mark.parametrize("times", [1, TRIES - 1])
def test_a_model_is_of_the_checkpoint_that_is_latest_then(place, times, live, replaced, caplog):
    replaced(times, place)
    assert load_model(live)[2] == 3 + times
    assert len([m for m in caplog.messages if "trying the latest checkpoint again" in m]) >= times


def test_looking_again_has_an_end(live, replaced):
    replaced(TRIES)
    with pytest.raises(CheckpointError, match=rf"{TRIES} times the newest checkpoint was removed.*train\.keep"):
        load_model(live)


def test_a_requested_step_is_never_replaced_by_another(live, replaced):
    replaced(1)
    with pytest.raises(CheckpointError, match="step-00000003"):
        load_model(live, step=3)


def test_a_damaged_latest_checkpoint_is_refused(live):
    file = live / "checkpoints" / "step-00000003" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="bytes changed"):
        load_model(live)


def test_the_same_step_saved_again_is_another_checkpoint(live):
    root, calls = live / "checkpoints", []

    def read(step: int) -> int:
        calls.append(step)
        if len(calls) == 1:
            again = shutil.copytree(root / "step-00000003", root / "again")
            (again / "manifest.json").write_text((again / "manifest.json").read_text())
            shutil.rmtree(root / "step-00000003")
            again.rename(root / "step-00000003")
            raise CheckpointError("a file was missing")
        return step

    assert read_latest(root, None, read) == 3 and calls == [3, 3]


def test_checkpoints_that_go_while_they_are_listed(live, monkeypatch):
    real, calls = latest.choose_checkpoint, []

    def choose(root):
        calls.append(1)
        if len(calls) == 1:
            raise FileNotFoundError(2, "No such file or directory", str(root))
        return real(root)

    monkeypatch.setattr(latest, "choose_checkpoint", choose)
    assert read_latest(live / "checkpoints", None, lambda step: step) == 3
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        read_latest(live, None, lambda step: step)


# ---- commands


@pytest.mark.parametrize("name", ["grid.png", full("images.npz"), full("folder")])
def test_images_are_of_the_latest_checkpoint(name, live, replaced, tmp_path):
    preview = name.endswith("png")
    request = GenerationRequest(live, tmp_path / name, 1 if preview else 12, preview=preview)
    replaced(2)
    assert generate_images(request, ALONE) == [tmp_path / name]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["live", name])
    if name.endswith("npz"):
        with np.load(tmp_path / name) as stored:
            assert json.loads(str(stored["request"]))["step"] == 5


def test_a_set_that_was_begun_with_a_checkpoint_is_not_mixed_with_another(live, replaced, tmp_path):
    request = GenerationRequest(live, tmp_path / "set", 12)
    parts = tmp_path / "set.parts"
    with pytest.raises(Exception, match="no such luck"):
        from unittest import mock

        from megapromoe.sampling.image_set_writer import ImageSetWriter

        with mock.patch.object(ImageSetWriter, "finish", side_effect=ValueError("no such luck")):
            generate_images(request, ALONE)
    next(parts.glob("*.png")).unlink()
    left = sorted(p.name for p in parts.iterdir())
    replaced(1)
    with pytest.raises(Exception, match="was removed while it was read; .* use another --out"):
        generate_images(request, ALONE)
    assert sorted(p.name for p in parts.iterdir()) == left


def sampled_beside_a_live_run(request: GenerationRequest, launch) -> list[Path]:
    """The run replaces its checkpoint while rank 1 reads it, twice."""
    if launch.rank == 1:
        replaced_while_read(request.run, 2)
    return generate_images(request, launch)


def test_all_ranks_choose_the_same_latest_checkpoint(live, tmp_path, fault_table):
    request = GenerationRequest(live, tmp_path / "images.npz", 12)
    assert as_job(2, tmp_path, sampled_beside_a_live_run, request) == [[tmp_path / "images.npz"]] * 2
    with np.load(tmp_path / "images.npz") as stored:
        assert json.loads(str(stored["request"]))["step"] == 5 and stored["arr_0"].shape[0] == 12
    what = "all ranks together read the latest checkpoint again"
    fault_table.append(("sample, while the run removes the checkpoint that it reads", what, "nothing"))


@pytest.mark.full
def test_an_evaluation_is_of_the_latest_checkpoint(live, replaced, tmp_path, trained):
    request = GenerationRequest(live, tmp_path / "drawn", 130)
    replaced(1)
    (record,) = image_metrics.evaluate(Evaluation(request, None, "data"), ALONE)
    assert record["step"] == 4 and len(list((tmp_path / "drawn").iterdir())) == 1


@pytest.mark.full
def test_steps_that_a_run_does_not_keep_are_left_out(live, tmp_path, trained, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    request = GenerationRequest(live, tmp_path / "drawn", 130)
    monkeypatch.setattr(image_metrics, "steps_in", lambda root: [2, 3])
    (record,) = image_metrics.evaluate(Evaluation(request, None, "data", every_step=True), ALONE)
    assert record["step"] == 3 and "this step is skipped" in caplog.text
    monkeypatch.setattr(image_metrics, "steps_in", lambda root: [1, 2])
    with pytest.raises(CheckpointRemoved):
        image_metrics.evaluate(Evaluation(request, None, "data", every_step=True), ALONE)
    with pytest.raises(CheckpointRemoved):
        image_metrics.evaluate(Evaluation(replace(request, step=2), None, "data"), ALONE)


@pytest.mark.parametrize("place", ["verify", "logical"])
def test_a_conversion_is_of_the_latest_checkpoint(place, live, replaced, tmp_path):
    replaced(1, place)
    out, config = tmp_path / "model.safetensors", ["--config", str(live / "config.yaml")]
    assert cli.main(["convert", str(live), str(out), "--to", "safetensors", *config]) == 0
    assert cli.main(["inspect", str(out), str(live), *config]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["live", "model.safetensors"]


@pytest.mark.parametrize("command", ["inspect", "upcycle"])
def test_other_readers_also_try_the_new_latest_checkpoint(command, live, replaced, tmp_path, capsys):
    replaced(2)
    words = {"inspect": [str(live), "--json"], "upcycle": [str(live), str(tmp_path / "new"), "model.num_experts=6"]}
    assert cli.main([command, *words[command], "--config", str(live / "config.yaml")]) == 0
    if command == "inspect":
        assert json.loads(capsys.readouterr().out)["step"] == 5


def test_readers_beside_a_thread_that_replaces_checkpoints(live):
    """As a live run does, at moments of its own; two checkpoints are there at a time for a while."""
    stop, problems = threading.Event(), []

    def live_run() -> None:
        try:
            while not stop.is_set():
                replace_newest(live)
                time.sleep(0.05)
        except Exception as problem:
            problems.append(problem)

    thread = threading.Thread(target=live_run)
    thread.start()
    try:
        root = live / "checkpoints"
        read = [
            read_latest(root, None, lambda step: read_manifest(root / f"step-{step:08d}")["step"]) for _ in range(50)
        ]
    finally:
        stop.set()
        thread.join()
    assert not problems and read == sorted(read)
