"""The condition of an image by text: features of its tokens, which an encoder has computed.

Text tokens take part in the attention of each block, together with the image's; their mean is a part of the condition
of the modulation. A text without tokens, such as that of every null image, takes no part, and has a learned vector
instead of the mean.

Shape letters besides the usual ones: N text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megapromoe.config.model_options import ModelConfig
from megapromoe.nn.logical_module import LogicalModule, Normal, ParameterRule
from megapromoe.nn.norms import token_norm
from megapromoe.nn.tensor_parallel import Linear


@dataclass(frozen=True)
class TextCondition:
    """The texts of a batch.

    Attributes:
        features_BND: features of N tokens, padded to the same number; N may be 0, and at most `model.text_tokens`.
            Those of padding may be any numbers.
        mask_BN: True for the tokens of a text, False for padding.
    """

    features_BND: Tensor
    mask_BN: Tensor

    def __len__(self) -> int:
        return self.features_BND.shape[0]

    def to(self, device: torch.device | str) -> TextCondition:
        """The texts on a device."""
        return TextCondition(self.features_BND.to(device), self.mask_BN.to(device))

    def is_null(self) -> Tensor:
        """Whether each text has no tokens, bool (B,)."""
        return ~self.mask_BN.any(dim=1)

    def select(self, rows: Tensor, num_conditional: int) -> TextCondition:
        """The texts `rows`, int64 (n,). The model ignores those of null images, all but the first `num_conditional`."""
        return TextCondition(self.features_BND[rows], self.mask_BN[rows])

    def part(self, start: int, stop: int) -> TextCondition:
        """The texts start .. stop - 1."""
        return TextCondition(self.features_BND[start:stop], self.mask_BN[start:stop])

    def without_null(self, num_conditional: int) -> TextCondition:
        """The texts of which those of null images, all but the first `num_conditional`, have no tokens."""
        if num_conditional == len(self):
            return self
        is_conditional_B = torch.arange(len(self), device=self.mask_BN.device) < num_conditional
        return replace(self, mask_BN=self.mask_BN & is_conditional_B.unsqueeze(1))

    def check(self, config: ModelConfig, images: int) -> None:
        """Raises ValueError if the texts do not fit a batch of this model; texts that are too long among others."""
        B, N, width = self.features_BND.shape if self.features_BND.dim() == 3 else (-1, -1, -1)
        if (B, width) != (images, config.text_width):
            raise ValueError(
                f"features_BND has the shape {tuple(self.features_BND.shape)}: must be ({images}, tokens,"
                f" {config.text_width}), an image's text each, of model.text_width channels"
            )
        if config.text_tokens < N:
            raise ValueError(
                f"features_BND has texts of {N} tokens: must be at most model.text_tokens = {config.text_tokens}"
            )
        if self.mask_BN.shape != (B, N) or self.mask_BN.dtype != torch.bool:
            raise ValueError(
                f"mask_BN is {self.mask_BN.dtype} of the shape {tuple(self.mask_BN.shape)}: must be torch.bool of"
                f" ({B}, {N}), one for each token of features_BND"
            )


class TextEmbed(LogicalModule):
    """Text features (B, N, D_text) to tokens (B, N, D), and their means (B, D).

    Features are normalised, since those of different encoders differ in scale, and pass a two-layer MLP.
    """

    rules = {"null": ParameterRule(Normal(0.02))}

    def __init__(self, features: int, width: int, norm: str):
        """Makes the module.

        Args:
            features: D_text.
            width: D.
            norm: a value of `model.norm`.
        """
        super().__init__()
        self.norm = token_norm(norm, features)
        self.mlp = nn.Sequential(Linear(features, width), nn.GELU(approximate="tanh"), Linear(width, width))
        self.null = nn.Parameter(torch.empty(width))
        self._reset_own_parameters()

    def forward(self, features_BND: Tensor, mask_BN: Tensor) -> tuple[Tensor, Tensor]:
        # Padding is set to zero, so that not even NaN in it can reach an image.
        features_BND = features_BND.to(self.null.dtype).masked_fill(~mask_BN.unsqueeze(-1), 0)
        text_BND = self.mlp(self.norm(features_BND))
        count_B1 = mask_BN.sum(1, keepdim=True)
        sum_BD = torch.bmm(mask_BN.unsqueeze(1).to(text_BND.dtype), text_BND).squeeze(1)
        return text_BND, torch.where(count_B1 > 0, sum_BD / count_B1.clamp(min=1), self.null)
