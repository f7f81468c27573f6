"""Networks that give features: they are what they say, and what they say holds for the figures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.reference_statistics import normal
from support.sampled_runs import ALONE

from megapromoe.evaluation import features, image_metrics
from megapromoe.evaluation.features import FeatureError, open_network
from megapromoe.evaluation.image_metrics import Evaluation, EvaluationError
from megapromoe.evaluation.inception import CLASSES, Inception, resize
from megapromoe.evaluation.pixels import open_pixels
from megapromoe.evaluation.statistics import Normal, frechet_distance
from megapromoe.sampling.image_sets import ImageSet, ImageSetError


@pytest.mark.full
def test_the_classifier_of_digits_is_the_same_each_time():
    torch.set_num_threads(2)
    network, real = open_network("digits", "cpu"), open_pixels("digits")
    torch.set_num_threads(1)
    assert network.sha256 == open_network("digits", "cpu").sha256
    assert not network.standard and network.title("FID", "Fréchet distance") == "Fréchet distance (digits classifier)"
    features_of_train = network(torch.from_numpy(real.read(0, 2000)))
    assert [f.shape for f in features_of_train] == [(1797, 64), (1797, 112), (1797, 10)]
    assert (features_of_train.probabilities_NK.argmax(1).numpy() == real.labels).mean() > 0.99
    torch.testing.assert_close(features_of_train.probabilities_NK.sum(1), torch.ones(1797))


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
    with pytest.raises(FeatureError, match=f"loading it runs its code.*--sha256 {sha}"):
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
    with pytest.raises(FeatureError, match="nor the standard network"):
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


def test_statistics_of_a_reference_hold_for_the_standard_network_alone(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "drawn.npz", arr_0=images)
    mean, covariance = np.array([100.0, 120.0, 140.0]), np.diag([3.0, 4.0, 5.0])
    np.savez(tmp_path / "real.npz", mu=mean, sigma=covariance)
    file = tmp_path / "detector.pt"
    sha = scripted(file, Detector())
    evaluation = Evaluation(None, tmp_path / "drawn.npz", str(tmp_path / "real.npz"), features=str(file), sha256=sha)
    with pytest.raises(EvaluationError, match="contains mu, sigma; images .arr_0. are needed"):
        image_metrics.evaluate(evaluation, ALONE)
    monkeypatch.setitem(features.STANDARD, sha, "inception")
    (record,) = image_metrics.evaluate(evaluation, ALONE)
    assert list(record["figures"]) == ["FID", "Inception score"]
    x = images.reshape(20, 16, 3).astype(float).mean(1)
    expected = frechet_distance(normal(x), Normal(torch.from_numpy(mean), torch.from_numpy(covariance), 0))
    assert record["figures"]["FID"] == pytest.approx(expected, rel=1e-5)
    np.savez(tmp_path / "real.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(EvaluationError, match="its pooled statistics are not of inception"):
        image_metrics.evaluate(evaluation, ALONE)


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
        image_metrics.evaluate(wrong, ALONE)


class Small(torch.nn.Module):
    """One feature, of images of 4 x 4 alone."""

    def forward(self, x: torch.Tensor):
        return x.view(len(x), -1, 16).float().mean(dim=(1, 2)).unsqueeze(1)


def test_data_that_a_network_cannot_take_is_reported(tmp_path):
    file = tmp_path / "small.pt"
    sha = scripted(file, Small())
    for name, count, side in (("real", 9, 4), ("few", 3, 4), ("wide", 9, 5)):
        images = np.random.default_rng(count).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)

    def evaluated(images, reference):
        paths = tmp_path / f"{images}.npz", str(tmp_path / f"{reference}.npz")
        return image_metrics.evaluate(Evaluation(None, *paths, features=str(file), sha256=sha), ALONE)

    with pytest.raises(EvaluationError, match=r"small.pt: fails on uint8 images \(1, 3, 5, 5\) \(.*size"):
        evaluated("wide", "wide")
    for images, reference, counts in (("few", "real", "3 images against 9"), ("real", "few", "9 images against 3")):
        with pytest.raises(EvaluationError, match=f"{counts}: precision and recall need 4 of each"):
            evaluated(images, reference)
    assert evaluated("real", "real")[0]["figures"]["precision (small)"] == 1.0


def test_statistics_of_spatial_features_alone_are_no_reference(tmp_path, monkeypatch):
    np.savez(tmp_path / "drawn.npz", arr_0=np.zeros((20, 4, 4, 3), dtype=np.uint8))
    np.savez(tmp_path / "real.npz", mu_s=np.zeros(3), sigma_s=np.eye(3))
    sha = scripted(tmp_path / "detector.pt", Detector())
    monkeypatch.setitem(features.STANDARD, sha, "inception")
    paths = tmp_path / "drawn.npz", str(tmp_path / "real.npz")
    with pytest.raises(EvaluationError, match="contains mu_s, sigma_s; images .arr_0. are needed, or mu and sigma"):
        image_metrics.evaluate(Evaluation(None, *paths, features=str(tmp_path / "detector.pt")), ALONE)


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3)}
NAN, TEXT = np.array([1.0, np.nan, np.inf]), np.array(["a", "b", "c"])


@pytest.mark.parametrize(
    "arrays, match",
    [
        ({"mu": NAN}, "2 of the 3 values of mu are not finite"),
        ({"sigma": np.full((3, 3), np.nan)}, "9 of the 9 values of sigma are not finite"),
        (
            {"mu": np.zeros((1, 3))},
            r"mu \(1, 3\), sigma \(3, 3\): a mean has the shape \(D,\), its covariance \(D, D\)",
        ),
        ({"mu": np.array(0.0)}, r"mu \(\), sigma \(3, 3\): a mean"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu \(0,\), sigma \(0, 0\): a mean"),
        ({"sigma": np.ones(3)}, r"mu \(3,\), sigma \(3,\): a mean"),
        ({"sigma": np.eye(4)}, r"mu \(3,\), sigma \(4, 4\): a mean"),
        ({"sigma": np.zeros((3, 4))}, r"sigma \(3, 4\): a mean"),
        ({"mu": TEXT}, "mu holds <U1 values, not real numbers"),
        ({"sigma": np.eye(3, dtype=complex)}, "sigma holds complex128 values, not real numbers"),
        ({"mu": np.array([{}, {}, {}])}, "mu .*pickle"),
        ({"sigma": np.tri(3)}, "sigma is not symmetric"),
        ({"sigma": -np.eye(3)}, "sigma has a variance below 0"),
        ({"sigma": np.eye(3) * 1e308}, r"sigma has values up to 1e\+308, which features do not have"),
        ({"mu_s": NAN, "sigma_s": np.eye(3)}, "2 of the 3 values of mu_s are not finite"),
    ],
)
def test_statistics_that_are_none_are_refused(arrays, match, tmp_path, monkeypatch):
    np.savez(tmp_path / "drawn.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8))
    np.savez(tmp_path / "real.npz", **GOOD | arrays)
    file = tmp_path / "detector.pt"
    monkeypatch.setitem(features.STANDARD, scripted(file, Detector()), "inception")
    paths = tmp_path / "drawn.npz", str(tmp_path / "real.npz")
    with pytest.raises(EvaluationError, match=match) as error:
        image_metrics.evaluate(Evaluation(None, *paths, features=str(file)), ALONE)
    assert "real.npz" in str(error.value) and ";" in str(error.value)


def test_an_empty_set_is_refused(tmp_path):
    np.savez(tmp_path / "empty.npz", arr_0=np.zeros((0, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(ImageSetError, match=r"arr_0 is uint8 \(0, 4, 4, 3\); images are .*, one at least"):
        ImageSet(tmp_path / "empty.npz")


class Logits(torch.nn.Module):
    """Returns what are no probabilities."""

    def forward(self, x: torch.Tensor):
        y = x.float().mean(dim=(2, 3))
        return y, y[:, :1], y - 128


def test_a_figure_that_is_not_finite_is_no_result(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8))
    sha = scripted(tmp_path / "logits.pt", Logits())
    wrong = Evaluation(None, tmp_path / "x.npz", str(tmp_path / "x.npz"), "train", str(tmp_path / "logits.pt"), sha)
    with pytest.raises(EvaluationError, match=r"features = logits: classifier score \(logits\) is nan, so the network"):
        image_metrics.evaluate(wrong, ALONE)
