"""Commands without their work: one process, and functions that record their arguments."""

import sys
import types

import pytest

from megapromoe.distributed import launch_environment
from megapromoe.distributed.launch_environment import LaunchEnvironment


@pytest.fixture
def alone(monkeypatch):
    """One process, whatever launched the tests."""
    monkeypatch.setattr(launch_environment, "detect", lambda: LaunchEnvironment("python"))


def _replaced(monkeypatch, module: str, function: str) -> list[tuple]:
    """Replaces a function, and the module it is in, by one that notes its arguments; returns these."""
    calls: list[tuple] = []
    replacement = types.ModuleType(module)
    setattr(replacement, function, lambda *arguments: calls.append(arguments))
    monkeypatch.setitem(sys.modules, module, replacement)
    return calls


@pytest.fixture
def trained(monkeypatch, alone):
    """The arguments of each call of `train`, which does nothing."""
    return _replaced(monkeypatch, "megapromoe.training.loop", "train")


@pytest.fixture
def sampled(monkeypatch, alone):
    """The arguments of each call of `generate_images`, which does nothing."""
    return _replaced(monkeypatch, "megapromoe.sampling.generation", "generate_images")
