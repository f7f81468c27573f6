"""Imports of large packages without the work of the garbage collector, which is a third of a start."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection in this block: what imports create stays, and each collection would look at all of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def end_uncollected() -> None:
    """The end of this process examines no object either: its memory goes back as a whole."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
