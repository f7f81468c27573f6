"""Evaluations for tests: the classifier of digits, trained once, and the command's options from its words."""

import pytest
from support import command_words

from megapromoe.commands import evaluate as command
from megapromoe.evaluation import image_metrics
from megapromoe.evaluation.features import open_network


@pytest.fixture(scope="module")
def network():
    return open_network("digits", "cpu")


@pytest.fixture
def trained(network, monkeypatch):
    """Evaluations in this process do not train their classifier anew."""
    monkeypatch.setattr(image_metrics, "open_network", lambda *arguments: network)


def parsed(*words):
    return command_words.parsed(command, *words)
