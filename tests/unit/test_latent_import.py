"""Published latents: imported as ProMoE's release makes them, and refused with the reason."""

import zipfile

import numpy as np
import pytest
from support.latent_folders import published, write

from megapromoe.data.images import ImageError
from megapromoe.data.importing import PublishedLatents
from megapromoe.data.latents import Latents

pytestmark = pytest.mark.usefixtures("impatient")


def test_published_latents_are_imported(tmp_path):
    arrays = published(tmp_path / "npz")
    data = Latents(write(tmp_path / "l", PublishedLatents(tmp_path / "npz", dtype="float32"), 2, 4))
    assert data.shape == (4, 4, 4) and data.stochastic and data.manifest.mirror == "stored" and len(data) == 6
    normal = np.random.default_rng(9).standard_normal((1, 4, 4, 4)).astype(np.float32)
    for index in range(6):
        for view in (0, 1):
            mean, logvar = np.split(arrays[data.name(index)][view], 2)
            expected = (mean + np.exp(0.5 * logvar.clip(-30, 20)) * normal[0]) * 0.18215
            drawn = data.sample(np.array([index]), np.array([view == 1]), normal)[0]
            assert np.allclose(drawn, expected, atol=1e-5)
        assert data.name(index).startswith(f"n{data.labels[index]}/")
    assert data.raw(0)[0, 1].min() == -30


def test_published_values_without_mirror_images(tmp_path):
    arrays = published(tmp_path / "npz", flip=False)
    data = Latents(write(tmp_path / "l", PublishedLatents(tmp_path / "npz", "latent", 1.0, dtype="float32")))
    assert data.shape == (8, 4, 4) and not data.stochastic and data.manifest.mirror == "none"
    drawn = data.sample(np.array([2]), np.zeros(1, bool), None)
    assert np.array_equal(drawn[0], arrays[data.name(2)][0])


def test_published_files_that_are_wrong(tmp_path):
    published(tmp_path / "other", lambda c: {"moments": c["latent"]})
    data = Latents(write(tmp_path / "l1", PublishedLatents(tmp_path / "other")))
    assert len(data) == 5 and data.manifest.skipped[0][0] == "n1/im3.latent.npz"
    assert "holds moments, but no `latent`" in data.manifest.skipped[0][1]
    published(tmp_path / "pickle", lambda c: {"latent": np.array([{}], dtype=object)})
    assert (
        "allow_pickle" in Latents(write(tmp_path / "l2", PublishedLatents(tmp_path / "pickle"))).manifest.skipped[0][1]
    )
    published(tmp_path / "header")
    header = b"\x93NUMPY\x01\x00\x06\x00{'a':("
    with zipfile.ZipFile(tmp_path / "header" / "n1" / "im3.latent.npz", "w") as archive:
        archive.writestr("latent.npy", header)
    skipped = Latents(write(tmp_path / "l4", PublishedLatents(tmp_path / "header"))).manifest.skipped
    assert [name for name, _ in skipped] == ["n1/im3.latent.npz"], "numpy ends in a tokenize.TokenError"
    published(tmp_path / "mixed", lambda c: {name: a[:, :2] for name, a in c.items()})
    with pytest.raises(
        ImageError, match=r"n1/im3.latent.npz: holds \(8, 2, 4\).*2 of \(8, 4, 4\); all files must have the same shapes"
    ):
        write(tmp_path / "l3", PublishedLatents(tmp_path / "mixed"))
    published(tmp_path / "odd", lambda c: c)
    for path in (tmp_path / "odd").rglob("*.npz"):
        np.savez(path, latent=np.zeros((3, 4, 4), np.float32))
    with pytest.raises(ImageError, match="3 channels cannot be a mean and a log-variance"):
        PublishedLatents(tmp_path / "odd")
    for path in (tmp_path / "odd").rglob("*.npz"):
        path.write_text("")
    with pytest.raises(ImageError, match="none of 6 files can be read"):
        PublishedLatents(tmp_path / "odd")
