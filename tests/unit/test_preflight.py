"""The preflight's verdict: its rules on made-up clusters."""

from dataclasses import replace
from itertools import combinations

import pytest
from support.made_up_clusters import GOOD, change, cluster_of, verdict_of

from megapromoe.distributed.watchdog import Hang
from megapromoe.preflight import bandwidth, machine
from megapromoe.preflight.bandwidth import pair_rounds
from megapromoe.preflight.groups import GroupResult
from megapromoe.preflight.storage import GIB
from megapromoe.preflight.verdict import FAIL, WARN, majority_and_outliers, nodes_to_blame

# ---- who is to blame


@pytest.mark.parametrize(
    "pairs, blamed",
    [
        ("", ""),
        ("ab ac ad ae", "a"),
        ("ab ac ad ae bc bd be", "ab"),
        ("ab", "ab"),  # nothing distinguishes the two
        ("ab ac ad ae cd", "acd"),
        ("ab ac ad ae bc bd be cd ce de", ""),  # all nodes: a common cause
    ],
)
def test_nodes_to_blame(pairs, blamed):
    assert nodes_to_blame([tuple(pair) for pair in pairs.split()], "abcde") == tuple(blamed)


def test_outliers_need_a_majority():
    assert majority_and_outliers({"a": 1, "b": 1, "c": 2}) == (1, ("c",))
    assert majority_and_outliers({"a": 1}) == (1, ())
    assert majority_and_outliers({"a": 1, "b": 2}) == (None, ("a", "b"))
    assert majority_and_outliers({"a": 1, "b": 1, "c": 2, "d": 3}) == (None, ("a", "b", "c", "d"))


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 7, 8, 31, 32])
def test_every_pair_is_measured_once_in_rounds_of_disjoint_pairs(nodes):
    rounds = pair_rounds(nodes)
    met = [tuple(sorted(pair)) for pairs in rounds for pair in pairs]
    assert sorted(met) == list(combinations(range(nodes), 2))
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) <= nodes


@pytest.mark.parametrize("nodes", [33, 64, 101])
def test_many_nodes_are_paired_in_a_ring_and_at_random(nodes):
    rounds = pair_rounds(nodes)
    assert len(rounds) == bandwidth.ALL_PAIRS
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in rounds)
    met = {frozenset(pair) for pairs in rounds for pair in pairs}
    assert met >= {frozenset((i, (i + 1) % nodes)) for i in range(nodes)}
    assert rounds == pair_rounds(nodes)  # every rank computes the same schedule
    partners = [sum(node in pair for pair in met) for node in range(nodes)]
    assert min(partners) > 20


# ---- made-up clusters


def serious(verdict) -> set[str]:
    return {row.check for row in verdict.rows if row.verdict == FAIL}


def warned(verdict) -> dict[str, tuple]:
    return {row.check: row.nodes for row in verdict.rows if row.verdict == WARN}


def test_a_healthy_cluster_passes():
    verdict = verdict_of(cluster_of())
    assert (verdict.exit_code, verdict.bad_nodes, serious(verdict), warned(verdict)) == (0, (), set(), {})
    assert verdict.sentence == "passed (8 nodes, 64 ranks)"


def slow_node(cluster, node):
    for rank, network in cluster.findings["network"].items():
        slow = {o: v / 5 for o, v in network.pairs.items() if node in (o, cluster.node_of[rank])}
        cluster.findings["network"][rank] = replace(network, pairs=network.pairs | slow)


def slow_direction(cluster, node):
    """Only what the node sends is slow."""
    for rank in cluster.ranks_on(node):
        change(cluster, "network", rank, pairs={o: 4.0 for o in cluster.nodes if o != node})


def wrong_sender(cluster, rank):
    for other in cluster.findings["network"]:
        if other != rank:
            result = GroupResult(list(range(cluster.world)), ["all_reduce"], [rank])
            change(cluster, "network", other, groups={"world": result})


