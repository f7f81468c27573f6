"""Statistics of features against independent references, in one pass and shared out among ranks."""

import numpy as np
import pytest
import torch
from support import processes
from support.reference_statistics import normal, published_frechet

from megapromoe.evaluation.statistics import Moments, Normal, Score, frechet_distance, precision_recall


def vectors(count, dim, seed=0, offset=0.0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, dim)) @ generator.standard_normal((dim, dim)) + offset


def moments_of(x, sizes):
    moments = Moments(x.shape[1])
    for part in torch.from_numpy(x).split(sizes):
        moments.update(part)
    return moments.normal()


def moments_of_a_rank(x):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    normal = moments_of(x[rank::world], 7)
    return normal.mean.numpy(), normal.covariance.numpy(), normal.count


def test_moments_in_one_pass():
    x = vectors(50, 6, offset=1e6)  # far from zero, where sums of squares cancel
    computed = moments_of(x, [1, 30, 19])
    np.testing.assert_allclose(computed.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(computed.covariance, np.cov(x, rowvar=False), rtol=1e-8)
    assert computed.count == 50
    for mean, covariance, count in processes.run(3, moments_of_a_rank, x):
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-8)
        assert count == 50
    with pytest.raises(ValueError, match="at least two vectors"):
        moments_of(x[:1], [1])


@pytest.mark.parametrize("dim, count", [(3, 50), (64, 300), (200, 2000)])
def test_frechet_distance_is_the_published_one(dim, count):
    a, b = vectors(count, dim, 1), vectors(count + 9, dim, 2, 0.3)
    assert frechet_distance(normal(a), normal(b)) == pytest.approx(published_frechet(a, b), rel=1e-6)


def test_frechet_distance_of_known_distributions():
    a = Normal(torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0])).double(), 9)
    b = Normal(torch.ones(3).double(), torch.diag(torch.tensor([4.0, 4.0, 0.0])).double(), 9)
    assert frechet_distance(a, b) == pytest.approx(3 + (2 - 1) ** 2 + 0 + 3**2, rel=1e-9)  # near and wholly singular
    x = normal(vectors(30, 20, 3))
    assert 0 <= frechet_distance(x, x) < 1e-7 * float(x.covariance.trace())
    few = normal(vectors(21, 20, 3)[:15])  # rank 14 of 20
    apart = Normal(few.mean + 2, few.covariance, 15)
    assert frechet_distance(few, apart) == pytest.approx(20 * 4, rel=1e-6)


def test_inception_score_is_the_published_one():
    p = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(7) * 0.3, 25)).float()
    score = Score(25, 7, split=10)
    for start in (8, 0, 16):
        score.update(start, p[start : start + 8] if start < 16 else p[16:])
    expected = []
    for start in (0, 10, 20):
        part = p[start : start + 10].double().numpy()
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        expected.append(np.exp(kl.sum(1).mean()))
    assert score.value() == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-9)
    sure = Score(4, 2)
    sure.update(0, torch.eye(2).repeat(2, 1))  # log 0
    assert sure.value() == pytest.approx((2.0, 0.0))


def published_precision_recall(real, drawn, k):
    def inside(x, centres):
        radii = [np.sort(np.linalg.norm(centres - c, axis=1))[k] for c in centres]  # 0 is itself
        return np.mean([any(np.linalg.norm(v - c) <= r for c, r in zip(centres, radii, strict=True)) for v in x])

    return inside(drawn, real), inside(real, drawn)


def precision_recall_of_a_rank(real, drawn):
    return precision_recall(torch.from_numpy(real), torch.from_numpy(drawn))


def test_precision_and_recall_are_the_published_ones(monkeypatch):
    monkeypatch.setattr("megapromoe.evaluation.statistics._ROWS", 16)
    real, drawn = vectors(60, 5, 1), vectors(45, 5, 1) * 0.7 + 0.5
    real[7] = real[8] = real[9]  # equal ones
    for k in (1, 3):
        computed = precision_recall(torch.from_numpy(real), torch.from_numpy(drawn), k)
        assert computed == published_precision_recall(real, drawn, k)
        assert 0 < computed[0] < 1 and 0 < computed[1] < 1
    same = torch.from_numpy(real)
    assert precision_recall(same, same) == (1.0, 1.0)
    assert precision_recall(same, same + 1e3) == (0.0, 0.0)
    assert precision_recall(torch.zeros(5, 2), torch.zeros(4, 2)) == (1.0, 1.0)  # on the rim is within
    with pytest.raises(ValueError, match="4 are needed"):
        precision_recall(same, same[:3])


def test_ranks_share_out_precision_and_recall():
    real, drawn = vectors(1200, 4, 1), vectors(600, 4, 2) * 0.7 + 0.5  # more than a chunk of rows for each
    alone = precision_recall(torch.from_numpy(real), torch.from_numpy(drawn))
    assert processes.run(2, precision_recall_of_a_rank, real, drawn) == [alone, alone]
