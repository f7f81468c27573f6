"""Presets: the settings that each changes in the defaults, section by section.

`*_s`, `*_b`, `*_l` and `*_xl` are DiT's sizes over patches of 2 of the 4x32x32 latents of 256x256 images,
with the published recipe: batch 256, AdamW at 1e-4 without weight decay or warm-up, clipping at 0.5, EMA
0.9999, horizontal flips, 500K steps of rectified flow, sampled with 250 Euler steps. Values that they have in common
are the defaults of the options; the user chooses the training data. Comments give the trainable and the active
parameters, and the published FID-50K after 500K steps at guidance 1.5. `*t2i*` are conditioned by text.
"""

from typing import Any

from megapromoe.config.data_options import UNSET

Preset = dict[str, dict[str, Any]]

# DiT's sizes. Source: Peebles and Xie, arXiv 2212.09748, table 1.
SIZES = {
    "s": {"hidden_size": 384, "depth": 12, "heads": 6},
    "b": {"hidden_size": 768, "depth": 12, "heads": 12},
    "l": {"hidden_size": 1024, "depth": 24, "heads": 16},
    "xl": {"hidden_size": 1152, "depth": 28, "heads": 16},
}
# The MoE baselines have 8 experts of DiT's full MLP width and no shared expert. The defaults are ProMoE's experts.
_BASELINE = {"num_experts": 8, "expert_ratio": 4.0, "shared_expert": False, "unconditional_expert": False}


def _published(size: str, router: str, **model: Any) -> Preset:
    return {
        "model": {"router": router, **SIZES[size], **model},
        "data": {"source": UNSET, "flip": True},
    }


# Fine-grained experts: 4 times as many and a quarter as wide as ProMoE's, of which a token visits 4, and SwiGLU instead
# of GELU at two thirds of the width. So a token passes as many matrix elements as in ProMoE. Widths of the dense MLP,
# of a routed and of the shared expert; the last is reduced by what 36 more prototypes and more biases take, so that the
# active parameters are those of ProMoE but for 0.05 %. Source of the idea: DeepSeekMoE, arXiv 2401.06066, "fine-grained
# expert segmentation"; SwiGLU's widths: Shazeer, arXiv 2002.05202. Not from the paper of ProMoE.
_FINE_WIDTHS = {"s": (1024, 128, 496), "b": (2048, 256, 1008), "l": (2728, 336, 1376), "xl": (3072, 384, 1520)}


def _fine(size: str) -> Preset:
    mlp, routed, shared = _FINE_WIDTHS[size]
    experts = {"num_experts": 48, "top_k": 4, "expert_width": routed, "shared_expert_width": shared}
    ratio = mlp / SIZES[size]["hidden_size"]
    # A null image passes as many unconditional experts as others pass routed ones.
    return _published(size, "promoe", activation="swiglu", mlp_ratio=ratio, num_unconditional_experts=4, **experts)


def _ddpm(size: str, **model: Any) -> Preset:
    # Stated: the objective, 250 DDPM steps, the weight of the contrastive loss. Inferred: expert choice, which the
    # notes of ProMoE's release recommend for DDPM; the paper does not say which choice its rows have. The counts are
    # equal for both: with model.router=promoe it is token choice.
    return _published(size, "promoe_ec", **model) | {
        "diffusion": {"objective": "ddpm"},
        "sample": {"method": "ddpm"},
    }


# Blocks of text-to-image models, and velocity without a learned variance.
_TEXT_BLOCK = {
    "learn_sigma": False,
    "activation": "swiglu",
    "norm": "rms",
    "qk_norm": "rms",
    "positions": "rope",
    "modulation": "shared",
}

