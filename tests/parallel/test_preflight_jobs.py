"""Real preflights: every rank a process and a node of its own, with faults in them; and the command."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import context, start_server

from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.commands import check
from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.distributed import runtime
from megapromoe.errors import UserError
from megapromoe.planning.measurements import read_measurements
from megapromoe.preflight import arrival, bandwidth, clocks, groups, job, machine, storage
from megapromoe.preflight.verdict import FAIL, WARN

RANKS = 4


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    check.arguments(parser)
    options, overrides = parser.parse_known_args(arguments)
    options.overrides = overrides
    return options


def work(rank: int, port: int, folder: Path, faults: dict, arguments: list[str]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    os.environ |= {
        "SLURMD_NODENAME": f"n{rank}",
        "SLURM_STEP_NODELIST": f"n[0-{RANKS - 1}]",
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{RANKS})",
    }
    storage.VISIBLE = 2.0
    if rank in faults:
        faults[rank]()
    launch = runtime.LaunchEnvironment("srun", rank, RANKS, 0, 1, "127.0.0.1", port)
    code = check.run(options_of(arguments), launch)
    sys.stdout.flush()
    os._exit(code)


def preflight(folder: Path, *arguments: str, faults: dict | None = None, absent: tuple[int, ...] = ()):
    """Runs a preflight; returns the exit codes, the output of rank 0, the report and the bad nodes."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    files = ["--report", str(folder / "report.json"), "--bad-nodes", str(folder / "bad")]
    files += ["data.source=synthetic", "data.size=1000"]  # digits would import scikit-learn in every process
    (folder / "bad").write_text("of-an-earlier-time\n")
    ranks = [r for r in range(RANKS) if r not in absent]
    start_server()
    workers = [
        context.Process(target=work, args=(r, port, folder, faults or {}, [*files, *arguments]), daemon=True)
        for r in ranks
    ]
    for worker in workers:
        worker.start()
    end = time.monotonic() + 120
    try:
        for worker in workers[:1]:
            worker.join(timeout=max(end - time.monotonic(), 0))
        for worker in workers[1:]:
            worker.join(timeout=5)
        codes = [worker.exitcode for worker in workers]
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
    output = (folder / "out-0").read_text()
    report = json.loads((folder / "report.json").read_text())
    errors = "".join((folder / f"err-{r}").read_text() for r in ranks)
    assert "Traceback" not in errors, errors
    return codes, output, report, (folder / "bad").read_text().split()


def verdicts(report: dict, check_name: str) -> dict[str, str]:
    """Node -> verdict, of the lines of one check that did not pass."""
    return {
        node: row["verdict"] for row in report["rows"] if row["check"] == check_name and row["blame"] + row["nodes"]
        for node in row["blame"] or row["nodes"] if row["verdict"] in (FAIL, WARN)
    }  # fmt: skip


def test_a_good_allocation_passes(tmp_path):
    run = tmp_path / "run"
    codes, output, report, bad = preflight(tmp_path, "--run-dir", str(run), "parallel.tp=2", "parallel.ep=2")
    assert (codes, bad, report["bad_nodes"]) == ([0] * 4, [], [])
    assert "preflight passed (4 nodes, 4 ranks)" in output and "no GPU: CPU run" in output
    network = report["found"]["network"]
    assert sorted(network["2"]["pairs"]) == ["n0", "n1", "n3"]
    assert all(speed > 0 for rank in network.values() for speed in [*rank["pairs"].values(), rank["exchange"]])
    operations = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"}
    for rank in network.values():  # speeds for `plan --measured`; ep has the ranks of another group
        assert set(rank["collectives"]) == {"world", "tp", "dp"}
        for times in rank["collectives"].values():
            assert set(times) == operations and all(0 < a < c and b > 0 and d > 0 for a, b, c, d in times.values())
    (measured,) = read_measurements([tmp_path / "report.json"]).rates
    assert measured.device == "cpu" and min(measured.products, measured.elementwise, measured.launch) > 0
    assert {message.nodes for message in measured.messages} == {2, 4}
    assert network["2"]["groups"]["tp"]["ranks"] == [2, 3] and network["2"]["groups"]["dp"]["ranks"] == [0, 2]
    assert {"files", "free space", "data", "clock", "versions", "group edp"} <= {row["check"] for row in report["rows"]}
    assert set(report["found"]["files"]["2"]["visible_after"]) == {"n0", "n1"}
    assert not [file for file in run.rglob("*") if file.is_file()]  # the probe files are removed


