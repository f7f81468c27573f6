"""Figures against independent references; networks that are what they say; all of it on digits, at 1 and 2 ranks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import parallel
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy import linalg
from test_sampling import ALONE, as_job, launched, run, stirred_run  # noqa: F401, `run` is a fixture

from megapromoe.commands import evaluate as command
from megapromoe.diffusion.drawing import SampleError
from megapromoe.evaluation import features, quality, quality_report
from megapromoe.evaluation.features import FeatureError, open_network
from megapromoe.evaluation.image_sets import ImageSet, ImageSetError, open_array
from megapromoe.evaluation.inception import CLASSES, Inception, resize
from megapromoe.evaluation.pixels import open_pixels
from megapromoe.evaluation.quality import Evaluation, EvaluationError
from megapromoe.evaluation.sampling import Request
from megapromoe.evaluation.statistics import Moments, Normal, Score, frechet_distance, precision_recall
from megapromoe.options import ConfigError
from megapromoe.training.checkpoint_file import steps_in
from megapromoe.training.runtime import Launch


def vectors(count, dim, seed=0, offset=0.0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, dim)) @ generator.standard_normal((dim, dim)) + offset


def normal(x):
    return Normal(torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x, rowvar=False)), len(x))


# ---- statistics


def moments_of(x, sizes, launch=ALONE):
    moments = Moments(x.shape[1])
    for part in torch.from_numpy(x).split(sizes):
        moments.update(part)
    return moments.normal(launch)


def moments_of_a_rank(x):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return [t.numpy() if torch.is_tensor(t) else t for t in moments_of(x[rank::world], 7, Launch("t", rank, world))]


def test_moments_in_one_pass():
    x = vectors(50, 6, offset=1e6)  # far from zero, where sums of squares cancel
    found = moments_of(x, [1, 30, 19])
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-8)
    assert found.count == 50
    for mean, covariance, count in parallel.run(3, moments_of_a_rank, x):
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-8)
        assert count == 50
    with pytest.raises(ValueError, match="two vectors"):
        moments_of(x[:1], [1])


def published_frechet(a, b):
    """By the square root of the product of covariances, as pytorch-fid and guided-diffusion compute it."""
    (m, A), (n, B) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    return (m - n) @ (m - n) + np.trace(A) + np.trace(B) - 2 * np.trace(linalg.sqrtm(A @ B).real)


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
    launch = Launch("t", torch.distributed.get_rank(), torch.distributed.get_world_size())
    return precision_recall(torch.from_numpy(real), torch.from_numpy(drawn), launch=launch)


def test_precision_and_recall_are_the_published_ones(monkeypatch):
    monkeypatch.setattr("megapromoe.evaluation.statistics._ROWS", 16)
    real, drawn = vectors(60, 5, 1), vectors(45, 5, 1) * 0.7 + 0.5
    real[7] = real[8] = real[9]  # equal ones
    for k in (1, 3):
        found = precision_recall(torch.from_numpy(real), torch.from_numpy(drawn), k)
        assert found == published_precision_recall(real, drawn, k)
        assert 0 < found[0] < 1 and 0 < found[1] < 1
    same = torch.from_numpy(real)
    assert precision_recall(same, same) == (1.0, 1.0)
    assert precision_recall(same, same + 1e3) == (0.0, 0.0)
    assert precision_recall(torch.zeros(5, 2), torch.zeros(4, 2)) == (1.0, 1.0)  # on the rim is within
    with pytest.raises(ValueError, match="4 are needed"):
        precision_recall(same, same[:3])


def test_ranks_share_out_precision_and_recall():
    real, drawn = vectors(1200, 4, 1), vectors(600, 4, 2) * 0.7 + 0.5  # more than a chunk of rows for each
    alone = precision_recall(torch.from_numpy(real), torch.from_numpy(drawn))
    assert parallel.run(2, precision_recall_of_a_rank, real, drawn) == [alone, alone]


# ---- sets of images


def test_an_npz_is_read_from_where_it_lies(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", arr_0=images, mu=np.arange(3.0))
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(images))
    for name in ("plain", "packed"):
        opened = ImageSet(tmp_path / f"{name}.npz")
        assert (len(opened), opened.shape) == (7, (4, 4, 3))
        np.testing.assert_array_equal(opened.read(2, 6), images[2:6])
    assert isinstance(open_array(tmp_path / "plain.npz", "arr_0"), np.memmap)
    np.testing.assert_array_equal(open_array(tmp_path / "plain.npz", "mu"), np.arange(3.0))
    np.savez(tmp_path / "floats.npz", arr_0=images.astype(float))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    for name, match in (("floats", "images are uint8"), ("objects", "pickle"), ("text", "no .npz archive")):
        with pytest.raises(ImageSetError, match=match):
            ImageSet(tmp_path / f"{name}.npz")
    with pytest.raises(ImageSetError, match="has no mu"):
        open_array(tmp_path / "packed.npz", "mu")


def test_a_folder_of_pictures_is_a_set(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((5, 4, 3), 10 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    pictures = ImageSet(tmp_path)
    assert (len(pictures), pictures.shape) == (3, (5, 4, 3)) and pictures.read(1, 3)[:, 0, 0, 0].tolist() == [10, 20]
    Image.fromarray(np.zeros((5, 5, 3), dtype=np.uint8)).save(tmp_path / "3.png")
    (tmp_path / "4.png").write_bytes(b"no picture")
    with pytest.raises(ImageSetError, match="3.png.*all must be alike"):
        pictures = ImageSet(tmp_path)
        pictures.read(2, 4)
    with pytest.raises(ImageSetError, match="4.png: cannot be read"):
        pictures.read(4, 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageSetError, match="holds no picture"):
        ImageSet(tmp_path / "empty")


# ---- networks


def test_the_classifier_of_digits_is_the_same_each_time():
    torch.set_num_threads(2)
    one, real = open_network("digits", "cpu"), open_pixels("digits")
    torch.set_num_threads(1)
    assert one.sha256 == open_network("digits", "cpu").sha256
    assert not one.standard and one.title("FID", "Fréchet distance") == "Fréchet distance (digits classifier)"
    seen = one(torch.from_numpy(real.read(0, 2000)))
    assert [f.shape for f in seen] == [(1797, 64), (1797, 112), (1797, 10)]
    assert (seen.probabilities_NK.argmax(1).numpy() == real.labels).mean() > 0.99
    torch.testing.assert_close(seen.probabilities_NK.sum(1), torch.ones(1797))


class Halves(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        y = x.float() / 255
        return y.mean(dim=(2, 3)), y[:, :1, :2, :2], y.mean(dim=(2, 3)).softmax(1)


class Detector(torch.nn.Module):
    """The interface of NVIDIA's."""

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        y = x.float().mean(dim=(2, 3))
        return y if return_features else (y if no_output_bias else y + 9).softmax(1)


