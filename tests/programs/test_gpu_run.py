"""The program for short access to a GPU: stages run on the CPU, within their limits, and are continued after a stop."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megapromoe import cli
from megapromoe.benchmark import gpu_program, gpu_wheels, profile_step
from megapromoe.benchmark.gpu_machine import IDENTITY, GpuRunError
from megapromoe.benchmark.gpu_program import main
from megapromoe.benchmark.gpu_runner import GpuRun, run_process
from megapromoe.benchmark.gpu_stages import STAGES, StageCommand, stage_commands, stage_figures
from megapromoe.commands.options import resolve_options

ROOT = Path(__file__).parents[2]
GPU = {"index": "0", "uuid": "x", "name": "H100", "power.draw": "70"}
MACHINE = {
    **{"device": "CPU", "capability": None, "gpus": 0, "cuda": None, "cores": 2, "nvidia_smi": [GPU]},
    **{"python": "3", "torch": "2", "deepspeed": "0", "megapromoe": "1"},
}


# ---- all stages, on the CPU


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """The folder of a whole run of the smallest models, by the program itself."""
    out = tmp_path_factory.mktemp("gpu")
    words = ["all", "--device", "cpu", "--quick", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_run.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.full
def test_every_stage_is_finished_and_in_the_report(measured):
    report = (measured / "report.md").read_text()
    for stage in STAGES:
        saved = json.loads((measured / stage / "stage.json").read_text())
        assert saved["status"] == "finished" and f"## {stage}: finished" in report
        assert all(command["exit_code"] == 0 and command["megapromoe"] for command in saved["commands"].values())
        lines = stage_figures(stage, measured / stage)
        assert lines and all(f"* {line}" in report for line in lines)


@pytest.mark.full
def test_the_machine_is_described(measured):
    machine = json.loads((measured / "machine.json").read_text())
    assert machine["device"] == "CPU" and machine["gpus"] == 0 and machine["cores"] == os.cpu_count()
    assert machine["torch"] == torch.__version__ and machine["deepspeed"].startswith("0.19.")
    assert set(IDENTITY) <= machine.keys() == MACHINE.keys() | {"time"}


@pytest.mark.full
def test_figures_of_the_tests(measured):
    (line,) = stage_figures("tests", measured / "tests")
    passed, failed = int(line.split()[0]), int(line.split()[2])
    assert passed >= 6 and failed == 0  # the golden cases


@pytest.mark.full
@pytest.mark.parametrize("stage", ["step", "layer"])
def test_figures_of_the_benchmark(measured, stage):
    (case,) = json.loads((measured / stage / "eager" / "benchmark.json").read_text())["scenes"].values()
    assert case["experiment"] == stage and [*case["contenders"]] == ["ours", "dense"]
    (line,) = stage_figures(stage, measured / stage)
    assert f"eager, {stage} digits E4 B8 real: ours" in line and "× dense); dense" in line


@pytest.mark.full
def test_the_profile_is_a_table_and_a_trace(measured):
    folder = measured / "profile"
    table = (folder / "profile.txt").read_text()
    assert "Self CPU" in table and "aten::mm" in table
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("forward") == names.count("backward") == names.count("update") == 2
    figures = json.loads((folder / "profile.json").read_text())
    assert figures["steps_profiled"] == figures["steps_timed"] == 2 and figures["images"] == 8
    assert figures["images_per_second"] == pytest.approx(8 / figures["seconds"]) and figures["mfu"] is None
    seconds = [kernel["seconds"] for kernel in figures["kernels"]]
    assert len(seconds) == profile_step.TOP and seconds == sorted(seconds, reverse=True) and seconds[-1] > 0
    assert sorted(path.name for path in folder.iterdir()) == [
        *("profile.json", "profile.log", "profile.txt", "stage.json", "trace.json.gz")
    ]


@pytest.mark.full
def test_training_is_that_of_the_package(measured):
    lines = (measured / "train" / "digits" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 4
    assert (measured / "train" / "digits" / "checkpoints" / "step-00000004").is_dir()
    assert stage_figures("train", measured / "train")[0].startswith("digits: step 4, denoising loss ")


@pytest.mark.full
def test_a_repeated_command_skips_what_is_finished(measured, capsys):
    files = sorted(measured.rglob("stage.json"))
    before = [(file.stat().st_mtime_ns, file.read_text()) for file in files]
    assert main(["all", "--device", "cpu", "--quick", "--out", str(measured)], ROOT) == 0
    assert capsys.readouterr().out.count("finished before, skipped; use --again to repeat it") == len(STAGES)
    assert [(file.stat().st_mtime_ns, file.read_text()) for file in files] == before


@pytest.mark.full
def test_other_command_lines_are_not_mixed_in(measured, capsys):
    assert main(["all", "--device", "cpu", "--out", str(measured)], ROOT) == 2
    assert "has results of other command lines; use another --out, or --again" in capsys.readouterr().err


# ---- the command lines of a GPU


def test_the_words_for_a_gpu_are_understood(tmp_path):
    """What tests cannot run: every word is one that its program takes, every file and configuration is there."""
    programs = []
    for stage in STAGES:
        for command in stage_commands(stage, tmp_path, "cuda", False, 540.0):
            dash_m, program, *words = command.words
            assert dash_m == "-m"
            programs.append(program)
            if program == "megapromoe":
                options = cli.parse(words)
                if options.command == "train":
                    resolve_options(options, 1)
                else:
                    assert options.command == "benchmark" and options.device == "cuda" and options.experiment == stage
            elif program == "pytest":
                assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))
            else:
                assert program == "megapromoe.benchmark.profile_step"
    assert sorted(programs) == ["megapromoe"] * 6 + ["megapromoe.benchmark.profile_step", "pytest"]


def test_a_dry_run_prints_the_command_lines(tmp_path, capsys):
    assert main(["all", "--dry-run", "--out", str(tmp_path / "none")], ROOT) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[0].startswith("DS_ACCELERATOR=cpu ") and "test_gpu.py" in lines[0]
    assert "benchmark step --device cuda --sizes l xl" in lines[1] and "--compile" in lines[2]
    assert "--compile" in lines[3] and "captured --capture" in lines[3]
    assert "profile_step --preset promoe_l --seconds 270" in lines[4]
    assert "train.steps=50" in lines[7] and not (tmp_path / "none").exists()


# ---- limits, failures, and going on


def stage_of(*commands: StageCommand):
    """In place of the stages' command lines."""
    return lambda stage, out, device, quick, seconds: list(commands)