@pytest.mark.full
def test_groups_that_divide_optimizer_states_are_checked(tmp_path):
    codes, _, report, _ = preflight(tmp_path, "--run-dir", str(tmp_path / "run"), "parallel.shard_ranks=2")
    assert codes == [0] * 4
    passed = {row["check"] for row in report["rows"] if row["verdict"] == "pass"}
    assert {"group dp_shard", "group dp_replicas", "group edp_shard", "group edp_replicas"} <= passed
    third = report["found"]["network"]["2"]
    assert third["groups"]["dp_shard"]["ranks"] == [2, 3] and third["groups"]["dp_replicas"]["ranks"] == [0, 2]
    assert set(third["collectives"]) == {"world", "dp_shard", "dp_replicas"}  # the others have ranks of these


def odd_version():
    real = machine.versions
    machine.versions = lambda: real() | {"torch": "2.12.0"}


def skewed_clock():
    clocks.now = lambda: time.time() + 30


def other_data():
    real = storage.open_dataset

    def changed(config):
        dataset = real(config)
        dataset.means = np.nextafter(dataset.means, np.float32(2))
        return dataset

    storage.open_dataset = changed


def test_faults_of_three_nodes_are_distinguished(tmp_path):
    faults = {1: odd_version, 2: skewed_clock, 3: other_data}
    codes, output, report, bad = preflight(tmp_path, faults=faults)
    assert codes == [3] * 4 and bad == ["n1", "n3"]
    assert verdicts(report, "versions") == {"n1": FAIL}
    assert verdicts(report, "clock") == {"n2": WARN}
    assert verdicts(report, "data") == {"n3": FAIL}
    assert report["found"]["clock"]["2"]["offset"] == pytest.approx(30, abs=1)
    assert "FAILED: 2 bad nodes (4 nodes, 4 ranks): n1 (versions), n3 (data)" in output


def wrong_values():
    real = groups.contribution

    def flipped(rank, count, device):
        x = real(rank, count, device)
        x[-1:] += 1
        return x

    groups.contribution = flipped


def slow_link():
    real = bandwidth.measure_exchange
    bandwidth.measure_exchange = lambda *a: (real(*a)[0] / 1e6, True)


def local_run_directory():
    """On this node the run directory is a local folder of the same name."""
    real = storage.check_files
    storage.check_files = lambda folder, *a: real(folder.with_name("local"), *a)


@pytest.mark.full
def test_faults_of_network_and_file_system(tmp_path):
    """Rank 2 sends wrong values, rank 3 is slow towards all nodes, and rank 1 has another run directory."""
    faults = {1: local_run_directory, 2: wrong_values, 3: slow_link}
    codes, output, report, bad = preflight(
        tmp_path, "--run-dir", str(tmp_path / "run"), "--expect-gbs", "0.001", "parallel.ep=2", faults=faults
    )
    assert codes == [3] * 4 and bad == ["n1", "n2", "n3"]
    assert verdicts(report, "files") == {"n1": FAIL}
    assert verdicts(report, "group world") == {"n2": FAIL}
    assert verdicts(report, "group ep") != {} and "n0" not in verdicts(report, "group ep")
    assert verdicts(report, "bandwidth") == {"n3": FAIL}
    assert "wrong from rank 2" in " ".join(row["result"] for row in report["rows"])


def test_a_rank_that_never_starts_is_named_with_its_node(tmp_path):
    codes, output, report, bad = preflight(tmp_path, "--timeout", "4", absent=(2,))
    assert codes == [3] * 3 and bad == ["n2"]
    assert "3 of 4 ranks; missing: rank 2" in output


def frozen():
    real = groups.check_collective

    def stop(operation, group, device):
        if operation == "reduce_scatter":
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(operation, group, device)

    groups.check_collective = stop


def killed():
    def die(*a):
        os._exit(9)

    bandwidth.measure_pairs = die


def stuck():
    def wait(config):
        time.sleep(1000)

    storage.open_dataset = wait


@pytest.mark.full
@pytest.mark.parametrize(
    "fault, stage, how",
    [
        (frozen, "reduce_scatter in world", "silent"),
        (killed, "all_to_all in edp", "silent"),
        (stuck, "data", "not finished"),
    ],
)
def test_a_hang_is_ended_and_named(tmp_path, fault, stage, how):
    began = time.monotonic()
    codes, output, report, bad = preflight(tmp_path, "--timeout", "8", faults={2: fault})
    assert codes[0] == 3 and bad == ["n2"]
    # A stopped process cannot end; the others do.
    assert [codes[1], codes[3]] == [3, 3] and codes[2] in {frozen: (-9, None), killed: (9,), stuck: (3,)}[fault]
    assert report["hang"]["place"] == stage
    assert how in output and f"'{stage}'" in " ".join(output.split())
    assert verdicts(report, "answers") == {"n2": FAIL}
    assert time.monotonic() - began < 90