def scripted(file: Path, module: torch.nn.Module) -> str:
    torch.jit.script(module).save(str(file))
    return features.sha256_of(file)


def test_torchscript_runs_only_where_it_is_vouched_for(tmp_path, monkeypatch):
    file = tmp_path / "halves.pt"
    sha = scripted(file, Halves())
    with pytest.raises(FeatureError, match=f"a program that runs .*--sha256 {sha}"):
        open_network(str(file), "cpu")
    with pytest.raises(FeatureError, match="its sha256 is"):
        open_network(str(file), "cpu", sha256="0" * 64)
    network = open_network(str(file), "cpu", sha256=sha.upper())
    grey = torch.full((2, 4, 4, 1), 51, dtype=torch.uint8)
    pooled, spatial, probabilities = network(grey)
    assert pooled.tolist() == [[pytest.approx(0.2)] * 3] * 2 and spatial.shape == (2, 4)
    assert probabilities[0].tolist() == [pytest.approx(1 / 3)] * 3
    assert (network.name, network.standard, network.declared) == ("halves", False, False)
    assert open_network(str(file), "cpu", sha, declared_standard=True).declared
    detector = tmp_path / "detector.pt"
    monkeypatch.setitem(features.STANDARD, scripted(detector, Detector()), "inception")
    network = open_network(str(detector), "cpu")
    assert network.standard and not network.declared and network.title("FID", "other") == "FID"
    colours = torch.arange(12, dtype=torch.uint8).view(1, 2, 2, 3)
    pooled, spatial, probabilities = network(colours)
    assert pooled.tolist() == [[4.5, 5.5, 6.5]] and spatial is None
    torch.testing.assert_close(probabilities, torch.tensor([[4.5, 5.5, 6.5]]).softmax(1))


