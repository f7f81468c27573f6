"""Autoencoders: opened as diffusers saves them, normalised as its pipelines do, refused with the reason."""

import pytest
import torch

from megapromoe.data.autoencoder import AutoencoderError, open_autoencoder
from megapromoe.data.contact_sheet import check_same_autoencoder


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
