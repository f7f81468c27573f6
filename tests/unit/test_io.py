"""Files are written as a whole: whatever happens in between, the old content stays, and nothing is left beside it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from megapromoe import io

DIES_WHILE_IT_WRITES = """
import os, signal, sys
from pathlib import Path
from megapromoe import io
with io.atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    return path


def test_content_is_replaced(file):
    io.write_text(file, "neu: ü")
    assert file.read_text(encoding="utf-8") == "neu: ü"
    io.write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}
    assert os.listdir(file.parent) == ["file"]


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_while_writing_keeps_the_old_content(file, error, concurrent):
    with pytest.raises(error), io.atomic_write(file, concurrent) as opened:
        opened.write(b"half")
        opened.flush()
        assert len(os.listdir(file.parent)) == 2
        raise error
    assert file.read_text() == "old" and os.listdir(file.parent) == ["file"]


def test_an_error_of_the_disk_keeps_the_old_content(file, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        io.write_text(file, "new")
    assert file.read_text() == "old" and os.listdir(file.parent) == ["file"]


def test_what_a_killed_process_left_is_replaced(file):
    died = subprocess.run([sys.executable, "-c", DIES_WHILE_IT_WRITES, str(file)])
    assert died.returncode == -signal.SIGKILL
    assert file.read_text() == "old" and sorted(os.listdir(file.parent)) == ["file", "file.writing"]
    io.write_text(file, "new")
    assert file.read_text() == "new" and os.listdir(file.parent) == ["file"]


def test_folders_are_made_only_where_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError):
        io.write_text(tmp_path / "misspelt" / "file", "x")
    assert not (tmp_path / "misspelt").exists()
    io.write_text(tmp_path / "a" / "b" / "file", "x", parents=True)
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"


# ---- files or folders


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_tree_is_replaced_as_a_whole_or_not_at_all(tmp_path, kind):
    target = tmp_path / "target"

    def make(path, content):
        if kind == "folder":
            path.mkdir()
            path = path / "inner"
        path.write_text(content)

    def content():
        return ((target / "inner") if kind == "folder" else target).read_text()

    with io.atomic_tree(target, overwrite=False) as staging:
        make(staging, "first")
    assert content() == "first"
    with pytest.raises(FileExistsError), io.atomic_tree(target, overwrite=False) as staging:
        make(staging, "second")
    with pytest.raises(KeyError), io.atomic_tree(target, overwrite=True) as staging:
        make(staging, "third")
        raise KeyError
    assert content() == "first" and os.listdir(tmp_path) == ["target"]
    with io.atomic_tree(target, overwrite=True) as staging:
        make(staging, "fourth")
    assert content() == "fourth" and os.listdir(tmp_path) == ["target"]
