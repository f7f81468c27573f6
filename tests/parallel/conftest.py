"""Fixtures that several files of this folder use."""

import shutil

import pytest
from support import processes
from support.sampled_runs import stirred_run

from megapromoe.evaluation import image_metrics
from megapromoe.evaluation.features import open_network


@pytest.fixture(scope="session")
def stirred(tmp_path_factory):
    """A run directory with a checkpoint of step 3, whose averages are far from the initial zeros."""
    folder = tmp_path_factory.mktemp("stirred")
    processes.run(1, stirred_run, str(folder), "model.num_experts=3")
    return folder


@pytest.fixture(scope="module")
def run(stirred, tmp_path_factory):
    """A copy of that run for each file of tests."""
    return shutil.copytree(stirred, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="session")
def network():
    """The classifier of digits, trained once."""
    return open_network("digits", "cpu")


@pytest.fixture
def trained(network, monkeypatch):
    """Evaluations in this process use that classifier and train none."""
    monkeypatch.setattr(image_metrics, "open_network", lambda *arguments: network)
