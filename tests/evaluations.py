"""Evaluations for tests: the classifier of digits, trained once, and the command's options from its words."""

import command_words
import pytest

from megapromoe.commands import evaluate as command
from megapromoe.evaluation import quality
from megapromoe.evaluation.features import open_network


@pytest.fixture(scope="module")
def network():
    return open_network("digits", "cpu")


@pytest.fixture
def trained(network, monkeypatch):
    """Evaluations in this process do not train their classifier anew."""
    monkeypatch.setattr(quality, "open_network", lambda *arguments: network)


def parsed(*words):
    return command_words.parsed(command, *words)
