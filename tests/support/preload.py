"""Imports, in the server that workers are forked from, all that they would import one by one."""

import functools
import gc
import importlib
import pkgutil

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, imported by deepspeed.initialize, and Inductor by it
import deepspeed.utils.numa
import deepspeed.utils.nvtx
import pytest  # noqa: F401
import torch
import torch.utils.tensorboard  # noqa: F401

import megapromoe

for module in pkgutil.walk_packages(megapromoe.__path__, "megapromoe."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
# Three habits of ZeRO-3 take much of a short run. It starts numactl for each bucket of gradients to count sockets,
# writes all numbers of all parameters into a message that it does not print, and opens ranges of a profiler of GPUs.
deepspeed.utils.numa.get_numa_cores = functools.cache(deepspeed.utils.numa.get_numa_cores)
torch.set_printoptions(threshold=0, edgeitems=1)
deepspeed.utils.nvtx.enable_nvtx = False
# Objects of this server are never freed: not looking at them saves workers the copies of their pages.
gc.collect()
gc.freeze()