# The text-to-image models of ProMoE's last experiment. The paper states 36 layers, 16 heads, the width 11,008, the
# experts, 3 B active parameters of 12 B, batch, learning rate, weight decay, steps and guidance. Inferred: 11,008 is
# the width of SwiGLU MLPs at D 2048, as in Qwen2.5-3B, and every block has experts; a modulation in each block would
# add 0.9 B, so it is shared. Neither stated nor inferred: RMSNorm, rotary positions, and the sizes of images and texts,
# here 512 pixels through an autoencoder of 16 channels, and 256 tokens of 3584 channels, those of Qwen2.5-VL-7B.
_TEXT = {
    "condition": "text",
    "text_width": 3584,
    "text_tokens": 256,
    "hidden_size": 2048,
    "depth": 36,
    "heads": 16,
    "input_size": 64,
    "in_channels": 16,
    "mlp_ratio": 5.375,  # 11,008 channels
    "expert_width": 11008,
    "moe_every": 1,
    **_TEXT_BLOCK,
}


def _text_to_image(router: str, **model: Any) -> Preset:
    return {
        "model": {"router": router, **_TEXT, **model},
        "data": {"source": UNSET},
        "sample": {"steps": 50, "guidance": 5.0},
        "train": {"steps": 400_000, "global_batch": 384, "weight_decay": 0.02},
    }


