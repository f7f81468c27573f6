"""Guidance by classes and by k-means, against the formulas; running centroids at any layout, saved and restored."""

import math
from pathlib import Path

import pytest
import torch
from support.processes import run
from support.trajectory import small, train
from test_routers import E, S, config_of, filled, tokens
from test_training import losses
from test_training import train as train_run
from torch.nn import functional as F

from megapromoe.checkpoint.format import Checkpoint, folder_of
from megapromoe.conversion.state import check_published
from megapromoe.conversion.stream import ConversionError
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.engine import Engine
from megapromoe.nn.moe.guided_routers import NO_SUPERCLASS, STARVED, KMeansRouter
from megapromoe.nn.moe.layer import ROUTERS
from megapromoe.nn.parallelize import build

CLASSES = 10


def classifier(**changes):
    router = filled(ROUTERS["classification"](config_of(router="classification", num_classes=CLASSES, **changes)))
    router.superclass_C.copy_(torch.tensor([*(c % E for c in range(CLASSES)), NO_SUPERCLASS]))
    return router


def kmeans(**changes) -> KMeansRouter:
    router = ROUTERS["kmeans"](config_of(router="kmeans", **changes)).train()
    generator = torch.Generator().manual_seed(3)
    router.centroids.copy_(F.normalize(torch.randn(router.centroids.shape, generator=generator), dim=-1))
    router.share.fill_(1 / E)
    return router


# ---- by classes


@pytest.mark.parametrize("training", [True, False])
def test_an_image_goes_where_the_classifier_says(training):
    router, x = classifier().train(training), tokens(4)
    routed = router(x, torch.tensor([1, 2, 3, 9]))
    for b in range(4):
        logits = router.classifier(x[b].mean(0))
        rows = slice(b * S, (b + 1) * S)
        assert routed.route.token_R[rows].tolist() == list(range(b * S, (b + 1) * S))
        assert set(routed.route.expert_R[rows].tolist()) == {int(logits.argmax())}
        torch.testing.assert_close(routed.route.weight_R[rows], logits.softmax(0).max().expand(S))
    assert routed.route.top_k == 1 and routed.losses.keys() == ({"classification"} if training else set())


def test_the_classifier_learns_superclasses():
    router, x = classifier(classification_weight=2.0).train(), tokens(4)
    labels = torch.tensor([7, 0, 4, CLASSES])  # the last is null: it has no super-class
    loss = router(x, labels).losses["classification"]
    logits = torch.stack([router.classifier(x[b].mean(0)) for b in range(3)])
    torch.testing.assert_close(loss, 2.0 * F.cross_entropy(logits, torch.tensor([7 % E, 0, 4])))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        router(x, labels).losses["classification"].backward()
        optimizer.step()
    assert router(x, labels).route.expert_R.view(4, S)[:3, 0].tolist() == [7 % E, 0, 4]


def test_no_loss_without_labelled_images():
    router = classifier().train()
    for images, labels in ((2, [CLASSES, CLASSES]), (0, [])):
        loss = router(tokens(images), torch.tensor(labels, dtype=torch.int64)).losses["classification"]
        loss.backward()
        assert loss == 0 and not router.classifier.weight.grad.any()


# ---- k-means


@pytest.mark.parametrize("gate", ["identity", "sigmoid"])
def test_a_token_goes_to_the_centroid_it_resembles_most(gate):
    router, x = kmeans(gate=gate).eval(), tokens(3)
    before = router.centroids.clone()
    routed = router(x)
    cosine_TE = torch.stack(
        [torch.stack([F.cosine_similarity(t, c, dim=0) for c in before]) for t in x.view(-1, x.shape[-1])]
    )
    assert torch.equal(routed.route.expert_R, cosine_TE.argmax(1))
    best = cosine_TE.max(1).values
    torch.testing.assert_close(routed.route.weight_R, best if gate == "identity" else best.sigmoid())
    assert torch.equal(router.centroids, before) and not routed.losses, "inference moves nothing"


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_centroids_follow_their_tokens(decay):
    router, x = kmeans(kmeans_decay=decay), tokens(3)
    before, unit = router.centroids.clone(), F.normalize(x.view(-1, x.shape[-1]), dim=-1)
    chosen = router(x).route.expert_R
    counts = torch.bincount(chosen, minlength=E)
    assert counts.min() > 0
    for e in range(E):
        mean = unit[chosen == e].mean(0)
        torch.testing.assert_close(router.centroids[e], decay * before[e] + (1 - decay) * mean)
    torch.testing.assert_close(router.share, decay / E + (1 - decay) * counts / len(chosen))


def test_only_tokens_learn_from_the_weights():
    router, x = kmeans(), tokens(2).requires_grad_()
    router(x).route.weight_R.sum().backward()
    assert x.grad.any() and not list(router.parameters())


def clusters(images: int) -> torch.Tensor:
    """Tokens in E tight bundles."""
    generator = torch.Generator().manual_seed(0)
    middle = F.normalize(torch.randn(E, tokens(1).shape[-1], generator=generator), dim=-1)
    noise = torch.randn(images, S, middle.shape[-1], generator=generator)
    return middle[torch.arange(images * S) % E].view(images, S, -1) + 0.05 * noise


