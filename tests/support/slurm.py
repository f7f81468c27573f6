"""A real SLURM on this machine: munged, slurmctld and several slurmd, each on a port of its own, in one folder.

Nothing of a SLURM that the machine may have is touched: key, socket, spool, logs and configuration lie in the folder,
and the commands find them by SLURM_CONF. The nodes claim more processors and GPUs than there are, since what is tested
is who starts what, where and when.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ctld_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
{mpi_params}
ReturnToService=1
JobRequeue=1
KillWait=120
MinJobAge=600
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdTimeout=30
InactiveLimit=0
TmpFS={folder}
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why a SLURM cannot be started here; empty if it can."""
    if os.geteuid() != 0:
        return "several slurmd on one machine need root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge" if absent else ""


class Cluster:
    """Nodes n1, n2, ... with 8 fake GPUs each. Use as a context manager."""

    def __init__(self, folder: Path, nodes: int = 3, ports: bool = True):
        self.folder = folder
        self.names = [f"n{i + 1}" for i in range(nodes)]
        self.daemons: list[subprocess.Popen] = []
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "OMPI", "PMI"))}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self._configure(ports)

    def _configure(self, ports: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", *(f"spool-{n}" for n in self.names)):
            (self.folder / name).mkdir()
        # Held all at once so that they differ; free again when the daemons start.
        sockets = [socket.socket() for _ in range(len(self.names) + 1)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        ctld, *slurmd = (s.getsockname()[1] for s in sockets)
        for s in sockets:
            s.close()
        host = socket.gethostname().partition(".")[0]
        gpus = "Gres=gpu:8 CPUs=128 Boards=1 SocketsPerBoard=2 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=4096"
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {gpus} State=UNKNOWN"
            for name, port in zip(self.names, slurmd, strict=True)
        ]
        mpi_params = f"MpiParams=ports={_free_range(40)}" if ports else ""
        conf = CONF.format(host=host, ctld_port=ctld, folder=self.folder, mpi_params=mpi_params, nodes="\n".join(lines))
        (self.folder / "slurm.conf").write_text(conf)
        for i in range(8):  # files in the place of /dev/nvidia0 and so on
            (self.folder / f"gpu{i}").touch()
        files = f"Name=gpu File={self.folder}/gpu[0-7]"
        (self.folder / "gres.conf").write_text("".join(f"NodeName={name} {files}\n" for name in self.names))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        folder = self.folder
        # munged insists that nobody else may write on the way to its files, unless forced
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
            f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        self.wait(lambda: (folder / "munge.socket").exists(), "munged to listen", 20)
        self._daemon("slurmctld", "-D", "-i")
        for name in self.names:
            self._daemon("slurmd", "-D", "-N", name)
        ready = "\n".join(f"{name} idle" for name in self.names)
        self.wait(lambda: self.command("sinfo", "-hN", "-o", "%N %t", check=False).strip() == ready, "idle nodes", 60)

    def _daemon(self, *command: str) -> None:
        with open(self.folder / "daemons.log", "ab") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            )

    def __exit__(self, *exception) -> None:
        if len(self.daemons) > 1:
            self.command("scancel", "--user=root", check=False)
            end = time.monotonic() + 5
            while self.command("squeue", "-h", check=False).strip() and time.monotonic() < end:
                time.sleep(0.2)
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self.daemons:
            daemon.wait(timeout=10)
        self.daemons.clear()

    def _processes(self) -> list[int]:
        """The daemons, and what still runs of jobs."""
        variable, pids = f"SLURM_CONF={self.folder / 'slurm.conf'}\0".encode(), []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if variable in environment.read_bytes():
                    pids.append(int(environment.parent.name))
        return pids

    # ---- what a user does

    def command(self, *command: str, check: bool = True, **more) -> str:
        """Runs a command of SLURM; returns what it says."""
        done = subprocess.run(
            command, env=self.env | more.pop("env", {}), capture_output=True, text=True, timeout=60, **more
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job` as a dictionary."""
        words = self.command("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition: Callable[[], bool], what: str, limit: float = 120.0) -> None:
        """Waits until `condition()`; AssertionError with the daemons' last words after `limit` seconds."""
        end = time.monotonic() + limit
        while not condition():
            if time.monotonic() > end:
                logs = [self.folder / "slurmctld.log", self.folder / "daemons.log"]
                tails = "\n".join(f"--- {p}\n{p.read_text()[-2500:]}" for p in logs if p.exists())
                raise AssertionError(f"waited {limit:g} s for {what}\n{tails}")
            time.sleep(0.1)


def _free_range(count: int) -> str:
    """ "first-last" of so many neighbouring ports that are free now, below those that the kernel gives away."""
    for first in range(20000, 30000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as s:
                    s.bind(("", port))
        except OSError:
            continue
        return f"{first}-{first + count - 1}"
    raise RuntimeError(f"no {count} neighbouring ports are free")
