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
from tqdm import tqdm

from megapromoe.config.options import Config
from megapromoe.distributed import runtime
from megapromoe.distributed.mesh import make_mesh
from megapromoe.preflight import bandwidth, groups, machine, meeting, storage
from megapromoe.preflight.bandwidth import Network
from megapromoe.preflight.groups import Heard
from megapromoe.preflight.machine import Machine
from megapromoe.preflight.meeting import Clock, Meeting
from megapromoe.preflight.report import table, write_reports, write_text
from megapromoe.preflight.storage import Data, Files
from megapromoe.preflight.verdict import Cluster, Hang, Limits, PreflightError, judge
from megapromoe.preflight.watch import Watch

RULES = (
    meeting.judge_arrival,
    meeting.judge_answers,
    machine.judge_versions,
    machine.judge_devices,
    machine.judge_host,
    meeting.judge_clocks,
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
        self.store = runtime.meet(launch, timeout, "preflight")
        # The watch names what hangs; the store's and the groups' own limits only end what it could not.
        self.store.set_timeout(timedelta(seconds=10 * timeout))
        self.meeting = Meeting(self.store, launch.rank, launch.world)
        self.watch: Watch | None = None
        self.bar = tqdm(total=len(STAGES), disable=True if launch.rank else None, leave=False)

    def run(self) -> int:
        """Exit code: 0 passed, 3 some node is to blame, 1 something failed that no node is to blame for.

        Raises PreflightError on every rank if a report cannot be written.
        """
        launch, node = self.launch, runtime.node_name()
        if launch.rank == 0 and self.bad_nodes is not None:
            self._forget()
        node_of, local = self.meeting.roll_call(node, launch.local_world, self.timeout)
        self.cluster = Cluster(launch.world, node_of, local | runtime.expected_nodes(launch))
        if len(node_of) < launch.world:
            return self._end()
        self.watch = Watch(self.store.clone(), launch.rank, launch.world, self.timeout, self._hung)
        joined = self._examine(node)
        code = self._end()
        self._leave(joined, code)
        return code

    def _examine(self, node: str) -> bool:
        """Every stage, on this rank; returns whether torch.distributed is in good order."""
        leaders = self.cluster.leaders()
        leading = self.launch.rank == leaders[node]
        self._stage("machine", lambda: machine.examine(self.launch, leading))
        self._stage("clock", lambda: meeting.compare_clocks(self.meeting, list(leaders.values())))
        if self.folder is not None:
            self._stage("files", lambda: storage.try_files(self.folder, self.meeting, leaders, node))
        else:
            self.cluster.found["files"] = {}
        self._stage("data", lambda: storage.try_data(self.config) if leading else None)
        if self.launch.rank == 0:
            self.meeting.say("skip", machine.cannot_join(self.cluster.found["machine"], self.cluster.node_of))
        self.cluster.skipped = self.meeting.hear("skip")
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
            self.watch.at(stage)

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
        self.watch.at(name)
        self.bar.set_description(name)
        value = find()
        self.meeting.say(f"found/{name}/{self.launch.rank}", None if value is None else asdict(value))
        self.watch.at(f"{name} of the other ranks")
        if self.launch.rank == 0:
            said = {rank: self.meeting.hear(f"found/{name}/{rank}") for rank in range(self.launch.world)}
            self._keep(name, said)
        self.bar.update()
        return value

    def _keep(self, stage: str, said: dict[int, Any]) -> None:
        self.cluster.found[stage] = {rank: STAGES[stage](one) for rank, one in said.items() if one is not None}

    def _hung(self, hang: Hang) -> int:
        """On rank 0, in the watch's thread: judges by what is there. The rank itself may be the one that waits."""
        self.cluster.hang = hang
        heard = Meeting(self.watch.store, self.launch.rank, self.launch.world).heard
        for stage in STAGES:
            said = {rank: heard(f"found/{stage}/{rank}") for rank in range(self.launch.world)}
            if any(one is not None for one in said.values()):
                self._keep(stage, said)
        code, problems = self._conclude()
        for problem in problems:
            print(f"megapromoe: {problem}", file=sys.stderr, flush=True)
        return 1 if problems else code

    def _end(self) -> int:
        """Rank 0 judges; all hear the exit code."""
        if self.launch.rank:
            code, problems = self.meeting.hear("verdict")
            self._close_watch()
            self.store.add("left", 1)  # from now on the store may be gone
        else:
            self._close_watch()
            code, problems = self._conclude()
            self.meeting.say("verdict", [code, problems])
            end, others = time.monotonic() + LAST_WORDS, len(self.cluster.node_of) - 1
            while self.store.add("left", 0) < others and time.monotonic() < end:
                time.sleep(meeting.PAUSE)
        if problems:
            raise PreflightError("; ".join(problems))
        return code

    def _close_watch(self) -> None:
        if self.watch is not None:
            self.watch.close()

    def _conclude(self) -> tuple[int, list[str]]:
        """Judges, prints and writes; the exit code, and what could not be written."""
        self.bar.close()
        verdict = judge(self.cluster, self.limits, RULES)
        print(table(verdict), flush=True)
        return verdict.exit_code, write_reports(self.cluster, self.limits, verdict, self.report, self.bad_nodes)

    def _forget(self) -> None:
        """An earlier preflight's bad nodes are not this one's, however it ends."""
        try:
            write_text(self.bad_nodes, "")
        except OSError:
            return  # told when the verdict is to be written

    def _leave(self, joined: bool, code: int) -> None:
        if joined:
            runtime.stop()
        elif torch.distributed.is_initialized():  # an orderly end would wait for what failed
            sys.stdout.flush()
            os._exit(code)
