"""The launchers on a real SLURM: jobs are submitted, signalled, cancelled, and lose their nodes."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support import slurm
from support.documented_commands import documented
from support.levels import full

from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.step_folders import folder_of, steps_in

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
STEPS = 48
SETTINGS = [
    f"train.steps={STEPS}", "train.warmup=4", "train.schedule=constant", "train.log_every=1", "train.save_every=5",
    "train.keep_last=50", "train.deepspeed=fp32_zero1", "parallel.tp=2", "parallel.ep=2", "model.hidden_size=32",
    "train.global_batch=32",
]  # fmt: skip
ENDLESS = ["train.steps=1000000", "train.save_every=1000000"]

pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())


class Job:
    """A submitted job: its number, its log and its run directory."""

    def __init__(self, cluster: slurm.Cluster, script: str, *words: str, name: str, options=(), before=(), **env: str):
        """`before`: words of bash that stand before sbatch."""
        self.cluster, self.where = cluster, cluster.folder / "work"
        self.where.mkdir(exist_ok=True)
        env = {"PRESET": "digits", "PREFLIGHT": "0", "OMP_NUM_THREADS": "1", **env}
        env = {**env, "NODE_CACHE": str(cluster.folder / "cache")}
        if "MEGAPROMOE_ENV" not in env:  # jobs use the environment of the tests
            env["MEGAPROMOE_PYTHON"] = sys.executable
        options = [f"--job-name={name}", "--time=60", *options]
        command = ["sbatch", "--parsable", *options, str(LAUNCHERS / script), *words]
        if before:
            command = ["bash", "-c", f"{' '.join(before)} {shlex.join(command)}"]
        self.number = cluster.command(*command, env=env, cwd=self.where).strip()
        self.log = self.where / f"{name}-{self.number}.log"
        self.run = self.where / "runs" / f"{name}-{self.number}"

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def steps(self) -> int:
        """Steps logged so far."""
        file = self.run / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def losses(self) -> list[float]:
        return [json.loads(line)["total_loss"] for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def attempts(self) -> list[list[str]]:
        """Of each attempt: its name, the newest checkpoint, the exit code, the nodes."""
        file = self.run / "logs" / "attempts.tsv"
        return [line.split("\t") for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for(self, condition, what: str) -> None:
        """Waits until `condition()`; AssertionError with the job's log if the job ends before."""

        def happened() -> bool:
            over = self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            done = condition()
            assert done or not over, f"{what}: job is {self.state()}\n{self.output()}"
            return done

        self.cluster.wait(happened, what, 400)

    def finish(self, state: str = "COMPLETED") -> None:
        self.wait_for(lambda: self.state() == state, state)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.Cluster(tmp_path_factory.mktemp("slurm"), nodes=4) as made:
        yield made


def two_by_two(cluster: slurm.Cluster, name: str, *words: str, options=(), **env: Any) -> Job:
    """`digits` on 2 nodes x 2 tasks."""
    return on_two_nodes(2, cluster, name, *words, options=options, **env)


def on_two_nodes(tasks: int, cluster: slurm.Cluster, name: str, *words: str, options=(), **env: Any) -> Job:
    """`digits` on 2 nodes with so many tasks each."""
    shape = ["--nodes=2", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}", "--cpus-per-task=1", *options]
    return Job(cluster, "promoe_s.sh", *SETTINGS, *words, name=name, options=shape, **env)


@pytest.fixture(scope="module")
def undisturbed(cluster) -> Job:
    job = on_two_nodes(1, cluster, "undisturbed")
    job.finish()
    return job


@pytest.mark.parametrize("script", ["promoe_s.sh", "promoe_b.sh", "promoe_l.sh", "promoe_xl.sh", "promoe_t2i.sh"])
def test_sbatch_would_take_it(script, cluster):
    for nodes in (1, 4):
        output = cluster.command("sbatch", "--test-only", f"--nodes={nodes}", str(LAUNCHERS / script), "parallel.ep=8")
        assert re.search(rf"to start at .* using {nodes * 128} processors on nodes n", output)
    too_many = cluster.command("sbatch", "--test-only", "--nodes=9", str(LAUNCHERS / script), check=False)
    assert "allocation failure" in too_many


def test_sbatch_would_take_the_array(cluster):
    output = cluster.command("sbatch", "--test-only", "--array=0-11%4", str(LAUNCHERS / "scaling_experts.sh"), "study")
    assert "to start at" in output


