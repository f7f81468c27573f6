"""Other ways to run a mixture-of-experts layer, with the parameters and the interface of ours.

Each takes the place of an `MoE` in a block: `route` says who visits whom and `forward` runs the experts.

=====================  ====================================================================================
ours                   `models.moe.MoE`: rows sorted by expert, in one product or expert by expert
joined                 ours, but null tokens pass the shared and the unconditional expert as one MLP, twice as wide
loop                   the published way: for each expert a boolean mask over all tokens, and its own MLP
bmm                    every expert gets a buffer of equal capacity, one batched product; too many are dropped
deepspeed-capacity     DeepSpeed's `MoE`, the same capacity, shared and unconditional expert beside it
deepspeed-nodrop       the same with the capacity of the fullest expert, so that nothing is dropped
dense                  one MLP of the same products per token
=====================  ====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.benchmark.baseline_wrapper import CAPACITY, BaselineWrapper, Layer, dense_experts
from megapromoe.nn.layers import Mlp
from megapromoe.nn.moe.layer import MoE
from megapromoe.nn.moe.routers import Routed

CONTENDERS = ("ours", "loop", "dense", "joined", "bmm", "deepspeed-capacity", "deepspeed-nodrop")


def contender(name: str, moe: MoE) -> Layer:
    """The layer `name` around our layer, whose parameters it uses; "dense" has its own.

    Raises CannotRun where this machine cannot run it.
    """
    if name == "ours":
        return moe
    if name == "loop":
        return Loop(moe)
    if name == "joined":
        return Joined(moe)
    if name == "bmm":
        return BatchedCapacity(moe)
    if name == "dense":
        return dense(moe)
    # DeepSpeed takes seconds to import, and only two contenders are its.
    from megapromoe.benchmark.deepspeed_moe import DeepSpeedLayer

    return DeepSpeedLayer(moe, drops=name == "deepspeed-capacity")


def dense(moe: MoE) -> Mlp:
    """An MLP as wide as all the experts that a token meets: shared and routed, or shared and unconditional."""
    config, like = moe.router.config, moe.experts.fc1.weight
    width = config.top_k * config.moe_width + config.shared_experts * config.shared_width
    mlp = Mlp(config.hidden_size, width)
    mlp = mlp.to(like.device, like.dtype)
    for name, p in mlp.named_parameters():
        nn.init.xavier_uniform_(p) if name.endswith("weight") else nn.init.zeros_(p)
    return mlp


class Loop(BaselineWrapper):
    """Expert after expert, each on the tokens that a mask picks: the unconditional expert is the last of them.

    Asks the device for the number of tokens of each expert. The oracle of tests: it is what the formula says.
    """

    def forward(self, x_BSD: Tensor, routed: Routed, conditional: int) -> Tensor:
        B, S, D = x_BSD.shape
        x_TD, moe, route = x_BSD.reshape(B * S, D), self.moe, routed.route
        shared, unconditional = dense_experts(moe)
        E, K = moe.router.experts, route.top_k
        cut = conditional * S
        expert_TK = torch.full((B * S, K), E, device=x_TD.device)
        expert_TK[:cut] = route.expert_R.view(-1, K)
        weight_TK = torch.cat([route.weight_R.view(-1, K), route.weight_R.new_ones(B * S - cut, K)]).to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD)
        # Unbound once: indexing the stack expert by expert would make a gradient of its whole size for each.
        fc1, fc2 = moe.experts.fc1, moe.experts.fc2
        own = zip(*(p.unbind() for p in (fc1.weight, fc1.bias, fc2.weight, fc2.bias)), strict=True)
        experts: list[Callable[[Tensor], Tensor]] = [partial(_mlp, *parameters) for parameters in own]
        experts.append(unconditional)
        for e, expert in enumerate(experts):
            for k in range(K if e < E else 1):
                mask_T = expert_TK[:, k] == e
                if mask_T.any():
                    y_TD[mask_T] += weight_TK[mask_T, k, None] * expert(x_TD[mask_T])
        return (y_TD + shared(x_TD)).view(B, S, D)


def _mlp(weight1_FD: Tensor, bias1_F: Tensor, weight2_DF: Tensor, bias2_D: Tensor, x_RD: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x_RD, weight1_FD, bias1_F), approximate="tanh"), weight2_DF, bias2_D)


class Joined(BaselineWrapper):
    """Ours, with one product for both experts of null tokens, whose weights are laid side by side for it.

    The products stay the same; it saves passes over null tokens and pays with a copy of the weights.
    """

    def forward(self, x_BSD: Tensor, routed: Routed, conditional: int) -> Tensor:
        B, S, D = x_BSD.shape
        x_TD, moe, cut = x_BSD.reshape(B * S, D), self.moe, conditional * S
        begun = moe.dispatcher.begin(x_TD[:cut], routed.route, B * S)
        shared, unconditional = dense_experts(moe)
        weight1_FD = torch.cat([shared.fc1.weight, unconditional.fc1.weight])
        bias1_F = torch.cat([shared.fc1.bias, unconditional.fc1.bias])
        weight2_DF = torch.cat([shared.fc2.weight, unconditional.fc2.weight], dim=1)
        null_TD = _mlp(weight1_FD, bias1_F, weight2_DF, shared.fc2.bias + unconditional.fc2.bias, x_TD[cut:])
        y_TD = torch.cat([shared(x_TD[:cut]), null_TD])
        return moe.dispatcher.finish(moe.dispatcher.compute(begun, moe.experts), y_TD).view(B, S, D)


class BatchedCapacity(BaselineWrapper):
    """Each expert takes the first C = ceil(1.25·R/E) of its rows, in one batched product; later rows are dropped.

    `dropped` is the share of the last call's rows that were. Asks the device for nothing.
    """

    def __init__(self, moe: MoE, capacity: float = CAPACITY):
        super().__init__(moe)
        self.capacity = capacity
        self.kept_R: Tensor | None = None

    @property
    def dropped(self) -> float:
        if self.kept_R is None or not self.kept_R.numel():
            return 0.0
        return 1 - float(self.kept_R.float().mean())

    def forward(self, x_BSD: Tensor, routed: Routed, conditional: int) -> Tensor:
        B, S, D = x_BSD.shape
        x_TD, cut = x_BSD.reshape(B * S, D), conditional * S
        token_R, expert_R, weight_R = routed.route[:3]
        E, R = self.moe.router.experts, token_R.shape[0]
        C = math.ceil(self.capacity * R / E)
        hits_RE = (expert_R.unsqueeze(1) == torch.arange(E, device=expert_R.device)).long()
        place_R = (hits_RE.cumsum(0) * hits_RE).sum(1) - 1  # which of its expert's rows
        kept_R = place_R < C
        self.kept_R = kept_R
        slot_R = torch.where(kept_R, expert_R * C + place_R, E * C)  # the dropped share one row at the end

        rows = x_TD.new_zeros(E * C + 1, D).index_copy(0, slot_R, x_TD.index_select(0, token_R))
        fc1, fc2 = self.moe.experts.fc1, self.moe.experts.fc2
        x_ECD = rows[: E * C].view(E, C, D)
        hidden_ECF = F.gelu(torch.baddbmm(fc1.bias[:, None], x_ECD, fc1.weight.mT), approximate="tanh")
        y_ECD = torch.baddbmm(fc2.bias[:, None], hidden_ECF, fc2.weight.mT)
        y = torch.cat([y_ECD.view(E * C, D), y_ECD.new_zeros(1, D)]).index_select(0, slot_R)
        y_TD = self.beside(x_TD, cut).index_add(0, token_R, y * weight_R.to(y.dtype).unsqueeze(1))
        return y_TD.view(B, S, D)
