"""The training loop and its checkpoints: resuming changes nothing, and what cannot be resumed is refused."""

import json
import logging
import math
import re
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch
from support.former_names import rewrite_with_former_names
from support.levels import full
from support.processes import WorkerFailed, run
from support.training_runs import losses, state, train

import megapromoe.training.loop as loop
from megapromoe.checkpoint.format import KINDS, Checkpoint, CheckpointError
from megapromoe.checkpoint.step_folders import folder_of, steps_in
from megapromoe.config.renamed_options import RENAMED
from megapromoe.config.train_options import TrainConfig
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import open_state
from megapromoe.distributed import stop_requests

LAYOUTS = [
    full(1, ("train.deepspeed=fp32_zero0",)),
    full(2, ("parallel.ep=2", "train.deepspeed=fp32_zero0")),
    (2, ("parallel.ep=2", "train.deepspeed=fp32_zero2", "train.accumulation=2")),
    full(4, ("parallel.tp=2", "parallel.ep=2")),
    full(4, ("parallel.tp=2", "parallel.ep=2", "train.deepspeed=fp32_zero3")),
    full(4, ("parallel.tp=4", "parallel.ep=2", "train.deepspeed=fp32_zero2")),  # tp > ep
    full(4, ("parallel.tp=2", "parallel.ep=2", "train.deepspeed=bf16_zero1")),
    full(4, ("parallel.tp=2", "parallel.ep=2", "parallel.expert_tp=true", "model.router=diffmoe")),
    full(2, ("parallel.ep=2", "train.deepspeed=bf16_zero2_offload")),
    full(2, ("parallel.ep=2", "train.deepspeed=fp32_zero2", "model.router=gmm", "model.top_k=2")),
    full(2, ("parallel.ep=2", "model.router=race")),
    full(4, ("parallel.ep=2", "parallel.shard_ranks=2", "train.deepspeed=bf16_zero2", "train.accumulation=2")),
    full(2, ("parallel.tp=2", "train.deepspeed=fp32_zero3", "model.router=conditional")),
]


