"""Autoencoders: opened as diffusers saves them, normalised as its pipelines do, refused with the reason."""

import numpy as np
import pytest
import torch
from support.latent_folders import Arrays, write

from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.config.resolve import resolve
from megapromoe.data.autoencoder import AutoencoderError, open_autoencoder, renormalised
from megapromoe.data.contact_sheet import check_same_autoencoder, first_pictures
from megapromoe.data.latents import Latents
from megapromoe.sampling.decoding import normalisation_of_latents, open_decoder
from megapromoe.sampling.preview_writer import PreviewWriter


def test_kl_gives_diffusers_posterior_and_decodes(autoencoders):
    from diffusers import AutoencoderKL

    # As ours: whether parameters want gradients decides, on some CPUs, which kernels run, and so the last bit.
    model = AutoencoderKL.from_pretrained(autoencoders / "kl", low_cpu_mem_usage=False).eval().requires_grad_(False)
    opened = open_autoencoder(str(autoencoders / "kl"))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        posterior = model.encode(x).latent_dist
        mean, logvar = opened.encode(x)
        assert torch.equal(mean, posterior.mean) and torch.equal(logvar, posterior.logvar)
        assert torch.allclose(opened.normalise(mean), mean * 0.18215)
        decoded = model.decode(mean).sample.clamp(-1, 1)
    assert torch.allclose(opened.decode(opened.normalise(mean)), decoded, atol=1e-5)
    assert opened.latent_shape(16) == (2, 8, 8) == tuple(mean.shape[1:]) and opened.resolution(8) == 16
    assert open_autoencoder(str(autoencoders / "pipeline")).identity["sha256"] == opened.identity["sha256"]
    with pytest.raises(AutoencoderError, match="resolution 17 must be a multiple of 2, .*nearest: 16, 18"):
        opened.latent_shape(17)
    with pytest.raises(AutoencoderError, match="latents have 4 channels, .* have 2"):
        opened.decode(torch.zeros(1, 4, 8, 8))


def test_tiny_has_no_variance(autoencoders):
    opened = open_autoencoder(str(autoencoders / "tiny"))
    mean, logvar = opened.encode(torch.zeros(1, 3, 16, 16))
    assert logvar is None and not opened.stochastic and tuple(mean.shape[1:]) == opened.latent_shape(16)
    assert opened.decode(mean).shape == (1, 3, 16, 16)
    assert opened.identity["sha256"] != open_autoencoder(str(autoencoders / "kl")).identity["sha256"]


def test_means_and_deviations_of_channels_are_used_as_diffusers_pipelines_do(autoencoders):
    opened = open_autoencoder(str(autoencoders / "per_channel"))
    raw = torch.randn(3, 2, 4, 4)
    mean, std = (torch.tensor(v).view(1, 2, 1, 1) for v in ([0.5, -1.0], [2.0, 4.0]))
    latents = opened.normalise(raw)
    assert torch.allclose(latents, (raw - mean) * 0.5 / std, atol=1e-6)
    assert torch.allclose(opened.decode(latents), opened.model.decode(raw).sample.clamp(-1, 1), atol=1e-5)


def test_autoencoders_that_cannot_be_opened_are_refused_with_the_reason(autoencoders, tmp_path):
    with pytest.raises(AutoencoderError, match="no such folder, and no owner/name"):
        open_autoencoder("nothing")
    with pytest.raises(AutoencoderError, match="cannot be opened: .*config.json"):
        open_autoencoder(str(tmp_path))
    with pytest.raises(AutoencoderError, match="cannot be opened: .*safetensors"):
        open_autoencoder(str(autoencoders / "pickled"))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(AutoencoderError, match="is a UNet2DModel; give an AutoencoderKL or an AutoencoderTiny"):
        open_autoencoder(str(tmp_path))
    with pytest.raises(AutoencoderError, match="takes 3 channels, the images have 1"):
        open_autoencoder(str(autoencoders / "kl"), channels=1)
    with pytest.raises(AutoencoderError, match="1 or 3 channels, not 4"):
        open_autoencoder("none", channels=4)


def test_an_unnamed_autoencoder_matches_any():
    pixels = open_autoencoder("none")
    check_same_autoencoder({"name": "", "kind": "", "sha256": ""}, pixels)
    check_same_autoencoder(pixels.identity, pixels)
    with pytest.raises(AutoencoderError):
        check_same_autoencoder({"name": "vae", "kind": "AutoencoderKL", "sha256": "00"}, pixels)


def test_latents_are_decoded_with_the_normalisation_of_their_manifest(autoencoders, tmp_path):
    """Latents that were normalised in another way than their autoencoder's own, as --scale and --statistics do it."""
    opened = open_autoencoder(str(autoencoders / "kl"))
    source = Arrays(shape=(2, 4, 4), classes=2)
    source.manifest_fields["autoencoder"] = opened.identity
    folder = write(tmp_path / "latents", source)
    data = Latents(folder)
    assert data.manifest.scale != opened.scale and data.manifest.shift != opened.shift
    raw = torch.from_numpy(data.raw(0)[:1, 0].copy())
    expected = opened.model.decode(raw).sample.clamp(-1, 1)
    normalised = torch.from_numpy(data.read(np.array([0]))[0])

    settings = (f"data.path={folder}", "data.source=latents", "model.in_channels=2", "model.input_size=4")
    config = resolve("digits", overrides=[*settings, "model.num_classes=2", "data.flip=true", "train.warmup=0"])
    run = RunDirectory.open(tmp_path / "run", config, 1)
    run.close()

    def decoded(where) -> torch.Tensor:
        decoder = open_decoder(config, str(autoencoders / "kl"), "cpu", where)
        return decoder.decode(normalised)

    assert torch.allclose(decoded(None), expected, atol=1e-5)
    picture = first_pictures(data, [0], opened)[0]
    known = (list(data.manifest.scale), list(data.manifest.shift))
    assert normalisation_of_latents(config, run.folder) == known
    writer = PreviewWriter(tmp_path / "a.npz", 1, 1, 1, 0, normalisation=known)
    writer.write(0, normalised)
    writer.finish(np.zeros(1, np.int64))
    with np.load(tmp_path / "a.npz") as stored:
        assert np.allclose(stored["images"] / stored["scale"] + stored["shift"], raw.numpy(), atol=1e-5)
    assert np.abs(picture - ((expected[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()).max() <= 1
    (folder / "manifest.json").unlink()  # on another machine, the run directory alone knows it
    assert torch.allclose(decoded(run.folder), expected, atol=1e-5)
    assert normalisation_of_latents(config, run.folder) == known
    assert not torch.allclose(decoded(None), expected, atol=1e-2)
    with pytest.raises(AutoencoderError, match="latents have 3 channels, those of autoencoder .* have 2"):
        renormalised(opened, (1.0,) * 3, (0.0,) * 3)
    assert renormalised(opened, opened.scale, opened.shift) is opened
