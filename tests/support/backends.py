"""Implementations that a CPU does not use by default: grouped products of experts, and graphs without inductor."""

from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

from megapromoe.benchmark import models
from megapromoe.engine import fused_update
from megapromoe.nn.compile import compile_model
from megapromoe.nn.moe import dispatcher, expert_linear


@contextmanager
def grouped():
    """Within it experts use grouped products, like bf16 on a GPU of compute capability 9 or 10; CPUs have them too."""
    with (
        patch.object(expert_linear, "has_grouped_mm_kernel", lambda x: True),
        patch.object(dispatcher, "has_grouped_mm_kernel", lambda x: True),
    ):
        yield


BACKENDS = {"looped": nullcontext, "grouped": grouped}
"""name -> context in which experts use this implementation."""


@contextmanager
def benchmarks_without_inductor():
    """Within it compiled steps of benchmarks run operator by operator: inductor takes a minute for each."""
    functions = fused_update.compile_functions("aot_eager", dynamic=True)
    with (
        patch.object(models, "compile_model", partial(compile_model, backend="aot_eager")),
        patch.object(fused_update, "compiled_functions", lambda: functions),
    ):
        yield
