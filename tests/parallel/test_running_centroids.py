"""State of routers (running centroids, balance biases) at any layout: equal on all ranks, in float32, restored."""

from pathlib import Path

import pytest
import torch
from support.levels import full
from support.processes import run
from support.training_runs import losses
from support.training_runs import train as train_run
from support.trajectory import small, train

from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.step_folders import folder_of
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.engine import Engine
from megapromoe.nn.parallelize import build
from megapromoe.training.loop import TrainingError


def buffers(folder: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder_of(folder, step))
    return {name: checkpoint.buffer(name) for name in checkpoint.manifest["buffers"]}


def same_everywhere(overrides: tuple[str, ...], folder: str) -> dict[str, torch.Tensor]:
    """Trains, and returns this rank's running statistics after the last step. Collective."""
    kept = []
    train(overrides, folder, 4, lambda model, mesh: kept.append(model))
    return {n: b.clone() for n, b in kept[0].named_buffers() if "router" in n}


KMEANS = ("model.router=kmeans",)
BIASED_PROMOE = ("model.balance_bias=0.01", "model.top_k=2", "train.accumulation=2")


@pytest.mark.parametrize("router, of_layer", [full(KMEANS, 2), full(BIASED_PROMOE, 1)], ids=["kmeans", "balance bias"])
def test_state_of_all_ranks_is_the_same_and_saved(router, of_layer, tmp_path):
    folders = [tmp_path / name for name in ("one", "four")]
    for folder in folders:
        folder.mkdir()
    run(1, same_everywhere, router, str(folders[0]))
    ranks = run(4, same_everywhere, (*router, "parallel.tp=2", "parallel.ep=2"), str(folders[1]))
    one_rank, four = (buffers(folder, 4) for folder in folders)
    start = {n: b for n, b in build(small(*router)).named_buffers() if "router" in n}
    assert set(one_rank) == set(start) and len(one_rank) == 2 * of_layer
    for name, value in one_rank.items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(four[name], value, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(rank[name], four[name]) for rank in ranks)


def bf16_statistics() -> tuple[set, bool]:
    config = small("model.router=kmeans", "train.deepspeed=bf16_zero1")
    mesh = make_mesh(1, 1)
    engine = Engine(build(config, mesh), config, mesh)
    before = {n: b.clone() for n, b in engine.module.named_buffers() if n.endswith(".centroids")}
    x = torch.randn(16, 4, 8, 8, dtype=torch.bfloat16)
    engine.module(x, torch.full((16,), 500.0), torch.arange(16) % 10, 16)
    after = dict(engine.module.named_buffers())
    moved = all(not torch.equal(after[n], b) for n, b in before.items())
    parameters = {p.dtype for p in engine.module.parameters()}
    kinds = {after[n].dtype for n in before}
    engine.close()
    return kinds, moved and parameters == {torch.bfloat16}


def test_running_statistics_stay_in_float32_under_bf16():
    assert run(1, bf16_statistics) == [({torch.float32}, True)]


def engine_steps() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Steps of two micro-batches: an applied one, a spike, one that is not finite, and an applied one.

    Returns the load of the experts in each step, and their biases before and after it.
    """
    config = small("model.balance_bias=0.01", "train.accumulation=2", "model.depth=2")
    mesh = make_mesh(1, 1)
    engine = Engine(build(config, mesh), config, mesh)
    (bias,) = (b for name, b in engine.module.named_buffers() if name.endswith("balance_bias"))
    results = []
    for named in ({}, {"max_norm": 0.0}, {"loss": torch.tensor(float("nan"))}, {}):
        load_E, before = torch.zeros(4), bias.clone()
        for micro in range(2):

            def loss(prediction, auxiliary, load_E=load_E):
                load_E.add_(auxiliary.load_ME[0])
                return (prediction - 1).square().mean(), prediction.detach().mean()

            x, y = torch.randn(4, 4, 8, 8), torch.tensor([1, 2, 3, 10])
            engine.micro_step(x, torch.full((4,), 500.0), y, 3, loss=loss)
            if not micro:
                engine.finish_micro_step()
        engine.step(1e-3, **named)
        results.append((load_E, before, bias.clone()))
    engine.close()
    return results


def test_biases_move_once_for_each_applied_step():
    (results,) = run(1, engine_steps)
    for number, (load_E, before, after) in enumerate(results):
        assert load_E.sum() == 2 * 3 * 16
        moved = 0.01 * (load_E.mean() - load_E).sign() if number in (0, 3) else torch.zeros(4)
        assert torch.equal(after, before + moved) and moved.any() == (number in (0, 3))


EXAMPLE = Path(__file__).parents[2] / "examples" / "my_router.py"
BIASED = f"model.router={EXAMPLE}:BiasedRouter"


@pytest.mark.parametrize(
    "router, of_layer",
    [(("model.router=kmeans", "model.kmeans_decay=0.5"), 2), full((BIASED,), 1), full(BIASED_PROMOE, 1)],
    ids=["kmeans", "a user's", "balance bias"],
)
def test_a_run_is_continued_with_its_state_at_another_layout(router, of_layer, tmp_path):
    settings = (*router, "train.save_every=0", "train.log_every=1")
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    run(1, train_run, str(straight), *settings, "train.steps=6")
    run(2, train_run, str(moved), *settings, "train.steps=3", "parallel.ep=2")
    run(2, train_run, str(moved), *settings, "train.steps=6", "parallel.tp=2")
    expected, resumed = buffers(straight / "checkpoints", 6), buffers(moved / "checkpoints", 6)
    assert expected.keys() == resumed.keys() and len(resumed) == 2 * of_layer
    assert all(value.any() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)
    assert losses(moved) == pytest.approx(losses(straight), rel=1e-5)


def other_file_on_a_node(folder: str) -> None:
    """Starts a run whose file of a router has another content on rank 1. Collective."""
    rank = torch.distributed.get_rank()
    file = Path(folder) / f"rank{rank}.py"
    file.write_text(EXAMPLE.read_text() + "#" * rank)
    with pytest.raises(
        TrainingError, match=r"rank 1: model\.router = .*rank1\.py:.*: rank 0 has .*copy one file to all"
    ):
        train_run(str(Path(folder) / "run"), f"model.router={file}:BiasedRouter")


def test_ranks_with_different_routers_are_named(tmp_path):
    run(2, other_file_on_a_node, str(tmp_path))
