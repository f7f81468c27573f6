"""Counts what torch code does: kernels, waits for the device, allocations, memory, messages, FLOPs.

    with Counter() as counter:
        y = layer(x)
        counter.phase("backward")
        y.backward(g)
    counter.phases["forward"].kernels

Counts do not depend on the speed of the machine, so tests can compare them with expectations. They are taken below
autograd, so backward is counted too. What an operator does in C++ is not visible: each operator counts as one kernel,
although some launch several.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import Counter as Tally
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from megapromoe.errors import UserError

# Operators for which the host waits for a GPU, because it needs a value or a size from the device. They are counted on
# a CPU too.
WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
# Views that the schema does not mark as such, and allocations that write nothing.
NO_KERNEL = {
    *("_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "set_", "resize_", "_local_scalar_dense"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
# The bytes that a rank sends in a collective over n ranks, over the bytes of its input, for the best algorithm.
SHARES = {
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "allgather_": lambda n: n - 1,
    "_allgather_base_": lambda n: n - 1,
    "reduce_scatter_": lambda n: (n - 1) / n,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "broadcast_": lambda n: 1,
    "barrier": lambda n: 0,
    "alltoall_base_": lambda n: (n - 1) / n,
}


class CounterError(UserError):
    """An operation that cannot be counted."""


@dataclass
class Counts:
    """The counts of one phase.

    Attributes:
        kernels: operators that compute or copy.
        waits: operator -> how often the host waits for it.
        gpu_waits: waits that CUDA reported; 0 on a CPU.
        allocations: new blocks of memory.
        allocated: their bytes.
        collectives: name -> calls.
        sent: name -> bytes that this rank sends.
        flops: of matrix products, 2·m·n·k each.
        compiled: graphs that torch.compile made.
    """

    kernels: int = 0
    waits: Tally = field(default_factory=Tally)
    gpu_waits: int = 0
    allocations: int = 0
    allocated: int = 0
    collectives: Tally = field(default_factory=Tally)
    sent: Tally = field(default_factory=Tally)
    flops: int = 0
    compiled: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Counter(TorchDispatchMode):
    """Context that counts; `phase(name)` starts the next phase, the first is "forward"."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, Counts] = {}
        self._log: list[tuple[int, int]] = []  # (number of a storage, bytes allocated or, negative, freed), in order
        self._numbers: dict[int, int] = {}  # address of a live storage -> its number
        self._num_storages = 0
        self._contexts = ExitStack()

    def __enter__(self):
        self._contexts.enter_context(_HostReads(self))
        self._warned = []
        if torch.cuda.is_available():
            self._warned = self._contexts.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            self._contexts.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("warn")
        self._compiled = _graphs()
        self.phase("forward")
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._close()
        self._contexts.close()

    def phase(self, name: str) -> None:
        """Starts the phase `name`."""
        if self.phases:
            self._close()
        self.now = self.phases[name] = Counts()

    @property
    def total(self) -> Counts:
        """The counts of all phases together."""
        return sum(self.phases.values(), Counts())

    def mark(self) -> int:
        """A point in time, for `live`."""
        return len(self._log)

    def live(self, at: int | None = None, without: Iterable[Tensor] = ()) -> int:
        """Bytes allocated within the context and not freed.

        Args:
            at: a point in time from `mark`; None: the maximum over time.
            without: tensors whose memory is excluded, such as the gradients of parameters.
        """
        excluded = {self._numbers.get(t.untyped_storage()._cdata) for t in without}
        current = peak = 0
        for number, size in self._log[:at]:
            if number not in excluded:
                current += size
                peak = max(peak, current)
        return peak if at is None else current

    def peak(self, since: int) -> int:
        """The most bytes that were allocated at any time from a point in time on, beyond those allocated at it."""
        current = most = 0
        for _, size in self._log[since:]:
            current += size
            most = max(most, current)
        return most

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.namespace == "c10d":
            self._collective(name, args)
            return out
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self._memory(inputs, outputs)
        if _waits(func, name, args, kwargs, outputs):
            self.now.waits[name] += 1
        self.now.kernels += is_kernel(func, outputs)
        if flops := FLOPS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket):
            self.now.flops += int(flops(*args, **kwargs, out_val=out))
        return out

    def _memory(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        old = {t.untyped_storage()._cdata for t in inputs}
        for t in outputs:
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in old or key in self._numbers or not size or t.is_meta:
                continue
            number = self._numbers[key] = self._num_storages
            self._num_storages += 1
            self.now.allocations += 1
            self.now.allocated += size
            self._log.append((number, size))
            weakref.finalize(storage, self._freed, key, number, size).atexit = False

    def _freed(self, key: int, number: int, size: int) -> None:
        self._log.append((number, -size))
        if self._numbers.get(key) == number:
            del self._numbers[key]

    def _collective(self, name: str, args: tuple) -> None:
        if name not in SHARES:
            raise CounterError(f"collective {name}: the bytes that it sends are not defined; add it to counters.SHARES")
        self.now.collectives[name] += 1
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        # This rank's input, from arguments (output, input, ...) or (tensors, ...).
        second = name in ("allgather_", "reduce_scatter_", "_allgather_base_", "_reduce_scatter_base_")
        inputs = [t for t in tree_leaves(args[1 if second or name == "alltoall_base_" else 0]) if isinstance(t, Tensor)]
        size = sum(t.numel() * t.element_size() for t in inputs)
        splits = args[4] if name == "alltoall_base_" else []
        if splits:  # uneven: a rank sends nothing to itself
            self.now.sent[name] += size * (sum(splits) - splits[group.rank()]) // max(sum(splits), 1)
        else:
            self.now.sent[name] += int(SHARES[name](group.size()) * size)

    def _close(self) -> None:
        self.now.gpu_waits = sum("synchronizing CUDA" in str(w.message) for w in self._warned)
        self._warned.clear()
        graphs = _graphs()
        self.now.compiled, self._compiled = graphs - self._compiled, graphs


class _HostReads(TorchFunctionMode):
    """Counts reads of CPU tensors that call no operator: tolist and numpy."""

    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy") and args[0].device.type == "cpu":
            self.counter.now.waits[name] += 1
        return func(*args, **(kwargs or {}))


def is_kernel(func, outputs: list[Tensor]) -> bool:
    """Whether this call of an operator computed or copied: views, allocations and empty results do not count."""
    returns = func._schema.returns
    view = bool(returns) and all(r.alias_info and not r.alias_info.is_write for r in returns)
    name = func._schema.name.partition("::")[2]
    return not view and name not in NO_KERNEL and (not outputs or any(t.numel() for t in outputs))


def _waits(func, name: str, args: tuple, kwargs: dict, outputs: list[Tensor]) -> bool:
    """Whether the host waits for the device in this call of an operator."""
    if name in WAITS:
        return True
    if name == "repeat_interleave":  # without output_size the host reads the sum
        return kwargs.get("output_size") is None
    if name in (
        "index",
        "index_put",
        "index_put_",
        "_index_put_impl_",
    ):  # the host reads the number of set elements of a mask
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name in ("_to_copy", "copy_") and outputs:
        source = args[1] if name == "copy_" else args[0]
        return source.is_cuda and outputs[0].device.type == "cpu" and not kwargs.get("non_blocking", False)
    return False


def _graphs() -> int:
    """Graphs that torch.compile has made in this process; does not import it."""
    compiler = sys.modules.get("torch._dynamo.utils")
    return compiler.counters["stats"]["unique_graphs"] if compiler else 0


def _grouped_flops(a: Tensor, b: Tensor, *_, out_val, **__) -> int:
    """FLOPs of the products of all groups of rows: 2·(rows)·(inputs)·(outputs)."""
    if a.dim() == b.dim() == 2:  # groups of the inner dimension give one matrix each
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    return 2 * out_val.numel() * a.shape[-1]


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *_, out_val, **__) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_, out_val, **__) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


# Operators that are missing in torch's table.
FLOPS = {
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten._grouped_mm: _grouped_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
