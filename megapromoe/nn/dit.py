"""DiT with experts: one model for ProMoE, its ablations, its baselines and dense DiT, selected by the configuration.

`DiT(config)` makes the whole model at its logical shapes, usually on the meta device; `parallelize.build` then
allocates this rank's part of it.
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
from megapromoe.nn.moe.layer import MoE, split_conditional
from megapromoe.nn.moe.routers import RouterOutput
from megapromoe.nn.moe.routing_cache import RoutingCache
from megapromoe.nn.tensor_parallel import GatheredLinear


class AuxiliaryOutput(NamedTuple):
    """What a forward pass returns besides the prediction, for M MoE layers.

    `losses`: name -> weighted losses (M,), to be added to the training loss; empty in eval mode. For logs, without
    gradients: `load_ME` rows of each expert; `weight_M` mean routing weight; `dropped_M` share of this rank's rows that
    were dropped, None for dispatchers that drop none.
    """

    losses: dict[str, Tensor]
    load_ME: Tensor
    weight_M: Tensor
    dropped_M: Tensor | None = None

    def total(self) -> Tensor | float:
        """The sum of all auxiliary losses."""
        return sum(loss.sum() for loss in self.losses.values())


class Block(nn.Module):
    """Attention and an MLP or MoE layer, each with normalisation, modulation and a residual gate (adaLN-Zero)."""

    def __init__(self, config: ModelConfig, moe: bool):
        super().__init__()
        D = config.hidden_size
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(D, config.heads, config.qk_norm)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=config.mlp_norm_eps)
        self.mlp: MoE | Mlp = MoE(config) if moe else Mlp(D, int(D * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), GatheredLinear(D, 6 * D))
        self.recompute = "none"

    def forward(
        self, x_BSD: Tensor, c_BD: Tensor, y_B: Tensor, num_conditional: int
    ) -> tuple[Tensor, RouterOutput | None]:
        """Applies the block to tokens (B, S, D) with conditions (B, D).

        Returns the tokens, and the output of the router (None for a dense block).

        In training, `recompute` selects what is freed after forward and computed again in backward: "moe" the MoE
        layer; "blocks" both halves of the block, but not its router; "all" the block, which keeps its input and the
        decisions of its router.
        """
        arguments = x_BSD, c_BD, y_B, num_conditional, RoutingCache()
        return self._call(self.forward_with_cache, *arguments, recompute=self._recomputes("all"))

    def forward_with_cache(
        self, x_BSD: Tensor, c_BD: Tensor, y_B: Tensor, num_conditional: int, routing_cache: RoutingCache
    ) -> tuple[Tensor, RouterOutput | None]:
        """`forward`; a second pass with the same cache uses the routing decisions of the first."""
        recompute = self._recomputes("blocks")
        x_BSD, h_BSD, gate_BD = self._call(self.attention_half, x_BSD, c_BD, recompute=recompute)
        if isinstance(self.mlp, Mlp):
            return self.residual(x_BSD, gate_BD, self._call(self.mlp, h_BSD, recompute=recompute)), None
        num_routed = self.mlp.num_routed_images(h_BSD, num_conditional)
        h_BSD, routed_BSD, _ = split_conditional(h_BSD, num_routed)
        routed = self.mlp.route(routed_BSD, num_conditional, y_B, routing_cache)
        # Without the inputs of the contrastive loss, which a checkpoint would keep although the experts do not use
        # them.
        arguments = h_BSD, routed._replace(contrastive_inputs=None), num_conditional
        y_BSD = self._call(self.mlp, *arguments, recompute=self._recomputes("moe", "blocks"))
        return self.residual(x_BSD, gate_BD, y_BSD), routed

    def attention_half(self, x_BSD: Tensor, c_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block up to its MLP: the residual stream, the MLP's input, and the MLP's residual gate (B, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        x_BSD = x_BSD + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x_BSD), shift1, scale1))
        return x_BSD, modulate(self.norm2(x_BSD), shift2, scale2), gate2

    def residual(self, x_BSD: Tensor, gate_BD: Tensor, y_BSD: Tensor) -> Tensor:
        """The residual connection around the MLP or MoE layer, with its residual gate."""
        return x_BSD + gate_BD.unsqueeze(1) * y_BSD

    def _recomputes(self, *policies: str) -> bool:
        return self.training and self.recompute in policies

    @staticmethod
    def _call(function: Callable, *arguments: Any, recompute: bool) -> Any:
        if recompute:
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)


class FinalLayer(nn.Module):
    """Normalises, modulates, and projects each token to its patch: (B, S, D) -> (B, S, p·p·channels)."""

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
    """Parameter name -> layout; set by `parallelize.build`."""

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

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor, num_conditional: int) -> tuple[Tensor, AuxiliaryOutput]:
        """Predicts noise or velocity for a batch, conditional images first.

        Args:
            x_BCHW: noisy images or latents.
            t_B: model time in [0, 1000], float32.
            y_B: labels, int64; the first `num_conditional` are classes, the others the null class (num_classes).
            num_conditional: how many images are not null; a Python number, so that the host need not wait for the GPU.

        Returns:
            the raw prediction (B, 2C, H, W), or (B, C, H, W) without `learn_sigma`; and `AuxiliaryOutput`.
        """
        x_BSD, c_BD = self.embed(x_BCHW, t_B, y_B)
        router_outputs = []
        for block in self.blocks:
            x_BSD, routed = block(x_BSD, c_BD, y_B, num_conditional)
            if routed is not None:
                router_outputs.append(routed)
        return self.unpatchify(self.final_layer(x_BSD, c_BD)), self.auxiliary(router_outputs)

    def embed(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, S, D) and condition (B, D), in the dtype of the model."""
        dtype = self.x_embedder.proj.weight.dtype
        x_BSD = self.x_embedder(x_BCHW.to(dtype)) + self.pos_embed.to(dtype)
        return x_BSD, self.t_embedder(t_B) + self.y_embedder(y_B)

    def auxiliary(self, router_outputs: list[RouterOutput]) -> AuxiliaryOutput:
        """Collects the losses and statistics of all MoE layers."""
        if not router_outputs:
            empty = self.pos_embed.new_zeros(0)
            return AuxiliaryOutput({}, empty.view(0, 0), empty)
        # MoE layers, or the benchmark's baselines, which have the same methods.
        layers: list[Any] = [block.mlp for block in self.blocks if not isinstance(block.mlp, Mlp)]
        losses = layers[0].auxiliary_losses(router_outputs)
        load_ME = torch.stack([output.load_E for output in router_outputs])
        weight_M = torch.stack([output.mean_weight for output in router_outputs])
        can_drop = self.config.capacity_factor > 0
        dropped_M = torch.stack([moe.dispatcher.dropped for moe in layers]) if can_drop else None
        return AuxiliaryOutput(losses, load_ME, weight_M, dropped_M)

    def unpatchify(self, x_BSP: Tensor) -> Tensor:
        """Patches (B, S, p·p·c), row-major within a patch, channels last -> images (B, c, H, W)."""
        B, S, _ = x_BSP.shape
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = x_BSP.view(B, side, side, p, p, self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, self.channels, side * p, side * p)

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The initial value of a parameter at its logical shape, float32.

        ======================================  ==================================================
        adaLN of blocks and final layer, final  0
        linear
        biases                                  0
        label table, the time MLP, prototypes   normal, σ 0.02
        router of TC                            uniform within ±1/√D (Kaiming, a = √5)
        routers of EC and DiffMoE               normal, σ 0.006
        other matrices (each expert separately) Xavier uniform; the patch convolution as linear
        qk_norm weight                          1
        ======================================  ==================================================

        Source: DiT's initialize_weights; the ProMoE release for prototypes and routers. ProMoE with a linear router
        ("promoe_linear") is not published; its router is one of the other matrices.
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
        """The initial value of a buffer: positions, super-classes, random directions of centroids, even shares."""
        if name == "pos_embed":
            side = self.config.input_size // self.config.patch_size
            return position_table(side, self.config.hidden_size)[None]
        if name.endswith(".superclass_of_class"):
            return torch.tensor([*self.config.superclass_of, NO_SUPERCLASS])
        if name.endswith(".centroids"):
            return F.normalize(torch.randn(shape, generator=generator), dim=-1)
        if name.endswith(".share"):
            return torch.full(shape, 1 / shape[0])
        return torch.zeros(shape)