PRESETS: dict[str, Preset] = {
    # ProMoE, token choice: 12 routed (top-1), 1 shared, 1 unconditional expert. Source: arXiv 2510.24711.
    "promoe_s": _published("s", "promoe"),  # 75.4M, 33.0M
    "promoe_b": _published("b", "promoe"),  # 300.4M, 130.6M
    "promoe_l": _published("l", "promoe"),  # 1.062B, 458.3M, FID-50K 2.79
    "promoe_xl": _published("xl", "promoe"),  # 1.567B, 675.3M, FID-50K 2.59
    # 3 of the 12 experts for each token. Source: table 13.
    "promoe_l_k3": _published("l", "promoe", top_k=3),  # 1.062B, 559.0M, FID-50K 2.72
    "promoe_s_fine": _fine("s"),  # 75.5M, 33.0M
    "promoe_b_fine": _fine("b"),  # 300.6M, 130.5M
    "promoe_l_fine": _fine("l"),  # 1.054B, 458.3M
    "promoe_xl_fine": _fine("xl"),  # 1.568B, 675.2M
    # A Gaussian mixture instead of prototypes. Source: table 15; the router itself is inferred.
    "gmm_l": _published("l", "gmm"),  # 1.063B, 458.4M, FID-50K 3.76
    "gmm_l_k3": _published("l", "gmm", top_k=3),  # 1.063B, 559.1M, FID-50K 3.72
    # ProMoE, expert choice, which its release recommends for DDPM.
    "promoe_l_ec": _published("l", "promoe_ec"),
    # ProMoE under DDPM. Source: tables 4 and 18: the contrastive loss has weight 10 for B alone.
    "promoe_b_ddpm": _ddpm("b", rcl_weight=10.0),  # 300.4M, 130.6M, FID-50K 17.90
    "promoe_l_ddpm": _ddpm("l"),  # 1.062B, 458.3M, FID-50K 5.12
    "promoe_xl_ddpm": _ddpm("xl"),  # 1.567B, 675.3M, FID-50K 4.11
    # Dense DiT.
    "dit_b": _published("b", "dense"),  # 130.5M
    "dit_l": _published("l", "dense"),  # 458.1M, FID-50K 3.56
    "dit_xl": _published("xl", "dense"),  # 675.1M
    # ProMoE without routed experts: one expert for conditional images, one for null images, a shared one for both. Not
    # from the paper; its difference to DiT is what separate weights for null images contribute.
    "dense_conditional_b": _published("b", "conditional"),  # 144.5M, 130.5M
    "dense_conditional_l": _published("l", "conditional"),  # 508.2M, 458.1M
    "dense_conditional_xl": _published("xl", "conditional"),  # 749.2M, 675.1M
    # Token choice with a linear gate and a balance loss; expert choice.
    "tc_l_e8": _published("l", "tc", **_BASELINE, balance_weight=0.01, balance_form="batch"),  # 1.163B, 458.2M
    # The same balanced by a bias. Source of the rate: arXiv 2408.15664. The model is not published.
    "tc_l_e8_bias": _published("l", "tc", **_BASELINE, balance_bias=0.001),
    "ec_l_e8": _published("l", "ec", **_BASELINE),  # 1.163B, 458.2M
    # DiffMoE: expert choice over the batch, with a capacity predictor.
    "diffmoe_b_e8": _published("b", "diffmoe", **_BASELINE),  # 332.5M
    "diffmoe_l_e8": _published("l", "diffmoe", **_BASELINE),  # 1.176B
    "diffmoe_xl_e8": _published("xl", "diffmoe", **_BASELINE),  # 1.735B
    # Inferred: the model of 8 experts in the release's code, with 16. It has 1.982B parameters; table 5 states 1.846B,
    # and 1.095B for 8 experts, where that code has 1.176B.
    "diffmoe_l_e16": _published("l", "diffmoe", **(_BASELINE | {"num_experts": 16})),  # 1.982B, FID-50K 3.30
    # Expert Race, with the experts of the other baselines. Not published at these sizes.
    "race_b_e8": _published("b", "race", **_BASELINE),  # 332.5M
    "race_l_e8": _published("l", "race", **_BASELINE),  # 1.176B
    # Text-to-image: a dense model, and two with 4 times its parameters. Source: arXiv 2510.24711, appendix A.
    "t2i_3b": _text_to_image("dense"),  # 3.090B
    "tc_t2i_12b": _text_to_image(  # 12.833B, 3.091B
        "tc", num_experts=5, shared_expert=False, unconditional_expert=False, balance_weight=0.01
    ),
    "promoe_t2i_12b": _text_to_image("promoe", num_experts=4, shared_expert=False),  # 12.833B, 3.091B
    # A small ProMoE of scikit-learn's 8x8 digits, for a few minutes on a laptop. Not from the paper.
    "digits": {
        "model": {
            "hidden_size": 64,
            "depth": 4,
            "heads": 4,
            "patch_size": 2,
            "input_size": 8,
            "in_channels": 1,
            "num_classes": 10,
            "num_experts": 4,
        },
        "data": {"source": "digits"},
        "sample": {"method": "euler", "steps": 20, "guidance": 1.5},
        "train": {
            "steps": 500,
            "global_batch": 128,
            "lr": 4e-3,
            "warmup": 30,
            "schedule": "cosine",
            "max_grad_norm": 1.0,
            "ema_decay": 0.985,
            "ema_warmup": True,
            "deepspeed": "fp32_zero1",
            "save_every": 250,
        },
    },
    # A small text-to-image ProMoE of the embedded scenes, with the features of MiniLM. Not from the paper. Of 40 tried
    # recipes that two cores train for some ten minutes, this one scored best.
    "scenes": {
        "model": {
            "condition": "text",
            "text_width": 384,
            "text_tokens": 24,
            "text_ffn": 0,
            "hidden_size": 128,
            "depth": 4,
            "heads": 8,
            "patch_size": 4,
            "input_size": 16,
            "in_channels": 3,
            "num_experts": 4,
            "shared_expert": False,
            **_TEXT_BLOCK,
        },
        "data": {"source": UNSET},
        "sample": {"method": "euler", "steps": 30, "guidance": 5.0},
        "train": {
            "steps": 1300,
            "global_batch": 64,
            "lr": 4e-3,
            "warmup": 50,
            "schedule": "cosine",
            "max_grad_norm": 1.0,
            "ema_decay": 0.99,
            "ema_warmup": True,
            "deepspeed": "fp32_zero1",
            "save_every": 500,
        },
    },
    # A small ProMoE of Fashion-MNIST's clothes, for some minutes on a laptop. Not from the paper.
    "fashion": {
        "model": {
            "hidden_size": 96,
            "depth": 4,
            "heads": 4,
            "patch_size": 4,
            "input_size": 32,
            "in_channels": 1,
            "num_classes": 10,
            "num_experts": 4,
        },
        "data": {"source": "fashion_mnist", "flip": True},
        "sample": {"method": "euler", "steps": 30, "guidance": 1.5},
        "train": {
            "steps": 1200,
            "global_batch": 32,
            "lr": 2e-3,
            "warmup": 30,
            "schedule": "cosine",
            "max_grad_norm": 1.0,
            "ema_decay": 0.99,
            "ema_warmup": True,
            "deepspeed": "fp32_zero1",
            "save_every": 400,
        },
    },
}
