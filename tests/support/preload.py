"""Imports, in the server that workers are forked from, all that they would import one by one."""

import gc
import importlib
import pkgutil

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, imported by deepspeed.initialize, and Inductor by it
import pytest  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import megapromoe

for module in pkgutil.walk_packages(megapromoe.__path__, "megapromoe."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
# Objects of this server are never freed: not looking at them saves workers the copies of their pages.
gc.collect()
gc.freeze()
