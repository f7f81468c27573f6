"""Small random autoencoders in folders, for tests."""

from pathlib import Path

import torch

KL_SETTINGS = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)


def write_autoencoders(folder: Path) -> Path:
    """Writes folders of small random autoencoders as diffusers saves them."""
    from diffusers import AutoencoderKL, AutoencoderTiny  # slow to import

    few = (8, 8)
    torch.manual_seed(0)
    kl = AutoencoderKL(block_out_channels=few, norm_num_groups=4, latent_channels=2, **KL_SETTINGS)
    kl.save_pretrained(folder / "kl")
    kl.save_pretrained(folder / "pipeline" / "vae")
    kl.save_pretrained(folder / "pickled", safe_serialization=False)
    per_channel = dict(latents_mean=[0.5, -1.0], latents_std=[2.0, 4.0], scaling_factor=0.5, shift_factor=None)
    kl.register_to_config(**per_channel)
    kl.save_pretrained(folder / "per_channel")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=2,
    ).save_pretrained(folder / "tiny")
    return folder
