"""Imports of large packages without the work of the garbage collector, which is a third of a start."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection in this block: what imports create stays, and each collection would look at all of it.

    So would the first collections after the block, which is why all objects of this time are exempt from them. Garbage
    in cycles would stay too, but only a block that imports something exempts them.
    """
    enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if enabled:
            gc.enable()


def end_uncollected() -> None:
    """The end of this process examines no object either: its memory goes back as a whole."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
