"""Requests to stop: which signals ask, when Ctrl-C ends at once, and what counts as a launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.levels import full

from megapromoe.distributed import stop_requests
from megapromoe.distributed.launch_environment import Launch
from megapromoe.distributed.stop_requests import find_launcher

START = """
import hashlib, os, signal, sys, time
from megapromoe.distributed.launch_environment import Launch
from megapromoe.distributed.stop_requests import listening
"""
# In C++, where no handler of Python runs, for longer than any test.
BUSY = "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)"


def process(body: str, ignored: tuple[int, ...] = ()) -> subprocess.Popen:
    """Runs code that prints a line once signals may come."""

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    started = subprocess.Popen(
        [sys.executable, "-c", START + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=ignore,
    )
    assert started.stdout.readline() == "ready\n", started.communicate()
    return started


def ended(started: subprocess.Popen) -> tuple[int, str, str]:
    try:
        said = started.communicate(timeout=30)
    finally:
        started.kill()
    return started.returncode, *said


WAITS = """
with listening(Launch("{launcher}")) as asked_to_stop:
    asked_to_stop.steps_begin()
    print("ready", flush=True)
    while not asked_to_stop():
        time.sleep(0.01)
    {then}
print(asked_to_stop.reason, threads := __import__("threading").active_count(), flush=True)
sys.exit(75)
"""


@pytest.mark.parametrize("number", [full(signal.SIGTERM), full(signal.SIGUSR1), signal.SIGHUP, signal.SIGINT])
def test_signals_ask(number):
    started = process(WAITS.format(launcher="python", then=""))
    started.send_signal(number)
    code, said, _ = ended(started)
    assert (code, said) == (75, f"{number.name} 1\n"), "and the thread is gone"


def test_a_second_ctrl_c_ends_at_once_also_in_code_that_takes_no_signals():
    started = process(WAITS.format(launcher="python", then="print('busy', flush=True); " + BUSY))
    started.send_signal(signal.SIGINT)
    assert started.stdout.readline() == "busy\n"
    sent = time.monotonic()
    started.send_signal(signal.SIGINT)
    code, _, said = ended(started)
    assert code == 130 and time.monotonic() - sent < 5
    assert "again ends it at once" in said and "interrupted twice" in said


def test_two_ctrl_c_while_no_handler_can_run():
    body = "with listening(Launch('python')) as r:\n    r.steps_begin(); print('ready', flush=True); " + BUSY
    started = process(body)
    for _ in range(2):
        started.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert ended(started)[0] == 130


def test_ctrl_c_that_a_launcher_passes_on_is_not_a_second_one():
    started = process(WAITS.format(launcher="torchrun", then="time.sleep(0.5)"))
    for _ in range(3):
        started.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert ended(started)[0] == 75

    started = process(WAITS.format(launcher="torchrun", then=BUSY))
    started.send_signal(signal.SIGINT)
    time.sleep(stop_requests.ECHO + 0.3)
    started.send_signal(signal.SIGINT)
    assert ended(started)[0] == 130


def test_ctrl_c_before_the_first_step_interrupts():
    body = "with listening(Launch('python')) as r:\n    print('ready', flush=True); time.sleep(60)"
    started = process(body)
    started.send_signal(signal.SIGINT)
    code, _, said = ended(started)
    assert code in (1, -signal.SIGINT, 130) and "KeyboardInterrupt" in said


def test_what_was_ignored_at_the_start_stays_ignored():
    """By nohup, or by a shell that starts a job in the background."""
    started = process(WAITS.format(launcher="python", then=""), ignored=(signal.SIGHUP, signal.SIGINT))
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
        started.send_signal(number)
        time.sleep(0.1)
    assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    assert ended(started)[:2] == (75, "SIGTERM 1\n")


def test_a_study_keeps_ctrl_c():
    body = "with listening() as r:\n    print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", START + body], capture_output=True, text=True)
    assert done.stdout == "True\n"


def test_signals_of_a_forked_child_are_its_own():
    """Its copy of the pipe is that of its parent: two Ctrl-C in the child would end the parent."""
    body = """
with listening(Launch("python")) as asked_to_stop:
    asked_to_stop.steps_begin()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, lambda *_: None)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.3)
    print("ready", flush=True)
    sys.exit(75 if not asked_to_stop() else 1)
"""
    assert ended(process(body))[0] == 75


# ---- launchers


def child_of(words: list[str], tmp_path: Path, launcher: str) -> str:
    """A program that is started as `words` say, whose child prints what it takes for its launcher."""
    code = (
        "import sys; from megapromoe.distributed.launch_environment import Launch;"
        "from megapromoe.distributed.stop_requests import find_launcher;"
        f"found = find_launcher(Launch({launcher!r})); print(found and found.name)"
    )
    program = tmp_path / words[-1]
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}])\n")
    done = subprocess.run([sys.executable, *words[:-1], str(program)], capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "place, launcher, expected",
    [
        ("bin/torchrun", "torchrun", "torchrun"),
        full("torch/distributed/run.py", "torchrun", "torch.distributed.run"),
        full("deepspeed/launcher/launch.py", "torchrun", "deepspeed.launcher.launch"),
        full("bin/prterun", "mpirun", "prterun"),
        ("bin/torchrun", "python", "None"),
        full("bin/torchrun", "srun", "None"),
        full("bin/nohup", "torchrun", "None"),
        ("bin/my_torchrun", "torchrun", "None"),
    ],
)
def test_launchers_are_known_by_name(place, launcher, expected, tmp_path):
    assert child_of([place], tmp_path, launcher) == expected


def test_a_launcher_is_found_behind_a_shell_and_seen_to_end(tmp_path):
    program = tmp_path / "torchrun"
    program.write_text("import subprocess\nsubprocess.run(['sh', '-c', 'echo $$; sleep 60; true'])\n")
    started = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    shell = int(started.stdout.readline())
    try:
        real, os.getppid = os.getppid, lambda: shell
        try:
            launcher = find_launcher(Launch("torchrun"))
        finally:
            os.getppid = real
        assert launcher.pid == started.pid and launcher.lives()
        started.kill()
        while Path(f"/proc/{started.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        assert not launcher.lives(), "before anybody has waited for it"
        started.wait()
        assert not launcher.lives()
    finally:
        os.kill(shell, signal.SIGKILL)


def test_whoever_sets_the_variables_by_hand_has_no_launcher():
    assert find_launcher(Launch("torchrun")) is None