@pytest.mark.parametrize("world, overrides", LAYOUTS, ids=str)
def test_resuming_is_bit_exact(world, overrides, tmp_path):
    """From the first checkpoint of a run, as if it had been killed later."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(world, train, str(straight), *overrides)
    shutil.copytree(straight, resumed)
    shutil.rmtree(folder_of(resumed / "checkpoints", 6))
    run(world, train, str(resumed), *overrides)
    assert steps_in(straight / "checkpoints") == steps_in(resumed / "checkpoints") == [3, 6]
    expected, actual = state(straight, 6), state(resumed, 6)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert losses(resumed) == losses(straight) and len(losses(straight)) == 6
    moved = state(straight, 3)
    changed = {
        name for kind, name in expected if kind == "master" and not torch.equal(moved[kind, name], expected[kind, name])
    }
    assert "blocks.1.attn.qkv.weight" in changed
    assert ("blocks.1.mlp.experts.fc1.weight" in changed) != ("model.router=conditional" in overrides)


@pytest.mark.full
@pytest.mark.parametrize(
    "world, overrides", [(1, ()), (4, ("parallel.tp=2", "parallel.ep=4", "train.deepspeed=fp32_zero3"))]
)
def test_resuming_at_another_layout_is_the_same_training(world, overrides, tmp_path):
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    at = ("parallel.ep=2", "train.deepspeed=fp32_zero2")
    run(2, train, str(straight), *at)
    run(2, train, str(moved), "train.steps=3", *at)
    run(world, train, str(moved), *overrides)
    assert losses(moved) == pytest.approx(losses(straight), rel=1e-5)
    expected, actual = state(straight, 6), state(moved, 6)
    norms = {kind: torch.stack([t.norm() for (k, _), t in expected.items() if k == kind]).norm() for kind in KINDS}
    for (kind, name), tensor in expected.items():
        off = (actual[kind, name] - tensor).norm()
        assert off <= 1e-5 * tensor.norm() + 1e-6 * norms[kind], f"{kind} of {name}"


@pytest.mark.full
def test_a_run_with_former_names_of_options_resumes_to_the_bit(tmp_path):
    present, former = tmp_path / "present", tmp_path / "former"
    run(1, train, str(present), "train.steps=3", "train.optimizer=adamw")
    shutil.copytree(present, former)
    rewrite_with_former_names(former)
    names = [name.partition(".")[2] for name in RENAMED]
    assert all(re.search(rf"^  {name}:", (former / "config.yaml").read_text(), flags=re.M) for name in names)
    export(open_state(former), tmp_path / "converted", "ours")
    assert (tmp_path / "converted" / "config.yaml").read_text() == (present / "config.yaml").read_text()
    for folder in (present, former):
        run(1, train, str(folder))
    expected, resumed = state(present, 6), state(former, 6)
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert losses(former) == losses(present) and len(losses(former)) == 6
    assert (former / "config.yaml").read_text() == (present / "config.yaml").read_text()
    assert json.loads((former / "environment.json").read_text())[1]["changed"] == {"train.steps": [3, 6]}


def test_the_run_directory_explains_itself(tmp_path):
    folder = tmp_path / "run"
    run(2, train, str(folder), "parallel.ep=2", "train.sample_every=6", "model.in_channels=3", "sample.steps=2")
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "samples", "tensorboard"} <= names
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    needed = {
        "step",
        "total_loss",
        "denoising_loss",
        "contrastive_loss",
        "gradient_norm",
        "learning_rate",
        "images_per_second",
    }
    needed |= {"flops_per_second", "memory_bytes", "dead_experts", "expert_load", "gate"}
    assert needed <= set(line) and line["step"] == 6
    conditional_rows = sum(map(sum, line["expert_load"]))
    assert conditional_rows % 16 == 0 and 0 < conditional_rows <= 2 * 16 * 16
    assert line["total_loss"] == pytest.approx(line["denoising_loss"] + line["contrastive_loss"], rel=1e-5)
    assert (folder / "samples" / "step-00000006.png").stat().st_size > 100
    place = folder_of(folder / "checkpoints", 6)
    assert len({p.stat().st_mode for p in place.iterdir()}) == 1, "some files are private, some are not"
    manifest = Checkpoint(place).manifest
    assert manifest["step"] == manifest["updates"] == 6 and manifest["config"]["parallel"]["ep"] == 2


@pytest.mark.full
def test_drawing_samples_does_not_change_the_training(tmp_path):
    run(2, train, str(tmp_path / "plain"), "parallel.tp=2", "model.in_channels=3")
    run(
        2,
        train,
        str(tmp_path / "drawn"),
        "parallel.tp=2",
        "model.in_channels=3",
        "train.sample_every=2",
        "sample.steps=2",
    )
    assert losses(tmp_path / "plain") == losses(tmp_path / "drawn")


@pytest.mark.full
def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder, other = tmp_path / "mine", tmp_path / "other"
    run(2, train, str(folder), "train.steps=3", "parallel.ep=2", "model.num_experts=8")
    run(2, train, str(other), "train.steps=3", "parallel.ep=2")
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(other / "checkpoints", folder / "checkpoints")
    before = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    with pytest.raises(
        WorkerFailed, match=r"another model(.|\n)*prototypes: the checkpoint has \(4, 32\), the model \(8, 32\)"
    ):
        run(2, train, str(folder), "parallel.ep=2", "model.num_experts=8")
    assert {p: p.read_bytes() for p in before} == before


def spoil_and_open(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder).verify()
    return str(caught.value)


def test_damage_is_named(tmp_path):
    run(2, train, str(tmp_path), "parallel.ep=2", "train.steps=3")
    folder = folder_of(tmp_path / "checkpoints", 3)
    Checkpoint(folder).verify()
    file = folder / "rank-00001.safetensors"
    good = file.read_bytes()
    spoilt = bytearray(good)
    spoilt[len(good) // 2] ^= 1
    file.write_bytes(bytes(spoilt))
    assert "rank-00001.safetensors: bytes changed" in spoil_and_open(folder)
    file.write_bytes(good[:-10])
    assert f"has {len(good) - 10} bytes, not {len(good)}" in spoil_and_open(folder)
    file.unlink()
    assert "rank-00001.safetensors: is missing" in spoil_and_open(folder)
    (folder / "manifest.json").write_text("{")
    assert "manifest.json: is not JSON" in spoil_and_open(folder)
    (folder / "manifest.json").unlink()
    assert "no complete checkpoint" in spoil_and_open(folder)
    assert steps_in(tmp_path / "checkpoints") == []


def test_old_checkpoints_go(tmp_path):
    run(1, train, str(tmp_path), "train.save_every=1", "train.keep_last=2")
    # The newest two; the newest with train.max_bad_steps = 3 updates after it, and the next that will have them.
    assert steps_in(tmp_path / "checkpoints") == [3, 4, 5, 6]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {f"step-0000000{n}" for n in (3, 4, 5, 6)}


def broken(folder: str) -> None:
    """A model whose loss overflows from the first step."""
    real = loop.make_objective

    class Overflow:
        def __init__(self, config):
            self.real = real(config)
            self.corrupt = self.real.corrupt

        def loss(self, *arguments):
            return self.real.loss(*arguments) * float("inf")

    loop.make_objective = Overflow
    train(folder, "parallel.ep=2")


def test_a_run_that_only_overflows_ends_with_a_message(tmp_path):
    with pytest.raises(WorkerFailed, match=r"3 steps in a row without a usable gradient .*max_bad_steps"):
        run(2, broken, str(tmp_path))


def test_learning_rate_schedules():
    constant = TrainConfig(lr=2.0, warmup=4, steps=10)
    assert [loop.learning_rate(constant, s) for s in (0, 1, 3, 4, 9)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = TrainConfig(lr=2.0, warmup=4, steps=12, schedule="cosine", min_lr=1.0)
    assert loop.learning_rate(cosine, 4) == 2.0
    assert math.isclose(loop.learning_rate(cosine, 8), 1.5) and math.isclose(loop.learning_rate(cosine, 12), 1.0)


class RecordedMessages(logging.Handler):
    """The messages of a logger."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def messages_of_training(folder: str, *overrides: str) -> list[str]:
    """What the training loop logs on this rank of what changed since the last start."""
    handler = RecordedMessages()
    loop.logger.addHandler(handler)
    loop.logger.setLevel(logging.INFO)
    train(folder, *overrides)
    return [line for line in handler.lines if line.startswith("changed since")]