def test_a_starved_centroid_moves_to_the_worst_placed_token():
    router, x = kmeans(kmeans_decay=0.5), clusters(4)
    router.centroids[1] = -x[0, 0]  # nobody's
    steps = math.ceil(math.log(STARVED, 0.5))
    for step in range(steps):
        before = router.centroids.clone()
        chosen = router(x).route.expert_R
        assert step == steps - 1 or torch.equal(router.centroids[1], before[1])
    unit = F.normalize(x.view(-1, x.shape[-1]), dim=-1)
    worst = (unit * F.normalize(before, dim=-1)[chosen]).sum(1).argmin()
    torch.testing.assert_close(router.centroids[1], unit[worst])
    assert router.share[1] == pytest.approx(1 / E)


def test_every_bundle_finds_its_centroid():
    router, x = kmeans(), clusters(20)
    router.centroids[:] = x[0, 0] + 0.01 * router.centroids  # as bad a start as can be
    for _ in range(300):
        router(x)
    chosen = router.eval()(x).route.expert_R
    bundle = torch.arange(len(chosen)) % E
    assert all(len(set(chosen[bundle == b].tolist())) == 1 for b in range(E)) and len(set(chosen.tolist())) == E


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_moves_no_centroid(value):
    router, x = kmeans(), tokens(2)
    before = router.centroids.clone()
    router.share[2] = 0.0
    router(torch.full_like(x, value))
    assert torch.equal(router.centroids, before) and router.share.isfinite().all()


def test_a_batch_without_tokens_changes_nothing():
    router = kmeans()
    router.share[2] = 0.0
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    router(tokens(0))
    assert all(torch.equal(buffer, before[name]) for name, buffer in router.named_buffers())


def test_centroids_start_from_the_seed_each_layer_its_own():
    one, again = (build(small("model.router=kmeans")) for _ in range(2))
    other = build(small("model.router=kmeans", "train.seed=1"))
    pairs = zip(one.state_dict().items(), again.state_dict().items(), other.state_dict().items(), strict=True)
    found = []
    for (name, a), (_, b), (_, c) in pairs:
        if name.endswith(".centroids"):
            found.append(a)
            assert torch.equal(a, b) and not torch.equal(a, c)
            torch.testing.assert_close(a.norm(dim=1), torch.ones(len(a)))
    assert len(found) == 2 and not torch.equal(*found)


@pytest.mark.parametrize("recompute", ["none", "moe", "blocks", "all"])
def test_centroids_move_once_a_micro_batch(recompute, monkeypatch):
    calls = []
    follow = KMeansRouter.follow
    monkeypatch.setattr(KMeansRouter, "follow", lambda self, *a: calls.append(self) or follow(self, *a))
    model = build(small("model.router=kmeans", f"parallel.recompute={recompute}"))
    x, labels = torch.randn(4, 4, 8, 8), torch.tensor([1, 2, 3, 10])
    prediction, _ = model(x, torch.full((4,), 500.0), labels, 3)
    prediction.sum().backward()
    assert len(calls) == len(model.config.moe_blocks) == len(set(map(id, calls)))


# ---- at any layout


def buffers(folder: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder_of(folder, step))
    return {name: checkpoint.buffer(name) for name in checkpoint.manifest["buffers"]}


def same_everywhere(overrides: tuple[str, ...], folder: str) -> dict[str, torch.Tensor]:
    """Trains, and returns what this rank's running statistics are in the end."""
    kept = []
    train((*overrides, "model.router=kmeans"), folder, 4, lambda model, mesh: kept.append(model))
    return {n: b.clone() for n, b in kept[0].named_buffers() if "router" in n}


def test_centroids_of_all_ranks_are_the_same_and_saved(tmp_path):
    folders = [tmp_path / name for name in ("one", "four")]
    for folder in folders:
        folder.mkdir()
    run(1, same_everywhere, (), str(folders[0]))
    ranks = run(4, same_everywhere, ("parallel.tp=2", "parallel.ep=2"), str(folders[1]))
    alone, four = (buffers(folder, 4) for folder in folders)
    start = {n: b for n, b in build(small("model.router=kmeans")).named_buffers() if "router" in n}
    assert set(alone) == set(start) and len(alone) == 4
    for name, value in alone.items():
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


def test_a_run_goes_on_with_its_centroids_at_another_layout(tmp_path):
    settings = ("model.router=kmeans", "model.kmeans_decay=0.5", "train.save_every=0", "train.log_every=1")
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    run(1, train_run, str(straight), *settings, "train.steps=6")
    run(2, train_run, str(moved), *settings, "train.steps=3", "parallel.ep=2")
    run(2, train_run, str(moved), *settings, "train.steps=6", "parallel.tp=2")
    expected, found = buffers(straight / "checkpoints", 6), buffers(moved / "checkpoints", 6)
    assert expected.keys() == found.keys() and len(found) == 4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert losses(moved) == pytest.approx(losses(straight), rel=1e-5)


def test_no_published_checkpoint_is_of_a_guided_router():
    for router in ("classification", "kmeans"):
        with pytest.raises(ConversionError, match=f"model.router = {router} was never published"):
            check_published(small(f"model.router={router}"), Path("x.pth"))
    check_published(small(), Path("x.pth"))