@pytest.mark.parametrize("tasks", [1, full(2)])
def test_two_nodes_train_together(tasks, cluster, request):
    job = request.getfixturevalue("undisturbed") if tasks == 1 else on_two_nodes(tasks, cluster, "tasks")
    job.finish()
    ranks = 2 * tasks
    assert len(job.losses()) == STEPS and job.losses()[-1] < job.losses()[0]
    (start,) = json.loads((job.run / "environment.json").read_text())
    assert start["layout"] | {"world": ranks, "tp": 2, "ep": 2} == start["layout"]
    assert job.attempts() == [[f"{job.number}.0", f"step-{STEPS:08d}", "0", "n[1-2]"]]
    logs = job.run / "logs" / f"{job.number}.0"
    assert sorted(p.name for p in logs.iterdir()) == [f"rank-{r:04d}.log" for r in range(ranks)]
    assert f"step {STEPS}/{STEPS}" in (logs / "rank-0000.log").read_text()
    assert f"step {STEPS}/{STEPS}" in job.output(), "rank 0 is heard in the log of the job"
    assert cluster.job(job.number)["Restarts"] == "0"


@pytest.mark.full
def test_a_run_that_diverges_is_not_queued_again(cluster):
    job = on_two_nodes(1, cluster, "diverges", "train.lr=1e30")
    job.finish("FAILED")
    ((_, newest, code, _),) = job.attempts()
    assert code == "1" and newest != "none", "the last applied state is saved"
    assert cluster.job(job.number)["Restarts"] == "0"
    assert f"not repeated: the run diverged, see {job.run}/diverged.txt" in job.output()
    assert "start a new run, with another --run-dir and a lower train.lr" in (job.run / "diverged.txt").read_text()


@pytest.mark.full
def test_the_signal_before_the_time_limit_saves_and_queues_again_and_cancelling_saves(cluster):
    job = on_two_nodes(1, cluster, "limit", *ENDLESS, options=["--signal=B:USR1@60"])
    job.wait_for(lambda: job.steps() >= 3, "steps before the limit")
    # The limit is set now, so that a slow machine has trained by then. SLURM checks limits every half minute, and sends
    # the signal when fewer than a minute and a half are left.
    end = datetime.now() + timedelta(seconds=80)
    cluster.command("scontrol", "update", f"JobId={job.number}", f"EndTime={end.isoformat(timespec='seconds')}")
    job.wait_for(lambda: len(job.attempts()) == 1, "SLURM's signal")
    cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    ((_, newest, code, _),) = job.attempts()
    saved = int(newest.removeprefix("step-"))
    assert code == "75" and saved >= 3
    Checkpoint(folder_of(job.run / "checkpoints", saved)).verify()

    job.wait_for(lambda: job.steps() >= saved + 3, "steps after the requeue")
    assert f"continuing from {job.run}/checkpoints/{newest}" in job.output()
    assert cluster.job(job.number)["Restarts"] == "1"

    cluster.command("scancel", job.number)
    job.finish("CANCELLED")
    assert [attempt[2] for attempt in job.attempts()] == ["75", "75"]
    last = steps_in(job.run / "checkpoints")[-1]
    assert last >= saved + 3 and last == job.steps()
    Checkpoint(folder_of(job.run / "checkpoints", last)).verify()
    assert cluster.job(job.number)["Restarts"] == "1", "a cancelled job is not queued again"


@pytest.mark.full
def test_a_requeued_run_has_the_losses_of_an_undisturbed_one(undisturbed, cluster):
    job = on_two_nodes(1, cluster, "requeued")
    job.wait_for(lambda: job.steps() >= 7, "some steps")
    cluster.command("scancel", "--batch", "--signal=USR1", job.number)
    job.finish()
    assert job.losses() == undisturbed.losses()
    assert [attempt[2] for attempt in job.attempts()] == ["75", "0"]
    assert len(json.loads((job.run / "environment.json").read_text())) == 2


def processes_on(node: str) -> list[int]:
    """Everything that SLURM has started on a node."""
    pids = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and f"\0SLURMD_NODENAME={node}\0".encode() in (folder / "environ").read_bytes():
                pids.append(int(folder.name))
    return pids


