"""Both implementations of experts on a CPU, which loops over them by default, like GPUs without grouped products."""

from contextlib import contextmanager, nullcontext
from unittest.mock import patch

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
