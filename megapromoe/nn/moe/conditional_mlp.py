"""The MLP of `model.router=conditional`: separate weights for null images, without routed experts.

Output: shared(x) + conditional(x) for the tokens of conditional images, shared(x) + unconditional(x) for those of null
images. This is the first step of ProMoE's two-step router alone: one expert, of weight 1, for all conditional tokens,
so that the difference to a dense DiT is what separate weights for null images contribute, and the difference to ProMoE
what the mixture does. Null images are the last of a batch and their number is known on the host, so both experts run on
slices, and nothing is dispatched.

Source: ProMoE, arXiv 2510.24711, "Conditional routing"; the model without the second step is not in the paper.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megapromoe.config.model_options import ModelConfig
from megapromoe.nn.layers import Mlp
from megapromoe.nn.moe.dense_experts import dense_experts, mlps_of, partial_sum, split_conditional
from megapromoe.nn.tensor_parallel import RegionModule


class ImageBiases(NamedTuple):
    """The biases (D,) that are added after the sum over the ranks of a region, for the tokens of each kind of image."""

    conditional: Tensor
    null: Tensor


class ConditionalMlp(RegionModule):
    """Shared experts, the expert of conditional images, and the experts of null images. A region: tp divides all."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, width, activation = config.hidden_size, config.moe_width, config.activation
        self.shared = dense_experts(config.shared_experts, D, config.shared_width, activation)
        self.conditional = Mlp(D, width, activation)
        self.unconditional = dense_experts(config.unconditional_experts, D, width, activation)

    def forward(self, x_BSD: Tensor, num_conditional: int) -> Tensor:
        """Applies the layer to tokens (B, S, D), of which the first `num_conditional` images are conditional."""
        y_TD, biases = self._partial_output(x_BSD, num_conditional, with_biases=True)
        # Before the sum over the ranks: what follows it keeps nothing for the backward pass, so a recomputation stops
        # in front of the sum.
        bias_BD = None if biases is None else biases_of_images(biases, num_conditional, x_BSD[:, 0])
        y_BSD = self.region.reduce_from_region(y_TD).view_as(x_BSD)
        return y_BSD if bias_BD is None else y_BSD + bias_BD[:, None]

    def output_and_biases(
        self, x_BSD: Tensor, num_conditional: int, with_biases: bool = True
    ) -> tuple[Tensor, ImageBiases | None]:
        """The output (B, S, D), and the biases that it does not contain; None: it contains all.

        `with_biases`: the output contains all biases except in a sharded region; otherwise none.
        """
        y_TD, biases = self._partial_output(x_BSD, num_conditional, with_biases)
        return self.region.reduce_from_region(y_TD).view_as(x_BSD), biases

    def _partial_output(
        self, x_BSD: Tensor, num_conditional: int, with_biases: bool
    ) -> tuple[Tensor, ImageBiases | None]:
        """As `output_and_biases`, but this rank's part of the output, (B·S, D)."""
        B, S, D = x_BSD.shape
        x_TD = self.region.copy_to_region(x_BSD).reshape(B * S, D)
        x_TD, *parts = split_conditional(x_TD, num_conditional * S)
        outputs, biases = [], []
        for mlps, part_TD in zip(([self.conditional], mlps_of(self.unconditional)), parts, strict=True):
            output_TD, bias = partial_sum(mlps, [mlp.hidden(part_TD) for mlp in mlps], with_biases)
            outputs.append(output_TD)
            biases.append(bias)
        y_TD = torch.cat(outputs)
        if shared := mlps_of(self.shared):
            shared_TD, shared_bias = partial_sum(shared, [mlp.hidden(x_TD) for mlp in shared], with_biases)
            y_TD = shared_TD + y_TD
            biases = [bias if bias is None or shared_bias is None else bias + shared_bias for bias in biases]
        conditional, null = biases
        return y_TD, None if conditional is None or null is None else ImageBiases(conditional, null)


def biases_of_images(biases: ImageBiases, num_conditional: int, like_BD: Tensor) -> Tensor:
    """The biases for each image (B, D), the shape of `like_BD`; the images from `num_conditional` on are null."""
    is_null_B = torch.arange(like_BD.shape[0], device=like_BD.device) >= num_conditional
    return torch.where(is_null_B.unsqueeze(1), biases.null, biases.conditional)
