"""Files are written as a whole: whatever happens in between, the old content stays, and nothing is left beside it."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from megapromoe import io
from megapromoe.cli import main

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


def test_files_of_a_killed_process_are_replaced(file):
    died = subprocess.run([sys.executable, "-c", DIES_WHILE_IT_WRITES, str(file)])
    assert died.returncode == -signal.SIGKILL
    assert file.read_text() == "old" and sorted(os.listdir(file.parent)) == ["file", "file.writing"]
    io.write_text(file, "new")
    assert file.read_text() == "new" and os.listdir(file.parent) == ["file"]


def test_folders_are_created_only_on_request(tmp_path):
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


# ---- errors name the file


@pytest.fixture
def no_room():
    """No file of this process may have more than 4 KiB, an error that the system reports as it does a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NOISE = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)


def write_with(library, file: Path):
    if library == "text":
        io.write_text(file, "x" * 100_000)
    elif library == "tree":
        with io.atomic_tree(file, overwrite=True) as staging:
            staging.mkdir()
            (staging / "inner").write_bytes(NOISE.tobytes())
    elif library == "path":
        with io.atomic_path(file) as staging:
            staging.write_bytes(NOISE.tobytes())
    else:
        with io.atomic_write(file) as opened:
            if library == "numpy":
                np.save(opened, NOISE)
            elif library == "npz":
                np.savez(opened, NOISE)
            elif library == "pillow":
                Image.fromarray(NOISE).save(opened, format="png")
            else:
                Figure().savefig(opened, format="png", dpi=300)


@pytest.mark.parametrize("library", ["text", "tree", "path", "numpy", "npz", "pillow", "matplotlib"])
def test_an_error_of_a_disk_without_room_names_the_file(library, file, no_room):
    with pytest.raises(OSError) as error:
        write_with(library, file)
    assert error.value.filename == str(file) and error.value.strerror and str(file) in str(error.value)
    assert file.read_text() == "old" and os.listdir(file.parent) == ["file"]


def test_an_error_of_a_log_names_it(file, no_room):
    with pytest.raises(OSError, match=f"File too large: '{file}'"):
        io.append_text(file, "x" * 100_000)


def test_an_error_of_flushing_names_the_file(file, monkeypatch):
    def fails(handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(io.os, "fsync", fails)
    with pytest.raises(OSError, match=rf"\[Errno 5\] Input/output error: '{file}"):
        io.write_text(file, "new")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BlockingIOError(), OSError(28, "full", "other")])
def test_errors_of_other_files_keep_their_text(error, file):
    text = str(error)
    with pytest.raises(OSError) as raised, io.atomic_write(file):
        raise error
    assert raised.value is error and str(error) == text


def test_a_command_names_the_file_of_a_disk_without_room(tmp_path, capsys, no_room):
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / name / "x.png")
    words = ["--images", str(tmp_path / "images"), "--autoencoder", "none", "--resolution", "64"]
    assert main(["encode", *words, "--out", str(tmp_path / "l")]) == 1
    assert f"megapromoe: {tmp_path}/l/shard-00000.npy: File too large\n" in capsys.readouterr().err
