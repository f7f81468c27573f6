"""Who a process is, in every place of a real SLURM where one may start megapromoe. This SLURM reserves no ports."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import slurm

from megapromoe.distributed.launch_environment import port_of_step

ROOT = Path(__file__).parents[2]
TINY = [
    "train.steps=2", "train.warmup=0", "train.log_every=1", "train.save_every=0", "train.global_batch=32",
    "model.hidden_size=32", "train.deepspeed=fp32_zero1",
]  # fmt: skip
ALLOCATION = ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=1"]

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.Cluster(tmp_path_factory.mktemp("slurm"), nodes=2, ports=False) as made:
        yield made


@pytest.fixture(scope="module")
def describe_rank(tmp_path_factory) -> str:
    """The command of a program that appends who it is to the file that its first word names."""
    file = tmp_path_factory.mktemp("who") / "who.py"
    file.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from megapromoe.distributed.launch_environment import detect\n"
        "launch = detect()\n"
        "with open(sys.argv[1], 'a') as log:\n"
        "    log.write(f'{launch.launcher} {launch.rank} of {launch.world} at {launch.address}:{launch.port}\\n')\n"
    )
    return f"{sys.executable} {file}"


def sorted_lines(file: Path) -> list[str]:
    return sorted(file.read_text().splitlines())


def batch(cluster: slurm.Cluster, folder: Path, body: str, *options: str, **env: str) -> None:
    """Runs a batch script to its end."""
    (folder / "job.sh").write_text(f"#!/bin/bash\n{body}\n")
    command = ["sbatch", "--wait", *ALLOCATION, *options, f"--output={folder}/job.log", str(folder / "job.sh")]
    cluster.command(*command, env=env, check=False)


def test_shells_and_scripts_are_alone_and_tasks_are_ranks(cluster, describe_rank, tmp_path, fault_table):
    """One allocation, in which srun starts fewer tasks than it has, a step in a step, and an interactive step."""
    script = tmp_path / "all.sh"
    script.write_text(
        f"{describe_rank} salloc\n"
        f"srun -n1 {describe_rank} one\n"
        f"srun -n2 {describe_rank} two\n"
        f"srun --preserve-env -n2 {describe_rank} preserved\n"
        f"srun --mpi=pmi2 -n2 {describe_rank} pmi2\n"
        f"srun --interactive --preserve-env {describe_rank} interactive\n"
        f"srun -n1 bash -c 'srun --overlap -n3 {describe_rank} nested'\n"
        "srun -n2 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=n1 MASTER_PORT=7"
        f" {describe_rank} torchrun'\n"
    )
    cluster.command("salloc", *ALLOCATION, "bash", str(script), cwd=tmp_path)
    alone = ["python 0 of 1 at 127.0.0.1:0"]
    for name in ("salloc", "one", "interactive"):
        assert sorted_lines(tmp_path / name) == alone, name
    for name, tasks in (("two", 2), ("preserved", 2), ("pmi2", 2), ("nested", 3)):
        lines = sorted_lines(tmp_path / name)
        place = lines[0].rpartition(" ")[2]
        assert lines == [f"srun {rank} of {tasks} at {place}" for rank in range(tasks)], name
        assert place.startswith("127.0.0.1:"), "the names of these nodes mean nothing to the resolver"
    assert sorted_lines(tmp_path / "torchrun") == [f"torchrun {rank} of 2 at n1:7" for rank in range(2)]
    fault_table.append(
        ("a start without srun in a shell of an allocation of 4 tasks", "one process, which trains", "nothing")
    )


def test_a_batch_script_is_alone_also_if_a_task_of_another_job_submitted_it(cluster, describe_rank, tmp_path):
    inner = tmp_path / "inner.sh"
    inner.write_text(f"#!/bin/bash\nenv > {tmp_path}/environment\n{describe_rank} {tmp_path}/inner\n")
    step = f"[ $SLURM_PROCID != 1 ] || sbatch --wait --overcommit -n1 -N1 --output=/dev/null {inner}"
    batch(cluster, tmp_path, f"{describe_rank} {tmp_path}/outer\nsrun -n3 -N2 bash -c '{step}'")
    assert "SLURM_STEP_NUM_TASKS=3\n" in (tmp_path / "environment").read_text(), "the step's variables are handed on"
    for name in ("outer", "inner"):
        assert sorted_lines(tmp_path / name) == ["python 0 of 1 at 127.0.0.1:0"], name


HYDRA = shutil.which("mpiexec.hydra")


@pytest.mark.skipif(HYDRA is None, reason="mpiexec.hydra of MPICH is not installed")
@pytest.mark.parametrize("words", [["-n", "4"], ["-launcher", "fork", "-hosts", "localhost", "-n", "2"]], ids=" ".join)
def test_mpich_in_a_batch_script_does_not_train_alone(words, cluster, describe_rank, tmp_path, fault_table):
    """The mpi4py of the tests is for Open MPI: each process would take itself for the only one."""
    batch(cluster, tmp_path, shlex.join([HYDRA, *words, *shlex.split(describe_rank), str(tmp_path / "who")]))
    assert not (tmp_path / "who").exists()
    text = (tmp_path / "job.log").read_text()
    assert (
        f"the launcher's variables give rank 1 of {words[-1]}" in text and "start with the mpirun of that MPI" in text
    )
    if len(words) == 2:
        fault_table.append(
            ("mpirun of MPICH in a batch script, mpi4py of Open MPI", "refused on every rank, exit code 2", "nothing")
        )


def planned(*words: str) -> list[str]:
    """The line to paste of `megapromoe plan`."""
    done = subprocess.run(
        [sys.executable, "-m", "megapromoe", "plan", *words], capture_output=True, text=True, check=True
    )
    return shlex.split(done.stdout.splitlines()[-1])


def test_the_line_of_a_plan_starts_where_slurm_reserves_no_ports(cluster, tmp_path):
    """As it is printed, from a login node and in an allocation for more tasks; names of nodes resolve nowhere."""
    line = planned("--preset", "digits", "--nodes", "2", "--gpus-per-node", "1", *TINY, "train.deepspeed=fp32_zero1")
    assert line[0] == "srun" and "megapromoe" in line
    program = line.index("megapromoe")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "megapromoe").write_text(f'#!/bin/sh\nexec {sys.executable} -m megapromoe "$@"\n')
    (folder / "megapromoe").chmod(0o755)
    env = {"PATH": f"{folder}:{cluster.env['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name, start in (("login", []), ("allocation", ["salloc", *ALLOCATION, "--gpus-per-node=1"])):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [*start, *line[:program], *line[program:]], env=cluster.env | env, cwd=tmp_path / name,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (start,) = json.loads((tmp_path / name / "runs" / "digits" / "environment.json").read_text())
        assert (start["launcher"], start["layout"]["world"]) == ("srun", 2)


def test_two_jobs_on_a_node_get_ports_of_their_own(cluster, describe_rank, tmp_path):
    """Both at the same time: the port of the step, and the one that the launchers' node.sh finds free."""
    body = (
        f"srun -n2 -N1 {describe_rank} {tmp_path}/$SLURM_JOB_ID.who\n"
        f"srun -n1 -N1 bash {ROOT}/launchers/node.sh {tmp_path}/cache ask > {tmp_path}/$SLURM_JOB_ID.port\n"
    )
    script = tmp_path / "two.sh"
    script.write_text(f"#!/bin/bash\n{body}")
    command = ["sbatch", "--parsable", "--wait", "--nodes=1", "--ntasks=2", "--nodelist=n1", "--output=/dev/null"]
    jobs = [
        subprocess.Popen([*command, str(script)], env=cluster.env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    numbers = [job.communicate(timeout=120)[0].strip() for job in jobs]
    places = [sorted_lines(tmp_path / f"{number}.who") for number in numbers]
    assert [place[0].rpartition(":")[2] for place in places] == [str(port_of_step(int(n), 0)) for n in numbers]
    ports = {(tmp_path / f"{number}.port").read_text().strip() for number in numbers}
    assert len(ports) == 2 and all(20000 <= int(port) < 30000 for port in ports)
