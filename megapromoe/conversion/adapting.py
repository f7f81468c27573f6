"""A trained model with other classes, another grid of patches, or other channels.

The tensors of the new model are those of the old one, with these exceptions:

==============================  ====================================================================================
class table                     a row of each new class: its class of the old model, or the mean of all old classes if
                                it has none; the row of the null class is kept
patch embedding, last layer     the initial values of the new model, if patches or channels are others
last layer                      with `learn_sigma` in one of the two only: the rows of the mean are kept, those of the
                                variance left out, or zero
positions                       not stored: sine and cosine tables and rotations are computed for the new grid
==============================  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megapromoe.checkpoint.weights import AVERAGE
from megapromoe.config.model_options import ModelConfig
from megapromoe.config.options import Config
from megapromoe.conversion.state import State, model_shapes
from megapromoe.distributed.mesh import UNSHARDED
from megapromoe.nn.alignment import PROJECTOR_PARAMETERS
from megapromoe.nn.parallelize import initial_values

CLASS_TABLE = "y_embedder.embedding_table.weight"
PATCHES = ("x_embedder.proj.weight", "x_embedder.proj.bias")
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")


def adapt(source: State, config: Config, classes: Sequence[int | None], kind: str) -> State:
    """The state of a model whose classes, grid of patches, channels or learned variance may be others.

    Args:
        source: the trained model.
        config: of the new model; `config.train.seed` determines its initial values.
        classes: see `class_mapping.source_classes`; not used for a model of texts.
        kind: the weights of `source` to use, whatever kind is read.
    """
    old, new = source.config.model, config.model
    shapes, buffer_shapes = model_shapes(new)
    fresh, output_differs = fresh_names(old, new), old.learn_sigma != new.learn_sigma
    initial = initial_values(config, UNSHARDED)
    same_classes = tuple(classes) == tuple(range(old.num_classes))

    def read(_: str, name: str) -> Tensor:
        if name in fresh:
            out = torch.empty(shapes[name])
            initial.write(name, out.view(-1))
            return out
        tensor = source.read(kind, name)
        if name == CLASS_TABLE and not same_classes:
            return _rows_of(tensor, classes)
        if name in OUTPUT and output_differs:
            return _with_variance(tensor, new)
        return tensor

    averaged = {name.removeprefix("ema."): value for name, value in source.buffers.items() if kind == AVERAGE}
    buffers = {name: value for name, value in (source.buffers | averaged).items() if name in buffer_shapes}
    return replace(source, config=config, shapes=shapes, buffers=buffers, read=read, read_range=None)


def fresh_names(old: ModelConfig, new: ModelConfig) -> tuple[str, ...]:
    """The parameters that start from the new model's initial values."""
    same = all(getattr(old, name) == getattr(new, name) for name in ("patch_size", "in_channels"))
    projector = PROJECTOR_PARAMETERS if new.align_block else ()  # no source has one
    return projector if same else (*PATCHES, *OUTPUT, *projector)


def changed_names(old: ModelConfig, new: ModelConfig, classes: Sequence[int | None]) -> tuple[str, ...]:
    """The parameters that are taken from the old model with changes."""
    fresh = fresh_names(old, new)
    output = OUTPUT if old.learn_sigma != new.learn_sigma and not fresh else ()
    table = () if new.has_text or tuple(classes) == tuple(range(old.num_classes)) else (CLASS_TABLE,)
    return (*table, *output)


def _rows_of(table: Tensor, classes: Sequence[int | None]) -> Tensor:
    """The class table (classes + 1, D) of new classes."""
    old, null = table[:-1], table[-1]
    mean = old.double().mean(dim=0).float()
    return torch.stack([*(mean if number is None else old[number] for number in classes), null])


def _with_variance(tensor: Tensor, new: ModelConfig) -> Tensor:
    """The last layer's weight or bias, for `new.learn_sigma`. Its rows are patch by patch, channels last."""
    channels = new.in_channels
    pixels = new.patch_size**2
    mean = tensor.view(pixels, -1, *tensor.shape[1:])[:, :channels]
    if new.learn_sigma:
        mean = torch.cat([mean, torch.zeros_like(mean)], dim=1)
    return mean.reshape(-1, *tensor.shape[1:]).contiguous()
