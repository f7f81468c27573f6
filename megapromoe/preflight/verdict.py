"""The findings of the checks as plain data, and the rules' verdict on them.

Ranks only measure. Rank 0 has the findings of all ranks and evaluates them with rules. A rule is a function
`Cluster, Limits -> Iterator[Row]` without side effects, so that tests can apply it to made-up clusters.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megapromoe.errors import ExitCode, UserError

if TYPE_CHECKING:  # it imports torch
    from megapromoe.distributed.watchdog import Hang

PASS, WARN, FAIL, SKIP = "pass", "warn", "FAIL", "-"


class PreflightError(UserError):
    """The preflight could not be carried out, or its result could not be written. Raised on all ranks."""

    on_all_ranks = True


@dataclass(frozen=True)
class Limits:
    """Thresholds of the rules.

    Attributes:
        pair_gbps: GB/s in each direction that any two nodes must reach; None: `pair_share` of the usual bandwidth.
        free_bytes: bytes that must be free in the run directory.
        skew: seconds between two clocks above which there is a warning.
        host_bytes: bytes of host memory that the ranks of a node need; of the node with most ranks.
        device_share, pair_share: fraction of the usual speed below which a device or a connection counts as slow.
        visible_within: seconds within which a written file should be visible on every node.
    """

    pair_gbps: float | None = None
    free_bytes: int = 0
    skew: float = 1.0
    host_bytes: int = 0
    device_share: float = 0.8
    pair_share: float = 0.5
    visible_within: float = 5.0


@dataclass
class Cluster:
    """The findings of all ranks: the input of the rules.

    Attributes:
        world: number of ranks of the job.
        node_of: rank -> node, of the ranks that have started.
        expected: node -> number of ranks, as far as the launcher gives it.
        findings: stage -> rank -> that rank's result.
        hang: the hang that ended the checks early; None if there was none.
        skipped: why the network was not checked; "" if it was.
    """

    world: int
    node_of: dict[int, str]
    expected: dict[str, int] = field(default_factory=dict)
    findings: dict[str, dict[int, Any]] = field(default_factory=dict)
    hang: Hang | None = None
    skipped: str = ""

    @property
    def nodes(self) -> list[str]:
        """Names of all nodes with a started rank, in the order of their first ranks."""
        return list(dict.fromkeys(self.node_of[rank] for rank in sorted(self.node_of)))

    def ranks_on(self, node: str) -> list[int]:
        return [rank for rank in sorted(self.node_of) if self.node_of[rank] == node]

    def leaders(self) -> dict[str, int]:
        """The first rank of each node."""
        return {node: self.ranks_on(node)[0] for node in self.nodes}

    def nodes_of(self, ranks: Iterable[int]) -> tuple[str, ...]:
        """The nodes of the given ranks without repetition; ranks of unknown nodes are ignored."""
        return tuple(dict.fromkeys(self.node_of[r] for r in sorted(ranks) if r in self.node_of))


@dataclass(frozen=True)
class Row:
    """One line of the table: the result of a check on some nodes.

    Attributes:
        check: name of the check.
        nodes: the nodes that the line is about.
        result: what was measured.
        limit: what is required.
        verdict: PASS, WARN, FAIL or SKIP.
        remedy: what the user can do.
        blame: nodes that a launcher should exclude because of this result.
        setup: whether the configuration or installation is at fault, so that the check fails on any nodes.
    """

    check: str
    nodes: tuple[str, ...]
    result: str
    limit: str
    verdict: str
    remedy: str = ""
    blame: tuple[str, ...] = ()
    setup: bool = False


@dataclass(frozen=True)
class Verdict:
    """The outcome of a preflight: all rows, the nodes to exclude, the exit code and a summary in one sentence."""

    rows: tuple[Row, ...]
    bad_nodes: tuple[str, ...]
    exit_code: int
    sentence: str


Rule = Callable[[Cluster, Limits], Iterator[Row]]


def evaluate(cluster: Cluster, limits: Limits, rules: Iterable[Rule]) -> Verdict:
    """Applies the rules to the findings.

    The exit code is 0 without a failure, 2 if the setup is at fault (neither a repetition nor other nodes help), 3 if
    nodes are at fault, and 1 for a failure that cannot be assigned to a node.
    """
    rows = tuple(row for rule in rules for row in rule(cluster, limits))
    failed_checks_of: dict[str, list[str]] = {}
    for row in rows:
        for node in row.blame:
            failed_checks_of.setdefault(node, []).append(row.check)
    failed = list(dict.fromkeys(row.check for row in rows if row.verdict == FAIL))
    warned = list(dict.fromkeys(row.check for row in rows if row.verdict == WARN))
    warnings = f"; warnings: {', '.join(warned)}" if warned else ""
    where = f"{_count(len({*cluster.nodes, *cluster.expected}), 'node')}, {_count(cluster.world, 'rank')}"
    setup = list(dict.fromkeys(row.check for row in rows if row.verdict == FAIL and row.setup))
    bad_nodes = tuple(sorted(failed_checks_of))
    listed = ", ".join(f"{node} ({', '.join(dict.fromkeys(failed_checks_of[node]))})" for node in bad_nodes)
    if setup:
        sentence = f"FAILED ({where}) on any nodes, by its configuration or installation: {', '.join(setup)}"
        others = f"; bad nodes: {listed}" if bad_nodes else ""
        return Verdict(rows, bad_nodes, ExitCode.MISCONFIGURED, f"{sentence}{others}{warnings}")
    if bad_nodes:
        sentence = f"FAILED: {_count(len(bad_nodes), 'bad node')} ({where}): {listed}{warnings}"
        return Verdict(rows, bad_nodes, ExitCode.BAD_NODES, sentence)
    if failed:
        return Verdict(rows, (), 1, f"FAILED ({where}), and no single node is to blame: {', '.join(failed)}{warnings}")
    return Verdict(rows, (), 0, f"passed ({where}){warnings}")


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'s' * (number != 1)}"


# ---- which node is at fault


def blame_setup_if_on_all_nodes(cluster: Cluster, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of one fault, one for each node that has it.

    If all of several nodes have the fault, the rows blame the setup in place of the nodes.
    """
    rows = list(rows)
    on_all_nodes = len(cluster.nodes) > 1 and {node for row in rows for node in row.nodes} >= set(cluster.nodes)
    for row in rows:
        yield replace(row, blame=(), setup=True) if on_all_nodes else row


