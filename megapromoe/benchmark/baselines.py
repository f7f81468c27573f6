"""Other implementations of the MoE layer, with the parameters and the methods of ours.

Each can replace an `MoE` in a block: `route` assigns experts to tokens and `forward` runs the experts.

=====================  ====================================================================================
ours                   `nn.moe.layer.MoE`: rows sorted by expert, with grouped or looped experts
joined                 ours, but shared and unconditional expert are one MLP of twice the width for null tokens
loop                   as published: for each expert a boolean mask over all tokens, and its own MLP
bmm                    equal slots for every expert, one batched product; rows without a slot are dropped
deepspeed-capacity     DeepSpeed's `MoE` with the same capacity factor, and our shared and unconditional expert
deepspeed-nodrop       the same with as many slots as the fullest expert needs, so that no row is dropped
dense                  one MLP with as many FLOPs per token
=====================  ====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.benchmark.baseline_wrapper import CAPACITY_FACTOR, BaselineWrapper, CannotRun, Layer, dense_experts
from megapromoe.nn.layers import Mlp
from megapromoe.nn.moe.assignment import TokenAssignment
from megapromoe.nn.moe.layer import MoE

CONTENDERS = ("ours", "loop", "dense", "joined", "bmm", "deepspeed-capacity", "deepspeed-nodrop")


def make_contender(name: str, moe: MoE) -> Layer:
    """Makes the layer `name` with the parameters of our layer; "dense" has its own.

    Raises CannotRun if it cannot run on this machine.
    """
    if name == "ours":
        return moe
    if name == "dense":
        return dense(moe)
    if moe.config.activation != "gelu":
        raise CannotRun(f"model.activation = {moe.config.activation!r}: needs model.activation=gelu")
    if name == "loop":
        return Loop(moe)
    if name == "joined":
        return Joined(moe)
    if name == "bmm":
        return BatchedCapacity(moe)
    # Only two contenders need DeepSpeed, which takes seconds to import.
    from megapromoe.benchmark.deepspeed_moe import DeepSpeedLayer

    return DeepSpeedLayer(moe, drops=name == "deepspeed-capacity")


def dense(moe: MoE) -> Mlp:
    """An MLP as wide as all experts of a token together: shared and routed, or shared and unconditional."""
    config, weight = moe.config, moe.experts.fc1.weight
    width = config.top_k * config.moe_width + config.shared_experts * config.shared_width
    mlp = Mlp(config.hidden_size, width, config.activation)
    mlp = mlp.to(weight.device, weight.dtype)
    for name, p in mlp.named_parameters():
        nn.init.xavier_uniform_(p) if name.endswith("weight") else nn.init.zeros_(p)
    return mlp


class Loop(BaselineWrapper):
    """A loop over experts, each on the tokens that a mask selects; the unconditional expert is the last.

    The host waits for the number of tokens of each expert. Tests compare other layers with it, since it follows the
    formula.
    """

    def run_experts(
        self, x_BSD: Tensor, assignment: TokenAssignment, num_conditional: int
    ) -> tuple[Tensor, Tensor | None]:
        B, S, D = x_BSD.shape
        x_TD, moe = x_BSD.reshape(B * S, D), self.moe
        shared, unconditional = dense_experts(moe)
        E, K = moe.router.num_experts, assignment.top_k
        num_conditional_tokens = num_conditional * S
        expert_TK = torch.full((B * S, K), E, device=x_TD.device)
        expert_TK[:num_conditional_tokens] = assignment.expert_R.view(-1, K)
        weight_TK = assignment.weight_R.view(-1, K)
        null_weight_TK = weight_TK.new_ones(B * S - num_conditional_tokens, K)
        weight_TK = torch.cat([weight_TK, null_weight_TK]).to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD)
        # Unbound once: indexing the stacked parameters would make a gradient of their whole size for each expert.
        fc1, fc2 = moe.experts.fc1, moe.experts.fc2
        parameters_E = zip(*(p.unbind() for p in (fc1.weight, fc1.bias, fc2.weight, fc2.bias)), strict=True)
        experts: list[Callable[[Tensor], Tensor]] = [partial(_mlp, *parameters) for parameters in parameters_E]
        experts.append(unconditional)
        for e, expert in enumerate(experts):
            for k in range(K if e < E else 1):
                mask_T = expert_TK[:, k] == e
                if mask_T.any():
                    y_TD[mask_T] += weight_TK[mask_T, k, None] * expert(x_TD[mask_T])
        return (y_TD + shared(x_TD)).view(B, S, D), None


def _mlp(weight1_FD: Tensor, bias1_F: Tensor, weight2_DF: Tensor, bias2_D: Tensor, x_RD: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x_RD, weight1_FD, bias1_F), approximate="tanh"), weight2_DF, bias2_D)


class Joined(BaselineWrapper):
    """Ours, with the shared and the unconditional expert concatenated to one MLP for null tokens.

    It has the same FLOPs and fewer passes over null tokens, but copies the weights.
    """

    def run_experts(
        self, x_BSD: Tensor, assignment: TokenAssignment, num_conditional: int
    ) -> tuple[Tensor, Tensor | None]:
        B, S, D = x_BSD.shape
        x_TD, moe, n = x_BSD.reshape(B * S, D), self.moe, num_conditional * S
        dispatched = moe.dispatcher.dispatch(x_TD[:n], assignment, B * S)
        shared, unconditional = dense_experts(moe)
        weight1_FD = torch.cat([shared.fc1.weight, unconditional.fc1.weight])
        bias1_F = torch.cat([shared.fc1.bias, unconditional.fc1.bias])
        weight2_DF = torch.cat([shared.fc2.weight, unconditional.fc2.weight], dim=1)
        null_TD = _mlp(weight1_FD, bias1_F, weight2_DF, shared.fc2.bias + unconditional.fc2.bias, x_TD[n:])
        y_TD = torch.cat([shared(x_TD[:n]), null_TD])
        expert_outputs = moe.dispatcher.run_experts(dispatched, moe.experts)
        return moe.dispatcher.combine(expert_outputs, y_TD).view(B, S, D), expert_outputs.dropped


class BatchedCapacity(BaselineWrapper):
    """Each expert takes the first ceil(1.25·R/E) of its rows, in one batched product; other rows are dropped.

    The host does not wait for the GPU.
    """

    def __init__(self, moe: MoE, capacity_factor: float = CAPACITY_FACTOR):
        super().__init__(moe)
        self.capacity_factor = capacity_factor

    def run_experts(
        self, x_BSD: Tensor, assignment: TokenAssignment, num_conditional: int
    ) -> tuple[Tensor, Tensor | None]:
        B, S, D = x_BSD.shape
        x_TD = x_BSD.reshape(B * S, D)
        token_R, expert_R, weight_R = assignment[:3]
        E, R = self.moe.router.num_experts, token_R.shape[0]
        Q = math.ceil(self.capacity_factor * R / E)  # slots of an expert
        hits_RE = (expert_R.unsqueeze(1) == torch.arange(E, device=expert_R.device)).long()
        rank_R = (hits_RE.cumsum(0) * hits_RE).sum(1) - 1  # among the rows of its expert
        kept_R = rank_R < Q
        dropped = (~kept_R).float().sum() / max(R, 1)
        slot_R = torch.where(kept_R, expert_R * Q + rank_R, E * Q)  # dropped rows share one slot at the end

        rows = x_TD.new_zeros(E * Q + 1, D).index_copy(0, slot_R, x_TD.index_select(0, token_R))
        fc1, fc2 = self.moe.experts.fc1, self.moe.experts.fc2
        x_EQD = rows[: E * Q].view(E, Q, D)
        hidden_EQF = F.gelu(torch.baddbmm(fc1.bias[:, None], x_EQD, fc1.weight.mT), approximate="tanh")
        y_EQD = torch.baddbmm(fc2.bias[:, None], hidden_EQF, fc2.weight.mT)
        y = torch.cat([y_EQD.view(E * Q, D), y_EQD.new_zeros(1, D)]).index_select(0, slot_R)
        y_TD = self.dense_output(x_TD, num_conditional * S).index_add(0, token_R, y * weight_R.to(y.dtype).unsqueeze(1))
        return y_TD.view(B, S, D), dropped