def frozen_during_arrivals():
    real = arrival.gather_arrivals

    def stop(channel, *rest):
        channel.send(f"started/{channel.rank}", ["n0", 1])
        while len(channel.receive_from_ranks("started")) < RANKS:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGSTOP)
        return real(channel, *rest)

    arrival.gather_arrivals = stop


def frozen_before_the_verdict():
    def stop(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    job.Preflight._conclude = stop


def work_as_a_program(rank: int, port: int, folder: Path, faults: dict, arguments: list[str]) -> None:
    """As `work`; a user error is printed and sets the exit code, as on the command line."""
    try:
        work(rank, port, folder, faults, arguments)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(error.exit_code)


@pytest.mark.parametrize(
    "fault, where",
    [
        pytest.param(frozen_during_arrivals, "the process that holds the job's store", marks=pytest.mark.full),
        # Others may still wait for its part of the collective before.
        pytest.param(frozen, "in (all_gather|reduce_scatter) in world", marks=pytest.mark.full),
        pytest.param(frozen_before_the_verdict, "the process that holds the job's store", marks=pytest.mark.full),
    ],
)
def test_where_the_holder_of_the_store_is_frozen_the_others_end(tmp_path, fault, where):
    """Rank 0 holds the store. No rank can evaluate the findings then, so the exit code is that of a failed check."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start_server()
    arguments = ["--timeout", "8", "data.source=synthetic", "data.size=1000"]
    ranks = [
        context.Process(target=work_as_a_program, args=(r, port, tmp_path, {0: fault}, arguments), daemon=True)
        for r in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    try:
        end = time.monotonic() + 150
        for rank in ranks[1:]:
            rank.join(timeout=max(end - time.monotonic(), 0))
        errors = [(tmp_path / f"err-{r}").read_text() for r in range(RANKS)]
        assert [rank.exitcode for rank in ranks] == [None, 1, 1, 1], errors
        assert all(re.search(where, text) and "does not answer" in text for text in errors[1:]), errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


@pytest.mark.full
def test_a_run_directory_that_cannot_be_written_blames_the_setup(tmp_path):
    (tmp_path / "file").write_text("")
    codes, output, report, bad = preflight(tmp_path, "--run-dir", str(tmp_path / "file" / "run"))
    assert codes == [2] * 4 and bad == []
    assert verdicts(report, "files") and "Not a directory" in " ".join(output.split())


# ---- the command


def test_alone(tmp_path, capsys):
    launch = runtime.LaunchEnvironment("python")
    options = options_of(["--run-dir", str(tmp_path / "run"), "--bad-nodes", str(tmp_path / "bad")])
    try:
        assert check.run(options, launch) == 0
    finally:
        runtime.destroy_process_group()
    assert "preflight passed (1 node, 1 rank)" in capsys.readouterr().out
    assert (tmp_path / "bad").read_text() == ""
    assert json.loads((tmp_path / "run" / "preflight" / "report.json").read_text())["exit_code"] == 0
    # A run may start in that folder.
    RunDirectory.open(tmp_path / "run", resolve("digits"), 1).close()


def test_too_little_room_and_no_place_for_the_report(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    options = options_of(
        ["--run-dir", str(tmp_path / "run"), "--min-free-gib", "1e9", "--report", str(tmp_path / "file" / "report")]
    )
    with pytest.raises(job.PreflightError, match="file: (File exists|Not a directory)"):
        check.run(options, runtime.LaunchEnvironment("python"))
    runtime.destroy_process_group()
    output = capsys.readouterr().out
    assert "1e+09 GiB" in output and "on any nodes, by its configuration or installation: free space" in output


def test_a_wrong_config_is_reported_before_anything_starts(tmp_path):
    options = options_of(["--run-dir", str(tmp_path / "run"), "parallel.ep=3", "train.lr=fast"])
    with pytest.raises(ConfigError, match="2 problems"):
        check.run(options, runtime.LaunchEnvironment("srun", 0, 4))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--timeout", "0"], ["--expect-gbs", "fast"], ["--max-skew", "-1"]])
def test_limits_are_positive_numbers(words, capsys):
    with pytest.raises(SystemExit):
        options_of(words)
    assert "must be a number above 0" in capsys.readouterr().err


@pytest.mark.full
def test_under_torchrun(tmp_path):
    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "megapromoe",
    ]
    command = [*program, "check", "--run-dir", str(tmp_path / "run"), "parallel.tp=2"]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "preflight passed (1 node, 2 ranks)" in done.stdout
    report = json.loads((tmp_path / "run" / "preflight" / "report.json").read_text())
    assert report["found"]["network"]["1"]["groups"]["tp"]["ranks"] == [0, 1]
