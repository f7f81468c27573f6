"""Standard output that is closed or full."""

import contextlib
import os
import subprocess
import sys

import pytest
from support.levels import full

from megapromoe import cli


def test_an_early_reader_is_no_error():
    command = f"{sys.executable} -m megapromoe show --keys | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("model:") and done.stderr == ""


def with_output(line: list[str], output, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megapromoe", *line]
    return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=120, **more)


@pytest.fixture
def unread():
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


OUTPUTS = {  # of each command that prints without a run: words that print much
    "show": ["show", "--keys"],
    "plan": ["plan", "--preset", "promoe_s", "--gpus-per-node", "2", "--top", "40"],
    "launchers": ["launchers", "scripts"],
}


@pytest.mark.parametrize(
    "line", [*OUTPUTS.values(), ["--help"], ["--version"], ["data", "check", "--help"]], ids=" ".join
)
@pytest.mark.parametrize("unbuffered", ["", full("1")], ids=["buffered", "unbuffered"])
def test_closed_output_ends_a_command_without_a_message(line, unbuffered, unread, tmp_path):
    done = with_output(line, unread, cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.full
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_with_closed_output_ends_without_a_message(name, unread):
    done = with_output([name, "--help"], unread)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.full
def test_a_dry_run_with_closed_output_ends_without_a_message(unread, tmp_path):
    done = with_output(["train", "--run-dir", str(tmp_path / "run"), "--dry-run"], unread)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_to_a_full_disk_is_a_sentence():
    with open("/dev/full", "w") as disk:
        done = with_output(["show", "--keys"], disk)
    assert done.returncode == 1
    assert done.stderr == "megapromoe: the output cannot be written: No space left on device\n"


def test_an_error_of_a_pipe_that_is_not_the_output_is_a_bug(monkeypatch):
    def run(options, launch):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli.load("show"), "run", run)
    with pytest.raises(BrokenPipeError):
        cli.main(["show"])


@pytest.mark.parametrize("where", ["unread", "/dev/full"])
def test_a_rank_goes_on_where_its_output_cannot_be_written(where, unread, tmp_path):
    """It ends as if somebody had read; an error there would leave the other ranks waiting."""
    code = (
        "import sys; from megapromoe import cli\n"
        "def run(options, launch):\n"
        "    for i in range(20000): print('x' * 80); print('x' * 80, file=sys.stderr)\n"
        "    sys.stdout.flush(); open(options.run / 'end', 'w').close(); return 0\n"
        "cli.load('train').run = run; sys.exit(cli.main(['train', '--run-dir', '.']))"
    )
    with contextlib.ExitStack() as stack:
        output = unread if where == "unread" else stack.enter_context(open(where, "w"))
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=output, stderr=output, cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and (tmp_path / "end").exists()
