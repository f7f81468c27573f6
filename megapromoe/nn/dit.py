"""DiT with experts: one model for ProMoE, its ablations, its baselines and dense DiT; the config says which.

`DiT(config)` describes the whole model at its logical shapes; build it under `torch.device("meta")` and let
`parallelize.build` make this rank's part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megapromoe.config.options import ModelConfig
from megapromoe.distributed.parameter_layout import ParameterLayout
from megapromoe.nn.layers import (
    Attention,
    LabelEmbed,
    Mlp,
    PatchEmbed,
    TimeEmbed,
    modulate,
    position_table,
)
from megapromoe.nn.moe.guided_routers import NO_SUPERCLASS
from megapromoe.nn.moe.layer import MoE, fan_out
from megapromoe.nn.moe.routers import Routed
from megapromoe.nn.moe.routing_cache import Decisions
from megapromoe.nn.tensor_parallel import GatheredLinear


class Auxiliary(NamedTuple):
    """What a forward pass says beside its prediction.

    `losses` name -> (MoE layers,), weighted, to be summed into the training loss; empty in eval mode.
    `load` rows per expert and MoE layer, `gate` mean weight per MoE layer, `dropped` share of this rank's rows that
    found no room (None: nothing is ever dropped); all without gradient, for logs.
    """

    losses: dict[str, Tensor]
    load_LE: Tensor
    gate_L: Tensor
    dropped_L: Tensor | None = None

    def total(self) -> Tensor | float:
        """The sum of all auxiliary losses."""
        return sum(loss.sum() for loss in self.losses.values())


class Block(nn.Module):
    """Attention and an MLP or MoE, each normalised, modulated by the condition and gated (adaLN-Zero)."""

    def __init__(self, config: ModelConfig, moe: bool):
        super().__init__()
        D = config.hidden_size
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(D, config.heads, config.qk_norm)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=config.mlp_norm_eps)
        self.mlp: MoE | Mlp = MoE(config) if moe else Mlp(D, int(D * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), GatheredLinear(D, 6 * D))
        self.recompute = "none"

    def forward(self, x_BSD: Tensor, c_BD: Tensor, y_B: Tensor, conditional: int) -> tuple[Tensor, Routed | None]:
        """Tokens (B, S, D), condition (B, D), labels -> tokens, and what the router said (None for a dense block).

        `recompute` says which activations are dropped and made again in backward: of "moe" layers, of both halves of
        "blocks" but not the router's, or "all", so that a block keeps its input and what its router decided.
        """
        run = self._checkpointed if self._again("all") else self._plain
        return run(self.run, x_BSD, c_BD, y_B, conditional, Decisions())

    def run(
        self, x_BSD: Tensor, c_BD: Tensor, y_B: Tensor, conditional: int, decided: Decisions
    ) -> tuple[Tensor, Routed | None]:
        """`forward`; a second pass over a batch with the same `decided` routes as the first did."""
        halves = self._checkpointed if self._again("blocks") else self._plain
        x_BSD, h_BSD, gate_BD = halves(self.attend, x_BSD, c_BD)
        if isinstance(self.mlp, Mlp):
            return self.add(x_BSD, gate_BD, halves(self.mlp, h_BSD)), None
        h_BSD, routable_BSD, _ = fan_out(h_BSD, self.mlp.routable(h_BSD, conditional))
        routed = self.mlp.route(routable_BSD, conditional, y_B, decided)
        moe = self._checkpointed if self._again("moe", "blocks") else self._plain
        # Without what the experts do not look at, for a checkpoint keeps all it is given.
        y_BSD = moe(self.mlp, h_BSD, routed._replace(contrast=None), conditional)
        return self.add(x_BSD, gate_BD, y_BSD), routed

    def _again(self, *policies: str) -> bool:
        return self.training and self.recompute in policies

    def attend(self, x_BSD: Tensor, c_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block up to its MLP: tokens so far, the MLP's input, the MLP's output gate."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        x_BSD = x_BSD + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x_BSD), shift1, scale1))
        return x_BSD, modulate(self.norm2(x_BSD), shift2, scale2), gate2

    def add(self, x_BSD: Tensor, gate_BD: Tensor, y_BSD: Tensor) -> Tensor:
        """The residual connection around the MLP or MoE."""
        return x_BSD + gate_BD.unsqueeze(1) * y_BSD

    @staticmethod
    def _plain(f: Callable, *args: Any) -> Any:
        return f(*args)

    @staticmethod
    def _checkpointed(f: Callable, *args: Any) -> Any:
        return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)


class FinalLayer(nn.Module):
    """Normalise, modulate, project each token to its patch: (B, S, D) -> (B, S, p·p·channels)."""

    def __init__(self, width: int, patch: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BSD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BSD), shift, scale))


class DiT(nn.Module):
    """The diffusion transformer. Source: DiT (arXiv 2212.09748) and ProMoE (arXiv 2510.24711)."""

    pos_embed: Tensor
    layouts: dict[str, ParameterLayout]
    """Of every parameter, by its name; set by `parallelize.build`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, D)
        self.t_embedder = TimeEmbed(D, config.time_input, config.time_frequency_shift)
        self.y_embedder = LabelEmbed(config.num_classes, D)
        self.blocks = nn.ModuleList(Block(config, moe=i in config.moe_blocks) for i in range(config.depth))
        self.channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.final_layer = FinalLayer(D, config.patch_size, self.channels)
        self.register_buffer("pos_embed", torch.empty(1, config.tokens, D), persistent=False)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor, conditional: int) -> tuple[Tensor, Auxiliary]:
        """Predicts.

        Args:
            x_BCHW: noisy images or latents.
            t_B: model time in [0, 1000], float32.
            y_B: labels int64; the first `conditional` are classes, the rest is the null class (num_classes).
            conditional: how many images are not null; known on the host, so that nothing has to ask the device.

        Returns:
            the raw prediction (B, 2C, H, W), or (B, C, H, W) without `learn_sigma`; and `Auxiliary`.
        """
        x_BSD, c_BD = self.embed(x_BCHW, t_B, y_B)
        all_routed = []
        for block in self.blocks:
            x_BSD, routed = block(x_BSD, c_BD, y_B, conditional)
            if routed is not None:
                all_routed.append(routed)
        return self.unpatchify(self.final_layer(x_BSD, c_BD)), self.auxiliary(all_routed)

    def embed(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, S, D) and condition (B, D), in the model's type."""
        dtype = self.x_embedder.proj.weight.dtype
        x_BSD = self.x_embedder(x_BCHW.to(dtype)) + self.pos_embed.to(dtype)
        return x_BSD, self.t_embedder(t_B) + self.y_embedder(y_B)

    def auxiliary(self, all_routed: list[Routed]) -> Auxiliary:
        if not all_routed:
            empty = self.pos_embed.new_zeros(0)
            return Auxiliary({}, empty.view(0, 0), empty)
        # MoE layers, or layers that others have put in their place and that answer like one.
        layers: list[Any] = [block.mlp for block in self.blocks if not isinstance(block.mlp, Mlp)]
        losses = layers[0].losses_of(all_routed)
        load_LE = torch.stack([r.load_E for r in all_routed])
        static = self.config.capacity_factor > 0
        dropped_L = torch.stack([moe.dispatcher.dropped for moe in layers]) if static else None
        return Auxiliary(losses, load_LE, torch.stack([r.gate for r in all_routed]), dropped_L)

    def unpatchify(self, x_BSP: Tensor) -> Tensor:
        """Patches (B, S, p·p·c), row-major within a patch, channels last -> images (B, c, H, W)."""
        B, S, _ = x_BSP.shape
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = x_BSP.view(B, side, side, p, p, self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, self.channels, side * p, side * p)

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The logical initial value of a parameter, float32.

        ======================================  ==================================================
        adaLN of blocks and final layer, final  0
        linear
        biases                                  0
        label table, the time MLP, prototypes   normal, σ 0.02
        gate of TC                              uniform within ±1/√D (Kaiming, a = √5)
        gates of EC and DiffMoE                 normal, σ 0.006
        other matrices (experts one by one)     Xavier uniform; the patch convolution like a linear
        qk_norm weight                          1
        ======================================  ==================================================

        Source: DiT's initialize_weights; the ProMoE release for prototypes and gates. ProMoE with a linear gate
        ("promoe_linear") is not published; its gate is one of the other matrices.
        """
        if name.endswith("_norm.weight"):
            return torch.ones(shape)
        if name.endswith(".bias") or "adaLN" in name or name.startswith("final_layer.linear"):
            return torch.zeros(shape)
        if name.startswith(("y_embedder.", "t_embedder.")) or name.endswith(".prototypes"):
            return torch.empty(shape).normal_(0.0, 0.02, generator=generator)
        matrix = torch.empty(shape)
        if name.endswith(".router.gate") and self.config.router == "tc":
            return nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
        if name.endswith(".router.gate") and self.config.router in ("ec", "diffmoe"):
            return nn.init.normal_(matrix, std=0.006, generator=generator)
        nn.init.xavier_uniform_(matrix.view(shape[0], -1), generator=generator)
        return matrix

    def initial_buffer(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """What a buffer starts with: positions, super-classes; centroids in random directions, with even shares."""
        if name == "pos_embed":
            side = self.config.input_size // self.config.patch_size
            return position_table(side, self.config.hidden_size)[None]
        if name.endswith(".superclass_C"):
            return torch.tensor([*self.config.superclass_of, NO_SUPERCLASS])
        if name.endswith(".centroids"):
            return F.normalize(torch.randn(shape, generator=generator), dim=-1)
        if name.endswith(".share"):
            return torch.full(shape, 1 / shape[0])
        return torch.zeros(shape)