def test_what_is_no_network_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("nothing")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"fc": Path("x")}, tmp_path / "pickle.pth")
    for name, match in (("text.pt", "no weights"), ("other.pth", "not the weights of"), ("pickle.pth", "no weights")):
        with pytest.raises(FeatureError, match=match):
            open_network(str(tmp_path / name), "cpu")
    with pytest.raises(FeatureError, match="no such file, and none of digits, fashion_mnist"):
        open_network("vgg", "cpu")
    with pytest.raises(FeatureError, match="never the standard network"):
        open_network("digits", "cpu", declared_standard=True)


def test_the_standard_inception_from_its_weights(tmp_path, monkeypatch):
    network = Inception()
    # torchvision's Inception v3 has 27,161,264 parameters, 3,326,696 of them in the auxiliary head; 8 classes more.
    assert sum(p.numel() for p in network.parameters()) == 27_161_264 - 3_326_696 + 8 * 2049
    for parameter in network.parameters():  # weights of full precision would be 95 MB on disk
        parameter.data = parameter.data.half()
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("tracked")}
    torch.save(state, tmp_path / "weights.pth")
    unknown = open_network(str(tmp_path / "weights.pth"), "cpu")
    assert not unknown.standard and unknown.title("FID", "Fréchet distance") == "Fréchet distance (weights)"
    monkeypatch.setitem(features.STANDARD, unknown.sha256, "inception")
    assert open_network(str(tmp_path / "weights.pth"), "cpu").title("FID", "x") == "FID"
    images = torch.randint(0, 256, (2, 9, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pooled, spatial, probabilities = unknown(images)
    assert (pooled.shape, spatial.shape, probabilities.shape) == ((2, 2048), (2, 7 * 17 * 17), (2, CLASSES))
    bare = network.float().eval()
    bare.fc.bias.data += 5 * torch.randn(CLASSES)  # the published score leaves it out
    with torch.no_grad():
        torch.testing.assert_close(bare(images.permute(0, 3, 1, 2))[2], probabilities)


def test_images_are_resized_as_tensorflow_1_did():
    x = np.random.default_rng(0).random((1, 1, 5, 7))
    expected = np.empty((9, 9))
    for i in range(9):
        for j in range(9):
            (a, p), (b, q) = divmod(i * 5 / 9, 1), divmod(j * 7 / 9, 1)
            a, b, c, d = int(a), int(b), min(int(a) + 1, 4), min(int(b) + 1, 6)
            low, high = x[0, 0, a, b] * (1 - q) + x[0, 0, a, d] * q, x[0, 0, c, b] * (1 - q) + x[0, 0, c, d] * q
            expected[i, j] = low * (1 - p) + high * p
    np.testing.assert_allclose(resize(torch.from_numpy(x), 9)[0, 0], expected, rtol=1e-6)


# ---- the whole way


@pytest.fixture(scope="module")
def network():
    return open_network("digits", "cpu")


@pytest.fixture
def trained(network, monkeypatch):
    """Evaluations in this process do not train their classifier anew."""
    monkeypatch.setattr(quality, "open_network", lambda *arguments: network)


def real_digits(file: Path, count: int = 1797) -> np.ndarray:
    images = open_pixels("digits").read(0, count)
    np.savez(file, arr_0=images)
    return images


def test_real_digits_are_as_good_as_real_digits(tmp_path, trained):
    real_digits(tmp_path / "real.npz")
    (record,) = quality.evaluate(Evaluation(None, tmp_path / "real.npz", "digits"), ALONE)
    figures = record["figures"]
    assert all(name.endswith("(digits classifier)") for name in figures) and "FID" not in str(record)
    distance, spatial, score, precision, recall = figures.values()
    assert distance < 1e-4 and spatial < 1e-4 and (precision, recall) == (1.0, 1.0) and 8 < score <= 10
    assert (record["reference"], record["reference_count"], record["count"]) == ("digits", 1797, 1797)


def test_figures_are_those_of_the_features(tmp_path, trained, network):
    images = real_digits(tmp_path / "half.npz", 900)
    other = 255 - open_pixels("digits").read(900, 1797)
    np.savez(tmp_path / "other.npz", arr_0=other)
    (record,) = quality.evaluate(
        Evaluation(None, tmp_path / "half.npz", str(tmp_path / "other.npz"), features="x"), ALONE
    )
    a, b = (network(torch.from_numpy(x)) for x in (images, other))
    expected = [published_frechet(a[i].double().numpy(), b[i].double().numpy()) for i in (0, 1)]
    distance, spatial, _, precision, recall = record["figures"].values()
    assert (distance, spatial) == pytest.approx(expected, rel=1e-4)
    assert (precision, recall) == precision_recall(b.pooled_ND, a.pooled_ND)


def test_a_run_is_evaluated_alike_on_one_rank_and_on_two(run, tmp_path):  # noqa: F811
    """Images are drawn once, by two ranks, and then taken as they are."""
    evaluation = Evaluation(Request(run, tmp_path / "drawn", 130, scales=(1.0, 3.0)), None, "data")
    two, also = as_job(2, tmp_path, quality.evaluate, evaluation)
    one = quality.evaluate(evaluation, ALONE)
    assert [r["guidance"] for r in one] == [1.0, 3.0] and two[0]["figures"] == also[0]["figures"]
    for a, b in zip(one, two, strict=True):
        assert a["figures"] == pytest.approx(b["figures"], rel=1e-9)
        assert a["images"] == b["images"] and a["features"] == b["features"] and a["step"] == 3
    assert one[0]["figures"] != one[1]["figures"]
    assert len(list((tmp_path / "drawn").iterdir())) == 2
    said = quality_report.table(one)
    assert "130 images of step 3 (ema weights) against digits (1,797 images)" in said and "guidance 3" in said
    quality_report.append(one, tmp_path / "evaluation.jsonl")
    quality_report.append(one[:1], tmp_path / "evaluation.jsonl")
    assert [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()] == [*one, one[0]]
    quality_report.plot(one, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 300
    with pytest.raises(EvaluationError, match="the figures are above"):
        quality_report.append(one, tmp_path)


@pytest.fixture(scope="module")
def long_run(run, tmp_path_factory):  # noqa: F811
    """A run that kept two checkpoints, of different weights: steps 3 and 1200."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("long") / "run")
    other = tmp_path_factory.mktemp("other")
    parallel.run(1, stirred_run, str(other), "model.num_experts=3", "train.seed=5")
    later = shutil.copytree(other / "checkpoints" / "step-00000003", folder / "checkpoints" / "step-00001200")
    manifest = json.loads((later / "manifest.json").read_text())
    (later / "manifest.json").write_text(json.dumps(manifest | {"step": 1200}))
    return folder


def evaluate_where_the_first_sees_more(evaluation, launch):
    """As on a file system that shows what was saved to some machines later than to others."""
    if launch.rank > 0:
        quality.steps_in = lambda root: [3]
    return quality.evaluate(evaluation, launch)


def test_every_step_is_as_each_alone(long_run, tmp_path, trained, network, monkeypatch):
    request = Request(long_run, tmp_path / "drawn", 130, scales=(1.0, 3.0))
    both = as_job(2, tmp_path, evaluate_where_the_first_sees_more, Evaluation(request, None, "data", every_step=True))
    figures = [[record["figures"] for record in records] for records in both]
    assert figures[0] == figures[1] and len(list((tmp_path / "drawn").iterdir())) == 4
    calls, look = [], quality.look
    monkeypatch.setattr(quality, "open_network", lambda *arguments: calls.append("opened") or network)
    monkeypatch.setattr(quality, "look", lambda *arguments: calls.append(arguments[3]) or look(*arguments))
    records = quality.evaluate(Evaluation(request, None, "data", every_step=True), ALONE)
    assert calls[:2] == ["opened", "reference"] and len(calls) == 2 + 4 and len(set(calls)) == 6
    assert [(r["step"], r["guidance"]) for r in records] == [(3, 1.0), (3, 3.0), (1200, 1.0), (1200, 3.0)]
    alone = []
    for step in (3, 1200):
        alone += quality.evaluate(Evaluation(replace(request, step=step), None, "data"), ALONE)
    for one, other, job in zip(records, alone, both[0], strict=True):
        assert one["figures"] == other["figures"] == pytest.approx(job["figures"], rel=1e-9)
        assert one["images"] == other["images"] == job["images"]
    assert records[0]["figures"] != records[2]["figures"]


def test_checkpoints_that_go_or_are_not_there_are_named(long_run, tmp_path, trained, monkeypatch):
    none = tmp_path / "none"
    none.mkdir()
    (none / "config.yaml").write_text((long_run / "config.yaml").read_text())
    evaluation = Evaluation(Request(long_run, tmp_path / "drawn", 130), None, "data", every_step=True)
    monkeypatch.setattr(quality, "steps_in", lambda root: [3, 7, 1200])
    with pytest.raises(SampleError, match="step = 7: .* no such checkpoint; there are 3, 1200"):
        quality.evaluate(evaluation, ALONE)
    assert len(list((tmp_path / "drawn").glob("step-00000003-*"))) == 1, "what was drawn by then is kept"
    monkeypatch.setattr(quality, "steps_in", steps_in)
    with pytest.raises(SampleError, match="holds no complete checkpoint"):
        quality.evaluate(replace(evaluation, request=replace(evaluation.request, run=none)), ALONE)


def record_of(step, guidance, distance):
    features = {"name": "x", "standard": False, "declared": False}
    said = {"count": 130, "reference": "digits", "reference_count": 1797, "features": features, "weights": "ema"}
    return said | {"step": step, "guidance": guidance, "figures": {"Fréchet distance (x)": distance}}


def test_a_table_and_a_picture_of_several_steps(tmp_path, monkeypatch):
    records = [record_of(*values) for values in ((3, 1.0, 9.0), (3, 2.0, 8.0), (1200, 1.0, 5.0), (1200, 2.0, 4.5))]
    first, steps, scales, line = quality_report.table(records).splitlines()
    assert first.startswith("130 images of each of 2 steps (ema weights) against digits (1,797 images)")
    assert steps.split("  ")[-1].strip() == "step 1,200" and steps.count("step 3") == 2
    assert [steps.index("step 3"), scales.index("guidance 1")] < [steps.index("step 1,200"), scales.index("guidance 2")]
    assert len(steps) == len(scales) == len(line) and line.split()[-4:] == ["9", "8", "5", "4.5"]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    quality_report.plot(records[::-1], tmp_path / "steps.png")
    quality_report.plot(records[:2], tmp_path / "scales.png")
    over_steps, over_scales = drawn
    lines = {line.get_label(): line.get_xydata().tolist() for line in over_steps.lines}
    assert lines == {"guidance 1": [[3, 9], [1200, 5]], "guidance 2": [[3, 8], [1200, 4.5]]}
    assert (over_steps.get_xlabel(), over_scales.get_xlabel()) == ("step", "guidance scale")
    assert [line.get_xydata().tolist() for line in over_scales.lines] == [[[1, 9], [2, 8]]]
    assert "step" not in over_steps.get_title().replace("of each step", "") and "step 3," in over_scales.get_title()


def test_statistics_of_a_reference_hold_for_the_standard_network_alone(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "drawn.npz", arr_0=images)
    mean, covariance = np.array([100.0, 120.0, 140.0]), np.diag([3.0, 4.0, 5.0])
    np.savez(tmp_path / "real.npz", mu=mean, sigma=covariance)
    file = tmp_path / "detector.pt"
    sha = scripted(file, Detector())
    evaluation = Evaluation(None, tmp_path / "drawn.npz", str(tmp_path / "real.npz"), features=str(file), sha256=sha)
    with pytest.raises(EvaluationError, match="holds mu, sigma; images .arr_0. are needed"):
        quality.evaluate(evaluation, ALONE)
    monkeypatch.setitem(features.STANDARD, sha, "inception")
    (record,) = quality.evaluate(evaluation, ALONE)
    assert list(record["figures"]) == ["FID", "Inception score"]
    x = images.reshape(20, 16, 3).astype(float).mean(1)
    expected = frechet_distance(normal(x), Normal(torch.from_numpy(mean), torch.from_numpy(covariance), 0))
    assert record["figures"]["FID"] == pytest.approx(expected, rel=1e-5)
    np.savez(tmp_path / "real.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(EvaluationError, match="its pooled statistics are not of inception"):
        quality.evaluate(evaluation, ALONE)


def test_what_cannot_be_compared_is_said_before_anything_is_drawn(run, tmp_path, trained):  # noqa: F811
    request = Request(run, tmp_path / "drawn", 112)
    with pytest.raises(EvaluationError, match="112 images are too few for the covariance of 112 .*use --num 113"):
        quality.evaluate(Evaluation(request, None, "data"), ALONE)
    real_digits(tmp_path / "few.npz", 50)
    with pytest.raises(EvaluationError, match="few.npz: 50 images are too few .*113 are needed"):
        quality.evaluate(
            Evaluation(Request(run, tmp_path / "drawn", 113), None, str(tmp_path / "few.npz"), features="digits"), ALONE
        )
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((200, 9, 9, 1), dtype=np.uint8))
    with pytest.raises(EvaluationError, match="the images are 8x8x1, the reference 9x9x1") as error:
        quality.evaluate(Evaluation(request, None, str(tmp_path / "large.npz"), features="digits"), ALONE)
    assert "looks at images of 8x8x1, not 9x9x1" in str(error.value)
    for wrong, match in (
        (Evaluation(None, tmp_path / "few.npz", "data", features="digits"), "is what a run trains on"),
        (Evaluation(None, tmp_path / "few.npz", "gone.npz", features="digits"), "no such file or folder"),
        (Evaluation(None, tmp_path / "few.npz", str(tmp_path / "large.npz")), "give --features FILE"),
        (Evaluation(request, None, "data", split="test"), "no test split"),
    ):
        with pytest.raises(EvaluationError, match=match):
            quality.evaluate(wrong, ALONE)
    assert not (tmp_path / "drawn").exists()


def test_features_must_be_finite(tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor):
            return x.float().mean(dim=(2, 3)) / (x[:, 0].float().amax(dim=(1, 2)) - 7.0).unsqueeze(1) * 0 + 1

    images = np.zeros((80, 4, 4, 3), dtype=np.uint8)
    images[70] = 7  # 7 / 0
    np.savez(tmp_path / "set.npz", arr_0=images)
    sha = scripted(tmp_path / "broken.pt", Broken())
    wrong = Evaluation(None, tmp_path / "set.npz", str(tmp_path / "set.npz"), "train", str(tmp_path / "broken.pt"), sha)
    with pytest.raises(EvaluationError, match=r"not finite at images 64\.\.79"):
        quality.evaluate(wrong, ALONE)


# ---- the command


def parsed(*words):
    import argparse

    parser = argparse.ArgumentParser()
    command.arguments(parser)
    options = parser.parse_args(words)
    options.overrides = []
    return options


def test_the_command_evaluates_prints_and_keeps(run, tmp_path, trained, capsys):  # noqa: F811
    words = ["--run", str(run), "--num", "120", "--guidance", "1", "2", "--samples", str(tmp_path / "kept")]
    assert command.run(parsed(*words, "--plot", str(tmp_path / "plot.png")), ALONE) == 0
    assert "Fréchet distance (digits classifier)" in capsys.readouterr().out
    assert command.run(parsed(*words, "--json"), ALONE) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kept = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [r["guidance"] for r in said] == [1.0, 2.0] and kept[2:] == said
    assert [r["figures"] for r in kept[:2]] == [r["figures"] for r in said]
    assert (tmp_path / "plot.png").is_file()


def test_the_command_evaluates_every_step(long_run, tmp_path, trained, capsys):
    words = ["--run", str(long_run), "--num", "120", "--guidance", "1.5", "--samples", str(tmp_path / "kept")]
    assert command.run(parsed(*words, "--every-step", "--plot", str(tmp_path / "plot.png")), ALONE) == 0
    said = capsys.readouterr().out
    assert said.startswith("120 images of each of 2 steps (ema weights)") and "step 1,200" in said
    kept = [json.loads(line) for line in (long_run / "evaluation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in kept] == [3, 1200] and (tmp_path / "plot.png").is_file()
    assert command.run(parsed(*words, "--json"), ALONE) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 1200, "the last one, where nothing is said"


@pytest.mark.parametrize(
    "words, said",
    [
        ([], ["give one of them"]),
        (["--run", "r", "--images", "i"], ["give one of them"]),
        (["--run", "r"], ["--num: is needed"]),
        (["--images", "i", "--num", "5", "--plot", "p"], ["--num: is for", "--plot: is for", "--reference: is needed"]),
        (["--run", "r", "--every-step", "--step", "3"], ["--num: is needed", "--every-step, --step 3: give one"]),
        (["--images", "i", "--every-step"], ["--every-step: is for drawing", "--reference: is needed"]),
    ],
)
def test_options_that_do_not_go_together(words, said):
    with pytest.raises(ConfigError) as error:
        command.run(parsed(*words), ALONE)
    assert all(part in str(error.value) for part in said)
