"""`megapromoe` with a rank that hangs at a known place: it waits for ever, its process stops, or it is slow."""

import ctypes
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from megapromoe.cli import main
from megapromoe.imports import uncollected

# Imported before the ranks meet: on a busy machine it may take longer than these tests let a start-up last.
with uncollected():
    import megapromoe.engine.deepspeed_backend.start
    import megapromoe.training.loop  # noqa: F401

    megapromoe.engine.deepspeed_backend.start.import_muon()


def wait_for_ever(*_, **__) -> None:
    threading.Event().wait()


def freeze(*_, **__) -> None:
    """Stops this process, as SIGSTOP from outside would; it says no word any more."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hang_at(rank: int, step: int) -> None:
    """Runs the command line; `rank` hangs when it asks for the data of `step`, of step 0 when it opens the data."""
    if int(os.environ["RANK"]) == rank:
        import megapromoe.training.loop as loop

        if step == 0:
            loop.open_dataset = wait_for_ever
        else:
            real = loop.prefetch

            def batches(*arguments, **options):
                for number, batch in enumerate(real(*arguments, **options), 1):
                    if number == step:
                        wait_for_ever()
                    yield batch

            loop.prefetch = batches
    sys.exit(main())


def hang_in(rank: int | None, target: str, what: Callable[[], None] = wait_for_ever, call: int = 1) -> None:
    """Runs the command line; `rank`, or each, does `what` before its call number `call` of a function.

    Args:
        target: as "package.module:function" or "package.module:Class.method".
    """
    if rank is None or int(os.environ["RANK"]) == rank:
        module, _, path = target.partition(":")
        *owners, name = path.split(".")
        owner = importlib.import_module(module)
        for attribute in owners:
            owner = getattr(owner, attribute)
        real, calls = getattr(owner, name), []

        def replacement(*arguments, **options):
            calls.append(1)
            if len(calls) == call:
                what()
            return real(*arguments, **options)

        setattr(owner, name, replacement)
    sys.exit(main())


def slow(seconds: float) -> Callable[[], None]:
    """For `hang_in`: goes on after a while."""
    return lambda: time.sleep(seconds)


def slow_sampler(seconds: float) -> None:
    """Runs the command line; each step of a drawing while training takes so many seconds."""
    from megapromoe.training import preview

    real = preview.generate
    preview.generate = lambda *arguments: real(*arguments, progress=lambda step, steps: time.sleep(seconds))
    sys.exit(main())


def compile_by_graph() -> None:
    """Models are compiled without a C++ compiler, which takes seconds instead of minutes."""
    parallelize = importlib.import_module("megapromoe.nn.parallelize")  # the package has a function of this name
    real = parallelize.compile_model
    parallelize.compile_model = lambda model: real(model, "aot_eager")


def enter_network(name: str) -> None:
    """Moves this process, which has one thread, into the network of a name, as `ip netns exec` does."""
    new_network = 0x40000000  # CLONE_NEWNET
    with open(f"/var/run/netns/{name}") as network:
        if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), new_network):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), network.name)


def patient_start(watched: str | None = None) -> None:
    """The start-up is not watched, in which a busy machine may need any time for imports and compilers.

    Args:
        watched: a place of the start-up that is watched nevertheless.
    """
    from megapromoe.distributed import watchdog

    real = watchdog.starting
    watchdog.starting = lambda place, *more: real(place, *more) if place == watched else watchdog.pause()