@pytest.mark.full
def test_a_node_that_dies_is_survived(undisturbed, cluster):
    job = on_two_nodes(1, cluster, "node")
    job.wait_for(lambda: job.steps() >= 7, "some steps")
    assert cluster.job(job.number)["NodeList"] == "n[1-2]"
    cluster.command("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    for pid in processes_on("n2"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        job.finish()
    finally:
        cluster.command("scontrol", "update", "NodeName=n2", "State=RESUME")
    *_, code, nodes = job.attempts()[-1]
    assert code == "0" and nodes in ("n[1,3]", "n[1,4]", "n[3-4]")
    assert job.losses() == undisturbed.losses()


@pytest.mark.full
def test_a_job_goes_on_with_the_nodes_that_are_left(undisturbed, cluster, fault_table):
    """4 of 3 to 4 nodes; 3 are left, on which the configuration cannot run (32 images, dp 3): it uses 2 of them."""
    idle = [f"{name} idle" for name in cluster.names]
    cluster.wait(lambda: cluster.command("sinfo", "-hN", "-o", "%N %t").split("\n")[:4] == idle, "idle nodes", 60)
    options = ["--nodes=3-4", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
    job = Job(cluster, "promoe_s.sh", *SETTINGS, name="elastic", options=options, MIN_NODES="2")
    job.wait_for(lambda: job.steps() >= 7, "some steps on 4 nodes")
    lost_at, lost = job.steps(), time.monotonic()
    cluster.command("scontrol", "update", "NodeName=n4", "State=DOWN", "Reason=test")
    for pid in processes_on("n4"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    starts = job.run / "environment.json"
    try:
        job.wait_for(lambda: len(json.loads(starts.read_text())) == 2, "a second start")
        job.wait_for(lambda: job.steps() > lost_at, "steps on 2 nodes")
        resumed = time.monotonic() - lost
        job.finish()
    finally:
        cluster.command("scontrol", "update", "NodeName=n4", "State=RESUME")
    assert [start["layout"]["world"] for start in json.loads(starts.read_text())] == [8, 4]
    *_, code, nodes = job.attempts()[-1]
    assert (code, nodes) == ("0", "n1,n2") and "cannot run on all 3 nodes of the job" in job.output()
    # The batch is the same, so the losses are those of a run that loses nothing.
    assert job.losses() == pytest.approx(undisturbed.losses(), rel=1e-5)
    (step,) = re.findall(r"resumes from step (\d+)", job.output())
    fault_table.append(
        (
            "a node of a job with `--nodes=3-4` goes down",
            "it is queued again and goes on with the nodes that are left, same losses",
            f"{resumed:.0f} s, and {lost_at - int(step)} steps since the last save (every 5)",
        )
    )


@pytest.mark.full
def test_ranks_whose_step_daemon_is_killed_save(cluster):
    """SLURM's daemon of the step starts the ranks of a node; on the other node it lives."""
    job = on_two_nodes(1, cluster, "daemon", *ENDLESS)
    job.wait_for(lambda: job.steps() >= 3, "some steps")
    *_, node = [f"n{number}" for number in re.findall(r"\d+", cluster.job(job.number)["NodeList"])]
    ranks = [pid for pid in processes_on(node) if b"\0train\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    daemons = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in ranks}
    assert {Path(f"/proc/{pid}/comm").read_text().strip() for pid in daemons} == {"slurmstepd"}
    for pid in daemons:
        os.kill(pid, signal.SIGKILL)
    try:
        cluster.wait(lambda: steps_in(job.run / "checkpoints"), "a checkpoint", 120)
        newest = steps_in(job.run / "checkpoints")[-1]
        Checkpoint(folder_of(job.run / "checkpoints", newest)).verify()
        cluster.wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), "the end of the ranks", 60)
    finally:
        cluster.command("scancel", "--signal=KILL", "--full", job.number, check=False)
        cluster.command("scancel", job.number, check=False)


@pytest.mark.full
def test_a_failure_is_tried_again_but_not_for_ever(cluster, tmp_path):
    """What fails the same way each time ends with the exit code of the ranks; the words of a rank are told."""
    environment = fake(tmp_path, 'echo "rank $SLURM_PROCID: no luck" >&2; exit 76')
    job = two_by_two(cluster, "failing", RETRIES="1", MEGAPROMOE_ENV=environment)
    job.finish("FAILED")
    assert [attempt[1:3] for attempt in job.attempts()] == [["none", "76"]] * 2
    assert cluster.job(job.number)["ExitCode"] == "76:0"
    assert job.output().count("rank-0003: rank 3: no luck") == 2
    assert "2 failures without a new checkpoint: given up" in job.output()


def test_a_wrong_configuration_is_reported_once(cluster):
    job = two_by_two(cluster, "wrong", "parallel.ep=3", "train.lr=fast")
    job.finish("FAILED")
    assert cluster.job(job.number)["ExitCode"] == "2:0" and cluster.job(job.number)["Restarts"] == "0"
    assert job.output().count("train.lr") == 1 and "parallel.ep = 3" in job.output()
    assert not job.run.exists()


@pytest.mark.full
@pytest.mark.parametrize("preflight", ["1", "0"])
def test_data_that_no_node_can_read_costs_one_allocation(preflight, cluster, tmp_path, fault_table):
    """The check says so, or without it the ranks; on other nodes and at other times it would be the same."""
    where = ["data.source=latents", f"data.path={tmp_path}/nowhere"]
    job = two_by_two(cluster, f"nodata{preflight}", *where, PREFLIGHT=preflight)
    job.finish("FAILED")
    assert cluster.job(job.number)["ExitCode"] == "2:0" and cluster.job(job.number)["Restarts"] == "0"
    assert [attempt[1:3] for attempt in job.attempts()] == [["none", "2"]]
    assert "not repeated: repeating cannot help" in job.output()
    logs = job.run / "logs" / f"{job.number}.0"
    if preflight == "0":
        assert f"{tmp_path}/nowhere" in job.output()
    else:
        assert "on any nodes, by its configuration or installation: data" in job.output()
        assert (logs / "bad_nodes").read_text() == ""
        assert f"{tmp_path}/nowhere" in (logs / "check.json").read_text()  # its table wraps the long path
        fault_table.append(("a data path that no node can read", "named, exit code 2, not queued again", "one start"))


@pytest.mark.full
@pytest.mark.parametrize("variables", ["NONE", "PREFLIGHT=0"])
def test_a_job_that_inherits_no_variables_runs(variables, cluster, tmp_path, fault_table):
    """sbatch --export=NONE and --export=VAR=...: srun would hand on as little, not even PATH."""
    shutil.copytree(LAUNCHERS, tmp_path / "launchers")
    (tmp_path / ".venv").mkdir()
    fake(
        tmp_path / ".venv", 'echo "$1 of rank $SLURM_PROCID finds $(command -v bash srun megapromoe | wc -l) programs"'
    )
    options = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", f"--export={variables}"]
    script = str(tmp_path / "launchers" / "promoe_s.sh")
    job = Job(cluster, script, "data.source=synthetic", name="bare", options=options)
    job.finish()
    logs = job.run / "logs" / f"{job.number}.0"
    for name in ("check", "rank") if variables == "NONE" else ("rank",):
        for rank in range(4):
            command = {"check": "check", "rank": "train"}[name]
            assert (logs / f"{name}-{rank:04d}.log").read_text() == f"{command} of rank {rank} finds 3 programs\n"
    fault_table.append((f"sbatch --export={variables}", "the steps get all variables of the job", "nothing"))


@pytest.mark.full
@pytest.mark.parametrize("code", ["2", "13", "127"])
def test_what_repeating_cannot_mend_is_not_queued_again(code, cluster, tmp_path):
    """A package that is missing, or a program that cannot be started. The step has the limits of the node."""
    environment = fake(tmp_path, f'echo "rank $SLURM_PROCID: $(ulimit -S -l) $(ulimit -H -l)" >&2; exit {code}')
    job = two_by_two(cluster, f"broken{code}", MEGAPROMOE_ENV=environment, before=["ulimit", "-S", "-l", "64;"])
    job.finish("FAILED")
    assert cluster.job(job.number)["ExitCode"] == "2:0" and cluster.job(job.number)["Restarts"] == "0"
    assert len(job.attempts()) == 1 and "not repeated: repeating cannot help" in job.output()
    soft, hard = (job.run / "logs" / f"{job.number}.0" / "rank-0003.log").read_text().split()[2:]
    assert soft == hard != "64", "the shell that called sbatch has 64 KiB of locked memory"


def fake(folder: Path, body: str) -> str:
    """An environment whose megapromoe is a shell script in the place of train and check; `show` is the real one."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "megapromoe"
    real = f'real=("{sys.executable}" -m megapromoe)'
    program.write_text(f'#!/usr/bin/env bash\n{real}\n[[ $1 != show ]] || exec "${{real[@]}}" "$@"\n{body}\n')
    program.chmod(0o755)
    return str(folder)


@pytest.mark.full
def test_a_node_that_fails_the_check_is_left_out(tmp_path_factory):
    """One node of four has another DeepSpeed. No ports are reserved on this SLURM: ranks meet at a free one."""
    folder = tmp_path_factory.mktemp("ports")
    odd = folder / "odd" / "deepspeed-0.0.1.dist-info"
    odd.mkdir(parents=True)
    (odd / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n")
    body = f'[[ $SLURMD_NODENAME != n2 ]] || export PYTHONPATH={folder}/odd:$PYTHONPATH\nexec "${{real[@]}}" "$@"'
    with slurm.Cluster(folder / "slurm", nodes=5, ports=False) as cluster:
        shape = ["--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
        env = {"PREFLIGHT": "1", "MEGAPROMOE_ENV": fake(folder, body)}
        job = Job(cluster, "promoe_s.sh", *SETTINGS, "train.steps=4", name="checked", options=shape, **env)
        job.finish()
        assert [attempt[1:] for attempt in job.attempts()] == [
            ["none", "3", "n[1-4]"],
            ["step-00000004", "0", "n[1,3-5]"],
        ]
        assert cluster.job(job.number)["ExcNodeList"] == "n2"
        assert "queued again without n2" in job.output()
        assert (job.run / "logs" / f"{job.number}.0" / "bad_nodes").read_text() == "n2\n"
        assert (job.run / "logs" / f"{job.number}.1" / "check.json").exists()


def test_sbatch_would_take_every_documented_command(cluster):
    commands = [command.text for command in documented() if command.text.startswith("sbatch ")]
    assert len(commands) >= 3
    for text in commands:
        words = shlex.split(re.sub(r"\[.*?\]", "", text))[1:]
        words = [str(ROOT / word) if word.startswith("launchers/") else word for word in words]
        output = cluster.command("sbatch", "--test-only", *words)
        assert re.search(r"to start at .* using \d+ processors on nodes n", output), f"{text}: {output}"


@pytest.mark.full
def test_the_ranks_of_a_study_are_on_several_nodes(cluster, tmp_path):
    """Two ranks on two nodes by srun, with the options of sbatch that `submit` finds itself."""
    study = tmp_path / "study"
    tool = [sys.executable, str(ROOT / "tools" / "scaling_study.py")]
    env = {**cluster.env, "NODE_CACHE": str(tmp_path / "cache")}
    tiny = ["train.steps=3", "train.warmup=0", "model.hidden_size=32", "train.global_batch=8", "parallel.ep=2"]
    tiny += ["train.deepspeed=fp32_zero1"]
    made = ["--preset", "digits", "--seeds", "0", "--ranks", "2", "--launcher", f"srun {sys.executable}", *tiny]
    output = f"--output={tmp_path}/%a.log"
    for words in (["plan", str(study), *made], ["submit", str(study), "--nodes=2", "--cpus-per-task=1", output]):
        done = subprocess.run([*tool, *words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --gpus-per-node=1" in done.stdout
    number = re.search(r"\d+$", done.stdout.strip())[0]
    cluster.wait(lambda: number not in cluster.command("squeue", "-h", "-o", "%F"), "the study", 400)
    log = (tmp_path / "0.log").read_text() + "".join(path.read_text() for path in (study / "logs").glob("*.log"))
    (run,) = (study / "runs").iterdir()
    assert (run / "checkpoints" / "step-00000003" / "manifest.json").exists(), log
    (start,) = json.loads((run / "environment.json").read_text())
    assert (start["launcher"], start["layout"]["world"]) == ("srun", 2)


@pytest.mark.full
def test_a_study_runs_as_an_array_and_is_collected(cluster, tmp_path):
    """Its last job has the number of the array: only that one may be queued again when it is asked to stop."""
    study = tmp_path / "study"
    tool = [sys.executable, str(ROOT / "tools" / "scaling_study.py")]
    env = {**cluster.env, "OMP_NUM_THREADS": "1", "NODE_CACHE": str(tmp_path / "cache"), "PREFLIGHT": "0"}

    def call(*words: str) -> str:
        done = subprocess.run([*tool, *words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    tiny = ["train.steps=400", "train.warmup=0", "train.log_every=1", "model.hidden_size=32", "train.global_batch=32"]
    call("plan", str(study), "--preset", "digits", "--experts", "2", "4", "--seeds", "0", *tiny)
    output = f"--output={tmp_path}/%a.log"
    number = re.search(r"\d+$", call("submit", str(study), "--jobs", "2", output, "--cpus-per-task=1").strip())[0]

    def ended() -> bool:
        return number not in cluster.command("squeue", "-h", "-o", "%F")

    last = cluster.job(f"{number}_1")
    assert last["JobId"] == number
    cluster.wait(lambda: any((study / "runs").glob("*e4*/metrics.jsonl")), "the last task", 400)
    cluster.command("scancel", "--batch", "--signal=USR1", f"{number}_1")
    cluster.wait(ended, "the array", 400)
    logs = [(tmp_path / f"{i}.log").read_text() for i in range(2)]
    assert [re.findall(r"exit code (\d+)", log) for log in logs] == [["0"], ["75", "0"]], logs
    rows = (call("collect", str(study), "--draws", "64") and (study / "results.csv").read_text()).splitlines()
    assert len(rows) == 3
    assert "all 2 tasks are done" in call("submit", str(study))
