"""Made-up clusters for tests of the preflight's verdict: healthy, until a finding is changed."""

from dataclasses import replace

from megapromoe.preflight.bandwidth import Network
from megapromoe.preflight.clocks import Clock
from megapromoe.preflight.groups import GroupResult
from megapromoe.preflight.job import RULES
from megapromoe.preflight.machine import Machine
from megapromoe.preflight.storage import GIB, Data, Files
from megapromoe.preflight.verdict import Cluster, Limits, evaluate

GOOD = Machine(
    versions={"python": "3.11", "torch": "2.13", "driver": "570"}, device="cuda", name="H100", uuid="",
    memory=80 * GIB, free=79 * GIB, wrong=0, teraflops=700.0, error="", host_memory=1024 * GIB,
    host_available=900 * GIB, shared_memory=512 * GIB, open_files=65536, cpus=128, settings={"NCCL_DEBUG": "WARN"},
)  # fmt: skip


def cluster_of(nodes: int = 8, ranks: int = 8) -> Cluster:
    """A healthy cluster: tp 2, ep within the node."""
    world = nodes * ranks
    node_of = {r: f"node{r // ranks}" for r in range(world)}
    leaders = [r for r in range(world) if r % ranks == 0]
    names = [f"node{i}" for i in range(nodes)]
    findings = {"machine": {}, "clock": {}, "files": {}, "data": {}, "network": {}}
    for r in range(world):
        findings["machine"][r] = replace(GOOD, uuid=f"GPU-{r}")
        node = list(range(r // ranks * ranks, r // ranks * ranks + ranks))
        groups = {
            "world": GroupResult(list(range(world))),
            "tp": GroupResult([r // 2 * 2, r // 2 * 2 + 1]),
            "ep": GroupResult(node),
        }
        pairs = {name: 45.0 for name in names if name != node_of[r]}
        findings["network"][r] = Network("cuda", "", groups, pairs, [], 300.0)
    for r in leaders:
        findings["clock"][r] = Clock(0.002, 0.001)
        findings["files"][r] = Files("/runs/x", "", {names[r // ranks - 1]: 0.1, "node0": 0.1}, 2e9, 5000 * GIB)
        findings["data"][r] = Data("", 1_281_167, "abcd", 1000.0)
    return Cluster(world, node_of, dict.fromkeys(names, ranks), findings)


def change(cluster: Cluster, stage: str, rank: int, **fields) -> None:
    cluster.findings[stage][rank] = replace(cluster.findings[stage][rank], **fields)


def verdict_of(cluster: Cluster, **limits):
    return evaluate(cluster, Limits(**{"free_bytes": 100 * GIB, **limits}), RULES)
