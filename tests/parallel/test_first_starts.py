"""A first start that fails leaves the folder free: the corrected command works there, whatever it corrects."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.latent_folders import Arrays, write
from support.levels import full
from support.processes import run
from support.training_runs import losses, train

import megapromoe.engine.engine as engine_module
from megapromoe.data.latents import INDEX, MANIFEST, read_manifest
from megapromoe.errors import UserError
from megapromoe.io import sha256_of

SHORT = ("train.steps=1", "train.global_batch=8")
CORRECTED = {
    "other data": ("data.seed=3",),
    "another model": ("model.depth=2", "model.num_experts=2"),
    "another layout": ("parallel.ep=2",),
}


def try_to_train(folder: str, *settings: str) -> str:
    """The error of `train` on this rank; "" without one."""
    try:
        train(folder, *SHORT, *settings)
    except UserError as error:
        return str(error)
    return ""


def try_without_a_model(folder: str, rank: int) -> str:
    """A start that fails while `rank` builds the model, as on a GPU with too little memory."""

    def build(*arguments: object, **more: object) -> object:
        if torch.distributed.get_rank() == rank:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return built(*arguments, **more)

    built, engine_module.build = engine_module.build, build
    try:
        return try_to_train(folder)
    except torch.OutOfMemoryError as error:
        return str(error)
    finally:
        engine_module.build = built


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def spoil_label(folder: Path) -> None:
    """Gives a record a label that no class has."""
    path, manifest = folder / INDEX, folder / MANIFEST
    tensors = load_file(path)
    tensors["labels"] = np.where(np.arange(len(tensors["labels"])) == 3, 77, tensors["labels"]).astype(np.int32)
    save_file(tensors, path)
    manifest.write_text(replace(read_manifest(folder), index_sha256=sha256_of(path)).to_json())


def shorten_shard(folder: Path) -> None:
    os.truncate(next(folder.glob("shard-*.npy")), 1000)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Latents in folders named by what is wrong with them."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "few", Arrays(count=4, classes=10, shape=(4, 8, 8)))
    write(folder / "shape", Arrays(count=16, classes=10, shape=(2, 4, 4)))
    for name, spoil in (("label", spoil_label), ("short", shorten_shard)):
        write(folder / name, Arrays(count=16, classes=10, shape=(4, 8, 8)))
        spoil(folder / name)
    return folder


FAULTS = {
    "nosuch": "holds no manifest.json",
    "few": "holds 4 records, fewer than train.global_batch",
    "shape": "records have shape (2, 4, 4)",
    "label": "label 77",
    "short": "has 1,000 bytes",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_data_that_cannot_be_used_leaves_nothing_behind(fault, data, tmp_path):
    folder = tmp_path / "run"
    latent = ("data.source=latents", f"data.path={data / fault}", "data.flip=false")
    (message,) = run(1, try_to_train, str(folder), *latent)
    assert FAULTS[fault] in message
    assert not folder.exists()
    if fault in ("nosuch", "few"):
        assert run(1, try_to_train, str(folder)) == [""]
        assert len(losses(folder)) == 1
        assert len(json.loads((folder / "environment.json").read_text())) == 1


@pytest.mark.parametrize("corrected", [full("other data"), "another model", full("another layout")])
def test_a_rank_that_cannot_build_the_model_leaves_the_folder_to_any_other_start(corrected, tmp_path):
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)  # of the launcher
    with pytest.raises(AssertionError, match="out of memory"):
        run(2, fails_on, str(folder), 1)
    assert {"config.yaml", "environment.json", "metrics.jsonl", "samples", "tensorboard"}.isdisjoint(entries(folder))
    assert run(2, try_to_train, str(folder), *CORRECTED[corrected]) == ["", ""]
    assert entries(folder) == ["checkpoints", "config.yaml", "environment.json", "logs", "metrics.jsonl", "run.lock",
                               "tensorboard"]  # fmt: skip


def fails_on(folder: str, rank: int) -> None:
    """Raises what a rank raised, so that the job ends as when a process of it ends."""
    if message := try_without_a_model(folder, rank):
        raise RuntimeError(message)


def test_the_run_that_took_a_step_keeps_its_folder(tmp_path):
    folder = tmp_path / "run"
    assert run(1, try_to_train, str(folder)) == [""]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (message,) = run(1, try_to_train, str(folder), "model.depth=2", "train.steps=2")
    assert "belongs to a run with another config" in message and "model.depth: the run has 4, not 2" in message
    (message,) = run(1, try_to_train, str(folder), "data.source=latents", "data.path=nosuch")
    assert "data.source: the run has" in message
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
