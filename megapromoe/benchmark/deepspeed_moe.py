"""DeepSpeed's own MoE layer as a contender, with our shared and unconditional expert."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapromoe.benchmark.baseline_wrapper import CAPACITY_FACTOR, BaselineWrapper, CannotRun, prototypes_of
from megapromoe.nn.layers import Mlp
from megapromoe.nn.moe.auxiliary import MoEAuxiliary
from megapromoe.nn.moe.layer import MoE

BALANCE_WEIGHT = 0.01  # of its balance loss, which replaces our contrastive loss


class DeepSpeedLayer(BaselineWrapper):
    """DeepSpeed's `MoE`, top-1, with copies of our experts; its linear gate has our normalised prototypes.

    Args:
        moe: our layer, whole or this rank's part of an ep group.
        drops: drop rows beyond `baseline_wrapper.CAPACITY_FACTOR`; otherwise slots for the fullest expert.
        ep: expert-parallel size, over consecutive ranks of the running torch.distributed job.

    Raises CannotRun without a running job, with more than one expert per token, or if DeepSpeed cannot be imported.
    """

    def __init__(self, moe: MoE, drops: bool, ep: int = 1):
        super().__init__(moe)
        config = moe.config
        if config.top_k != 1:
            raise CannotRun(
                f"model.top_k = {config.top_k}: needs model.top_k=1, since DeepSpeed renormalises the weights of more"
            )
        if not dist.is_initialized():
            raise CannotRun("DeepSpeed's MoE needs a torch.distributed job; start one of one rank first")
        if config.num_experts % ep:
            raise CannotRun(f"model.num_experts = {config.num_experts}: DeepSpeed needs a multiple of ep {ep}")
        try:
            from deepspeed.moe.layer import MoE as DeepSpeedMoE

            from megapromoe.engine.deepspeed_backend.start import join_job
        except Exception as error:  # its import tests for GPUs and compilers, and can fail in many ways
            raise CannotRun(f"DeepSpeed cannot be imported: {error}") from error
        join_job()

        experts, weight = moe.experts, moe.experts.fc1.weight
        expert = Mlp(config.hidden_size, config.moe_width).to(weight.device, weight.dtype)
        self.routed = DeepSpeedMoE(
            config.hidden_size,
            expert,
            num_experts=config.num_experts,
            ep_size=ep,
            capacity_factor=CAPACITY_FACTOR,
            eval_capacity_factor=CAPACITY_FACTOR,
            drop_tokens=drops,
        ).to(weight.device)
        with redirect_stdout(StringIO()):  # it prints each group that it makes
            self.routed.set_deepspeed_parallelism()
        with torch.no_grad():
            gate = self.routed.deepspeed_moe.gate.wg
            gate.weight.copy_(nn.functional.normalize(prototypes_of(moe).float(), dim=-1))
            for e, copy in enumerate(self.routed.deepspeed_moe.experts.deepspeed_experts):
                for ours, theirs in ((experts.fc1, copy.fc1), (experts.fc2, copy.fc2)):
                    theirs.weight.copy_(ours.weight[e])
                    theirs.bias.copy_(ours.bias[e])
        self.drops = drops

    def forward(
        self, x_BSD: Tensor, num_conditional: int, y_B: Tensor | None = None, scored_BSD: Tensor | None = None
    ) -> tuple[Tensor, MoEAuxiliary]:
        """DeepSpeed's gate chooses the experts; its balance loss replaces our losses."""
        if scored_BSD is not None:
            raise CannotRun("model.router_input = unmodulated: DeepSpeed's gate scores the tokens that experts process")
        B, S, D = x_BSD.shape
        x_TD, n = x_BSD.reshape(B * S, D), num_conditional * S
        y_TD = self.dense_output(x_TD, n)
        zero = x_BSD.new_zeros((), dtype=torch.float32)
        loss, load_E = zero, zero.new_zeros(self.moe.config.num_experts)
        if n:
            routed_TD, balance, _ = self.routed(x_TD[:n])
            y_TD = torch.cat([y_TD[:n] + routed_TD, y_TD[n:]])
            loss, load_E = BALANCE_WEIGHT * balance, self.routed.deepspeed_moe.exp_counts.to(zero)
        dropped = zero
        if self.drops:
            slots = max(-(-n * CAPACITY_FACTOR // self.moe.config.num_experts), 4)  # 4: its min_capacity
            dropped = 1 - load_E.clamp(max=slots).sum() / max(n, 1)
        losses = {"balance": loss} if self.training else {}
        return y_TD.view(B, S, D), MoEAuxiliary(losses, {}, load_E, zero, dropped)
