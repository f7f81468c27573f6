"""A block of the DiT: attention, then an MLP or MoE layer, each with normalisation, modulation and a residual gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megapromoe.config.model_options import ModelConfig
from megapromoe.nn.layers import NO_CONTEXT, Attention, AttentionContext, GatedResidual, Mlp, modulate
from megapromoe.nn.logical_module import LogicalModule, ParameterRule, zeros
from megapromoe.nn.moe import conditional_mlp
from megapromoe.nn.moe.auxiliary import MoEAuxiliary
from megapromoe.nn.moe.conditional_mlp import ConditionalMlp
from megapromoe.nn.moe.dense_experts import biases_of_images
from megapromoe.nn.moe.layer import MoE, auxiliary_of
from megapromoe.nn.moe.routing_cache import RoutingCache
from megapromoe.nn.norms import token_norm
from megapromoe.nn.tensor_parallel import Modulation, RegionModule


class ModulationTable(LogicalModule):
    """What one block adds to the modulation that all blocks share, (B, n) -> (B, n). Source: PixArt (2310.00426)."""

    rules = {"weight": ParameterRule(zeros)}

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def forward(self, modulation: Tensor) -> Tensor:
        return modulation + self.weight


class Block(nn.Module):
    """Attention and an MLP or MoE layer, each with normalisation, modulation and a residual gate (adaLN-Zero)."""

    def __init__(self, config: ModelConfig, has_experts: bool, last: bool = False):
        super().__init__()
        D = config.hidden_size
        self.norm1 = token_norm(config.norm, D)
        self.attn = Attention(D, config.heads, config.qk_norm)
        self.norm2 = token_norm(config.norm, D, config.mlp_norm_eps)
        self.mlp: MoE | ConditionalMlp | Mlp
        if not has_experts:
            self.mlp = Mlp(D, config.mlp_width, config.activation)
        else:
            self.mlp = ConditionalMlp(config) if config.router == "conditional" else MoE.from_config(config)
        if config.modulation == "shared":
            self.modulation_table = ModulationTable(6 * D)
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Modulation(D, 6 * D))
        self.has_table = config.modulation == "shared"
        self.routes_unmodulated = has_experts and config.router_input == "unmodulated"
        self.text_mlp = Mlp(D, config.text_ffn, config.activation) if config.text_ffn and not last else None
        self.recompute = "none"

    def forward(
        self,
        x_BSD: Tensor,
        c_BD: Tensor,
        y_B: Tensor | None,
        num_conditional: int,
        context: AttentionContext = NO_CONTEXT,
    ) -> tuple[Tensor, MoEAuxiliary | None]:
        """Applies the block.

        Args:
            x_BSD: tokens; with `model.condition=text` those of the text, then those of the image.
            c_BD: conditions; with `model.modulation=shared` the modulation that all blocks have in common, (B, 6D).
            y_B: labels; None with `model.condition=text`.
            num_conditional: how many images are not null.
            context: of attention.

        Returns:
            the tokens, and the auxiliary output of the MoE layer (None for a dense block).

        In training, `recompute` selects what is freed after forward and computed again in backward: "moe" the MoE
        layer; "blocks" both halves of the block, but not its router; "all" the block, which keeps its input and the
        decisions of its router.
        """
        arguments = x_BSD, c_BD, y_B, num_conditional, RoutingCache(), context
        return self._call(self.forward_with_cache, *arguments, recompute=self._recomputes("all"))

    def forward_with_cache(
        self,
        x_BSD: Tensor,
        c_BD: Tensor,
        y_B: Tensor | None,
        num_conditional: int,
        routing_cache: RoutingCache,
        context: AttentionContext = NO_CONTEXT,
    ) -> tuple[Tensor, MoEAuxiliary | None]:
        """`forward`; a second pass with the same cache uses the routing decisions of the first."""
        recompute = self._recomputes("blocks")
        half = self._call(self.attention_half, x_BSD, c_BD, context, recompute=recompute)
        x_BSD, h_BSD, gate_BD, text_BND, scored_BSD = half
        if isinstance(self.mlp, Mlp | ConditionalMlp | MoE) and _fuses_biases(self.mlp):
            return self._fused_half(self.mlp, x_BSD, h_BSD, gate_BD, text_BND, scored_BSD, num_conditional, y_B)
        if isinstance(self.mlp, Mlp):
            return self.residual(x_BSD, gate_BD, self._call(self.mlp, h_BSD, recompute=recompute), text_BND), None
        if isinstance(self.mlp, ConditionalMlp):
            y_BSD = self._call(self.mlp, h_BSD, num_conditional, recompute=recompute)
            return self.residual(x_BSD, gate_BD, y_BSD, text_BND), None
        if not isinstance(self.mlp, MoE):  # another implementation of the layer, which is not in two steps
            y_BSD, auxiliary = self._call(self.mlp, h_BSD, num_conditional, y_B, scored_BSD, recompute=recompute)
            return self.residual(x_BSD, gate_BD, y_BSD, text_BND), auxiliary
        inputs, routed = self.mlp.route(h_BSD, num_conditional, y_B, routing_cache, scored_BSD)
        # Only the tokens and their assignment: a checkpoint would keep everything else although the experts do not
        # use it.
        y_BSD, dropped = self._call(self.mlp.run_experts, *inputs, recompute=self._recomputes("moe", "blocks"))
        return self.residual(x_BSD, gate_BD, y_BSD, text_BND), auxiliary_of(routed, dropped)

    def _fused_half(
        self,
        mlp: MoE | ConditionalMlp | Mlp,
        x_BSD: Tensor,
        h_BSD: Tensor,
        gate_BD: Tensor,
        text_BND: Tensor | None,
        scored_BSD: Tensor | None,
        num_conditional: int,
        y_B: Tensor | None,
    ) -> tuple[Tensor, MoEAuxiliary | None]:
        """MLP and residual in compiled code, which adds the biases of the last layers in the kernel of the residual."""
        if isinstance(mlp, Mlp):
            y_BSD, bias_D = mlp.fc2.without_bias(mlp.hidden(h_BSD))
            return self.residual(x_BSD, gate_BD, y_BSD, text_BND, bias_D.expand_as(gate_BD)), None
        if isinstance(mlp, ConditionalMlp):
            y_BSD, image_biases = mlp.output_and_biases(h_BSD, num_conditional, with_biases=False)
            assert image_biases is not None
            added_BD = conditional_mlp.biases_of_images(image_biases, num_conditional, gate_BD)
            return self.residual(x_BSD, gate_BD, y_BSD, text_BND, added_BD), None
        inputs, routed = mlp.route(h_BSD, num_conditional, y_B, None, scored_BSD)
        y_BSD, biases, dropped = mlp.outputs_and_biases(*inputs, with_biases=False)
        bias_BD = biases_of_images(biases, inputs.num_routed_images, gate_BD)
        return self.residual(x_BSD, gate_BD, y_BSD, text_BND, bias_BD), auxiliary_of(routed, dropped)

    def attention_half(
        self, x_BSD: Tensor, c_BD: Tensor, context: AttentionContext = NO_CONTEXT
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The block up to its MLP.

        Returns:
            the residual stream of the image, the MLP's input, the MLP's residual gate (B, D); with text its tokens at
            the end of the block; and with `model.router_input=unmodulated` the tokens that the router scores.
        """
        rotation, mask, num_text = context[:3]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c_BD, context).chunk(6, dim=1)
        if mask is None and _fuses_biases(self.attn):
            heads_BSD = self.attn.joined_heads(modulate(self.norm1(x_BSD), shift1, scale1), rotation, mask)
            y_BSD, bias_D = self.attn.proj.without_bias(heads_BSD)
            x_BSD = GatedResidual.apply(x_BSD, gate1, y_BSD, bias_D.expand_as(gate1))
            h_BSD, scored_BSD = self.mlp_input(x_BSD, shift2, scale2)
            return x_BSD, h_BSD, gate2, None, scored_BSD
        y_BSD = gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x_BSD), shift1, scale1), rotation, mask)
        if mask is None:
            x_BSD = x_BSD + y_BSD
            h_BSD, scored_BSD = self.mlp_input(x_BSD, shift2, scale2)
            return x_BSD, h_BSD, gate2, None, scored_BSD
        # Two sums and not slices of one, so that the tokens of the image are contiguous: experts take no others.
        text_BND = x_BSD[:, :num_text] + y_BSD[:, :num_text]
        x_BSD = x_BSD[:, num_text:] + y_BSD[:, num_text:]
        if self.text_mlp is not None:
            text_y_BND = self.text_mlp(modulate(self.norm2(text_BND), shift2, scale2))
            text_BND = text_BND + gate2.unsqueeze(1) * text_y_BND
        h_BSD, scored_BSD = self.mlp_input(x_BSD, shift2, scale2)
        return x_BSD, h_BSD, gate2, text_BND, scored_BSD

    def mlp_input(self, x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens for the MLP or MoE layer, and those that its router scores if they are others.

        With `model.router_input=unmodulated` the router scores the normalised tokens, and experts process
        normalised · (1 + scale) + shift. Scale and shift depend on the time and the condition. Their magnitude would
        otherwise decide about the scores as much as the content of a token. Source: Nucleus-Image, arXiv 2604.12163,
        "decoupled routing".
        """
        normalised_BSD = self.norm2(x_BSD)
        return modulate(normalised_BSD, shift_BD, scale_BD), normalised_BSD if self.routes_unmodulated else None

    def modulation(self, c_BD: Tensor, context: AttentionContext = NO_CONTEXT) -> Tensor:
        """Shifts, scales and residual gates (B, 6D)."""
        if context.is_modulation:
            return c_BD
        if self.has_table:
            return self.modulation_table(c_BD)
        return self.adaLN_modulation[1](c_BD) if context.is_activated else self.adaLN_modulation(c_BD)

    def residual(
        self,
        x_BSD: Tensor,
        gate_BD: Tensor,
        y_BSD: Tensor,
        text_BND: Tensor | None = None,
        bias_BD: Tensor | None = None,
    ) -> Tensor:
        """The residual connection around the MLP or MoE layer, with its residual gate; the text tokens come first.

        `bias_BD`: for each image what is to be added to its `y_BSD`, in compiled code.
        """
        if bias_BD is None:
            x_BSD = x_BSD + gate_BD.unsqueeze(1) * y_BSD
        else:
            x_BSD = GatedResidual.apply(x_BSD, gate_BD, y_BSD, bias_BD)
        return x_BSD if text_BND is None else torch.cat([text_BND, x_BSD], dim=1)

    def _recomputes(self, *policies: str) -> bool:
        return self.training and self.recompute in policies

    @staticmethod
    def _call(function: Callable, *arguments: Any, recompute: bool) -> Any:
        if recompute:
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)


def _fuses_biases(module: RegionModule) -> bool:
    """Whether a module's last bias is added in the kernel of the residual: compiled, and without a sum over ranks."""
    return torch.compiler.is_compiling() and not module.region.is_sharded
