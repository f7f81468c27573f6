"""Links in a folder that somebody else has prepared: no writer changes what they lead to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megapromoe import io
from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError
from megapromoe.config.resolve import resolve
from megapromoe.data import node_cache
from megapromoe.evaluation import image_metrics_report
from megapromoe.evaluation.reference import EvaluationError
from megapromoe.sampling.image_set_writer import ImageSetWriter
from megapromoe.sampling.image_sets import ImageSetError
from megapromoe.sampling.preview_writer import PreviewWriter

CONFIG = resolve("digits")
CONTENT = "a thesis\n"


@pytest.fixture
def target(tmp_path) -> Path:
    """A file that must stay as it is; the test fails if it does not."""
    path = tmp_path / "thesis.tex"
    path.write_text(CONTENT)
    yield path
    assert path.read_text() == CONTENT


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "prepared"
    made.mkdir()
    return made


@pytest.fixture
def run_folder(folder) -> Path:
    RunDirectory.open(folder, CONFIG, 1).close()
    return folder


def link(path: Path, target: Path, kind: str = "symbolic") -> None:
    path.unlink(missing_ok=True)
    (path.symlink_to if kind == "symbolic" else path.hardlink_to)(target)


# ---- written as a whole: the link is replaced


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("kind", ["symbolic", "hard"])
@pytest.mark.parametrize("place", ["file", "staging"])
def test_a_link_is_replaced_by_what_is_written(folder, target, place, kind, concurrent):
    path = folder / "file"
    link(path if place == "file" else io.staging_path(path, concurrent), target, kind)
    io.write_text(path, "ours", concurrent=concurrent)
    assert path.read_text() == "ours" and not path.is_symlink() and os.listdir(folder) == ["file"]


def test_libraries_that_write_to_a_path_find_no_link(folder, target):
    link(io.staging_path(folder / "file"), target)
    with io.atomic_path(folder / "file") as staging:
        staging.write_text("ours")
    assert (folder / "file").read_text() == "ours"


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
def test_a_run_replaces_links_by_files_of_its_own(run_folder, target, name):
    path = run_folder / name
    elsewhere = run_folder.parent / "elsewhere"
    path.rename(elsewhere)
    before = elsewhere.read_bytes()
    link(path, elsewhere)
    link(io.staging_path(path), target)
    RunDirectory.open(run_folder, resolve("digits", overrides=["train.lr=1e-5"]), 1).close()
    assert elsewhere.read_bytes() == before
    assert not path.is_symlink() and path.read_bytes() != before


def test_a_folder_of_a_run_may_be_a_link(run_folder, tmp_path):
    """Checkpoints on another disk."""
    large = tmp_path / "large"
    (run_folder / "checkpoints").rename(large)
    (run_folder / "checkpoints").symlink_to(large)
    RunDirectory.open(run_folder, CONFIG, 1).close()
    assert (run_folder / "checkpoints").is_symlink()


@pytest.mark.parametrize("name", ["grid.png", "arrays.npz"])
def test_a_preview_replaces_links(folder, target, name):
    link(folder / name, target)
    link(io.staging_path(folder / name), target)
    PreviewWriter(folder / name, 1, 1, 1, 0).open({})
    assert not io.staging_path(folder / name).is_symlink()


# ---- changed in place: the link is refused


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_the_lock_of_a_run_is_no_link(run_folder, target, kind):
    link(run_folder / "run.lock", target, kind)
    for attempt in (lambda: RunDirectory.open(run_folder, CONFIG, 1), lambda: RunDirectory(run_folder).state(CONFIG)):
        with pytest.raises(RunDirectoryError, match=rf"run\.lock: is a {kind}.* link.*; remove (it|the link)"):
            attempt()
    (run_folder / "run.lock").unlink()
    RunDirectory.open(run_folder, CONFIG, 1).close()


def test_a_dangling_lock_makes_no_file(folder, tmp_path):
    link(folder / "run.lock", tmp_path / "new")
    with pytest.raises(RunDirectoryError, match="symbolic link"):
        RunDirectory.open(folder, CONFIG, 1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("only_read", [True, False])
def test_a_pipe_as_lock_is_not_waited_for(run_folder, only_read):
    (run_folder / "run.lock").unlink()
    os.mkfifo(run_folder / "run.lock")
    with pytest.raises(RunDirectoryError, match="is no regular file; remove it"):
        RunDirectory(run_folder).state(CONFIG) if only_read else RunDirectory.open(run_folder, CONFIG, 1)


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_the_lines_of_an_evaluation_reach_no_other_file(folder, target, kind):
    link(folder / "evaluation.jsonl", target, kind)
    with pytest.raises(EvaluationError, match="evaluation.jsonl: cannot be written .* link"):
        image_metrics_report.append([{"step": 1}], folder / "evaluation.jsonl")


def test_the_lock_of_an_image_set_is_no_link(folder, target):
    writer = ImageSetWriter(folder / "set", 2, 1, (4, 4, 3))
    writer.folder.mkdir()
    link(writer.folder / "parts.lock", target)
    with pytest.raises(ImageSetError, match="symbolic link"):
        writer.open({})


def test_the_lock_of_a_node_cache_is_no_link(folder, target):
    class Manifest:
        index_sha256 = 64 * "0"
        shards, record_bytes = (), 1

    copies = folder / (16 * "0")
    copies.mkdir()
    link(copies / "lock", target)
    with pytest.raises(node_cache.CacheError, match="symbolic link"):
        node_cache.cache_shards(folder, folder, Manifest())


def test_the_picture_of_a_plan_replaces_a_link(folder, target):
    link(folder / "plan.png", target)
    link(folder / "plan.json", target)
    words = ["plan", "--preset", "promoe_s", "--gpu", "h100", "--plot", "plan.png", "--report", "plan.json"]
    done = subprocess.run(
        [sys.executable, "-m", "megapromoe", *words], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG") and not (folder / "plan.json").is_symlink()
