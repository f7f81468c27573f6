"""Bytes that elementwise operators, reductions and copies move, and the least that a block and an update must move.

Products and attention are left out: what they move depends on how they divide their work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from megapromoe.config.model_options import ModelConfig

UPDATE_MINIMUM = {"gradient": 2, "master": 8, "moments": 16, "average": 8, "parameter": 2}
"""Bytes for each parameter that an update in bf16 must move: it reads the bf16 gradient, reads and writes the fp32
master, both moments and one average, and writes the bf16 parameter."""


def moved_bytes(func: Any, args: tuple, kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> int:
    """Bytes that a call of an elementwise operator, reduction or copy reads and writes.

    Every input is read once, unless the operator only overwrites it. An expanded tensor counts at the size of its
    memory. Of the table of a gather only as many rows are read as the result has.
    """
    name = func._schema.name.partition("::")[2]
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not outputs:  # it changes arguments and returns nothing
        changed = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        outputs = [t for t in tree_leaves([values.get(name) for name in changed]) if isinstance(t, Tensor)]
    read, written = 0, sum(map(_bytes, outputs))
    for number, tensor in enumerate(inputs):
        if number == 0 and name in ("copy_", "fill_", "zero_"):
            continue
        is_table = number == 0 and name in ("index_select", "gather", "embedding", "index")
        read += min(_bytes(tensor), written) if is_table else _bytes(tensor)
    return read + written


def _bytes(tensor: Tensor) -> int:
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride or not size else 1
    return numbers * tensor.element_size()


def minimum_moved(m: ModelConfig, block: str, routed: float) -> dict[str, tuple[float, float]]:
    """The activations (D bf16 numbers for each token) that the elementwise groups of a block must read and write.

    A group is all that lies between two calls of products, attention or a sort, whose inputs and outputs are in memory.
    It reads each of its tensors once and writes each once. Parameters, and what is smaller than the activations, are
    left out, and so are the gradients of biases, which can be summed by the group that writes what they sum.

    Args:
        m: of a ProMoE with one shared and one unconditional expert and top-1 routing.
        block: "dense" or "moe".
        routed: share of the tokens that are routed.

    Returns group -> forward, backward.
    """
    groups = {
        "norm, modulation": (2.0, 4.0),  # backward adds the gradient of the residual connection
        "gradients of q, k and v joined": (0.0, 6.0),
    }
    if block == "dense":
        return groups | {
            "residual, norm, modulation": (4.0, 6.0),
            "GELU": (2 * m.mlp_width / m.hidden_size, 3 * m.mlp_width / m.hidden_size),
            "residual": (3.0, 3.0),
        }
    width = (m.shared_width + m.moe_width) / m.hidden_size
    return groups | {
        "residual, norm, modulation": (4.0, 7.0),  # the gradients of shared and of other experts are apart
        "tokens for the router, float32": (2 * routed, 0.0),  # their gradient is part of the group before
        "rows of the experts": (2 * routed, 0.0),  # so is theirs
        "GELU": (2 * width, 3 * width),
        "combination, residual": (4.0, 4 + routed),
    }
