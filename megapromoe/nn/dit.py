"""DiT with experts: one model for ProMoE, its ablations, its baselines and dense DiT, selected by the configuration.

`DiT(config)` makes the whole model with initial values at its logical shapes. `parallelize.build` makes this rank's
part of it, with initial values that depend only on a seed.

Initial values, which each kind of layer defines in its `rules`:

======================================  ==================================================
adaLN of blocks and final layer, its    0
tables in blocks, final linear
biases                                  0
label table, vector of no text, the     normal, σ 0.02
time MLP, prototypes
router of TC                            uniform within ±1/√D (Kaiming, a = √5)
routers of EC and DiffMoE               normal, σ 0.006
other matrices (each expert separately) Xavier uniform; the patch convolution as linear
qk_norm weight                          1
SwiGLU: gate and up projection          as two matrices
======================================  ==================================================

Source: DiT's initialize_weights; the ProMoE release for prototypes and routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.config.model_options import ModelConfig
from megapromoe.distributed.parameter_layout import ParameterLayout
from megapromoe.nn.alignment import Projector, alignment_loss
from megapromoe.nn.block import Block
from megapromoe.nn.layers import (
    AttentionContext,
    LabelEmbed,
    PatchEmbed,
    TimeEmbed,
    modulate,
    position_table,
    sequence_table,
)
from megapromoe.nn.logical_module import LogicalModule, ParameterRule, zeros
from megapromoe.nn.moe.auxiliary import MoEAuxiliary, auxiliary_losses
from megapromoe.nn.norms import token_norm
from megapromoe.nn.rotary import Rotation, image_angles, rotation_of, sequence_angles
from megapromoe.nn.tensor_parallel import Linear, Modulation
from megapromoe.nn.text_condition import TextCondition, TextEmbed


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
    projected_BSW: Tensor | None = None
    """In training with `model.align_block` the projected tokens, with gradients; None otherwise."""

    def aligned(self, teacher_BWHW: Tensor | None, weight: float) -> AuxiliaryOutput:
        """This with the loss "alignment", if tokens were projected.

        Args:
            teacher_BWHW: the teacher's features of the clean images.
            weight: of the loss.
        """
        if self.projected_BSW is None:
            return self
        assert teacher_BWHW is not None, "model.align_block needs the teacher's features in each batch"
        loss = weight * alignment_loss(self.projected_BSW, teacher_BWHW)
        return self._replace(losses={**self.losses, "alignment": loss[None]}, projected_BSW=None)

    def total(self) -> Tensor | float:
        """The sum of all auxiliary losses."""
        return sum(loss.sum() for loss in self.losses.values())


class Embedded(NamedTuple):
    """The inputs of the blocks and of the final layer."""

    x_BSD: Tensor
    """Tokens, those of a text first."""
    c_BD: Tensor
    """Conditions."""
    modulation: Tensor | None
    """With `model.modulation=shared`: shifts, scales and residual gates (B, 6D) that all blocks have in common."""
    context: AttentionContext


class ZeroLinear(Linear):
    """A linear layer that starts at zero."""

    rules = {"weight": ParameterRule(zeros), "bias": ParameterRule(zeros)}


class FinalLayer(nn.Module):
    """Normalises, modulates, and projects each token to its patch: (B, S, D) -> (B, S, p·p·channels)."""

    def __init__(self, width: int, patch: int, channels: int, norm: str):
        super().__init__()
        self.norm_final = token_norm(norm, width)
        self.linear = ZeroLinear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(width, 2 * width))

    def forward(self, x_BSD: Tensor, c_BD: Tensor, is_activated: bool = False) -> Tensor:
        """`is_activated`: see `AttentionContext`."""
        modulation = self.adaLN_modulation[1] if is_activated else self.adaLN_modulation
        shift, scale = modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BSD), shift, scale))


class DiT(LogicalModule):
    """The diffusion transformer. Source: DiT (arXiv 2212.09748) and ProMoE (arXiv 2510.24711)."""

    pos_embed: Tensor
    text_pos_embed: Tensor
    layouts: dict[str, ParameterLayout]
    """Parameter name -> layout; set by `parallelize.build` and `parallelize.parallelize`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, D)
        self.t_embedder = TimeEmbed(D, config.time_input, config.time_frequency_shift)
        if config.has_text:
            self.text_embedder = TextEmbed(config.text_width, D, config.norm)
        else:
            self.y_embedder = LabelEmbed(config.num_classes, D)
        last = config.depth - 1
        self.blocks = nn.ModuleList(Block(config, i in config.expert_blocks, i == last) for i in range(config.depth))
        if config.align_block:
            self.projector = Projector(D, config.align_hidden, config.align_width)
        self.channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.final_layer = FinalLayer(D, config.patch_size, self.channels, config.norm)
        if config.modulation == "shared":
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Modulation(D, 6 * D))
        if config.positions == "sincos":
            self.register_buffer("pos_embed", torch.empty(1, config.tokens, D), persistent=False)
            if config.has_text:
                self.register_buffer("text_pos_embed", torch.empty(1, config.text_tokens, D), persistent=False)
        self._reset_own_parameters()

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor, condition: Tensor | TextCondition, num_conditional: int | None = None
    ) -> tuple[Tensor, AuxiliaryOutput]:
        """Predicts noise or velocity for a batch, conditional images first.

        Args:
            x_BCHW: noisy images or latents.
            t_B: model time in [0, 1000], float32.
            condition: labels (B,), int64, of which the first `num_conditional` are classes, the others the null class
                (num_classes); or with `model.condition=text` texts, of which those of null images are ignored.
            num_conditional: how many images are not null (None: all); a Python number, so that the host need not wait
                for the GPU.

        Returns:
            the raw prediction (B, 2C, H, W), or (B, C, H, W) without `learn_sigma`; and `AuxiliaryOutput`.

        Raises TypeError for labels if the model needs texts, or the reverse; ValueError for texts that do not fit.
        """
        num_conditional = len(x_BCHW) if num_conditional is None else num_conditional
        y_B, text = self._check(condition, len(x_BCHW), num_conditional)
        x_BSD, c_BD, modulation, context = self.embed(x_BCHW, t_B, y_B, *text)
        *block_conditions, final_c_BD = self.conditions(c_BD, modulation)
        x_BSD, layers, aligned_BSD = self.run_blocks(x_BSD, block_conditions, y_B, num_conditional, context)
        projected_BSW: Tensor | None = None
        if self.training and aligned_BSD is not None:
            projected_BSW = self.projector(aligned_BSD[:, context.num_text :])
        if context.num_text:
            x_BSD = x_BSD[:, context.num_text :]
        prediction = self.unpatchify(self.final_layer(x_BSD, final_c_BD, context.is_activated))
        return prediction, self.auxiliary(layers)._replace(projected_BSW=projected_BSW)

    def _check(
        self, condition: Tensor | TextCondition, images: int, num_conditional: int
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """The labels, or the features and the mask of the texts, in which null images have no tokens."""
        if isinstance(condition, TextCondition) != self.config.has_text:
            needed = "a TextCondition" if self.config.has_text else "a tensor of labels"
            kind = type(condition).__name__
            raise TypeError(f"condition is a {kind}: must be {needed} with model.condition = {self.config.condition!r}")
        if not isinstance(condition, TextCondition):
            return condition, ()
        condition.check(self.config, images)
        condition = condition.without_null(num_conditional)
        return None, (condition.features_BND, condition.mask_BN)

    def embed(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        y_B: Tensor | None,
        features_BND: Tensor | None = None,
        mask_BN: Tensor | None = None,
    ) -> Embedded:
        """What the blocks get, in the dtype of the model: from labels, or from the features and the mask of texts."""
        dtype, config = self.x_embedder.proj.weight.dtype, self.config
        x_BSD, num_text = self.x_embedder(x_BCHW.to(dtype)), 0
        rotation: Rotation | None = None
        mask: Tensor | None = None
        if config.positions == "sincos":
            x_BSD = x_BSD + self.pos_embed.to(dtype)
        else:
            side = config.input_size // config.patch_size
            angle_S = image_angles(side, config.head_dim, x_BSD.device, config.position_scale)
        c_BD = self.t_embedder(t_B)
        if features_BND is None or mask_BN is None:
            c_BD = c_BD + self.y_embedder(y_B)
        else:
            num_text = features_BND.shape[1]
            text_BND, text_BD = self.text_embedder(features_BND, mask_BN)
            c_BD = c_BD + text_BD
            if config.positions == "sincos":
                text_BND = text_BND + self.text_pos_embed[:, :num_text].to(dtype)
            else:
                angle_S = torch.cat([sequence_angles(num_text, config.head_dim, x_BSD.device), angle_S])
            is_image = mask_BN.new_ones(x_BSD.shape[:2])
            mask = torch.cat([mask_BN, is_image], dim=1)[:, None, None]
            x_BSD = torch.cat([text_BND, x_BSD], dim=1)
        if config.positions == "rope":
            rotation = rotation_of(angle_S)
        modulation = self.adaLN_modulation(c_BD) if config.modulation == "shared" else None
        # Compiled, the SiLU of the conditions is part of a kernel of this function, instead of one in each block.
        is_activated = modulation is None and torch.compiler.is_compiling()
        c_BD = F.silu(c_BD) if is_activated else c_BD
        # All fields at once: in compiled code, torch 2.11 makes a broken tuple of one that was replaced in part.
        return Embedded(x_BSD, c_BD, modulation, AttentionContext(rotation, mask, num_text, is_activated))

    def run_blocks(
        self,
        x_BSD: Tensor,
        block_conditions: Sequence[Tensor],
        y_B: Tensor | None,
        num_conditional: int,
        context: AttentionContext,
    ) -> tuple[Tensor, list[MoEAuxiliary], Tensor | None]:
        """All blocks; `nn/compile.py` replaces this.

        Returns:
            the tokens, the auxiliary outputs of MoE layers, and the tokens after `model.align_block` blocks (None: 0).
        """
        layers = []
        aligned_BSD: Tensor | None = None
        for number, (block, c_BD) in enumerate(zip(self.blocks, block_conditions, strict=True), start=1):
            x_BSD, auxiliary = block(x_BSD, c_BD, y_B, num_conditional, context)
            if auxiliary is not None:
                layers.append(auxiliary)
            if number == self.config.align_block:
                aligned_BSD = x_BSD
        return x_BSD, layers, aligned_BSD

    def conditions(self, c_BD: Tensor, modulation: Tensor | None) -> Sequence[Tensor]:
        """The condition of each block, and of the final layer; `nn/compile.py` replaces this."""
        return [c_BD if modulation is None else modulation] * len(self.blocks) + [c_BD]

    def auxiliary(self, layers: Sequence[MoEAuxiliary]) -> AuxiliaryOutput:
        """Computes the losses of all MoE layers and collects their statistics. Collective."""
        if not layers:
            empty = self.x_embedder.proj.weight.new_zeros(0)
            return AuxiliaryOutput({}, empty.view(0, 0), empty)
        load_ME = torch.stack([layer.load_E for layer in layers])
        weight_M = torch.stack([layer.mean_weight for layer in layers])
        dropped = [layer.dropped for layer in layers if layer.dropped is not None]
        dropped_M = torch.stack(dropped) if dropped else None
        return AuxiliaryOutput(auxiliary_losses(layers), load_ME, weight_M, dropped_M)

    def unpatchify(self, x_BSP: Tensor) -> Tensor:
        """Patches (B, S, p·p·c), row-major within a patch, channels last -> images (B, c, H, W)."""
        B, S, _ = x_BSP.shape
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = x_BSP.view(B, side, side, p, p, self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, self.channels, side * p, side * p)

    def initialize(self, name: str, value: Tensor, generator: torch.Generator | None = None) -> None:
        if name == "pos_embed":
            side = self.config.input_size // self.config.patch_size
            table = position_table(side, self.config.hidden_size, self.config.position_scale)
            value.copy_(table[None])
        elif name == "text_pos_embed":
            value.copy_(sequence_table(self.config.text_tokens, self.config.hidden_size)[None])
        else:
            super().initialize(name, value, generator)
