"""A backend of torch.compile that counts what inductor would launch, and computes by the graph's own operators.

Inductor lowers and fuses each graph as for a CPU, except that it fuses joins of tensors, as for a GPU. Nothing is built
from its C++: neither a compiler nor its minutes are needed. A *launch* is one call in inductor's wrapper: of a kernel
that it generated, or of an operator that it does not generate (a product, attention, a sort). What the package's own
custom operators issue is counted when they run.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from torch import fx
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from torch._inductor.codegen.common import KernelArgs

NAMESPACE = "megapromoe"  # of the package's custom operators
COLLECTIVES = "_c10d_functional::"
WAIT = COLLECTIVES + "wait_tensor"


@dataclass
class Launches:
    """What compiled code issues.

    Attributes:
        fused: calls of generated kernels.
        calls: operator -> calls of it.
        moved: bytes that generated kernels read and write: each tensor once for a kernel that reads it, and once for
            one that writes it.
        messages: collectives, which are not launches.
    """

    fused: int = 0
    calls: Tally = field(default_factory=Tally)
    moved: int = 0
    messages: int = 0

    def __add__(self, other: Launches) -> Launches:
        messages = self.messages + other.messages
        return Launches(self.fused + other.fused, self.calls + other.calls, self.moved + other.moved, messages)

    @property
    def total(self) -> int:
        """All launches."""
        return self.fused + self.calls.total()


class LoweringBackend:
    """Counts over all graphs that it compiled.

    Attributes:
        issued: what their calls have issued so far.
        graphs: what one call of each graph issues, forward and backward graphs apart.
    """

    def __init__(self, unknown_size: int) -> None:
        """`unknown_size`: for `moved`, the value of a size that a graph does not know, and for which it has no hint."""
        self.unknown_size = unknown_size
        self.issued = Launches()
        self.graphs: list[Launches] = []

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        # Imported late: it takes seconds.
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(force_disable_caches=True):  # a graph that inductor has compiled before is counted too
            compiled: Any = compile_fx(graph, inputs, inner_compile=self._lower)  # type: ignore[arg-type]
        return compiled

    def _lower(self, graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable:
        from torch._inductor import config, cpu_vec_isa
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.codegen.cpp import KernelGroup
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.graph import GraphLowering

        runner = _Runner(fx.GraphModule(graph, graph.graph.__deepcopy__({})))
        launches = Launches()
        generate, call = GraphLowering.codegen, KernelGroup.call_kernel

        def codegen(lowering: GraphLowering) -> Any:
            result = generate(lowering)
            launches.calls = Tally(_external_calls(lowering.scheduler.nodes))
            for name in [name for name in launches.calls if name.startswith(COLLECTIVES)]:
                calls = launches.calls.pop(name)
                launches.messages += 0 if name == WAIT else calls
            return result

        def call_kernel(group: KernelGroup, wrapper: Any, name: str) -> None:
            launches.fused += 1
            launches.moved += sum(map(self._bytes, _arguments(group.args)))
            call(group, wrapper, name)

        with ExitStack() as stack:
            stack.enter_context(config.patch(force_disable_caches=True, compile_threads=1, force_pointwise_cat=True))
            # Scalar C++: choosing vectors takes time and a compiler, and changes neither kernels nor their tensors.
            stack.enter_context(patch.object(cpu_vec_isa, "pick_vec_isa", lambda: cpu_vec_isa.invalid_vec_isa))
            stack.enter_context(patch.object(GraphLowering, "codegen", codegen))
            stack.enter_context(patch.object(KernelGroup, "call_kernel", call_kernel))
            stack.enter_context(patch.object(AsyncCompile, "cpp_pybinding", lambda *_: _not_built))
            compile_fx_inner(graph, inputs, **settings)
        self.graphs.append(launches)

        def run(arguments: list[Any]) -> Any:
            self.issued += launches
            values = list(arguments)
            arguments.clear()
            result = runner.run(*values)
            runner.env.clear()  # autograd copies a gradient to which something else refers
            return result

        run._boxed_call = True  # type: ignore[attr-defined]  # torch's convention for functions that take a list
        return run

    def _bytes(self, name: str) -> int:
        """The size of a tensor in the graph that is being lowered."""
        from torch._inductor.virtualized import V

        numel, dtype = V.graph.get_numel(name), V.graph.get_dtype(name)
        if not isinstance(numel, int):
            typical = V.graph.sizevars.shape_env.var_to_hint_override
            numel = numel.subs({size: typical.get(size, self.unknown_size) for size in numel.free_symbols})
        return int(numel) * dtype.itemsize


class _Runner(fx.Interpreter):
    """Runs a graph by its operators, hidden from counters except for the package's own."""

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if getattr(target, "namespace", None) == NAMESPACE:
            # The function of the operator: within a call of the operator, counters would not see what it issues.
            return OPDEFS[target._schema.name]._init_fn(*args, **kwargs)
        with _disable_current_modes():
            return super().call_function(target, args, kwargs)


def _not_built(*_: Any) -> None:
    raise RuntimeError("kernels of this backend are counted, not built")


def _arguments(arguments: KernelArgs) -> Iterator[str]:
    """The tensors that a kernel reads and those that it writes; one that it changes in place is both."""
    from torch._inductor.codegen.common import InplacedBuffer

    in_place = {b.inner_name: b for b in arguments.inplace_buffers.values() if isinstance(b, InplacedBuffer)}
    for buffer in in_place.values():
        yield from 2 * buffer.other_names[-1:]
    yield from (name for name in arguments.input_buffers if name not in arguments.inplace_buffers)
    for name, argument in arguments.output_buffers.items():
        if isinstance(argument, str) and name not in arguments.inplace_buffers:
            yield name


def _external_calls(nodes: Sequence[Any]) -> Iterator[str]:
    """The operators that inductor does not generate, without the package's own."""
    from torch._inductor import ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    for node in nodes:
        if not isinstance(node, ExternKernelSchedulerNode):
            continue
        operator, kernel = getattr(node.node, "op_overload", None), getattr(node.node, "python_kernel_name", None)
        no_launch = isinstance(node.node, (ir.MultiOutput, ir.DynamicScalar, ir.AssertScalar))
        if not no_launch and getattr(operator, "namespace", None) != NAMESPACE:
            name = operator._schema.name if operator is not None else str(kernel or type(node.node).__name__)
            is_collective = name.startswith(COLLECTIVES)
            yield name if is_collective else name.replace("::", ".").rpartition(".")[2]