def python(name: str, code: str, stop: signal.Signals = signal.SIGINT) -> StageCommand:
    return StageCommand(name, ("-c", code), stop)


def process(command: StageCommand, folder: Path, limit: float, grace: float = 20.0):
    return run_process(command, dict(os.environ), ROOT, folder / "log", limit, grace)


KEEPS = """
import signal, sys, time
def end(*_): print("kept", flush=True); sys.exit(75)
signal.signal(signal.{name}, end)
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_process_is_stopped_at_its_limit_and_keeps_what_it_has(tmp_path, stop):
    outcome = process(python("x", KEEPS.format(name=stop.name), stop), tmp_path, limit=2.0)
    assert (outcome.status, outcome.exit_code) == ("stopped", 75) and 2 <= outcome.seconds < 20
    assert (tmp_path / "log").read_text().splitlines()[-2:] == ["started", "kept"]


def test_a_process_that_does_not_end_is_killed_with_its_children(tmp_path):
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    outcome = process(python("x", code), tmp_path, limit=2.0, grace=0.5)
    assert (outcome.status, outcome.exit_code) == ("stopped", -signal.SIGKILL) and outcome.seconds < 20
    assert "did not end after the signal, killed" in (tmp_path / "log").read_text()
    deadline = time.monotonic() + 10  # the kernel ends a killed process a moment later
    while runs(int((tmp_path / "child").read_text())):
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_exit_code_is_a_failure(tmp_path):
    outcome = process(python("x", "import sys; sys.exit(3)"), tmp_path, limit=20.0)
    assert (outcome.status, outcome.exit_code) == ("failed", 3)


@pytest.fixture
def described(monkeypatch):
    monkeypatch.setattr(gpu_program, "check_machine", lambda out, device, environment: MACHINE)


@pytest.mark.full
def test_a_stopped_stage_continues(tmp_path, monkeypatch, described, capsys):
    """The finished process is not run again; what the other one left is still there."""
    first = python("first", f"open({str(tmp_path / 'first')!r}, 'a').write('x')")
    second = python("second", f"import time; open({str(tmp_path / 'second')!r}, 'a').write('x'); time.sleep({{}})")
    slow = StageCommand("second", tuple(word.format(60) for word in second.words))
    monkeypatch.setattr(gpu_program, "stage_commands", stage_of(first, slow))
    words = ["step", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*words, "--minutes", "0.1"], ROOT) == 0
    held = json.loads((tmp_path / "out" / "step" / "stage.json").read_text())
    assert held["status"] == "stopped" and "## step: stopped" in (tmp_path / "out" / "report.md").read_text()
    assert "H100, power.draw 70" in (tmp_path / "out" / "report.md").read_text()
    assert main([*words, "--minutes", "0.1"], ROOT) == 0
    assert ((tmp_path / "first").read_text(), (tmp_path / "second").read_text()) == ("x", "xx")
    monkeypatch.setattr(gpu_program, "stage_commands", stage_of(first, python("second", "")))
    assert main([*words, "--minutes", "0.1"], ROOT) == 2, "other words"
    assert main([*words, "--minutes", "1", "--again"], ROOT) == 0
    assert (tmp_path / "first").read_text() == "xx"
    assert json.loads((tmp_path / "out" / "step" / "stage.json").read_text())["status"] == "finished"


def test_a_failed_stage_does_not_keep_others_from_running(tmp_path, monkeypatch, described, capsys):
    def commands(stage, out, device, quick, seconds):
        return [python("x", "print('oh no'); raise SystemExit(4)" if stage == "tests" else "")]

    monkeypatch.setattr(gpu_program, "stage_commands", commands)
    assert main(["all", "--device", "cpu", "--out", str(tmp_path)], ROOT) == 1
    captured = capsys.readouterr()
    assert "oh no" in captured.out and "gpu_run: failed: tests; see the logs in" in captured.err
    status = {stage: json.loads((tmp_path / stage / "stage.json").read_text())["status"] for stage in STAGES}
    assert status == {"tests": "failed", **dict.fromkeys(STAGES[1:], "finished")}


def test_ctrl_c_ends_the_process_and_keeps_the_rest(tmp_path, monkeypatch, described, capsys):
    ends = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(60)"
    monkeypatch.setattr(gpu_program, "stage_commands", stage_of(python("first", ""), python("second", ends)))
    assert main(["step", "--device", "cpu", "--out", str(tmp_path)], ROOT) == 130
    assert "interrupted; repeat the command to continue" in capsys.readouterr().err
    held = json.loads((tmp_path / "step" / "stage.json").read_text())
    assert held["status"] == "stopped" and held["commands"].keys() == {"first"}


@pytest.mark.parametrize(
    "error, text",
    [
        (OSError(28, "No space left on device"), "gpu_run: No space left on device\n"),
        (OSError(28, "No space left on device", "report.json"), "gpu_run: report.json: No space left on device\n"),
        (OSError("4096 requested and 0 written"), "gpu_run: 4096 requested and 0 written\n"),
    ],
)
def test_an_error_of_the_system_is_one_line(error, text, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise error

    monkeypatch.setattr(gpu_program, "_run", fails)
    assert main(["step", "--device", "cpu", "--out", str(tmp_path)], ROOT) == 1
    assert capsys.readouterr().err == text


def test_the_time_limit_is_not_recorded_with_the_results(tmp_path):
    run = GpuRun(tmp_path, ROOT, 540.0, {}, MACHINE)
    for seconds in (100.0, 500.0):
        (command,) = stage_commands("profile", tmp_path, "cuda", False, seconds)
        assert "--seconds" in command.words
        assert run._recorded(command)[:6] == [
            *("-m", "megapromoe.benchmark.profile_step", "--preset", "promoe_l", "--device", "cuda")
        ]


# ---- refusals


@pytest.mark.full
def test_figures_of_another_machine_are_not_mixed_in(measured, tmp_path, capsys):
    machine = json.loads((measured / "machine.json").read_text())
    (tmp_path / "machine.json").write_text(json.dumps(machine | {"device": "H100"}))
    assert main(["tests", "--device", "cpu", "--quick", "--out", str(tmp_path)], ROOT) == 2
    assert "has results of another machine (device: 'H100', now 'CPU'); use another --out" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(tmp_path, capsys):
    assert main(["tests", "--out", str(tmp_path)], ROOT) == 2
    assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err


WRONG = {
    "no time": (["tests", "--minutes", "0"], "--minutes 0.0: must be a number above 0"),
    "endless": (["tests", "--minutes", "inf"], "--minutes inf: must be a number above 0"),
    "no wheels": (["tests", "--wheels", "/nowhere"], "--wheels /nowhere: has no wheels"),
    "an invalid Python": (["wheels", "--python", "py3"], "--python py3: must be a version such as 3.12"),
    "torch without a tag": (["wheels", "--torch", "2.13"], "--torch 2.13: must be VERSION+TAG"),
    "an unknown package": (["wheels", "--packages", "nobody"], "nobody: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words_are_refused_with_the_rule(name, capsys):
    words, message = WRONG[name]
    assert main([*words, "--dry-run"], ROOT) in (1, 2)
    assert capsys.readouterr().err.startswith(f"gpu_run: {message}")


def test_gpu_run_needs_a_complete_checkout(tmp_path, capsys):
    assert main(["tests", "--dry-run"], tmp_path) == 2
    assert "run this from a complete checkout" in capsys.readouterr().err


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "stage.json").write_text("{")
    with pytest.raises(GpuRunError, match="stage.json: is damaged"):
        GpuRun(tmp_path, ROOT, 540.0, {}, MACHINE).commands_done("step", [])


# ---- wheels


def test_the_command_lines_that_collect_wheels(tmp_path, capsys):
    into = tmp_path / "wheels"
    assert main(["wheels", "--into", str(into), "--python", "3.12", "--torch", "2.13.0+cu130", "--dry-run"], ROOT) == 0
    built, others, with_torch = capsys.readouterr().out.splitlines()
    assert built.startswith("DS_BUILD_OPS=0 ") and "pip wheel --no-deps --no-build-isolation" in built
    assert built.endswith(" deepspeed==0.19.8") and f"--wheel-dir {into}" in built
    assert "pip download --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux" in others
    assert f"--no-deps --dest {into}" in others
    names = [word.partition("==")[0] for word in others.split() if "==" in word]
    assert sorted(names) == sorted(gpu_wheels.LACKING)
    assert with_torch.endswith("--index-url https://download.pytorch.org/whl/cu130 torch==2.13.0")
    assert "--no-deps" not in with_torch and not into.exists()


def test_without_torch_and_packages_only_deepspeed_is_built(capsys):
    assert main(["wheels", "--packages", "--dry-run"], ROOT) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "deepspeed==" in line


def test_wheels_are_installed_beside_the_figures(tmp_path, capsys):
    (tmp_path / "a-1-py3-none-any.whl").touch()
    assert main(["tests", "--wheels", str(tmp_path), "--out", str(tmp_path / "out"), "--dry-run"], ROOT) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "pip install --quiet --no-index --no-deps" in line and f"--target {tmp_path / 'out' / 'site'}" in line
    assert line.endswith("a-1-py3-none-any.whl")
