"""Requests to stop: which signals count, when Ctrl-C ends the process at once, and how a launcher is recognized."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.levels import full

from megapromoe.distributed import stop_requests
from megapromoe.distributed.launch_environment import LaunchEnvironment
from megapromoe.distributed.stop_requests import find_launcher

START = """
import hashlib, os, signal, sys, time
from megapromoe.distributed.launch_environment import LaunchEnvironment
from megapromoe.distributed.stop_requests import install_signal_handlers
"""
WITH_HANDLERS = "with install_signal_handlers(LaunchEnvironment('python')) as r:"
# Code in C++, during which no Python signal handler runs; it takes longer than any test.
BUSY = "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)"


def process(body: str, ignored: tuple[int, ...] = ()) -> subprocess.Popen:
    """Runs code that prints "ready" when it can receive signals."""

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
        outputs = started.communicate(timeout=30)
    finally:
        started.kill()
    return started.returncode, *outputs


WAITS = """
with install_signal_handlers(LaunchEnvironment("{launcher}")) as asked_to_stop:
    asked_to_stop.steps_begin()
    print("ready", flush=True)
    while not asked_to_stop():
        time.sleep(0.01)
    {then}
print(asked_to_stop.reason, threads := __import__("threading").active_count(), flush=True)
sys.exit(75)
"""


@pytest.mark.parametrize("number", [full(signal.SIGTERM), full(signal.SIGUSR1), signal.SIGHUP, signal.SIGINT])
def test_signals_request_a_stop(number):
    started = process(WAITS.format(launcher="python", then=""))
    started.send_signal(number)
    code, output, _ = ended(started)
    assert (code, output) == (75, f"{number.name} 1\n"), "and the thread has ended"


def test_a_second_ctrl_c_ends_at_once_even_in_code_that_handles_no_signals():
    started = process(WAITS.format(launcher="python", then="print('busy', flush=True); " + BUSY))
    started.send_signal(signal.SIGINT)
    assert started.stdout.readline() == "busy\n"
    sent = time.monotonic()
    started.send_signal(signal.SIGINT)
    code, _, errors = ended(started)
    assert code == 130 and time.monotonic() - sent < 5
    assert "press it again to end at once" in errors and "interrupted twice" in errors


def test_two_ctrl_c_while_no_handler_can_run():
    body = f"{WITH_HANDLERS}\n    r.steps_begin(); print('ready', flush=True); {BUSY}"
    started = process(body)
    for _ in range(2):
        started.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert ended(started)[0] == 130


def test_ctrl_c_that_a_launcher_forwards_is_not_a_second_one():
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
    body = f"{WITH_HANDLERS}\n    print('ready', flush=True); time.sleep(60)"
    started = process(body)
    started.send_signal(signal.SIGINT)
    code, _, errors = ended(started)
    assert code in (1, -signal.SIGINT, 130) and "KeyboardInterrupt" in errors


def test_signals_that_are_ignored_at_the_start_stay_ignored():
    """As under nohup, or in a background job of a shell."""
    started = process(WAITS.format(launcher="python", then=""), ignored=(signal.SIGHUP, signal.SIGINT))
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
        started.send_signal(number)
        time.sleep(0.1)
    assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    assert ended(started)[:2] == (75, "SIGTERM 1\n")


def test_a_process_that_is_no_rank_keeps_ctrl_c():
    body = (
        "with install_signal_handlers() as r:\n    print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = subprocess.run([sys.executable, "-c", START + body], capture_output=True, text=True)
    assert done.stdout == "True\n"


def test_signals_of_a_forked_child_do_not_count_for_its_parent():
    """The child inherits the pipe: two Ctrl-C in the child would otherwise end the parent."""
    body = """
with install_signal_handlers(LaunchEnvironment("python")) as asked_to_stop:
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
    """Starts a program by `words`; returns the launcher that a child of it finds."""
    code = (
        "import sys; from megapromoe.distributed.launch_environment import LaunchEnvironment;"
        "from megapromoe.distributed.stop_requests import find_launcher;"
        f"process = find_launcher(LaunchEnvironment({launcher!r})); print(process and process.name)"
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
def test_launchers_are_recognized_by_name(place, launcher, expected, tmp_path):
    assert child_of([place], tmp_path, launcher) == expected


def test_a_launcher_is_found_behind_a_shell_and_its_end_is_detected(tmp_path):
    program = tmp_path / "torchrun"
    program.write_text("import subprocess\nsubprocess.run(['sh', '-c', 'echo $$; sleep 60; true'])\n")
    started = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    shell = int(started.stdout.readline())
    try:
        real, os.getppid = os.getppid, lambda: shell
        try:
            launcher = find_launcher(LaunchEnvironment("torchrun"))
        finally:
            os.getppid = real
        assert launcher.pid == started.pid and launcher.is_running()
        started.kill()
        while Path(f"/proc/{started.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        assert not launcher.is_running(), "a process that has ended and has not been waited for"
        started.wait()
        assert not launcher.is_running()
    finally:
        os.kill(shell, signal.SIGKILL)


def test_variables_that_are_set_by_hand_give_no_launcher():
    assert find_launcher(LaunchEnvironment("torchrun")) is None
