"""The two ways to run experts, on a CPU: left alone it goes expert by expert, as GPUs without a grouped product do."""

from contextlib import contextmanager, nullcontext
from unittest.mock import patch

from megapromoe.nn.moe import dispatcher, expert_linear


@contextmanager
def grouped():
    """By grouped products, as bf16 on a GPU of compute capability 9 or 10. Torch has them on CPUs too."""
    with (
        patch.object(expert_linear, "in_one_kernel", lambda x: True),
        patch.object(dispatcher, "in_one_kernel", lambda x: True),
    ):
        yield


WAYS = {"expert by expert": nullcontext, "grouped": grouped}
