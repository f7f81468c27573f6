"""Snapshots of averages beside a real run, saves by the clock, averages that warm up: over ranks and resumes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.levels import full
from support.processes import run
from support.training_runs import QUICK, same_state, train
from support.trajectory import small

from megapromoe.checkpoint import manager
from megapromoe.checkpoint.disk_space import disk
from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.manifest import seal
from megapromoe.checkpoint.step_folders import folder_of, snapshot_of, snapshot_steps, steps_in
from megapromoe.diffusion.image_grid import generate
from megapromoe.distributed.mesh import make_mesh
from megapromoe.sampling.run_model import load_model
from megapromoe.training import loop

WARMING = ("train.snapshot_every=2", "train.ema_warmup=true", "train.ema_decay=0.999", "parallel.ep=2")


def averages(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a snapshot or checkpoint by name."""
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    return {name: checkpoint.logical("ema", name) for name in checkpoint.shapes}


def equal(expected: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return expected.keys() == other.keys() and all(torch.equal(expected[name], other[name]) for name in expected)


def share(folder: Path, step: int) -> float:
    return Checkpoint(folder_of(folder / "checkpoints", step)).manifest["ema_initial_share"]


def images(folder: str, step: int, tp: int, ep: int) -> torch.Tensor:
    """Images of a snapshot's averages by a model over all ranks."""
    mesh = make_mesh(tp, ep, timeout=60)
    model, config, _ = load_model(Path(folder), step, overrides=["sample.steps=3"], mesh=mesh)
    return generate(model, config, [1, 2, 3], [0, 1, 2])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps by two ranks with experts over both: checkpoints of steps 3 and 6, snapshots of 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("snapshots") / "straight"
    run(2, train, str(folder), *WARMING)
    return folder


def test_a_snapshot_holds_the_averages_of_its_step(straight):
    assert snapshot_steps(straight / "snapshots") == [2, 4, 6] and steps_in(straight / "checkpoints") == [3, 6]
    snapshot, checkpoint = snapshot_of(straight / "snapshots", 6), folder_of(straight / "checkpoints", 6)
    assert equal(averages(snapshot), averages(checkpoint))
    assert not equal(averages(snapshot_of(straight / "snapshots", 4)), averages(checkpoint))
    manifest = Checkpoint(snapshot).manifest
    assert manifest["kinds"] == ["ema"] and manifest["branch"] == "main" and manifest["run"]
    files = [sum(p.stat().st_size for p in folder.glob("*.safetensors")) for folder in (snapshot, checkpoint)]
    assert files[0] < 0.4 * files[1]


def tensor_bytes(folder: Path) -> int:
    """Bytes of a folder's files without the headers of safetensors."""
    return sum(
        len(data) - 8 - int.from_bytes(data[:8], "little")
        for data in (file.read_bytes() for file in folder.glob("*.safetensors"))
    )


@pytest.mark.parametrize("settings", [(), full(("model.num_experts=3", "model.router=kmeans")),
                                      full(("model.router=diffmoe",))])  # fmt: skip
def test_planned_sizes_are_those_of_the_files(straight, tmp_path, settings):
    """Of experts over two ranks, also where a spare slot is saved, and with buffers."""
    folder = straight
    if settings:
        folder = tmp_path / "run"
        run(2, train, str(folder), *WARMING, *settings, "train.steps=2")
    planned = disk(small(*QUICK, *WARMING, *settings))
    step = 2 if settings else 6
    assert tensor_bytes(folder_of(folder / "checkpoints", step)) == planned.checkpoint
    assert tensor_bytes(snapshot_of(folder / "snapshots", 2)) == planned.snapshot
    if not settings:
        assert (planned.checkpoints, planned.snapshots) == (2, 3)
        assert planned.peak == 2 * planned.checkpoint + 3 * planned.snapshot


@pytest.mark.full
def test_a_killed_run_continues_exactly_and_writes_its_snapshots_again(straight, tmp_path):
    """The newest checkpoint is of step 3, and snapshots of the lost steps are there."""
    killed = shutil.copytree(straight, tmp_path / "killed")
    shutil.rmtree(folder_of(killed / "checkpoints", 6))
    spoilt = snapshot_of(killed / "snapshots", 4) / "rank-00001.safetensors"
    spoilt.write_bytes(b"of another life")
    run(2, train, str(killed), *WARMING)
    for step in (2, 4, 6):
        places = (snapshot_of(folder / "snapshots", step) for folder in (straight, killed))
        assert equal(*map(averages, places)), step
    assert same_state(killed, straight, 6)
    assert share(killed, 6) == share(straight, 6) == pytest.approx(2 / 11 * 3 / 12 * 4 / 13 * 5 / 14 * 6 / 15 * 7 / 16)
    assert not list(killed.glob("branches/*")) and not list(killed.glob("snapshots/*.replaced"))


@pytest.mark.parametrize("world, tp, ep", [full(1, 1, 1), (2, 2, 1)])
def test_a_snapshot_is_sampled_from_at_another_layout(straight, world, tp, ep):
    expected = run(2, images, str(straight), 4, 1, 2)[0]
    sampled = run(world, images, str(straight), 4, tp, ep)[0]
    assert torch.allclose(sampled, expected, atol=1e-4) and expected.std() > 0.1


@pytest.mark.parametrize("world, overrides", [full(4, ("parallel.tp=2", "parallel.ep=2", "train.deepspeed=fp32_zero3")),
                                              (1, ("parallel.ep=1", "train.deepspeed=fp32_zero0"))])  # fmt: skip
def test_averages_that_warm_up_are_equal_at_every_layout(straight, tmp_path, world, overrides):
    run(world, train, str(tmp_path / "other"), *WARMING, *overrides)
    actual, expected = (averages(snapshot_of(f / "snapshots", 6)) for f in (tmp_path / "other", straight))
    total_norm = torch.stack([tensor.norm() for tensor in expected.values()]).norm()
    for name, tensor in expected.items():
        assert (actual[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-6 * total_norm, name


def snapshots_unwritable(folder: str) -> None:
    """No rank's part of a snapshot can be written."""
    real = manager.write_rank

    def write_rank(staging, number, tensors, parts, step):
        folder = staging / "gone" if "snapshots" in staging.parts else staging
        return real(folder, number, tensors, parts, step)

    manager.write_rank = write_rank
    real_init = manager.CheckpointManager.__init__
    manager.CheckpointManager.__init__ = lambda self, root, engine, ema, commit_timeout: real_init(
        self, root, engine, ema, 1.0
    )
    train(folder, *WARMING, "train.snapshot_every=3", "train.steps=5", "train.save_every=3")


@pytest.mark.full
def test_a_snapshot_that_cannot_be_written_costs_no_checkpoint(tmp_path):
    run(2, snapshots_unwritable, str(tmp_path))
    assert steps_in(tmp_path / "checkpoints") == [3, 5] and not snapshot_steps(tmp_path / "snapshots")
    Checkpoint(folder_of(tmp_path / "checkpoints", 3)).verify()


def test_a_start_that_goes_back_moves_snapshots_of_later_steps(straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "run")
    run(2, go_back, str(folder), 3)
    (branch,) = (folder / "branches").iterdir()
    assert snapshot_steps(branch / "snapshots") == [4, 6] and snapshot_steps(folder / "snapshots") == [2, 4]
    assert Checkpoint(snapshot_of(folder / "snapshots", 4)).manifest["branch"] == "step-3"
    assert not equal(*(averages(snapshot_of(f / "snapshots", 4)) for f in (branch, folder)))


def go_back(folder: str, step: int) -> None:
    """Two steps from a checkpoint, at another learning rate."""
    real = loop.train
    loop.train = lambda config, where, launch: real(config, where, launch, from_step=step)
    train(folder, *WARMING, "train.steps=5", "train.lr=0.003")


@pytest.mark.full
def test_a_checkpoint_of_a_version_without_warm_up_resumes_as_before(tmp_path):
    plain = ("train.ema_decay=0.9", "parallel.ep=2")
    run(2, train, str(tmp_path / "before"), *plain)
    old = shutil.copytree(tmp_path / "before", tmp_path / "old")
    shutil.rmtree(folder_of(old / "checkpoints", 6))
    file = folder_of(old / "checkpoints", 3) / "manifest.json"
    content = json.loads(file.read_text())
    del content["ema_warmup"], content["ema_initial_share"], content["config"]["train"]["ema_warmup"]
    file.write_text(seal(content))
    run(2, train, str(old), *plain, "train.ema_warmup=true")
    assert same_state(old, tmp_path / "before", 6)
    assert share(old, 6) == pytest.approx(0.9**6) == share(tmp_path / "before", 6)
    assert Checkpoint(folder_of(old / "checkpoints", 6)).manifest["ema_warmup"] is False


def test_a_save_by_the_clock_is_at_the_same_step_on_every_rank(tmp_path):
    """A clock that has always run out: a request is seen one step later, and repeated until the save."""
    late = ("train.save_every=0", "train.save_minutes=1e-9", "train.log_every=50", "parallel.ep=2")
    run(2, train, str(tmp_path), *late)
    assert steps_in(tmp_path / "checkpoints") == [2, 4, 6]
    for step in (2, 4, 6):
        Checkpoint(folder_of(tmp_path / "checkpoints", step)).verify()


def pictures(folder: str) -> list[str]:
    """Warnings about pictures of a run that draws one, on this rank."""
    warnings = []
    loop.logger.warning = lambda text, *values: warnings.append(text % values)
    few = ("train.sample_every=6", "model.in_channels=3", "sample.steps=2", "train.ema_decay=0.999")
    train(folder, "parallel.ep=2", *few)
    return warnings


@pytest.mark.full
def test_a_picture_that_is_drawn_with_initial_weights_is_named(tmp_path):
    warnings = run(2, pictures, str(tmp_path))
    line = "picture of step 6: drawn with the averaged weights, 99.4% of them still the initial weights"
    assert warnings == [[line], []]