def wrong_nvlink(cluster, node):
    """Sums within a node go wrong, and so does every larger sum."""
    for rank, network in cluster.findings["network"].items():
        wrong = {"world": GroupResult(network.groups["world"].ranks, ["all_reduce"])}
        if cluster.node_of[rank] == node:
            wrong["ep"] = GroupResult(network.groups["ep"].ranks, ["all_reduce"])
        change(cluster, "network", rank, groups=network.groups | wrong)


def unseen_by_others(cluster, node):
    for files in cluster.findings["files"].values():
        files.visible_after.update({other: -1.0 for other in files.visible_after if other == node})
    rank = cluster.leaders()[node]
    change(cluster, "files", rank, visible_after=dict.fromkeys(cluster.findings["files"][rank].visible_after, -1.0))


BAD_NODE = {
    "an odd version": ("versions", lambda c: change(c, "machine", 24, versions=GOOD.versions | {"torch": "2.12"})),
    "another version on one rank": (
        "versions",
        lambda c: change(c, "machine", 29, versions=GOOD.versions | {"python": "3.12"}),
    ),
    "a slow GPU": ("devices", lambda c: change(c, "machine", 30, teraflops=500.0)),
    "a GPU that computes wrongly": ("devices", lambda c: change(c, "machine", 30, wrong=1)),
    "a GPU that fails": ("devices", lambda c: change(c, "machine", 30, error="CUDA error: an illegal access")),
    "a GPU off the bus": ("devices", lambda c: change(c, "machine", 31, uuid="GPU-30")),
    "no GPU": (
        "devices",
        lambda c: [change(c, "machine", r, device="cpu", uuid="") for r in range(24, 32)],
    ),
    "ECC errors": (
        "devices",
        lambda c: change(
            c, "machine", 24, gpus=[{"index": "3", "uuid": "g", "ecc.errors.uncorrected.volatile.total": "4"}]
        ),
    ),
    "little memory": ("host", lambda c: change(c, "machine", 24, host_available=GIB)),
    "a read-only mount": ("files", lambda c: change(c, "files", 24, error="/runs: Read-only file system")),
    "an unshared folder": ("files", lambda c: unseen_by_others(c, "node3")),
    "unreadable data": ("data", lambda c: change(c, "data", 24, error="FileNotFoundError: shard 3")),
    "other data": ("data", lambda c: change(c, "data", 24, digest="ffff")),
    "a slow node": ("bandwidth", lambda c: slow_node(c, "node3")),
    "a slow sender": ("bandwidth", lambda c: slow_direction(c, "node3")),
    "wrong bytes": (
        "bandwidth",
        lambda c: [change(c, "network", r, wrong_pairs=["node3"]) for r in range(64) if r // 8 != 3],
    ),
    "slow NVLink": ("ep all-to-all", lambda c: change(c, "network", 27, exchange=100.0)),
    "a wrong sender": ("group world", lambda c: wrong_sender(c, 27)),
    "wrong NVLink": ("group ep", lambda c: wrong_nvlink(c, "node3")),
    "a failing adapter": ("network", lambda c: change(c, "network", 27, error="joining: NCCL error: no device")),
    "a silent rank": ("answers", lambda c: setattr(c, "hang", Hang("all_reduce in dp", (27,), (27,)))),
    "a late rank": ("answers", lambda c: setattr(c, "hang", Hang("data", (), (24, 25)))),
    "a missing rank": ("arrival", lambda c: c.node_of.pop(29)),
    "a missing node": ("arrival", lambda c: [c.node_of.pop(r) for r in range(24, 32)]),
}


@pytest.mark.parametrize("fault", BAD_NODE)
def test_a_bad_node_is_named(fault):
    what, make = BAD_NODE[fault]
    cluster = cluster_of()
    make(cluster)
    if what == "arrival":  # no other check runs then
        cluster.findings = {}
    verdict = verdict_of(cluster, host_bytes=2 * GIB)
    assert (verdict.exit_code, verdict.bad_nodes) == (3, ("node3",))
    assert what in serious(verdict)
    assert "1 bad node (8 nodes, 64 ranks): node3 (" in verdict.sentence


NO_NODE_AT_FAULT = {
    "two versions, half and half": (
        "versions",
        lambda c: [change(c, "machine", r, versions=GOOD.versions | {"torch": "2.12"}) for r in range(32)],
    ),
    "a hang of all": ("answers", lambda c: setattr(c, "hang", Hang("all_reduce in world", (), tuple(range(64))))),
    "a rank of an unknown node": ("arrival", lambda c: (c.node_of.pop(29), c.expected.clear(), c.findings.clear())),
}


@pytest.mark.parametrize("fault", NO_NODE_AT_FAULT)
def test_a_common_cause_blames_no_node(fault):
    what, make = NO_NODE_AT_FAULT[fault]
    cluster = cluster_of()
    make(cluster)
    verdict = verdict_of(cluster)
    assert (verdict.exit_code, verdict.bad_nodes) == (1, ())
    assert what in serious(verdict)
    assert all(row.remedy for row in verdict.rows if row.verdict == FAIL)


def no_gpu(cluster, reason: str) -> None:
    """nvidia-smi lists GPUs everywhere, and torch uses none."""
    for rank in cluster.node_of:
        gpus = [{"index": "0", "uuid": "g"}] if rank in cluster.leaders().values() else []
        change(cluster, "machine", rank, device="cpu", uuid="", gpus=gpus, no_gpu=reason)


def every_rank(**fields):
    return lambda c: [change(c, "machine", rank, **fields) for rank in c.node_of]


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
SETUP = {  # fault -> check, whether it is also certain in a job on one node, the change that causes it
    "a full disk": ("free space", True, lambda c: [change(c, "files", r, free=GIB) for r in c.findings["files"]]),
    "no such data": ("data", True, lambda c: [change(c, "data", r, error="no file") for r in c.findings["data"]]),
    "a folder that cannot be written": (
        "files",
        True,
        lambda c: [change(c, "files", r, error="/runs: Permission denied") for r in c.findings["files"]],
    ),
    "a folder on no shared disk": (
        "files",
        False,
        lambda c: [
            change(
                c,
                "files",
                r,
                visible_after={other: 0.1 if other == c.node_of[r] else -1.0 for other in f.visible_after},
            )
            for r, f in list(c.findings["files"].items())
        ],
    ),
    "a torch for CPUs": ("devices", True, lambda c: no_gpu(c, "torch 2.13.0+cpu is built without CUDA")),
    "a driver older than CUDA": ("devices", True, lambda c: no_gpu(c, TOO_OLD)),
    "no visible device": ("devices", False, lambda c: no_gpu(c, "no device is visible")),
    "a torch without kernels for this GPU": (
        "devices",
        True,
        every_rank(error="CUDA error: no kernel image is available for execution on the device"),
    ),
    "the same error everywhere": ("devices", False, every_rank(error="CUDA error: system not yet initialized")),
    "more ranks than GPUs": ("devices", False, lambda c: [change(c, "machine", r, uuid="GPU-0") for r in c.node_of]),
    "states larger than any node": ("host", True, every_rank(host_memory=GIB, host_available=GIB)),
    "states larger than what is free": ("host", False, every_rank(host_available=GIB)),
}


@pytest.mark.parametrize("nodes", [8, 2, 1])
@pytest.mark.parametrize("fault", SETUP)
def test_a_fault_of_all_nodes_blames_the_setup_and_excludes_no_node(fault, nodes):
    """Otherwise a launcher would exclude one node after the other, until none is left."""
    what, alone, make = SETUP[fault]
    cluster = cluster_of(nodes)
    make(cluster)
    verdict = verdict_of(cluster, host_bytes=2 * GIB)
    if nodes == 1 and not alone:
        assert verdict.exit_code in (0, 3)  # no other node to compare with
        return
    assert (verdict.exit_code, verdict.bad_nodes) == (2, ())
    assert what in serious(verdict) and "on any nodes, by its configuration or installation: " in verdict.sentence
    assert all(row.remedy for row in verdict.rows if row.verdict == FAIL)


def test_a_wrong_setup_outweighs_a_bad_node_which_is_named_too():
    """Without the bad node the next attempt would fail as well."""
    cluster = cluster_of()
    SETUP["no such data"][2](cluster)
    change(cluster, "machine", 24, wrong=1)
    verdict = verdict_of(cluster)
    assert (verdict.exit_code, verdict.bad_nodes) == (
        2,
        ("node3",),
    ) and "bad nodes: node3 (devices)" in verdict.sentence


def test_an_error_on_some_nodes_blames_these_nodes():
    cluster = cluster_of()
    for rank in range(32):
        change(cluster, "machine", rank, error="CUDA error: unspecified launch failure")
    verdict = verdict_of(cluster)
    assert (verdict.exit_code, verdict.bad_nodes) == (3, ("node0", "node1", "node2", "node3"))


WORTH_A_WARNING = {
    "cores far from the GPU": ("devices", lambda c: change(c, "machine", 25, gpu_numa=1, core_numa=[0])),
    "little locked memory": ("host", lambda c: change(c, "machine", 24, rdma=True, locked_memory=65536)),
    "a skewed clock": ("clock", lambda c: change(c, "clock", 24, offset=-3.0)),
    "another driver": ("versions", lambda c: change(c, "machine", 24, versions=GOOD.versions | {"driver": "560"})),
    "another GPU": ("devices", lambda c: [change(c, "machine", r, name="A100") for r in range(24, 32)]),
    "a GPU in use": ("devices", lambda c: change(c, "machine", 25, free=40 * GIB)),
    "a small /dev/shm": ("host", lambda c: change(c, "machine", 24, shared_memory=GIB // 16)),
    "few open files": ("host", lambda c: change(c, "machine", 24, open_files=256)),
    "a setting that slows": ("host", lambda c: change(c, "machine", 24, settings={"NCCL_DEBUG": "WARN",
                                                                                   "NCCL_IB_DISABLE": "1"})),
    "too many threads": ("host", lambda c: change(c, "machine", 24, settings={"OMP_NUM_THREADS": "64"})),
    "lost memory": ("host", lambda c: change(c, "machine", 24, host_memory=512 * GIB)),
    "a slow file system": ("files", lambda c: c.findings["files"][24].visible_after.update(node0=30.0)),
}  # fmt: skip


@pytest.mark.parametrize("fault", WORTH_A_WARNING)
def test_a_warning_passes_and_names_the_node(fault):
    what, make = WORTH_A_WARNING[fault]
    cluster = cluster_of()
    make(cluster)
    verdict = verdict_of(cluster)
    assert (verdict.exit_code, serious(verdict)) == (0, set())
    assert warned(verdict) == {what: ("node3",)}


def test_a_clock_offset_within_its_uncertainty_is_no_warning():
    cluster = cluster_of()
    change(cluster, "clock", 24, offset=1.5, uncertainty=0.8)
    assert not warned(verdict_of(cluster)) and warned(verdict_of(cluster, skew=0.5))


def test_one_slow_pair_blames_both_nodes_and_the_remedy_states_the_ambiguity():
    cluster = cluster_of()
    for rank in range(8):
        change(cluster, "network", rank, pairs=cluster.findings["network"][rank].pairs | {"node1": 5.0})
    verdict = verdict_of(cluster)
    assert verdict.bad_nodes == ("node0", "node1")
    assert any("no other pair shows which of the two is at fault" in row.remedy for row in verdict.rows)


@pytest.mark.parametrize("nodes", [3, 4, 5])
def test_a_slow_node_among_few_is_found_without_an_expectation(nodes):
    """Two of three pairs are slow, or half of six: the median over pairs would be slow itself."""
    cluster = cluster_of(nodes)
    slow_node(cluster, "node1")
    assert verdict_of(cluster).bad_nodes == ("node1",)


def test_two_bad_nodes_are_both_named():
    cluster = cluster_of()
    slow_node(cluster, "node1")
    slow_node(cluster, "node6")
    assert verdict_of(cluster).bad_nodes == ("node1", "node6")


def test_an_expectation_decides_what_is_slow():
    # 8 ranks x 45 GB/s
    assert verdict_of(cluster_of(), pair_gbps=350).exit_code == 0
    high = verdict_of(cluster_of(), pair_gbps=370)
    assert (high.exit_code, high.bad_nodes) == (1, ())
    assert any("--expect-gbs" in row.remedy for row in high.rows)


def test_without_gpus_slowness_is_a_warning_unless_a_speed_is_required():
    cluster = cluster_of()
    for rank, network in cluster.findings["network"].items():
        cluster.findings["network"][rank] = replace(network, device="cpu")
        change(cluster, "machine", rank, device="cpu", uuid="", teraflops=0.02 if rank == 24 else 0.1)
    slow_node(cluster, "node3")
    verdict = verdict_of(cluster)
    assert (verdict.exit_code, set(warned(verdict))) == (0, {"devices", "bandwidth"})
    assert any("no GPU: CPU run" in row.result for row in verdict.rows)
    assert verdict_of(cluster, pair_gbps=100).bad_nodes == ("node3",)


def test_ranks_that_wait_for_a_rank_with_an_error_are_not_blamed():
    cluster = cluster_of(nodes=3)
    change(cluster, "network", 8, error="joining: no interface")
    cluster.hang = Hang("all_reduce in world", (), tuple(r for r in range(16, 24)))
    assert verdict_of(cluster).bad_nodes == ("node1",)


def test_a_rank_whose_connection_to_a_silent_rank_fails_is_not_blamed():
    cluster = cluster_of(nodes=3)
    change(cluster, "network", 8, error="all_reduce in world: connection reset by peer")
    cluster.hang = Hang("all_reduce in world", (16,), (16,))
    assert verdict_of(cluster).bad_nodes == ("node2",)


def test_the_slower_of_two_gpus_is_reported():
    cluster = cluster_of(2, 1)
    change(cluster, "machine", 1, teraflops=0.7 * GOOD.teraflops)
    assert verdict_of(cluster).bad_nodes == ("node1",)


def test_locked_memory_without_rdma_and_cores_of_all_nodes_are_no_warning():
    cluster = cluster_of()
    change(cluster, "machine", 24, locked_memory=65536, gpu_numa=1, core_numa=[0, 1])
    verdict = verdict_of(cluster)
    assert not warned(verdict) and any("ulimit -l unlimited" in row.result for row in verdict.rows)


def test_gpus_that_torch_does_not_use_are_a_failure():
    cluster = cluster_of(1, 2)
    for rank in range(2):
        change(cluster, "machine", rank, device="cpu", uuid="", gpus=[{"index": "0", "uuid": "g"}])
    assert "devices" in serious(verdict_of(cluster))


def test_the_network_is_not_checked_where_a_collective_would_hang():
    good = {r: replace(GOOD, uuid=f"g{r}") for r in range(4)}
    node_of = {0: "a", 1: "a", 2: "b", 3: "b"}
    assert machine.reason_to_skip_network(good, node_of) == ""
    assert "share" in machine.reason_to_skip_network(good | {1: good[0]}, node_of)
    assert (
        machine.reason_to_skip_network(good | {2: replace(good[0])}, node_of) == ""
    )  # MIG parts of two nodes may share a name
    assert "rank 3" in machine.reason_to_skip_network(good | {3: replace(GOOD, device="cpu")}, node_of)
    assert "rank 2" in machine.reason_to_skip_network(good | {2: replace(GOOD, error="ill")}, node_of)
