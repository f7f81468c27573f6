"""Runs that are watched: a profile changes no number, every rank writes its own, and rank 0 alone sends metrics."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from support import stub_wandb
from support.processes import run
from support.training_runs import losses, state, train

LAYOUT = ("parallel.ep=2", "train.save_every=0", "train.steps=4")


def watched(folder: str, *settings: str) -> None:
    stub_wandb.install(Path(folder).parent / f"notes-{torch.distributed.get_rank()}")
    train(folder, *LAYOUT, *settings)


@pytest.mark.full
def test_watching_changes_no_number(tmp_path):
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    run(2, train, str(plain), *LAYOUT)
    run(2, watched, str(profiled), "train.profile=2:3", "train.wandb=moe")
    assert losses(profiled) == losses(plain) and len(losses(plain)) == 4
    expected, actual = state(plain, 4), state(profiled, 4)
    assert expected.keys() == actual.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)

    profiles = sorted(path.relative_to(profiled / "profile").as_posix() for path in (profiled / "profile").rglob("*.*"))
    assert profiles == [f"steps-00000002-00000003/rank-0000{rank}.trace.json.gz" for rank in (0, 1)]
    for name in profiles:
        with gzip.open(profiled / "profile" / name, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        names = {event["name"] for event in events}
        assert any("all_to_all" in name or "alltoall" in name.lower() for name in names)
        assert "[memory]" in names and any(name.startswith("aten::") for name in names)

    assert not (tmp_path / "notes-1").exists(), "only rank 0 writes"
    calls = stub_wandb.read(tmp_path / "notes-0")
    started = [content["id"] for name, content in calls if name == "init"]
    assert started == [json.loads((profiled / "environment.json").read_text())[0]["run"]]
    sent = [(content["step"], content["total_loss"]) for name, content in calls if name == "log"]
    assert [step for step, _ in sent] == [1, 2, 3, 4]
    assert [f"{loss:.7g}" for _, loss in sent] == [f"{loss:.7g}" for loss in losses(plain)]
