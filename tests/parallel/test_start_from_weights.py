"""Runs that start from the weights of a checkpoint: at every layout the same, within bounds, and only once."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.golden_states import random_state
from support.levels import full
from support.processes import run
from support.training_runs import state, train
from support.trajectory import small

from megapromoe.benchmark.counters import Counter
from megapromoe.cli import main
from megapromoe.conversion.exports import export
from megapromoe.conversion.starting_weights import newest_checkpoint, open_start
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.deepspeed_backend import partitions
from megapromoe.engine.engine import Engine
from megapromoe.errors import UserError
from megapromoe.training.initializing import start_from_weights

SMALL = ("model.depth=2", "train.ema_decay=[0.5,0.9]")
CHANGED = ("model.input_size=16", "model.num_classes=4", "train.init_classes=new")


def source(folder: Path, *settings: str) -> str:
    made = random_state(small(*SMALL, *settings))
    export(replace(made, read=lambda kind, name: 0.1 * made.read(kind, name)), folder / "source", "ours")
    return f"train.init_from={folder / 'source'}"


def beginning(settings: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """This rank's masters, averages and parameters at the start, with what they are of."""
    config = small(*SMALL, *settings)
    mesh = make_mesh(config.parallel.tp, config.parallel.ep, timeout=60)
    engine = Engine.new(config, mesh, "cpu")
    ema = EMA(engine, config.train.ema_decays)
    start_from_weights(config, engine, ema)
    weights: dict = {"pieces": [], "parameters": {}}
    for partition, *averages in zip(engine.partitions, *ema.averages, strict=True):
        for piece in partition.pieces:
            span = slice(piece.offset, piece.offset + piece.stop - piece.start)
            target = engine.layouts[piece.name].shard_range(mesh, piece.start, piece.stop)
            values = [flat.detach()[span].clone() for flat in (partition.master, *averages)]
            weights["pieces"].append((piece.name, target, values))
    weights["moments"] = sum(float(m.abs().sum()) for p in engine.partitions for m in engine.moments(p).values())
    if engine.stage < 3:
        for name, parameter in engine.module.named_parameters():
            target = engine.layouts[name].shard_range(mesh)
            weights["parameters"][name] = (target, parameter.detach().float().view(-1).clone())
    weights["buffers"] = {n: b for n, b in engine.module.state_dict().items() if n not in engine.layouts}
    engine.close()
    return weights


def check(ranks: list[dict], settings: tuple[str, ...]) -> None:
    """Compares all ranks with the weights that one process reads, bit for bit."""
    config = small(*SMALL, *settings)
    start = open_start(config, newest_checkpoint(Path(config.train.init_from)))
    weights = start.state(start.prototypes() if start.needs_prototypes else {})
    rounded = torch.bfloat16 if "bf16" in config.train.deepspeed else torch.float32
    elements = dict.fromkeys(weights.shapes, 0)
    for of_rank in ranks:
        for name, target, values in of_rank["pieces"]:
            expected = torch.full((target.stop - target.start,), 7.0)
            start.read_into(weights, name, target, expected)
            assert all(torch.equal(value, expected) for value in values), name
            elements[name] += len(expected)
        for name, (target, value) in of_rank["parameters"].items():
            expected = torch.zeros(target.stop)
            start.read_into(weights, name, target, expected)
            assert torch.equal(value, expected.to(rounded).float()), name
        assert all(torch.equal(of_rank["buffers"][name], value) for name, value in weights.buffers.items())
        assert of_rank["moments"] == 0
    assert all(elements[name] >= torch.Size(shape).numel() for name, shape in weights.shapes.items())


CASES = {
    "as it is, bf16": ((), ("train.deepspeed=bf16_zero1",)),
    "classes and grid": ((), (*CHANGED, "train.deepspeed=fp32_zero2")),
    "more experts": ((), ("model.num_experts=8", "train.deepspeed=fp32_zero3")),
    "thresholds, stage 0": (("model.router=diffmoe",), ("model.router=diffmoe", "train.deepspeed=fp32_zero0")),
    "from a dense model": (("model.router=dense",), (*CHANGED, "model.num_experts=3")),
}


@pytest.mark.parametrize("case", [full(case) if case != "classes and grid" else case for case in CASES])
def test_the_start_does_not_depend_on_the_layout(case, tmp_path):
    of_source, settings = CASES[case]
    settings = (*settings, source(tmp_path, *of_source))
    check(run(4, beginning, (*settings, "parallel.tp=2", "parallel.ep=2")), settings)


def peaks(settings: tuple[str, ...]) -> dict[str, int]:
    config = small(*settings)
    mesh = make_mesh(config.parallel.tp, config.parallel.ep, timeout=60)
    partitions.GATHERED = 1 << 14  # as small against these tensors as it is against those of real models
    with Counter() as counter:
        engine = Engine.new(config, mesh, "cpu")
        ema = EMA(engine, config.train.ema_decays)
        before = counter.mark()
        start_from_weights(config, engine, ema)
        peak = counter.peak(before)
    tensor = max(4 * torch.Size(layout.shape).numel() for layout in engine.layouts.values())
    engine.close()
    return {"peak": peak, "tensor": tensor}