def stop_as_the_launcher_ends(folder: str) -> list[str]:
    """Warnings of a rank about its launcher: rank 1 notices its end in the third step, rank 0 when it asks again."""
    calls = count(1)

    class Ending:
        name, pid = "torchrun", 123

        def is_running(self) -> bool:
            return next(calls) < (3 if torch.distributed.get_rank() else 4)

    stop_requests.find_launcher = lambda launch: Ending()
    handler = RecordedMessages()
    stop_requests.logger.addHandler(handler)
    with pytest.raises(loop.Interrupted, match="asked to stop: step 3 of 100 is saved"):
        train(folder, "train.steps=100")
    return handler.lines


def test_rank_0_logs_the_end_of_the_launcher_even_if_another_rank_notices_it_first(tmp_path):
    warning = "rank 0: torchrun (process 123), which started this rank, has ended; the run stops with a checkpoint"
    first, _ = run(2, stop_as_the_launcher_ends, str(tmp_path))
    assert first == [warning]


@pytest.mark.full
def test_a_resume_logs_what_changed_and_what_the_learning_rate_becomes(tmp_path):
    cosine = ("train.schedule=cosine", "train.lr=0.01", "train.log_every=1")
    first, others = run(2, messages_of_training, str(tmp_path), *cosine, "train.steps=3")
    assert first == others == []
    first, others = run(2, messages_of_training, str(tmp_path), *cosine, "train.steps=6", "parallel.ep=2")
    assert first == [
        "changed since the last start: parallel.ep: 1 -> 2",
        "changed since the last start: train.steps: 3 -> 6",
        "changed since the last start: learning rate: 0.0025 at step 3 -> 0.005 at step 4 (0 without these changes)",
    ]
    assert others == [], "rank 0 speaks for all"
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates[2:4] == pytest.approx([0.0025, 0.005])
