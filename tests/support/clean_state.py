"""What a call may leave behind in a worker process, put back: tests patch modules and classes, DeepSpeed keeps globals.

`CleanState()` notes the state of a fresh process; `restore()` brings it back. Noted are the environment and working
directory, the global random generators, warning filters, signal handlers and log handlers; of the modules of `WATCHED`
every global, the attributes of classes, the contents of containers that are globals or default arguments, and the next
values of `itertools.count`; of the modules that those import by name the functions and classes. Caches of functions are
emptied.
"""

from __future__ import annotations

import functools
import gc
import inspect
import itertools
import logging
import operator
import os
import random
import signal
import sys
import types
import warnings

import numpy as np
import torch

WATCHED = ("megapromoe", "deepspeed", "torch.distributed")
# The largest of the parts of these that no test changes.
_UNCHANGED = (
    *(f"deepspeed.{name}" for name in ("autotuning", "compile", "inference", "module_inject")),
    *(f"deepspeed.ops.{name}" for name in ("op_builder", "transformer")),
    *(f"torch.distributed.{name}" for name in ("_shard", "_tools", "checkpoint", "fsdp", "pipelining", "tensor")),
)
_SIGNALS = [s for s in signal.valid_signals() if s not in (signal.SIGKILL, signal.SIGSTOP)]
_CONTAINERS = (dict, list, set)


class CleanState:
    """The state of this process at the time of the call."""

    def __init__(self):
        self.environment = dict(os.environ)
        self.folder = os.getcwd()
        self.random = random.getstate()
        self.numpy = np.random.get_state()
        self.torch = torch.get_rng_state()
        self.filters = list(warnings.filters)
        self.signals = {number: signal.getsignal(number) for number in _SIGNALS}
        self.loggers = {logger: _settings(logger) for logger in _loggers()}
        self.spaces = [_Space(space) for space in _spaces()]
        self.functions = _cached_functions()

    def restore(self) -> None:
        """Puts everything back."""
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        random.setstate(self.random)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        warnings.resetwarnings()
        warnings.filters.extend(self.filters)
        for number, handler in self.signals.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        for logger in _loggers():
            level, handlers, propagate, disabled = self.loggers.get(logger, (logging.NOTSET, [], True, False))
            logger.handlers[:] = handlers
            logger.propagate, logger.disabled = propagate, disabled
            if logger.level != level:  # each change empties the caches of all loggers
                logger.setLevel(level)
        for space in self.spaces:
            space.put_back()
        for function in self.functions:
            function.cache_clear()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
        gc.collect()  # engines hold their tensors in cycles
        gc.freeze()  # what is left is not looked at again


def _cached_functions() -> list:
    """Functions of watched modules with a cache.

    Also those that others wrap, as a method of DeepSpeed whose cache holds the engine of each job.
    """
    gc.unfreeze()  # what is frozen is not among the objects
    cached = [value for value in gc.get_objects() if type(value) is functools._lru_cache_wrapper]
    gc.freeze()
    return [function for function in cached if _is_watched(str(getattr(function, "__module__", "")))]


def _loggers() -> list[logging.Logger]:
    named = logging.getLogger().manager.loggerDict.values()
    return [logging.getLogger(), *(logger for logger in named if isinstance(logger, logging.Logger))]


def _settings(logger: logging.Logger) -> tuple[int, list, bool, bool]:
    return logger.level, list(logger.handlers), logger.propagate, logger.disabled


def _is_watched(name: str) -> bool:
    return _is_in(name, WATCHED) and not _is_in(name, _UNCHANGED)


def _is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _spaces() -> list:
    """The watched modules, those that they import by name, and the classes that watched modules define.

    Types are asked for with `type`: `isinstance` would wake deprecated objects, which warn when they are looked at.
    """
    modules = [module for name, module in list(sys.modules.items()) if module is not None and _is_watched(name)]
    named = [v for module in modules for v in vars(module).values() if issubclass(type(v), types.ModuleType)]
    classes = [v for module in modules for v in vars(module).values() if issubclass(type(v), type)]
    classes = [cls for cls in classes if _is_watched(cls.__module__)]
    spaces = {id(space): space for space in (*modules, *named, *classes, torch.Tensor, torch.nn.Module)}
    return list(spaces.values())


class _Space:
    """A module or class: the attributes to put back, and the containers in them with their contents."""

    def __init__(self, space):
        self.space = space
        self.values = {name: _copied(value) for name, value in vars(space).items()}
        self.containers: list = []
        if isinstance(space, types.ModuleType) and not _is_watched(space.__name__):
            self.values = {name: value for name, value in self.values.items() if callable(value)}
        else:
            containers = []
            if isinstance(space, types.ModuleType):  # those of classes hold what was loaded once: compiled operators
                containers += [value for name, value in self.values.items() if not name.startswith("__")]
            for value in self.values.values():
                if type(value) is types.FunctionType:
                    containers += getattr(inspect.unwrap(value), "__defaults__", None) or ()
            self.containers = [(value, value.copy()) for value in containers if type(value) in _CONTAINERS]
        self.names, self.objects = tuple(self.values), tuple(self.values.values())

    def put_back(self) -> None:
        now = vars(self.space)
        if not all(map(operator.is_, map(now.get, self.names), self.objects)):  # without a loop in Python: mostly true
            for name in [n for n, v in self.values.items() if now.get(n, self) is not v]:
                if not name.startswith("__") or callable(self.values[name]):
                    setattr(self.space, name, _copied(self.values[name]))
        if len(now) > len(self.names):
            for name in [n for n in now if n not in self.values and _is_function(now[n])]:
                delattr(self.space, name)
        for container, contents in self.containers:
            if container != contents:
                container.clear()
                container.extend(contents) if isinstance(container, list) else container.update(contents)


def _copied(value):
    """A new `itertools.count` with the same next value; everything else as it is."""
    if type(value) is not itertools.count:
        return value
    return itertools.count(int(repr(value).removeprefix("count(").removesuffix(")")))


def _is_function(value) -> bool:
    return type(value) in (types.FunctionType, types.MethodType, staticmethod, classmethod)
