"""The classification and the k-means router, against the formulas."""

import math
from pathlib import Path

import pytest
import torch
from support.router_cases import E, S, config_of, filled, tokens
from support.trajectory import small
from torch.nn import functional as F

from megapromoe.conversion.state import check_published
from megapromoe.conversion.stream import ConversionError
from megapromoe.nn.moe.guided_routers import DEAD_EXPERT_SHARE, NO_SUPERCLASS, KMeansRouter
from megapromoe.nn.moe.layer import ROUTERS
from megapromoe.nn.parallelize import build

CLASSES = 10


def classifier(**changes):
    router = filled(ROUTERS["classification"](config_of(router="classification", num_classes=CLASSES, **changes)))
    router.superclass_of_class.copy_(torch.tensor([*(c % E for c in range(CLASSES)), NO_SUPERCLASS]))
    return router


def kmeans(**changes) -> KMeansRouter:
    router = ROUTERS["kmeans"](config_of(router="kmeans", **changes)).train()
    generator = torch.Generator().manual_seed(3)
    router.centroids.copy_(F.normalize(torch.randn(router.centroids.shape, generator=generator), dim=-1))
    router.share.fill_(1 / E)
    return router


# ---- classification


@pytest.mark.parametrize("training", [True, False])
def test_an_image_goes_to_the_predicted_superclass(training):
    router, x = classifier().train(training), tokens(4)
    routed = router(x, torch.tensor([1, 2, 3, 9]))
    for b in range(4):
        logits = router.classifier(x[b].mean(0))
        rows = slice(b * S, (b + 1) * S)
        assert routed.assignment.token_R[rows].tolist() == list(range(b * S, (b + 1) * S))
        assert set(routed.assignment.expert_R[rows].tolist()) == {int(logits.argmax())}
        torch.testing.assert_close(routed.assignment.weight_R[rows], logits.softmax(0).max().expand(S))
    assert routed.assignment.top_k == 1 and routed.losses.keys() == ({"classification"} if training else set())


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
    assert router(x, labels).assignment.expert_R.view(4, S)[:3, 0].tolist() == [7 % E, 0, 4]


def test_no_loss_without_labelled_images():
    router = classifier().train()
    for images, labels in ((2, [CLASSES, CLASSES]), (0, [])):
        loss = router(tokens(images), torch.tensor(labels, dtype=torch.int64)).losses["classification"]
        loss.backward()
        assert loss == 0 and not router.classifier.weight.grad.any()


# ---- k-means


@pytest.mark.parametrize("gate", ["identity", "sigmoid"])
def test_a_token_goes_to_the_centroid_with_the_largest_cosine(gate):
    router, x = kmeans(score_function=gate).eval(), tokens(3)
    before = router.centroids.clone()
    routed = router(x)
    cosine_TE = torch.stack(
        [torch.stack([F.cosine_similarity(t, c, dim=0) for c in before]) for t in x.view(-1, x.shape[-1])]
    )
    assert torch.equal(routed.assignment.expert_R, cosine_TE.argmax(1))
    best = cosine_TE.max(1).values
    torch.testing.assert_close(routed.assignment.weight_R, best if gate == "identity" else best.sigmoid())
    assert torch.equal(router.centroids, before) and not routed.losses, "inference updates no centroid"


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_centroids_move_towards_their_tokens(decay):
    router, x = kmeans(kmeans_decay=decay), tokens(3)
    before, unit = router.centroids.clone(), F.normalize(x.view(-1, x.shape[-1]), dim=-1)
    chosen = router(x).assignment.expert_R
    counts = torch.bincount(chosen, minlength=E)
    assert counts.min() > 0
    for e in range(E):
        mean = unit[chosen == e].mean(0)
        torch.testing.assert_close(router.centroids[e], decay * before[e] + (1 - decay) * mean)
    torch.testing.assert_close(router.share, decay / E + (1 - decay) * counts / len(chosen))


def test_only_tokens_learn_from_the_weights():
    router, x = kmeans(), tokens(2).requires_grad_()
    router(x).assignment.weight_R.sum().backward()
    assert x.grad.any() and not list(router.parameters())


def clusters(images: int) -> torch.Tensor:
    """Tokens in E tight clusters."""
    generator = torch.Generator().manual_seed(0)
    middle = F.normalize(torch.randn(E, tokens(1).shape[-1], generator=generator), dim=-1)
    noise = torch.randn(images, S, middle.shape[-1], generator=generator)
    return middle[torch.arange(images * S) % E].view(images, S, -1) + 0.05 * noise


def test_a_dead_centroid_moves_to_the_farthest_token():
    router, x = kmeans(kmeans_decay=0.5), clusters(4)
    router.centroids[1] = -x[0, 0]  # no token is close to it
    steps = math.ceil(math.log(DEAD_EXPERT_SHARE, 0.5))
    for step in range(steps):
        before = router.centroids.clone()
        chosen = router(x).assignment.expert_R
        assert step == steps - 1 or torch.equal(router.centroids[1], before[1])
    unit = F.normalize(x.view(-1, x.shape[-1]), dim=-1)
    farthest = (unit * F.normalize(before, dim=-1)[chosen]).sum(1).argmin()
    torch.testing.assert_close(router.centroids[1], unit[farthest])
    assert router.share[1] == pytest.approx(1 / E)


def test_every_cluster_gets_one_centroid():
    router, x = kmeans(), clusters(20)
    router.centroids[:] = x[0, 0] + 0.01 * router.centroids  # all centroids start in one direction
    for _ in range(300):
        router(x)
    chosen = router.eval()(x).assignment.expert_R
    cluster = torch.arange(len(chosen)) % E
    assert all(len(set(chosen[cluster == b].tolist())) == 1 for b in range(E)) and len(set(chosen.tolist())) == E


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_updates_no_centroid(value):
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
    first, second = (build(small("model.router=kmeans")) for _ in range(2))
    other = build(small("model.router=kmeans", "train.seed=1"))
    pairs = zip(first.state_dict().items(), second.state_dict().items(), other.state_dict().items(), strict=True)
    centroids = []
    for (name, a), (_, b), (_, c) in pairs:
        if name.endswith(".centroids"):
            centroids.append(a)
            assert torch.equal(a, b) and not torch.equal(a, c)
            torch.testing.assert_close(a.norm(dim=1), torch.ones(len(a)))
    assert len(centroids) == 2 and not torch.equal(*centroids)


@pytest.mark.parametrize("recompute", ["none", "moe", "blocks", "all"])
def test_centroids_are_updated_once_a_micro_batch(recompute, monkeypatch):
    calls = []
    update = KMeansRouter.update_centroids
    monkeypatch.setattr(KMeansRouter, "update_centroids", lambda self, *a: calls.append(self) or update(self, *a))
    model = build(small("model.router=kmeans", f"parallel.recompute={recompute}"))
    x, labels = torch.randn(4, 4, 8, 8), torch.tensor([1, 2, 3, 10])
    prediction, _ = model(x, torch.full((4,), 500.0), labels, 3)
    prediction.sum().backward()
    assert len(calls) == len(model.config.moe_blocks) == len(set(map(id, calls)))


def test_no_published_checkpoint_is_of_a_guided_router():
    for router in ("classification", "kmeans"):
        with pytest.raises(ConversionError, match=f"the published format does not support model.router = {router}"):
            check_published(small(f"model.router={router}"), Path("x.pth"))
    check_published(small(), Path("x.pth"))