def nodes_to_blame(pairs: Iterable[tuple[str, str]], nodes: Iterable[str]) -> tuple[str, ...]:
    """A small set of nodes that explains all bad pairs.

    It is built greedily: the nodes that are in most of the unexplained pairs are added until each pair has one of
    them. If nothing distinguishes the two nodes of a pair, both are in the set. If the set would hold every node, no
    node can be blamed and the result is empty.
    """
    unexplained = {frozenset(pair) for pair in pairs}
    blamed: set[str] = set()
    while unexplained:
        counts = Counter(node for pair in unexplained for node in pair)
        worst = {node for node, count in counts.items() if count == max(counts.values())}
        blamed |= worst
        unexplained = {pair for pair in unexplained if not pair & worst}
    return () if blamed >= set(nodes) else tuple(sorted(blamed))


def majority_and_outliers(values: Mapping[str, Hashable]) -> tuple[Hashable | None, tuple[str, ...]]:
    """The value of more than half of the nodes, and the nodes with another one; (None, all nodes) without a majority.

    Args:
        values: node -> value.
    """
    (common, times), *_ = Counter(values.values()).most_common(1)
    if 2 * times <= len(values):
        return None, tuple(values)
    return common, tuple(node for node, value in values.items() if value != common)


def upper_median(speeds: Iterable[float]) -> float:
    """The usual speed: the median, and of two speeds the higher one."""
    return statistics.median_high(speeds)


def rows_of_differences(
    check: str, values: Mapping[str, Hashable], show: Callable[[Any], str], remedy: str, serious: bool = True
) -> Iterator[Row]:
    """Rows for a value that should be the same on all nodes: one for each node that differs from the majority.

    Without a majority there is a single row, which names all nodes.

    Args:
        check, remedy: see `Row`.
        values: node -> value.
        show: formats a value.
        serious: whether a difference is a failure; otherwise it is a warning.
    """
    if not values:
        return
    common, odd = majority_and_outliers(values)
    verdict = FAIL if serious else WARN
    if common is None:
        result = "; ".join(f"{node}: {show(value)}" for node, value in list(values.items())[:4])
        yield Row(check, odd, result, "equal", verdict, f"{remedy} (no value has a majority: compare by hand)")
        return
    for node in odd:
        limit = f"{show(common)}, as {len(values) - len(odd)} others"
        yield Row(check, (node,), show(values[node]), limit, verdict, remedy, (node,) if serious else ())
