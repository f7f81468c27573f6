"""DeepSpeed's own MoE layer as a contender, beside our shared and unconditional expert."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapromoe.benchmark.baseline_wrapper import CAPACITY, BaselineWrapper, CannotRun, prototypes_of
from megapromoe.nn.layers import Mlp
from megapromoe.nn.moe.dispatcher import Route
from megapromoe.nn.moe.layer import MoE
from megapromoe.nn.moe.routers import Routed

BALANCE = 0.01  # weight of its balance loss, which takes the place of our contrastive loss


class DeepSpeedLayer(BaselineWrapper):
    """DeepSpeed's `MoE`, top-1, with copies of our experts; its gate is linear, on our unit prototypes.

    Args:
        moe: ours, on one rank or one of an ep group.
        drops: with the capacity of `baseline_wrapper.CAPACITY`; otherwise with that of the fullest expert.
        ep: expert-parallel size, of consecutive ranks of the running torch.distributed job.

    Raises CannotRun without a running job, with more than one expert a token, or if DeepSpeed does not import.
    """

    def __init__(self, moe: MoE, drops: bool, ep: int = 1):
        super().__init__(moe)
        config = moe.router.config
        if config.top_k != 1:
            raise CannotRun(f"model.top_k = {config.top_k}: compared at top_k 1 alone, its other gates renormalise")
        if not dist.is_initialized():
            raise CannotRun("DeepSpeed's MoE needs a torch.distributed job; start one, of one rank, before it")
        if config.num_experts % ep:
            raise CannotRun(f"model.num_experts = {config.num_experts}: DeepSpeed needs a multiple of ep {ep}")
        try:
            from deepspeed.moe.layer import MoE as DeepSpeedMoE

            from megapromoe.engine.deepspeed_adapter import join_job
        except Exception as error:  # it looks for a GPU and compilers while it is imported
            raise CannotRun(f"deepspeed does not import: {error}") from error
        join_job()

        experts, like = moe.experts, moe.experts.fc1.weight
        one = Mlp(config.hidden_size, config.moe_width).to(like.device, like.dtype)
        self.routed = DeepSpeedMoE(
            config.hidden_size,
            one,
            num_experts=config.num_experts,
            ep_size=ep,
            capacity_factor=CAPACITY,
            eval_capacity_factor=CAPACITY,
            drop_tokens=drops,
        ).to(like.device)
        with redirect_stdout(StringIO()):  # it prints that it makes a group
            self.routed.set_deepspeed_parallelism()
        with torch.no_grad():
            gate = self.routed.deepspeed_moe.gate.wg
            gate.weight.copy_(nn.functional.normalize(prototypes_of(moe).float(), dim=-1))
            for e, copy in enumerate(self.routed.deepspeed_moe.experts.deepspeed_experts):
                for ours, theirs in ((experts.fc1, copy.fc1), (experts.fc2, copy.fc2)):
                    theirs.weight.copy_(ours.weight[e])
                    theirs.bias.copy_(ours.bias[e])
        self.drops = drops

    @property
    def load_E(self) -> Tensor:
        """Rows that chose each expert in the last call."""
        return self.routed.deepspeed_moe.exp_counts

    @property
    def dropped(self) -> float:
        """Share of the last call's rows that found no room."""
        if not self.drops:
            return 0.0
        rows = int(self.load_E.sum())
        room = -(-rows * CAPACITY // self.moe.router.experts)
        return 1 - float(self.load_E.clamp(max=max(room, 4)).sum()) / max(rows, 1)  # 4: its min_capacity

    def route(self, x_BSD: Tensor, *_) -> Routed:
        """Nothing yet: its gate decides inside of `forward`, which adds its loss to what is returned here."""
        none_R = torch.zeros(0, dtype=torch.long, device=x_BSD.device)
        zero = x_BSD.new_zeros((), dtype=torch.float32)
        losses = {"balance": zero} if self.training else {}
        return Routed(Route(none_R, none_R, none_R.float()), losses, zero.new_zeros(self.moe.router.experts), zero)

    def forward(self, x_BSD: Tensor, routed: Routed, conditional: int) -> Tensor:
        B, S, D = x_BSD.shape
        x_TD, cut = x_BSD.reshape(B * S, D), conditional * S
        y_TD = self.beside(x_TD, cut)
        if cut:
            rows_TD, loss, load_E = self.routed(x_TD[:cut])
            if self.training:
                routed.losses["balance"] = BALANCE * loss
            y_TD = torch.cat([y_TD[:cut] + rows_TD, y_TD[cut:]])
        return y_TD.view(B, S, D)
