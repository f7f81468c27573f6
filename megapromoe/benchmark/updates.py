"""The updates of the plain training loop that the benchmark measures: torch's AdamW, or the engine's fused update."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megapromoe.config.train_options import TrainConfig
from megapromoe.engine.fused_update import WIDTH, AdamW, State, fused_adamw_, scalars_of


def make_update(model: nn.Module, t: TrainConfig, compiled: bool) -> Update | FusedUpdate:
    """The update of a model's weights: `FusedUpdate` if `compiled`, else `Update`."""
    return (FusedUpdate if compiled else Update)(model, t)


class Update:
    """Clips gradients and applies fused AdamW, with fp32 masters if the parameters are not fp32.

    As in the engine, the pass of AdamW divides the gradients to clip them, and the host reads nothing.
    """

    def __init__(self, model: nn.Module, t: TrainConfig):
        self.parameters = list(model.parameters())
        self.masters = [p.detach().float().clone() if p.dtype != torch.float32 else p for p in self.parameters]
        betas = (t.beta1, t.beta2)
        self.optimizer = torch.optim.AdamW(
            self.masters, fused=True, lr=t.lr, betas=betas, eps=t.eps, weight_decay=t.weight_decay
        )
        self.max_grad_norm = t.max_grad_norm

    @torch.no_grad()
    def step(self) -> None:
        used = []
        for p, master in zip(self.parameters, self.masters, strict=True):
            if p.grad is not None:
                master.grad = p.grad.float()
                used.append((p, master))
        if self.max_grad_norm:
            norm = nn.utils.get_total_norm([master.grad for _, master in used if master.grad is not None])
            optimizer: Any = self.optimizer  # torch's GradScaler sets this attribute, which the class does not declare
            optimizer.grad_scale = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)
        self.optimizer.step()
        if changed := [(p, master) for p, master in used if p is not master]:
            torch._foreach_copy_([p for p, _ in changed], [master for _, master in changed])
            for _, master in changed:
                master.grad = None


class FusedUpdate:
    """Clips gradients and applies AdamW in two passes after joining the gradients, compiled; fp32 masters as above.

    The parameters become views of one tensor. One without a gradient is updated as with a gradient of zeros.

    Attributes:
        masters: fp32 weights of each parameter.
        lr: (), float64, on the device.
    """

    def __init__(self, model: nn.Module, t: TrainConfig):
        self.parameters = list(model.parameters())
        device, dtype = self.parameters[0].device, self.parameters[0].dtype
        offsets = [0]
        for p in self.parameters:  # matrices begin at aligned addresses, as products of experts need
            offsets.append(offsets[-1] + -(-p.numel() // WIDTH) * WIDTH)
        flat, self.gradient = (torch.zeros(offsets[-1], dtype=dtype, device=device) for _ in range(2))
        pieces = [slice(offset, offset + p.numel()) for p, offset in zip(self.parameters, offsets, strict=False)]
        for p, piece in zip(self.parameters, pieces, strict=True):
            flat[piece].copy_(p.detach().view(-1))
            p.data = flat[piece].view_as(p)
        master = flat if dtype == torch.float32 else flat.float()
        self.masters = [master[piece].view_as(p) for p, piece in zip(self.parameters, pieces, strict=True)]
        self.gradients = [self.gradient[piece].view_as(p) for p, piece in zip(self.parameters, pieces, strict=True)]
        moments = (torch.zeros_like(master), torch.zeros_like(master))
        self.state = State(master, *moments, (), None if master is flat else flat)
        self.constants = AdamW(t.beta1, t.beta2, t.eps, t.weight_decay)
        self.max_grad_norm = t.max_grad_norm
        self.lr = torch.tensor(t.lr, dtype=torch.float64, device=device)
        self.steps = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self) -> None:
        pairs = [(g, p.grad) for g, p in zip(self.gradients, self.parameters, strict=True) if p.grad is not None]
        if len(pairs) < len(self.parameters):
            self.gradient.zero_()
        torch._foreach_copy_([g for g, _ in pairs], [gradient for _, gradient in pairs])
        norm = torch.linalg.vector_norm(self.gradient, dtype=torch.float32)
        divisor = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0) if self.max_grad_norm else torch.ones_like(norm)
        scalars = scalars_of(self.steps, norm.isfinite(), divisor, self.lr, self.constants)
        fused_adamw_(self.state, self.gradient, (), scalars, self.constants)
