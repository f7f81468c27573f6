"""`megapromoe routing trace` of real runs: its numbers, its files, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from support.processes import run
from support.training_runs import train

from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.data.sources import open_dataset
from megapromoe.diffusion.noise import image_noise
from megapromoe.diffusion.objectives import make_objective
from megapromoe.recorded_routes import read_routes
from megapromoe.routing_trace import TRACE_FILE, read_trace
from megapromoe.sampling.run_model import load_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six steps on two expert-parallel ranks, all recorded, with snapshots of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trace") / "run"
    run(2, train, str(folder), "parallel.ep=2", "train.routing_trace_every=1", "train.snapshot_every=2")
    return folder


def trace(folder, *words) -> int:
    return main(["routing", "trace", "--run-dir", str(folder), *words])


def test_the_command_shows_the_recorded_load(trained, tmp_path, capsys):
    assert trace(trained, "--out", str(tmp_path), "--from-step", "3") == 0
    out = capsys.readouterr().out
    assert "4 records, steps 3 to 6; 2 data ranks, ep 2" in out and "all blocks" in out and "changed" not in out
    numbers = json.loads((tmp_path / "trace.json").read_text())
    rows_NME = read_trace(trained, 3).rows_NME
    expected_M = (rows_NME.max(2) / rows_NME.mean(2)).max(0)
    assert numbers["fullest_expert_over_mean"]["max"] == pytest.approx(expected_M, rel=1e-4)
    assert (
        numbers["blocks"] == [1, 3] and numbers["experts"] == 4 and numbers["layouts"] == [{"ep": 2, "data_ranks": 2}]
    )
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"trace.json", "trace.png"}


@pytest.mark.full
def test_drift_between_snapshots(trained, tmp_path, capsys):
    words = ("--routes", "--num-images", "12", "--levels", "0.2,0.7", "--out", str(tmp_path))
    assert trace(trained, *words) == 0
    out = capsys.readouterr().out
    assert "step 2 to 3" in out and "step 4 to 6" in out, "checkpoints of 3 and 6, snapshots of 2, 4 and 6"
    recorded = read_routes(tmp_path / "routes.jsonl")
    assert [routes.step for routes in recorded] == [2, 3, 4, 6] and recorded[0].expert_LMNS.shape == (2, 2, 12, 16)
    drift = json.loads((tmp_path / "trace.json").read_text())["drift"]
    expected = (recorded[0].expert_LMNS != recorded[1].expert_LMNS).mean((1, 2, 3))
    assert drift[0]["changed"] == pytest.approx(expected, abs=1e-5) and max(drift[0]["changed"]) > 0
    # Again, and of two steps alone: the tokens are fixed.
    again = tmp_path / "again"
    assert trace(trained, *words[:-1], str(again), "--route-steps", "2,6") == 0
    assert [routes.step for routes in read_routes(again / "routes.jsonl")] == [2, 6]
    for routes, other in zip(read_routes(again / "routes.jsonl"), (recorded[0], recorded[3]), strict=True):
        assert np.array_equal(routes.expert_LMNS, other.expert_LMNS)


def test_routes_are_those_of_the_model(trained, tmp_path):
    """Those of block 3 at the middle noise level, against the router's own assignment."""
    assert trace(trained, "--routes", "--num-images", "8", "--route-steps", "4,6", "--out", str(tmp_path)) == 0
    routed = read_routes(tmp_path / "routes.jsonl")[1]
    model, _, _ = load_model(trained, 6)
    calls = []
    router = model.get_submodule("blocks.3.mlp.router")
    router.register_forward_hook(lambda *call: calls.append(call[-1].assignment))
    config = resolve(file=trained / "config.yaml", file_is_saved=True)
    dataset = open_dataset(config)
    numbers = list(routed.of.images)
    clean, labels = dataset.read(np.array(numbers))
    noise = image_noise(config.sample.seed, numbers, dataset.shape)
    x, t = make_objective(config).corrupt(torch.from_numpy(clean), noise, torch.full((8,), 0.5))
    with torch.no_grad():
        model(x, t, torch.from_numpy(labels), 8)
    assert np.array_equal(routed.expert_LMNS[1, 1].flatten(), calls[0].expert_R[calls[0].token_R.argsort()])


REFUSED = [
    (("--routes", "--route-steps", "5,6"), 1, "steps: 5: the run has ema weights of 2, 3, 4, 6"),
    (("--routes", "--route-steps", "6"), 1, "drift needs two steps or more"),
    (("--routes", "--layers", "2"), 1, "must be blocks with experts: 1, 3"),
    (("--from-step", "7"), 1, "has no record from step 7"),
    (("--route-steps", "2,4"), 2, "--route-steps: needs --routes; leave it out"),
    (("--num-images", "3", "--levels", "0.5"), 2, "--num-images, --levels: needs --routes"),
    (("--subsets", "x.yaml", "--pictures"), 2, "--subsets, --pictures: is for the report"),
]


@pytest.mark.parametrize("words, code, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_what_cannot_be_shown_is_refused(trained, tmp_path, capsys, words, code, message):
    assert trace(trained, *words, "--out", str(tmp_path / "out")) == code
    error = capsys.readouterr().err
    assert message in error and not (tmp_path / "out").exists()


def test_options_of_trace_are_refused_without_it(trained, capsys):
    assert main(["routing", "--run-dir", str(trained), "--routes"]) == 2
    assert "--routes: is for megapromoe routing trace; leave it out" in capsys.readouterr().err


def test_runs_without_a_trace_are_refused(trained, tmp_path, capsys):
    for name, file in (("damaged", b"{}\n"), ("empty", b""), ("none", None)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
        if file is not None:
            (folder / TRACE_FILE).write_bytes(file)
        assert trace(folder) == 1
        assert str(folder / TRACE_FILE) in capsys.readouterr().err
    config = (trained / "config.yaml").read_text()
    (tmp_path / "none" / "config.yaml").write_text(
        config.replace("router: promoe", "router: dense").replace("ep: 2", "ep: 1")
    )
    assert trace(tmp_path / "none") == 1
    assert "a dense model has no experts and no routing" in capsys.readouterr().err
