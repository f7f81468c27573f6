"""AdamW that is never compiled."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class EagerAdamW(torch.optim.AdamW):
    """torch's AdamW, whose methods do not import torch's compiler.

    torch wraps them for torch.compile, which is not applied to optimizers here. The wrappers (torch/optim/optimizer.py)
    import `torch._dynamo`: 800 modules and a second of each rank's start.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # DeepSpeed gives no closure
        """Updates all parameter groups."""
        assert closure is None, "a closure is not supported"
        inspect.unwrap(torch.optim.AdamW.step)(self)
