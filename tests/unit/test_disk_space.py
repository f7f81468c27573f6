"""What a run writes: how many checkpoints are on disk at once, saves by the clock, and the lines of `plan`."""

import math

import numpy as np
import pytest

from megapromoe.checkpoint.disk_space import buffer_bytes, disk, most_at_once, picture_bytes, saved_bytes
from megapromoe.checkpoint.retention import removable
from megapromoe.checkpoint.step_folders import StepFolder
from megapromoe.cli import main
from megapromoe.config.model_options import BIASED_ROUTERS, ROUTERS
from megapromoe.config.resolve import resolve
from megapromoe.conversion.state import model_shapes
from megapromoe.diffusion.image_grid import grid, picture_scale


def simulated(steps: int, between: int, keep: int, keep_every: int, needed: int) -> int:
    """Checkpoints at once, by the rules of retention applied save by save."""
    folders, most = [], 0
    for step in dict.fromkeys([*range(between, steps + 1, between), steps]):
        folders.append(StepFolder(None, step, step))
        most = max(most, len(folders))
        removed = removable(folders, step, keep, keep_every, needed)
        folders = [folder for folder in folders if folder not in removed]
    return most


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 31, 60])
@pytest.mark.parametrize("between", [1, 2, 3, 5, 7, 40])
def test_as_many_checkpoints_are_on_disk_as_retention_leaves(steps, between):
    between = min(between, steps)
    for keep in (1, 2, 3, 9):
        for keep_every in (0, 1, 2, 4, 10, 31):
            for needed in (1, 3, 8):
                settings = (steps, between, keep, keep_every, needed)
                assert most_at_once(*settings) == simulated(*settings), settings


def test_a_long_run_is_counted_without_all_of_its_saves():
    settings = (5000, 1, 2, 100, 3)
    assert most_at_once(*settings) == simulated(*settings)


def test_a_run_of_the_published_size():
    usage = disk(resolve("promoe_xl", overrides=["train.snapshot_every=10000", "train.sample_every=50000"]))
    assert usage.checkpoint == 1_567_438_880 * 16 and usage.snapshot == 1_567_438_880 * 4
    assert (usage.checkpoints, usage.snapshots, usage.pictures, usage.most_checkpoints) == (100, 50, 10, 3)
    assert usage.peak == 3 * usage.checkpoint + 50 * usage.snapshot + 10 * usage.picture and usage.exact


def test_experts_that_do_not_divide_are_saved_with_their_spare_slots():
    even, spare = (disk(resolve("promoe_s", overrides=[f"parallel.ep={ep}"])).snapshot for ep in (4, 8))
    expert = 384 * 768 * 2 + 768 + 384
    assert spare - even == 4 * 6 * 4 * expert, "4 more slots in 6 layers"


@pytest.mark.parametrize("preset", ["digits", "fashion", "promoe_s"])
def test_pictures_are_as_large_as_the_grid_that_is_drawn(preset):
    config = resolve(preset)
    count, side = 4 * min(config.model.num_classes, 10), config.model.input_size
    picture = grid(np.zeros((count, 3, side, side), dtype=np.float32), 8, picture_scale(side))
    assert picture_bytes(config) == picture.nbytes


def test_what_is_saved_already_needs_no_room(tmp_path):
    for name in ("checkpoints/step-00000003", "snapshots/average-00000002", "snapshots/average-00000004.writing"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"x" * 100)
    assert saved_bytes(tmp_path) == 300 and saved_bytes(tmp_path / "new") == 0


def test_the_state_of_every_router_is_counted():
    """Buffers are few bytes, but the check of free space is to be exact."""
    cases = [(router,) for router in ROUTERS] + [(router, "model.balance_bias=0.01") for router in BIASED_ROUTERS]
    for router, *more in cases:
        config = resolve("digits", overrides=[f"model.router={router}", *more])
        shapes = model_shapes(config.model)[1].values()
        assert buffer_bytes(config) == 4 * sum(math.prod(shape) for shape in shapes), (router, *more)


def test_saves_by_the_clock_are_an_estimate_from_the_time_of_a_step():
    config = resolve("promoe_s", overrides=["train.steps=6000", "train.save_every=3000", "train.save_minutes=5"])
    assert disk(config).checkpoints == 2 and disk(config).exact
    by_clock = disk(config, step_seconds=1.0)
    assert by_clock.checkpoints == 20 and not by_clock.exact
    assert disk(config, step_seconds=0.05).checkpoints == 2, "the steps come before the clock"


@pytest.mark.full
def test_plan_shows_saved_bytes_and_their_time_only_with_a_bandwidth(capsys):
    words = ["plan", "--preset", "promoe_xl", "train.snapshot_every=10000", "train.keep_every=100000"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "checkpoints     100 of 25.08 GB" in out and "at most 7 at once" in out
    assert "snapshots        50 of 6.270 GB" in out and "489.0 GB of disk" in out
    assert "--storage-gbs" in out and "is written in" not in out
    assert main([*words, "--storage-gbs", "2"]) == 0
    out = capsys.readouterr().out
    assert "a checkpoint is written in 12.5 s, all of 2,821 GB in 23.5 min" in out
