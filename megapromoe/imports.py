"""Imports of large packages without the work of the garbage collector, which is a third of a start."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected(exempt: bool = True) -> Iterator[None]:
    """No garbage collection in this block: what imports create stays, and each collection would look at all of it.

    Args:
        exempt: if the block imports anything, exempt all objects of this time from the collections after it too. False
            while a model runs, because garbage in cycles, which may hold memory of a GPU, would stay.
    """
    enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if exempt and len(sys.modules) > modules:
            gc.freeze()
        if enabled:
            gc.enable()


def end_uncollected() -> None:
    """The end of this process examines no object either: its memory goes back as a whole."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
