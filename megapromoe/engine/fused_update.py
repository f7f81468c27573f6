"""AdamW in one pass over a flat partition: unscale, clip, update, averages of the weights, cast to the parameters.

The pass reads the gradient, the fp32 master, both moments and the averages, and writes all of them but the gradient,
and the parameters. torch.compile makes one kernel of it. All that changes from step to step is a tensor of the device:
the learning rate, the divisor of the gradient, the bias corrections, and whether the step is applied. So the host reads
nothing and nothing is compiled again, as a CUDA graph needs; capturing the update was not tried. Source of AdamW:
Loshchilov, Hutter, https://arxiv.org/abs/1711.05101, as torch.optim.AdamW computes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# A kernel loads 16 bytes at a time if the number of elements of all its tensors is a multiple of this.
WIDTH = 64
# Elements. Without the compiler the result of every operator is in memory; parts of this size bound them.
EAGER_PART = 1 << 26


@dataclass(frozen=True)
class AdamW:
    """The constants of an update: betas, epsilon and weight decay of a parameter group."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Scalars(NamedTuple):
    """What an update is computed with, tensors () on the device, float32 except `applied`.

    Attributes:
        applied: bool, whether the step is applied; otherwise nothing changes.
        divisor: of the gradient.
        shrink: factor of the weights: 1 - lr·weight_decay.
        step_size: lr / (1 - beta1**t).
        root: sqrt(1 - beta2**t).
    """

    applied: Tensor
    divisor: Tensor
    shrink: Tensor
    step_size: Tensor
    root: Tensor


class State(NamedTuple):
    """The tensors of a partition that an update changes, all of one length.

    Attributes:
        master: fp32 weights.
        moment1, moment2: fp32.
        averages: fp32 averages of the weights, any number.
        parameter: the weights of the model, of any floating-point type; None if `master` is them.
    """

    master: Tensor
    moment1: Tensor
    moment2: Tensor
    averages: tuple[Tensor, ...]
    parameter: Tensor | None

    def shaped(self, start: int, stop: int, width: int) -> State:
        """Elements [start, stop) as rows of `width`."""

        def view(tensor: Tensor) -> Tensor:
            return tensor[start:stop].view(-1, width)

        return State(
            view(self.master),
            view(self.moment1),
            view(self.moment2),
            tuple(map(view, self.averages)),
            None if self.parameter is None else view(self.parameter),
        )


@torch.no_grad()
def fused_adamw_(
    state: State, gradient: Tensor, weights: Sequence[Tensor], scalars: Scalars, constants: AdamW, compiled: bool = True
) -> None:
    """Updates a partition in place.

    Args:
        state: of the partition, flat (N,).
        gradient: of any floating-point type, (N,); it is not changed.
        weights: for each average, () float32: how far it moves towards the new weights, 0 in a skipped step.
        scalars: of this step, see `scalars_of`.
        constants: of the partition's parameter group.
        compiled: one kernel made by torch.compile; otherwise operator by operator.

    Raises torch's error if the pass cannot be compiled as a whole.
    """
    run = compiled_functions().update if compiled else _update
    count = gradient.shape[0]
    aligned = count - count % WIDTH
    for start, stop, width in ((0, aligned, WIDTH), (aligned, count, 1)):
        if start < stop:
            part = state.shaped(start, stop, width)
            run(part, gradient[start:stop].view(-1, width), tuple(weights), scalars, constants)


@torch.no_grad()
def scalars_of(
    step: Tensor, applied: Tensor, divisor: Tensor, lr: Tensor, constants: AdamW, compiled: bool = True
) -> Scalars:
    """The scalars of an update, in one kernel if `compiled`; counts the step in `step` if it is applied.

    Args:
        step: the number of updates so far, () float32.
        applied: bool, ().
        divisor: of the gradient, ().
        lr: learning rate, () float64.
        constants: of the parameter group.
    """
    run = compiled_functions().scalars if compiled else _scalars
    return run(step, applied, divisor, lr, constants)


class CompiledFunctions(NamedTuple):
    """`_update` and `_scalars`, compiled."""

    update: Callable
    scalars: Callable


@functools.cache
def compiled_functions() -> CompiledFunctions:
    """The compiled functions of this process. One kernel serves partitions of every size."""
    return compile_functions("inductor", dynamic=True)


def compile_functions(backend: str | Callable, dynamic: bool) -> CompiledFunctions:
    """Compiles both functions.

    Args:
        backend: of torch.compile.
        dynamic: one kernel for all sizes.
    """
    update = torch.compile(_update, backend=backend, fullgraph=True, dynamic=dynamic)
    return CompiledFunctions(update, torch.compile(_scalars, backend=backend, fullgraph=True, dynamic=False))


def _update(state: State, gradient: Tensor, weights: tuple[Tensor, ...], scalars: Scalars, constants: AdamW) -> None:
    """`fused_adamw_` of tensors (rows, width): as a whole in compiled code, else in parts of `EAGER_PART` elements."""
    if torch.compiler.is_compiling():
        # The comparison makes the width a constant of the kernel; the number of rows is an argument.
        width = WIDTH if gradient.shape[1] == WIDTH else 1
        assert gradient.shape[1] == width, "rows of another width"
        _update_at_once(state, gradient, weights, scalars, constants)
        return
    rows = max(EAGER_PART // gradient.shape[1], 1)
    for begin in range(0, gradient.shape[0], rows):
        part = slice(begin, begin + rows)
        tensors = State(
            state.master[part],
            state.moment1[part],
            state.moment2[part],
            tuple(average[part] for average in state.averages),
            None if state.parameter is None else state.parameter[part],
        )
        _update_at_once(tensors, gradient[part], weights, scalars, constants)


def _update_at_once(
    state: State, gradient: Tensor, weights: tuple[Tensor, ...], scalars: Scalars, constants: AdamW
) -> None:
    applied, divisor, shrink, step_size, root = scalars
    master, moment1, moment2, averages, parameter = state
    g = gradient.float() / divisor
    first = moment1 + (g - moment1) * (1 - constants.beta1)
    second = moment2 * constants.beta2 + g * g * (1 - constants.beta2)
    updated = master * shrink - step_size * first / (second.sqrt() / root + constants.eps)
    # Selected, not multiplied with 0: the gradient of a skipped step may be NaN.
    updated = torch.where(applied, updated, master)
    moment1.copy_(torch.where(applied, first, moment1))
    moment2.copy_(torch.where(applied, second, moment2))
    for average, weight in zip(averages, weights, strict=True):
        average.copy_(torch.lerp(average, updated, weight))
    if parameter is not None:
        parameter.copy_(updated)
    master.copy_(updated)


def _scalars(step: Tensor, applied: Tensor, divisor: Tensor, lr: Tensor, constants: AdamW) -> Scalars:
    step.add_(applied)
    # A skipped first step has count 0, for which the corrections are 0; its results are not used.
    count = step.double().clamp(min=1)
    correction1 = 1 - torch.pow(constants.beta1, count)
    correction2 = 1 - torch.pow(constants.beta2, count)
    lr = lr.double()
    shrink = 1 - lr * constants.weight_decay
    return Scalars(applied, divisor.float(), shrink.float(), (lr / correction1).float(), correction2.sqrt().float())
