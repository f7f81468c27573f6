"""What the checks found, as plain data, and how a finding becomes a verdict on a node.

Ranks measure and say nothing about good or bad; one place, with all findings before it, judges. A rule is a function
`Cluster, Limits -> Iterator[Row]`, so that it can be shown clusters that nobody has.
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
    """A preflight that could not be carried out, or whose result could not be written; told alike on all ranks."""

    on_all_ranks = True


@dataclass(frozen=True)
class Limits:
    """What is asked of a cluster.

    Attributes:
        pair_gbps: GB/s each way between any two nodes; None: half of what is usual among them.
        free_bytes: to be free in the run directory.
        skew: seconds between two clocks that are worth a warning.
        host_bytes: that the ranks of the fullest node need in host memory.
        device_share, pair_share: of the usual speed, below which a device or a connection is slow.
        seen_after: seconds after which a written file should be seen on every node.
    """

    pair_gbps: float | None = None
    free_bytes: int = 0
    skew: float = 1.0
    host_bytes: int = 0
    device_share: float = 0.8
    pair_share: float = 0.5
    seen_after: float = 5.0


@dataclass
class Cluster:
    """All that was found, for the rules.

    Attributes:
        world: ranks that there should be.
        node_of: rank -> node, of those that came.
        expected: node -> ranks, as far as the launcher says.
        found: stage -> rank -> what that rank found.
        hang: what ended the check early, if anything did.
        skipped: why the network was left alone, if it was.
    """

    world: int
    node_of: dict[int, str]
    expected: dict[str, int] = field(default_factory=dict)
    found: dict[str, dict[int, Any]] = field(default_factory=dict)
    hang: Hang | None = None
    skipped: str = ""

    @property
    def nodes(self) -> list[str]:
        """Names of all nodes that came, in the order of their first ranks."""
        return list(dict.fromkeys(self.node_of[rank] for rank in sorted(self.node_of)))

    def ranks_on(self, node: str) -> list[int]:
        return [rank for rank in sorted(self.node_of) if self.node_of[rank] == node]

    def leaders(self) -> dict[str, int]:
        """The first rank of each node."""
        return {node: self.ranks_on(node)[0] for node in self.nodes}

    def nodes_of(self, ranks: Iterable[int]) -> tuple[str, ...]:
        """The nodes of some ranks, as far as known, each once."""
        return tuple(dict.fromkeys(self.node_of[r] for r in sorted(ranks) if r in self.node_of))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        blame: the nodes that a launcher should leave out for it.
        setup: the configuration or the installation is to blame: it fails in the same way on any nodes.
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
    rows: tuple[Row, ...]
    bad_nodes: tuple[str, ...]
    exit_code: int
    sentence: str


Rule = Callable[[Cluster, Limits], Iterator[Row]]


def judge(cluster: Cluster, limits: Limits, rules: Iterable[Rule]) -> Verdict:
    """Applies the rules.

    Exit codes: 0 without a failure; 2 if the setup fails on any nodes, so that neither repeating nor leaving nodes out
    can help; else 3 if some node is to blame, 1 if a failure is nobody's.
    """
    rows = tuple(row for rule in rules for row in rule(cluster, limits))
    why: dict[str, list[str]] = {}
    for row in rows:
        for node in row.blame:
            why.setdefault(node, []).append(row.check)
    failed = list(dict.fromkeys(row.check for row in rows if row.verdict == FAIL))
    warned = list(dict.fromkeys(row.check for row in rows if row.verdict == WARN))
    warnings = f"; warnings: {', '.join(warned)}" if warned else ""
    where = f"{_count(len({*cluster.nodes, *cluster.expected}), 'node')}, {_count(cluster.world, 'rank')}"
    setup = list(dict.fromkeys(row.check for row in rows if row.verdict == FAIL and row.setup))
    listed = ", ".join(f"{node} ({', '.join(dict.fromkeys(checks))})" for node, checks in sorted(why.items()))
    if setup:
        sentence = f"FAILED ({where}) on any nodes, by its configuration or installation: {', '.join(setup)}"
        others = f"; bad nodes: {listed}" if why else ""
        return Verdict(rows, tuple(sorted(why)), ExitCode.MISCONFIGURED, f"{sentence}{others}{warnings}")
    if why:
        sentence = f"FAILED: {_count(len(why), 'bad node')} ({where}): {listed}{warnings}"
        return Verdict(rows, tuple(sorted(why)), ExitCode.BAD_NODES, sentence)
    if failed:
        return Verdict(rows, (), 1, f"FAILED ({where}), and no single node is to blame: {', '.join(failed)}{warnings}")
    return Verdict(rows, (), 0, f"passed ({where}){warnings}")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


# ---- who is it?


def shared_by_all(cluster: Cluster, rows: Iterable[Row]) -> Iterator[Row]:
    """Rows of one fault, each of one node. If every node of several has it, none is to blame, but what they share."""
    found = list(rows)
    everywhere = len(cluster.nodes) > 1 and {node for row in found for node in row.nodes} >= set(cluster.nodes)
    for row in found:
        yield replace(row, blame=(), setup=True) if everywhere else row


def culprits(pairs: Iterable[tuple[str, str]], nodes: Iterable[str]) -> tuple[str, ...]:
    """The fewest nodes that explain all bad pairs: again and again those with the most.

    A pair that nothing else tells apart names both. If that would name every node, it tells nothing: ().
    """
    left = {frozenset(pair) for pair in pairs}
    named: set[str] = set()
    while left:
        bad = Counter(node for pair in left for node in pair)
        worst = {node for node, count in bad.items() if count == max(bad.values())}
        named |= worst
        left = {pair for pair in left if not pair & worst}
    return () if named >= set(nodes) else tuple(sorted(named))


def odd_ones(values: Mapping[str, Hashable]) -> tuple[Hashable | None, tuple[str, ...]]:
    """What more than half of the nodes have, and the nodes with something else; (None, all) if there is no such."""
    (common, times), *_ = Counter(values.values()).most_common(1)
    if 2 * times <= len(values):
        return None, tuple(values)
    return common, tuple(node for node, value in values.items() if value != common)


def usual(figures: Iterable[float]) -> float:
    """The upper median: of two, the better one."""
    return statistics.median_high(figures)


def disagreements(
    check: str, values: Mapping[str, Hashable], show: Callable[[Any], str], remedy: str, serious: bool = True
) -> Iterator[Row]:
    """Rows for a value that should be the same on all nodes: one for each node that differs, or one of a tie."""
    if not values:
        return
    common, odd = odd_ones(values)
    verdict = FAIL if serious else WARN
    if common is None:
        told = "; ".join(f"{node}: {show(value)}" for node, value in list(values.items())[:4])
        yield Row(check, odd, told, "equal", verdict, f"{remedy} (no value has a majority: compare by hand)")
        return
    for node in odd:
        limit = f"{show(common)}, as {len(values) - len(odd)} others"
        yield Row(check, (node,), show(values[node]), limit, verdict, remedy, (node,) if serious else ())
