"""Fixtures that several files of this folder use."""

import pytest
from support.image_folder import write_images
from support.small_autoencoders import write_autoencoders


@pytest.fixture
def images(tmp_path):
    """A folder of images in three classes, nested, in many modes, some broken."""
    return write_images(tmp_path / "images")


@pytest.fixture(scope="session")
def autoencoders(tmp_path_factory):
    """A folder of small random autoencoders: kl, pipeline/vae, pickled, per_channel, tiny."""
    return write_autoencoders(tmp_path_factory.mktemp("autoencoders"))


@pytest.fixture
def impatient(monkeypatch):
    """Ranks that wait for each other while latents are written look often."""
    monkeypatch.setattr("megapromoe.data.shard_job.POLL", 0.01)


@pytest.fixture(scope="session")
def source_run(tmp_path_factory):
    """A run of a small model that runs start from, and its state; tests read it only."""
    from support.starting_runs import saved_run

    return saved_run(tmp_path_factory.mktemp("source_run"))
