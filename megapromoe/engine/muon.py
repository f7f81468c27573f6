"""Muon for hidden matrices, beside AdamW for all other parameters.

For each hidden matrix W (m outputs, n inputs), with gradient G and momentum M:

    M ← M + (1 - μ)·(G - M)
    U = G + μ·(M - G) with Nesterov's momentum, else M
    W ← (1 - lr·weight_decay)·W - lr·scale·orthogonalize(U)

Which parameters consist of hidden matrices is a fact of the types of modules, `ParameterRule.hidden_matrices`: those of
attention (queries, keys and values are three matrices), of MLPs, and of experts, of which each matrix is orthogonalised
alone.

Sources: Jordan et al., https://kellerjordan.github.io/posts/muon/ (iteration, coefficients, five steps, the scale
"original"; queries, keys and values separately); Liu et al., Muon is Scalable for LLM Training (Moonlight),
arXiv 2502.16982 (the scale "match_rms_adamw", weight decay). `torch.optim.Muon` computes the same for one matrix on one
device, always in bf16; its names of the scales are used here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapromoe.config.options import Config
from megapromoe.config.train_options import TrainConfig
from megapromoe.distributed.parameter_layout import ParameterLayout
from megapromoe.engine.eager_adamw import EagerAdamW
from megapromoe.engine.matrix_exchange import MatrixExchange

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # least norm by which a matrix is divided
BATCH = 1 << 25  # elements of matrices that are orthogonalised at once, which bounds temporary memory


@dataclass(frozen=True)
class MuonConstants:
    """The constants of an update, see the module: μ of the momentum, and `steps` of the iteration."""

    momentum: float
    nesterov: bool
    steps: int
    scale: str
    weight_decay: float

    @classmethod
    def from_config(cls, train: TrainConfig) -> MuonConstants:
        return cls(train.muon_momentum, train.muon_nesterov, train.muon_steps, train.muon_scale, train.weight_decay)


def update_scale(scale: str, rows: int, columns: int) -> float:
    """The factor of the orthogonalised update of a matrix (rows, columns).

    "match_rms_adamw" makes its root mean square about 0.2, that of updates of AdamW, so that both use one learning
    rate. "original" makes the change of the output, not of the weights, independent of the shape.
    """
    return {
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        "original": math.sqrt(max(1, rows / columns)),
    }[scale]


def orthogonalize(x_BMN: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Matrices with the singular vectors of x and singular values of about 1 (0.7 to 1.2), by Newton-Schulz steps.

    Singular values below about 1e-3 of the largest remain smaller, and a zero matrix remains zero.

    Args:
        x_BMN: matrices.
        steps: of the iteration.
        dtype: in which to compute.

    Returns:
        (B, M, N) of `dtype`.
    """
    a, b, c = COEFFICIENTS
    x = x_BMN.float()
    # The Frobenius norm is at least the largest singular value, which must be at most 1.
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)).to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x  # the smaller Gram matrix
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def orthogonalize_all(matrices: Sequence[Tensor], steps: int, dtype: torch.dtype) -> list[Tensor]:
    """`orthogonalize` of matrices of any shapes, those of equal shape in batches of at most `BATCH` elements."""
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(index)
    for shape, indices in by_shape.items():
        count = max(BATCH // shape.numel(), 1)
        for start in range(0, len(indices), count):
            batch = indices[start : start + count]
            done = orthogonalize(torch.stack([matrices[i] for i in batch]), steps, dtype)
            for index, result in zip(batch, done, strict=True):
                results[index] = result
    return results


HIDDEN_MATRICES = "hidden_matrices"  # the entry of parameter groups that Muon updates


def hidden_parameters(config: Config, layouts: Mapping[str, ParameterLayout]) -> frozenset[str]:
    """The names of the parameters that Muon updates; empty with another `train.optimizer`."""
    if config.train.optimizer != "muon":
        return frozenset()
    return frozenset(name for name, layout in layouts.items() if layout.hidden_matrices)


class MuonUpdate:
    """The update of one flat partition that consists of hidden matrices."""

    def __init__(self, constants: MuonConstants, exchange: MatrixExchange, dtype: torch.dtype):
        """Args: `dtype`: in which matrices are sent and orthogonalised, the type of the trained parameters."""
        self.constants, self.exchange, self.dtype = constants, exchange, dtype

    @torch.no_grad()
    def apply(
        self, master: Tensor, momentum: Tensor, gradient: Tensor, lr: float | Tensor, applied: Tensor | None = None
    ) -> None:
        """Updates master and momentum in place. Collective over the group of the partition.

        Args:
            master: fp32 weights, flat.
            momentum: fp32, like `master`.
            gradient: averaged and not clipped, of any type; it may lack padding at the end.
            lr: learning rate.
            applied: bool, (), on the device: if it is false, nothing changes. None: true.
        """
        constants, count = self.constants, gradient.numel()
        weights, buffer, gradient = master.view(-1)[:count], momentum.view(-1)[:count], gradient.view(-1).float()
        if applied is not None:
            # Selected, not multiplied with 0: the gradient of a skipped step may be NaN. The momentum then moves
            # towards itself, and the weights by a learning rate of 0.
            gradient = torch.where(applied, gradient, buffer)
            lr = applied.double() * lr
        buffer.lerp_(gradient, 1 - constants.momentum)
        direction = (gradient.lerp(buffer, constants.momentum) if constants.nesterov else buffer).to(self.dtype)
        results = orthogonalize_all(self.exchange.gather(direction), constants.steps, self.dtype)
        update = torch.zeros_like(direction)  # padding and spare expert slots stay zero
        self.exchange.distribute(results, update)
        del results, direction, gradient
        update = update.float()
        for matrix, part in self.exchange.held_parts(update):
            part.mul_(update_scale(constants.scale, matrix.rows, matrix.columns))
        if isinstance(lr, Tensor):
            weights.mul_((1 - lr * constants.weight_decay).float()).sub_(update.mul_(lr.float()))
        else:
            weights.mul_(1 - lr * constants.weight_decay).sub_(update, alpha=lr)


class MuonAndAdamW(EagerAdamW):
    """AdamW, and Muon for parameter groups with the entry `HIDDEN_MATRICES`.

    Whoever makes it sets `updates` before the first step. As in torch's fused AdamW, `grad_scale` divides gradients of
    AdamW's groups alone, and `found_inf` skips the update of all.

    Attributes:
        updates: for each parameter of a group of hidden matrices its update.
    """

    updates: dict[Tensor, MuonUpdate]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # DeepSpeed gives no closure
        """Updates all groups that `param_groups` has at this time: DeepSpeed calls it for one group at a time."""
        assert closure is None, "a closure is not supported"
        groups = self.param_groups
        found_inf = getattr(self, "found_inf", None)
        applied = None if found_inf is None else found_inf == 0
        for group in groups:
            for p in group["params"] if group.get(HIDDEN_MATRICES) else ():
                if p.grad is not None:
                    self.updates[p].apply(p.detach(), momentum_of(self, p), p.grad, group["lr"], applied)
        self.param_groups = [group for group in groups if not group.get(HIDDEN_MATRICES)]
        try:
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups


def momentum_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """The momentum of a parameter of Muon, which starts at zero."""
    state = optimizer.state[parameter]
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
    return state["momentum"]
