"""The preflight: all checks in order. Checks that need no other rank come first, those that may hang come last."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
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
from megapromoe.preflight import arrival, bandwidth, clocks, groups, machine, machine_rules, rates, storage
from megapromoe.preflight.bandwidth import Network
from megapromoe.preflight.clocks import Clock
from megapromoe.preflight.groups import GroupResult
from megapromoe.preflight.machine import Machine
from megapromoe.preflight.report import table, write_reports
from megapromoe.preflight.storage import Data, Files
from megapromoe.preflight.verdict import Cluster, Limits, PreflightError, evaluate
from megapromoe.work_progress import Progress

RULES = (
    arrival.evaluate_arrival,
    arrival.evaluate_hang,
    machine_rules.evaluate_versions,
    machine_rules.evaluate_devices,
    machine_rules.evaluate_host,
    clocks.evaluate_clocks,
    storage.evaluate_files,
    storage.evaluate_data,
    bandwidth.evaluate_errors,
    groups.evaluate_groups,
    bandwidth.evaluate_pairs,
    bandwidth.evaluate_all_to_all,
)
STAGES: dict[str, Callable[[dict], Any]] = {
    "machine": lambda message: Machine(**message),
    "clock": lambda message: Clock(**message),
    "files": lambda message: Files(**message),
    "data": lambda message: Data(**message),
    "network": lambda message: Network(
        **(message | {"groups": {name: GroupResult(**result) for name, result in message["groups"].items()}})
    ),
}
VERDICT_WAIT = 5.0  # seconds that rank 0, which may hold the store, waits for the others to receive the verdict


class Preflight:
    """The preflight of one rank. `run` is collective and returns the same exit code on every rank."""

    def __init__(
        self,
        config: Config,
        folder: Path | None,
        launch: runtime.LaunchEnvironment,
        limits: Limits,
        timeout: float,
        report: Path | None = None,
        bad_nodes: Path | None = None,
    ):
        """Connects to the job's store; the process group is created later, by `run`.

        Args:
            folder: run directory whose file system is checked; None: no check of files.
            launch: this rank's identity.
            limits: thresholds of the rules.
            timeout: seconds without progress of any rank that count as a hang.
            report: file to which rank 0 writes all findings as JSON.
            bad_nodes: file to which rank 0 writes the names of the faulty nodes.
        """
        self.config, self.folder, self.launch, self.limits, self.timeout = config, folder, launch, limits, timeout
        self.report, self.bad_nodes = report, bad_nodes
        self.store = rendezvous.create_store(launch, timeout, "preflight")
        # A hang is reported by the watchdog. The time-outs of the store, its channel and the process groups are longer
        # and take effect only where the watchdog cannot end the process.
        self.store.set_timeout(timedelta(seconds=10 * timeout))
        self.channel = self._channel(self.store)
        self.watchdog: Watchdog | None = None
        self.progress = Progress(len(STAGES), "stage", "check", enabled=launch.rank == 0, leave=False)

    def run(self) -> int:
        """Runs all checks and returns the exit code of the verdict: see `verdict.evaluate`. Collective.

        Raises PreflightError on every rank if a report cannot be written.
        """
        launch, node = self.launch, launch_environment.node_name()
        if launch.rank == 0 and self.bad_nodes is not None:
            self._clear_bad_nodes(self.bad_nodes)
        node_of, local = arrival.gather_arrivals(self.channel, node, launch.local_world, self.timeout)
        self.cluster = Cluster(launch.world, node_of, local | launch_environment.expected_nodes(launch))
        if len(node_of) < launch.world:
            return self._end()
        channel = self._channel(rendezvous.clone_connection(self.store, self.timeout))
        self.watchdog = Watchdog(channel, self.timeout, "--timeout", self._on_hang, every_place=True, code=1)
        joined = self._run_stages(node)
        code = self._end()
        self._leave_job(joined, code)
        return code

    def _run_stages(self, node: str) -> bool:
        """Runs every stage on this rank; returns whether torch.distributed was joined and raised no error."""
        leaders = self.cluster.leaders()
        is_leader = self.launch.rank == leaders[node]
        self._stage("machine", lambda: self._examine(is_leader))
        self._stage("clock", lambda: clocks.compare_clocks(self.channel, list(leaders.values())))
        folder = self.folder
        if folder is not None:
            self._stage("files", lambda: storage.check_files(folder, self.channel, leaders, node))
        else:
            self.cluster.findings["files"] = {}
        self._stage("data", lambda: storage.check_data(self.config) if is_leader else None)
        if self.launch.rank == 0:
            self.channel.send(
                "skip", machine.reason_to_skip_network(self.cluster.findings["machine"], self.cluster.node_of)
            )
        self.cluster.skipped = self.channel.receive("skip")
        if self.cluster.skipped:
            return False
        network = self._stage("network", self._measure_network)
        return not network.error

    def _examine(self, is_leader: bool) -> Machine:
        """The findings about this rank's machine, with the speed of its device if that computes correctly."""
        examined = machine.examine(self.launch, is_leader)
        if examined.error or examined.wrong:
            return examined
        try:
            elementwise, launch = rates.measure_device(runtime.device_of(self.launch))
        except RuntimeError as problem:  # all errors of CUDA, out of memory included
            return replace(examined, error=str(problem).splitlines()[0])
        return replace(examined, elementwise=elementwise, launch=launch)

    def _measure_network(self) -> Network:
        """Joins torch.distributed and measures the network; an error of a collective is part of the result."""
        fields: dict[str, Any] = {}
        place = "joining"

        def at(stage: str) -> None:
            nonlocal place
            place = stage
            self._at(stage)

        try:
            at("joining torch.distributed")
            job = runtime.init_process_group(self.launch, 2 * self.timeout, self.store)
            fields |= {"device": job.device.type, "groups": {}}
            at("creating the process groups")
            parallel = self.config.parallel
            mesh = make_mesh(parallel.tp, parallel.ep, parallel.expert_tp, 2 * self.timeout, parallel.shard_ranks)
            for direction, result in groups.check_groups(mesh, job.device, at):
                fields["groups"][direction] = result
            speeds, wrong_pairs = bandwidth.measure_pairs(self.cluster, self.launch.rank, job.device, at)
            fields |= {"pairs": speeds, "wrong_pairs": wrong_pairs}
            at("all-to-all in ep")
            fields["exchange"] = bandwidth.measure_all_to_all(mesh.ep, job.device)
            fields["collectives"] = dict(rates.measure_collectives(mesh, job.device, at))
        except RuntimeError as error:  # of torch.distributed, gloo or NCCL
            fields["error"] = f"{place}: {str(error).splitlines()[0]}"
        return Network(**fields)

    def _stage(self, name: str, measure: Callable[[], Any]) -> Any:
        """Runs one stage and sends its result; rank 0 waits for the results of all ranks."""
        self._at(name)
        self.progress.note(name)
        value = measure()
        self.channel.send(f"findings/{name}/{self.launch.rank}", None if value is None else asdict(value))
        self._at(f"{name} of the other ranks")
        if self.launch.rank == 0:
            messages = {rank: self.channel.receive(f"findings/{name}/{rank}") for rank in range(self.launch.world)}
            self._keep_findings(name, messages)
        self.progress.update()
        return value

    def _keep_findings(self, stage: str, messages: dict[int, Any]) -> None:
        findings = {rank: STAGES[stage](message) for rank, message in messages.items() if message is not None}
        self.cluster.findings[stage] = findings

    def _on_hang(self, hang: Hang) -> tuple[str, int]:
        """Evaluates the findings that exist when the job hangs.

        Called in the watchdog's thread, since the rank itself may be waiting; on rank 0 if that still runs.
        """
        if self.launch.rank:
            return f"{hang}. Rank 0 does not respond, so the nodes are not evaluated.", 1
        assert self.watchdog is not None
        channel = self.watchdog.channel
        self.cluster.hang = hang
        for stage in STAGES:
            messages = channel.receive_from_ranks(f"findings/{stage}")
            if messages:
                self._keep_findings(stage, messages)
        code, problems = self._conclude()
        return "; ".join([str(hang), *problems]), 1 if problems else code

    def _end(self) -> int:
        """Rank 0 evaluates the findings; every rank returns the same exit code."""
        if self.launch.rank:
            code, problems = self.channel.receive("verdict")
            self._close_watchdog()
            self.channel.count("left")  # after this, rank 0 may end, and the store with it
        else:
            self._close_watchdog()
            code, problems = self._conclude()
            self.channel.send("verdict", [code, problems])
            end, others = time.monotonic() + VERDICT_WAIT, len(self.cluster.node_of) - 1
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
        """Evaluates the findings, prints the table and writes the reports.

        Returns the exit code, and a message for each report that could not be written.
        """
        self.progress.close()
        verdict = evaluate(self.cluster, self.limits, RULES)
        print(table(verdict), flush=True)
        return verdict.exit_code, write_reports(self.cluster, self.limits, verdict, self.report, self.bad_nodes)

    @staticmethod
    def _clear_bad_nodes(bad_nodes: Path) -> None:
        """Empties the file, so that a preflight that ends early does not leave the nodes of an earlier one in it."""
        try:
            write_text(bad_nodes, "", parents=True)
        except OSError:
            return  # reported when the verdict is written

    def _leave_job(self, joined: bool, code: int) -> None:
        """Destroys the process group; after a failed collective that would wait, so the process ends at once."""
        if joined:
            runtime.destroy_process_group()
        elif torch.distributed.is_initialized():
            sys.stdout.flush()
            os._exit(code)
