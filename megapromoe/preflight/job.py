"""The preflight, top to bottom: what needs nobody first, what may hang last."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store

from megapromoe.config.options import Config
from megapromoe.distributed import launch_environment, rendezvous, runtime
from megapromoe.distributed.mesh import make_mesh
from megapromoe.distributed.store_channel import PAUSE, StoreChannel
from megapromoe.distributed.watchdog import Hang, Watchdog
from megapromoe.io import write_text
from megapromoe.preflight import arrival, bandwidth, clocks, groups, machine, machine_rules, storage
from megapromoe.preflight.bandwidth import Network
from megapromoe.preflight.clocks import Clock
from megapromoe.preflight.groups import Heard
from megapromoe.preflight.machine import Machine
from megapromoe.preflight.report import table, write_reports
from megapromoe.preflight.storage import Data, Files
from megapromoe.preflight.verdict import Cluster, Limits, PreflightError, judge
from megapromoe.work_progress import Progress

RULES = (
    arrival.judge_arrival,
    arrival.judge_answers,
    machine_rules.judge_versions,
    machine_rules.judge_devices,
    machine_rules.judge_host,
    clocks.judge_clocks,
    storage.judge_files,
    storage.judge_data,
    bandwidth.judge_errors,
    groups.judge_groups,
    bandwidth.judge_pairs,
    bandwidth.judge_exchange,
)
STAGES: dict[str, Callable[[dict], Any]] = {
    "machine": lambda said: Machine(**said),
    "clock": lambda said: Clock(**said),
    "files": lambda said: Files(**said),
    "data": lambda said: Data(**said),
    "network": lambda said: Network(
        **(said | {"groups": {name: Heard(**heard) for name, heard in said["groups"].items()}})
    ),
}
LAST_WORDS = 5.0  # seconds that rank 0, who may hold the store, gives the others to hear the verdict


class Preflight:
    """One rank's part of a preflight; `run` is collective and returns the same exit code on every rank."""

    def __init__(
        self,
        config: Config,
        folder: Path | None,
        launch: runtime.Launch,
        limits: Limits,
        timeout: float,
        report: Path | None = None,
        bad_nodes: Path | None = None,
    ):
        """`folder`: of the run, to try its file system, if any; `timeout`: seconds without progress that are a hang."""
        self.config, self.folder, self.launch, self.limits, self.timeout = config, folder, launch, limits, timeout
        self.report, self.bad_nodes = report, bad_nodes
        self.store = rendezvous.meet(launch, timeout, "preflight")
        # The watchdog names what hangs; the limits of the store, its channel and the groups only end what it could not.
        self.store.set_timeout(timedelta(seconds=10 * timeout))
        self.channel = self._channel(self.store)
        self.watchdog: Watchdog | None = None
        self.progress = Progress(len(STAGES), "stage", "check", enabled=launch.rank == 0, leave=False)

    def run(self) -> int:
        """Exit code: 0 passed, 3 some node is to blame, 1 something failed that no node is to blame for.

        Raises PreflightError on every rank if a report cannot be written.
        """
        launch, node = self.launch, launch_environment.node_name()
        if launch.rank == 0 and self.bad_nodes is not None:
            self._forget(self.bad_nodes)
        node_of, local = arrival.roll_call(self.channel, node, launch.local_world, self.timeout)
        self.cluster = Cluster(launch.world, node_of, local | launch_environment.expected_nodes(launch))
        if len(node_of) < launch.world:
            return self._end()
        channel = self._channel(rendezvous.own_connection(self.store, self.timeout))
        self.watchdog = Watchdog(channel, self.timeout, "--timeout", self._hung, every_place=True, code=1)
        joined = self._examine(node)
        code = self._end()
        self._leave(joined, code)
        return code

    def _examine(self, node: str) -> bool:
        """Every stage, on this rank; returns whether torch.distributed is in good order."""
        leaders = self.cluster.leaders()
        leading = self.launch.rank == leaders[node]
        self._stage("machine", lambda: machine.examine(self.launch, leading))
        self._stage("clock", lambda: clocks.compare_clocks(self.channel, list(leaders.values())))
        folder = self.folder
        if folder is not None:
            self._stage("files", lambda: storage.try_files(folder, self.channel, leaders, node))
        else:
            self.cluster.found["files"] = {}
        self._stage("data", lambda: storage.try_data(self.config) if leading else None)
        if self.launch.rank == 0:
            self.channel.send("skip", machine.cannot_join(self.cluster.found["machine"], self.cluster.node_of))
        self.cluster.skipped = self.channel.receive("skip")
        if self.cluster.skipped:
            return False
        network = self._stage("network", self._try_network)
        return not network.error

    def _try_network(self) -> Network:
        found: dict[str, Any] = {}
        place = "joining"

        def at(stage: str) -> None:
            nonlocal place
            place = stage
            self._at(stage)

        try:
            at("joining torch.distributed")
            job = runtime.start(self.launch, 2 * self.timeout, self.store)
            found |= {"device": job.device.type, "groups": {}}
            at("making the groups")
            parallel = self.config.parallel
            mesh = make_mesh(parallel.tp, parallel.ep, parallel.expert_tp, 2 * self.timeout)
            for direction, heard in groups.try_groups(mesh, job.device, at):
                found["groups"][direction] = heard
            found["pairs"], found["wrong_pairs"] = bandwidth.try_pairs(self.cluster, self.launch.rank, job.device, at)
            at("all-to-all in ep")
            found["exchange"] = bandwidth.try_exchange(mesh.ep, job.device)
        except RuntimeError as error:  # torch.distributed's, gloo's and NCCL's
            found["error"] = f"{place}: {str(error).splitlines()[0]}"
        return Network(**found)

    def _stage(self, name: str, find: Callable[[], Any]) -> Any:
        """Finds, tells the others, and on rank 0 waits for what all found."""
        self._at(name)
        self.progress.note(name)
        value = find()
        self.channel.send(f"found/{name}/{self.launch.rank}", None if value is None else asdict(value))
        self._at(f"{name} of the other ranks")
        if self.launch.rank == 0:
            self._keep(name, {rank: self.channel.receive(f"found/{name}/{rank}") for rank in range(self.launch.world)})
        self.progress.update()
        return value

    def _keep(self, stage: str, said: dict[int, Any]) -> None:
        self.cluster.found[stage] = {rank: STAGES[stage](one) for rank, one in said.items() if one is not None}

    def _hung(self, hang: Hang) -> tuple[str, int]:
        """In the watchdog's thread, on rank 0 if it lives: judges by what is there. The rank itself may be waiting."""
        if self.launch.rank:
            return f"{hang}. Rank 0 does not judge the nodes any more.", 1
        assert self.watchdog is not None
        channel = self.watchdog.channel
        self.cluster.hang = hang
        for stage in STAGES:
            findings = channel.receive_from_ranks(f"found/{stage}")
            if findings:
                self._keep(stage, findings)
        code, problems = self._conclude()
        return "; ".join([str(hang), *problems]), 1 if problems else code

    def _end(self) -> int:
        """Rank 0 judges; all hear the exit code."""
        if self.launch.rank:
            code, problems = self.channel.receive("verdict")
            self._close_watchdog()
            self.channel.count("left")  # from now on the store may be gone
        else:
            self._close_watchdog()
            code, problems = self._conclude()
            self.channel.send("verdict", [code, problems])
            end, others = time.monotonic() + LAST_WORDS, len(self.cluster.node_of) - 1
            while self.channel.count("left", 0) < others and time.monotonic() < end:
                time.sleep(PAUSE)
        if problems:
            raise PreflightError("; ".join(problems))
        return code

    def _channel(self, store: Store) -> StoreChannel:
        return StoreChannel(store, self.launch.rank, self.launch.world, self.timeout, 10 * self.timeout)

    def _at(self, stage: str) -> None:
        if self.watchdog is not None:
            self.watchdog.at(stage)

    def _close_watchdog(self) -> None:
        if self.watchdog is not None:
            self.watchdog.close()

    def _conclude(self) -> tuple[int, list[str]]:
        """Judges, prints and writes; the exit code, and what could not be written."""
        self.progress.close()
        verdict = judge(self.cluster, self.limits, RULES)
        print(table(verdict), flush=True)
        return verdict.exit_code, write_reports(self.cluster, self.limits, verdict, self.report, self.bad_nodes)

    @staticmethod
    def _forget(bad_nodes: Path) -> None:
        """An earlier preflight's bad nodes are not this one's, however it ends."""
        try:
            write_text(bad_nodes, "", parents=True)
        except OSError:
            return  # told when the verdict is to be written

    def _leave(self, joined: bool, code: int) -> None:
        if joined:
            runtime.stop()
        elif torch.distributed.is_initialized():  # an orderly end would wait for what failed
            sys.stdout.flush()
            os._exit(code)
