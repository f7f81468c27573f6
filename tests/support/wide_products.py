"""Products of bf16 tensors on CPUs without instructions for them, on which they take many times as long as in fp32."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class WideProducts(TorchDispatchMode):
    """Computes them in fp32 and rounds the results. Autograd keeps the same tensors as without it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        return func(*tree_map_only(Tensor, Tensor.float, args), **(kwargs or {})).bfloat16()
