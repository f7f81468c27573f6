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


@pytest.fixture
def trained(monkeypatch, alone):
    """`training.loop`, replaced by one that notes its arguments."""
    calls = []
    loop = types.ModuleType("megapromoe.training.loop")
    loop.train = lambda *arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "megapromoe.training.loop", loop)
    return calls


@pytest.fixture
def sampled(monkeypatch, alone):
    """`sampling.generation`, replaced by one that notes its arguments."""
    calls = []
    generation = types.ModuleType("megapromoe.sampling.generation")
    generation.generate_images = lambda *arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "megapromoe.sampling.generation", generation)
    return calls
