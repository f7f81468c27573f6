"""The assignment of tokens to experts as rows, and how a choice of experts or of tokens becomes one.

A *row* is a pair of a token and one of its experts. Every router returns rows, so all of them share one dispatch path.
Shape letters besides the usual ones: R rows, Q tokens that an expert takes of each image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megapromoe.nn.tensor_parallel import Region


class TokenAssignment(NamedTuple):
    """Rows to compute: token `token_R` goes to expert `expert_R` with routing weight `weight_R`.

    `token_R` and `expert_R` are int64 (R,); experts have their logical numbers 0 .. E-1.

    `top_k` > 0 states that the rows are token-major: exactly `top_k` rows for each token from `first_token` on.
    Combining is then a permutation and a sum in fixed order, reproducible from run to run. 0: any rows in any order.

    `is_shard`: the rows are those of one rank of a sharded region, of which other tokens have none.
    """

    token_R: Tensor
    expert_R: Tensor
    weight_R: Tensor
    top_k: int = 0
    first_token: int = 0
    is_shard: bool = False

    def tokens_of(self, row_R: Tensor) -> Tensor:
        """The token of each of the given rows, int64 of the same shape."""
        if not self.top_k:
            return self.token_R[row_R]
        token_R = row_R if self.top_k == 1 else row_R // self.top_k
        return token_R + self.first_token if self.is_shard else token_R

    def share(self, region: Region, num_tokens: int) -> tuple[int, int]:
        """The contiguous 1/size of the rows that this rank of a sharded region computes: the first, and how many.

        Of token-major rows it is the first token, and how many tokens.
        """
        units = num_tokens if self.top_k else self.token_R.shape[0]
        start, stop = (units * rank // region.size for rank in (region.rank, region.rank + 1))
        return start, stop - start

    def shard(self, region: Region, first: int, number: int) -> TokenAssignment:
        """The rows that this rank of a sharded region computes; `first`, `number`: its `share`.

        The weights are copied to the region, so that their gradient is summed over its ranks.
        """
        rows = first * max(self.top_k, 1), number * max(self.top_k, 1)
        token_R, expert_R = self.token_R.narrow(0, *rows), self.expert_R.narrow(0, *rows)
        weight_R = region.copy_to_region(self.weight_R).narrow(0, *rows)
        first_token = self.first_token + first if self.top_k else 0
        return TokenAssignment(token_R, expert_R, weight_R, self.top_k, first_token, is_shard=True)


def token_choice(chosen: Tensor, weight: Tensor) -> TokenAssignment:
    """The rows if each token chose K experts. Args: indices of experts (..., K), int64, and weights (..., K)."""
    K = chosen.shape[-1]
    token_T = torch.arange(chosen.shape[:-1].numel(), device=chosen.device)
    token_R = token_T if K == 1 else token_T.repeat_interleave(K)
    return TokenAssignment(token_R, chosen.flatten(), weight.flatten(), top_k=K)


def expert_choice(chosen_BEQ: Tensor, weight_BEQ: Tensor, S: int) -> TokenAssignment:
    """The rows if each expert chose Q tokens of each image. Args: indices within the image (B, E, Q), and weights."""
    B, E, Q = chosen_BEQ.shape
    first_B = torch.arange(B, device=chosen_BEQ.device) * S
    expert_E = torch.arange(E, device=chosen_BEQ.device)
    token_R = (chosen_BEQ + first_B[:, None, None]).flatten()
    return TokenAssignment(token_R, expert_E[None, :, None].expand(B, E, Q).flatten(), weight_BEQ.flatten())


def mask_choice(is_chosen_TE: Tensor, score_TE: Tensor) -> TokenAssignment:
    """The rows where the mask (T, E) is set; scores are the weights. The host waits for the number of rows."""
    token_R, expert_R = is_chosen_TE.nonzero(as_tuple=True)
    return TokenAssignment(token_R, expert_R, score_TE[token_R, expert_R])


def top_k(score: Tensor, K: int) -> Tensor:
    """The indices (..., K) of the K largest scores (..., E)."""
    return score.argmax(-1, keepdim=True) if K == 1 else score.topk(K, dim=-1).indices


def top_counts(score_TE: Tensor, count_E: Tensor) -> Tensor:
    """Mask (T, E) of the count_E[e] tokens with the highest scores of each expert e."""
    order_TE = score_TE.argsort(dim=0, descending=True, stable=True)
    index_TE = torch.arange(score_TE.shape[0], device=score_TE.device)[:, None].expand_as(order_TE)
    rank_TE = torch.empty_like(order_TE).scatter_(0, order_TE, index_TE)
    return rank_TE < count_E[None]


def rows_per_expert(expert_R: Tensor, num_experts: int) -> Tensor:
    """The number of rows of each expert, int64 (num_experts,).

    Unlike torch.bincount, whose result has a size that the host must read from the GPU.
    """
    return expert_R.new_zeros(num_experts).scatter_add_(0, expert_R, torch.ones_like(expert_R))