@pytest.mark.full
def test_a_rank_holds_no_more_than_its_share_and_one_tensor(tmp_path):
    """Of a checkpoint of ours, and of a file of weights with other classes."""
    size = ("model.hidden_size=128", "model.depth=4", "model.num_experts=4")
    made = random_state(small(*size))
    export(made, tmp_path / "source", "ours")
    export(made, tmp_path / "a.pth", "published")
    for name in ("source", "a.pth"):
        settings = (*size, f"train.init_from={tmp_path / name}", "parallel.tp=2", "parallel.ep=2")
        for of_rank in run(4, peaks, (*settings, "train.init_classes=new")):
            assert of_rank["peak"] <= of_rank["tensor"], name


# ---- in a run


def test_a_run_starts_from_weights_once(tmp_path, capsys):
    """It records what it took; a repeated command resumes, even if the source is gone, and says so."""
    from_source = source(tmp_path)
    folder = tmp_path / "run"
    settings = (*SMALL, from_source, "model.num_classes=12", "train.init_classes=new", "train.lr=1e-30")
    run(2, train, str(folder), *settings, "train.steps=3", "parallel.ep=2")
    (entry,) = json.loads((folder / "environment.json").read_text())
    assert entry["initial_weights"]["source"] == [
        f"{tmp_path / 'source' / 'checkpoints' / 'step-00000012'} (ours, step 12), the averaged weights (ema)"
    ]
    assert entry["initial_weights"]["classes"][0].startswith("all 12 rows are new, the mean of the source's 10 classes")
    before, config = state(folder, 3), small(*settings)
    start = open_start(config, newest_checkpoint(tmp_path / "source"))
    weights = start.state({})
    for name in weights.shapes:
        expected = weights.read("ema", name)
        torch.testing.assert_close(before["master", name], expected, rtol=0, atol=1e-20)
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    (messages,) = run(1, logged, str(folder), *settings, "train.steps=6")
    assert f"{from_source.replace('=', ' = ')}: not used, because the run resumes from its own checkpoint" in messages
    entries = json.loads((folder / "environment.json").read_text())
    assert len(entries) == 2 and "initial_weights" not in entries[1]
    with pytest.raises(UserError, match="there is no such file or folder"):
        newest_checkpoint(tmp_path / "source")
    assert main(["train", "--config", str(folder / "config.yaml"), "--run-dir", str(folder), "--dry-run"]) == 0
    assert "start      not used, because the run resumes: train.init_from" in capsys.readouterr().out


def logged(folder: str, *settings: str) -> list[str]:
    """Trains, and returns what the training loop logs."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("megapromoe.training.loop")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        train(folder, *settings)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return messages


def refused(folder: str, *settings: str) -> tuple[str, int, bool]:
    try:
        train(folder, *settings)
    except UserError as error:
        return str(error), error.exit_code, error.on_all_ranks
    return "", 0, False


def test_what_cannot_be_the_start_is_refused_on_all_ranks_before_anything_is_written(tmp_path):
    from_source = source(tmp_path)
    folder = tmp_path / "run"
    (text, code, on_all), other = run(2, refused, str(folder), *SMALL, from_source, "model.depth=4")
    assert "model.depth = 4: must be the source's 2" in text and (code, on_all) == (2, True)
    assert other == (text, code, on_all) and not folder.exists()
    file = next((tmp_path / "source" / "checkpoints").glob("*/rank-00000.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (text, code, _), other = run(2, refused, str(folder), *SMALL, from_source)
    assert "bytes changed since it was written" in text and other[0] == text and code == 2
    assert not folder.exists()


def test_a_dry_run_checks_the_source_and_prints_the_table(tmp_path, capsys):
    words = ["train", "--preset", "digits", "--run-dir", str(tmp_path / "run"), "--dry-run"]
    made = random_state(small(*SMALL, "model.input_size=8", "model.in_channels=1", "model.num_classes=10"))
    config = made.config.model
    export(made, tmp_path / "source", "ours")
    same = [f"model.{name}={getattr(config, name)}" for name in ("hidden_size", "depth", "heads", "num_experts")]
    same += [f"model.{name}={getattr(config, name)}" for name in ("score_function", "qk_norm", "expert_ratio")]
    assert main([*words, *same, f"train.init_from={tmp_path / 'source'}"]) == 0
    printed = capsys.readouterr().out
    assert "start      source: " in printed and "start      taken: " in printed
    assert main([*words, *same, f"train.init_from={tmp_path / 'other'}"]) == 2
    assert "other: there is no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
