"""Training on latents from disk: damage is counted over all ranks, and one rank's mistake stops all."""

import json

import pytest
import torch
from support.latent_folders import Arrays, damage, write
from support.processes import run
from support.training_runs import losses, train

from megapromoe.checkpoint.step_folders import steps_in
from megapromoe.training import loop


def try_to_train(folder, data, *overrides):
    """The error of `train` on this rank."""
    rank = torch.distributed.get_rank()
    data = data.replace("RANK", str(rank))
    try:
        train(folder, "data.source=latents", f"data.path={data}", "data.flip=true", "data.workers=3", *overrides)
    except loop.TrainingError as error:
        return f"{type(error).__name__} {error.on_all_ranks}: {error}"
    return "trained"


def damaged_samples(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line).get("damaged_samples", 0) for line in lines]


def test_damage_is_counted_over_all_ranks_and_ends_the_run_at_the_limit(tmp_path):
    data = write(tmp_path / "latents", Arrays(count=64, classes=10, shape=(4, 8, 8)))
    for place in range(0, 16, 2):
        damage(data, 1, place)
    single, double = tmp_path / "one", tmp_path / "two"
    assert run(1, try_to_train, str(single), str(data)) == ["trained"]
    count = damaged_samples(single)
    assert count[3] == 8 and count == sorted(count)  # 4 batches of 16 are an epoch of 64
    limit = count[2] - 1
    last = next(step for step, so_far in enumerate(count, 1) if so_far > limit)
    errors = run(2, try_to_train, str(double), str(data), "parallel.ep=2", f"data.max_damaged={limit}")
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"TrainingError True: step {last}: {count[last - 1]} samples had")
    assert f"data.max_damaged = {limit}" in errors[0] and steps_in(double / "checkpoints") == [last]
    assert losses(double) == pytest.approx(losses(single)[:last], rel=1e-4) and damaged_samples(double) == count[:last]


def test_a_rank_that_cannot_open_the_data_stops_all(tmp_path):
    data = write(tmp_path / "latents0", Arrays(count=64, classes=10, shape=(4, 8, 8)))
    errors = run(2, try_to_train, str(tmp_path / "run"), f"{data.parent}/latentsRANK")
    missing = f"{tmp_path}/latents1 holds no manifest.json; create it with megapromoe encode"
    assert errors == [f"TrainingError True: rank 1: {missing}"] * 2
