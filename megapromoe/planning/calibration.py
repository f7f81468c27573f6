"""Replaces assumed rates by measured ones, and fits what only whole steps show.

1. Rates that a report of `megapromoe check` or a benchmark.json has are taken as they are.
2. Steps of runs determine three factors, by which times differ from the estimate: `device` (products, attention and
   memory), `host` (launches and DeepSpeed's hooks) and `links` (time of messages). They minimise, in logarithms,
   the squared errors of the steps in units of `STEP_ERROR`, plus the squared factors in units of what was known before:
   `ASSUMED` for an assumed rate and for the host, `MEASURED` for other measured rates. So a single run changes mainly
   the factor that dominates its steps, and a factor that the runs do not depend on stays 1.

Steps that are kept out of the fit show what it is worth: these are predictions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megapromoe.config.layout import Layout
from megapromoe.config.options import Config
from megapromoe.number_text import significant
from megapromoe.planning.machines import CPU, Assumptions, Machine
from megapromoe.planning.measurements import (
    Measured,
    MeasuredStep,
    MeasurementError,
    Message,
    Rates,
    gpu_of,
)
from megapromoe.planning.roofline import step_time

FACTORS = ("device", "host", "links")
STEP_ERROR = 0.05  # standard deviations of logarithms: of a measured step,
ASSUMED, MEASURED = 1.0, 0.2  # and of a factor, of an assumed and of a measured rate
DETERMINED = 0.5  # a fit determines a factor if this share of its uncertainty, or less, is left


@dataclass(frozen=True)
class Value:
    """One rate of a plan: `assumed` or of the data sheet, `used`, and its origin: "measured", "fitted" or "assumed"."""

    name: str
    assumed: float
    used: float
    unit: str
    origin: str
    source: str = ""

    @property
    def factor(self) -> float:
        return self.used / self.assumed


@dataclass(frozen=True)
class Compared:
    """A measured step beside its estimates: with assumed rates, and with calibrated ones.

    `fitted`: whether the calibration used it. Otherwise `calibrated` is a prediction.
    """

    step: MeasuredStep
    assumed: float
    calibrated: float
    fitted: bool

    @property
    def factor(self) -> float:
        """The measured time over the calibrated estimate."""
        return self.step.seconds / self.calibrated


@dataclass(frozen=True)
class Calibration:
    """A machine and assumptions with the measurements in them, and where each value comes from."""

    machine: Machine
    assume: Assumptions
    values: tuple[Value, ...]
    compared: tuple[Compared, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_measured(self) -> bool:
        """Whether it has any measurement."""
        return bool(self.compared) or any(value.origin != "assumed" for value in self.values)


def calibrate(
    measured: Measured, machine: Machine, assume: Assumptions, validated: Measured | None = None
) -> Calibration:
    """Calibrates the rates of a machine.

    Args:
        measured: the measurements.
        machine, assume: the values of the data sheet and the assumptions.
        validated: measurements whose steps are predicted and not fitted, and whose rates are not used.

    Raises MeasurementError if the measurements are of another device.
    """
    validated = validated or Measured()
    for device in (measured.device, validated.device):
        check_device(device, machine)
    direct_machine, direct = machine, assume
    sources: dict[str, str] = {}
    for rates in measured.rates:
        direct_machine, direct, names = _with_rates(rates, direct_machine, direct)
        sources |= dict.fromkeys(names, rates.source)
    if measured.imbalance is not None:
        direct = replace(direct, imbalance=measured.imbalance[0])
        sources["imbalance"] = measured.imbalance[1]
    factors, determined = _fit(measured.steps, direct_machine, direct, set(sources))
    fitted = scaled(direct, factors)
    notes = [*measured.notes]
    for name in FACTORS:
        if measured.steps and name not in determined:
            notes.append(
                f"the measured steps do not determine the factor of {name}, because it has little share in them"
            )
    compared = [
        Compared(step, predict(step, machine, assume), predict(step, direct_machine, fitted), is_fitted)
        for steps, is_fitted in ((measured.steps, True), (validated.steps, False))
        for step in steps
    ]
    values = tuple(_values(machine, assume, direct_machine, fitted, sources, determined))
    return Calibration(direct_machine, fitted, values, tuple(compared), tuple(notes))


def check_device(device: str | None, machine: Machine) -> None:
    """Raises MeasurementError if the measurements are of another device than that of the plan."""
    measured_on, planned = gpu_of(device), "cpu" if machine.cuda_name == CPU.cuda_name else gpu_of(machine.name)
    if measured_on is not None and measured_on != planned:
        raise MeasurementError(
            f"the measurements are of {device}, but the plan is for {machine.name}: rates of one device say nothing"
            f" about another; give --gpu {measured_on}, or other measurements"
        )


def predict(step: MeasuredStep, machine: Machine, assume: Assumptions) -> float:
    """The estimated seconds of a measured step."""
    if step.whole_step:
        return step_time(step.config, step.layout, machine, assume).total
    return step_time(step.config, step.layout, machine, replace(assume, hook=0.0, gather_hook=0.0)).compute


def scaled(assume: Assumptions, factors: dict[str, float]) -> Assumptions:
    """The assumptions with the times of the device, the host and the links multiplied by their factors."""
    device, host, links = (factors[name] for name in FACTORS)
    network = assume.network_links
    return replace(
        assume,
        products=assume.products / device,
        attention=assume.attention / device,
        memory=assume.memory / device,
        launch=assume.launch * host,
        hook=assume.hook * host,
        gather_hook=assume.gather_hook * host,
        links=assume.links / links,
        network_links=None if network is None else network / links,
        near=assume.near * links,
        far=assume.far * links,
        peer=assume.peer * links,
    )


# ---- rates that were measured directly


def _with_rates(rates: Rates, machine: Machine, assume: Assumptions) -> tuple[Machine, Assumptions, list[str]]:
    """Puts measured rates in place; also returns the names of the values that they replace.

    The fused attention kernel is not measured. Its share is assumed to change with that of products, and DeepSpeed's
    hooks with the launches of kernels.
    """
    names = []
    if rates.products is not None:
        share = rates.products / (machine.peak if rates.width == 2 else machine.peak_fp32)
        assume = replace(assume, products=share, attention=assume.attention * share / assume.products)
        names.append("products")
    if rates.elementwise is not None:
        assume = replace(assume, memory=rates.elementwise / machine.hbm)
        names.append("memory")
    if rates.launch is not None:
        ratio = rates.launch / assume.launch
        hooks = assume.hook * ratio, assume.gather_hook * ratio
        assume = replace(assume, launch=rates.launch, hook=hooks[0], gather_hook=hooks[1])
        names.append("launch")
    if rates.memory is not None:
        machine = replace(machine, memory=rates.memory)
    inside = [m for m in rates.messages if m.nodes == 1]
    across = [m for m in rates.messages if m.nodes > 1]
    if inside:
        assume = replace(
            assume,
            links=statistics.median(_rate(m) for m in inside) / machine.nvlink,
            near=statistics.median(m.small[1] for m in inside if m.op != "all_to_all" or len(inside) == 1),
        )
        # The latency of an all-to-all is `near` and `peer` for each other rank.
        peers = [(m.small[1] - assume.near) / (m.size - 1) for m in inside if m.op == "all_to_all"]
        if peers:
            assume = replace(assume, peer=max(0.0, statistics.median(peers)))
        names += ["links", "near", *["peer"] * bool(peers)]
    if across or rates.pairs is not None:
        speed = _between_nodes(across, machine.nvlink * assume.links, rates.pairs)
        assume = replace(assume, network_links=speed / machine.network)
        names.append("network_links")
    if across:
        steps = [(m.small[1] - assume.near) / math.log2(m.nodes) for m in across if m.op != "all_to_all"]
        if steps:
            assume = replace(assume, far=max(0.0, statistics.median(steps)))
            names.append("far")
    return machine, assume, names


def _rate(m: Message) -> float:
    """Bytes per second of the links of a message: of a group on several nodes, of those between them."""
    near = -(-m.size // m.nodes)
    if m.op == "all_to_all":
        share = (near - 1) / m.size if m.nodes == 1 else (m.size - near) / m.size
    else:
        share = (near - 1) / near if m.nodes == 1 else (m.nodes - 1) / m.nodes / near
    return _passes(m) * share * m.large[0] / _transfer(m)


def _passes(m: Message) -> int:
    return 2 if m.op == "all_reduce" else 1


def _transfer(m: Message) -> float:
    """Seconds of the large message without its latency, unless that is all of them."""
    seconds = m.large[1] - m.small[1]
    return seconds if seconds > 0 else m.large[1]


def _between_nodes(messages: Sequence[Message], inside: float, pairs: float | None) -> float:
    """Bytes per second between nodes, from the messages that are not limited by the links inside a node.

    The others are only a lower bound; they count if there is nothing else.

    Args:
        inside: bytes per second inside a node.
        pairs: of single pairs of ranks; None if not measured.
    """
    limited = []
    for m in messages:
        near = -(-m.size // m.nodes)
        share = (near - 1) / (m.size if m.op == "all_to_all" else near)
        if _passes(m) * share * m.large[0] / inside < 0.9 * _transfer(m):
            limited.append(_rate(m))
    if limited:
        return statistics.median(limited)
    return max(*(_rate(m) for m in messages), pairs or 0.0) if messages else pairs or 0.0


# ---- the fit of whole steps


def _fit(
    steps: Sequence[MeasuredStep], machine: Machine, assume: Assumptions, known: set[str]
) -> tuple[dict[str, float], set[str]]:
    """The factors of the times of device, host and links; and those that the steps determine."""
    if not steps:
        return dict.fromkeys(FACTORS, 1.0), set()
    import numpy as np

    # A check launches a kernel again and again; a step also runs the Python code of modules, autograd and hooks.
    measured_names = {"device": {"products", "memory"}, "links": {"links", "near"}}
    sure = [name in measured_names and measured_names[name] <= known for name in FACTORS]
    before = np.where(sure, MEASURED, ASSUMED)

    def errors(x: np.ndarray) -> np.ndarray:
        factors = dict(zip(FACTORS, np.exp(x).tolist(), strict=True))
        return np.array(
            [math.log(predict(s, machine, scaled(assume, factors)) / s.seconds) / STEP_ERROR for s in steps]
        )

    x, damping = np.zeros(len(FACTORS)), 0.0
    for _ in range(40):
        residuals, delta = errors(x), 1e-4
        slopes = np.stack([(errors(x + delta * axis) - residuals) / delta for axis in np.eye(len(FACTORS))], axis=1)
        curvature = slopes.T @ slopes + np.diag(before**-2.0)
        change = -np.linalg.solve(
            curvature + damping * np.diag(np.diag(curvature)), slopes.T @ residuals + x / before**2
        )
        if np.sum(errors(x + change) ** 2) + np.sum(((x + change) / before) ** 2) <= np.sum(residuals**2) + np.sum(
            (x / before) ** 2
        ):
            x, damping = x + change, damping / 4
            if np.max(np.abs(change)) < 1e-6:
                break
        else:
            damping = max(4 * damping, 1e-3)
    left = np.sqrt(np.diag(np.linalg.inv(curvature))) / before
    determined = {name for name, share in zip(FACTORS, left, strict=True) if share <= DETERMINED}
    return dict(zip(FACTORS, np.exp(x).tolist(), strict=True)), determined


# ---- words


def _values(
    machine: Machine,
    assume: Assumptions,
    used_machine: Machine,
    used: Assumptions,
    sources: dict[str, str],
    determined: set[str],
) -> Iterator[Value]:
    groups = {
        "products": "device",
        "attention": "device",
        "memory": "device",
        "launch": "host",
        "hook": "host",
        "links": "links",
        "network_links": "links",
        "near": "links",
        "far": "links",
        "peer": "links",
    }
    peak = machine.peak if machine.asynchronous else machine.peak_fp32
    rows = (
        ("products", "products of matrices", peak / 1e12, "TFLOP/s"),
        ("attention", "fused attention", peak / 1e12, "TFLOP/s"),
        ("memory", "elementwise kernels", machine.hbm / 1e9, "GB/s"),
        ("launch", "launch of a kernel", 1e6, "us"),
        ("hook", "gradient hook of a parameter", 1e6, "us"),
        ("links", "collectives inside a node", machine.nvlink / 1e9, "GB/s"),
        ("network_links", "collectives between nodes", machine.network / 1e9, "GB/s"),
        ("near", "latency inside a node", 1e6, "us"),
        ("far", "latency for each doubling of nodes", 1e6, "us"),
        ("peer", "latency of an all-to-all for each rank", 1e6, "us"),
        ("imbalance", "rows of the fullest rank over the mean", 1.0, ""),
    )
    for name, words, scale, unit in rows:
        before, after = (a.between_nodes if name == "network_links" else getattr(a, name) for a in (assume, used))
        origins = [f"measured ({sources[name]})"] if name in sources else []
        if groups.get(name) in determined:
            origins.append("fitted")
        elif not origins and after != before:
            origins.append("assumed, in proportion")
        yield Value(words, before * scale, after * scale, unit, ", ".join(origins) or "assumed", sources.get(name, ""))


def calibration_lines(calibration: Calibration) -> Iterator[str]:
    """The calibration as lines of a plan: values, and predicted beside measured steps."""
    yield "calibration"
    yield f"  {'rate':40} {'assumed':>10} {'used':>10} {'':7} {'factor':>7}  origin"
    for v in calibration.values:
        factor = significant(v.factor) if v.assumed else "-"
        yield f"  {v.name:40} {significant(v.assumed):>10} {significant(v.used):>10} {v.unit:7} {factor:>7}  {v.origin}"
    yield from comparison_lines(calibration.compared)
    yield from (f"  {note}" for note in calibration.notes)


def comparison_lines(compared: Sequence[Compared]) -> Iterator[str]:
    """Measured steps beside the estimates."""
    if not compared:
        return
    yield "steps, ms"
    yield f"  {'':9} {'assumed':>9} {'calibrated':>10} {'measured':>9} {'quartiles':>19} {'factor':>7}  of"
    for c in compared:
        s = c.step
        spread = f"{significant(1e3 * s.low)} to {significant(1e3 * s.high)}"
        yield (
            f"  {'fitted' if c.fitted else 'predicted':9} {significant(1e3 * c.assumed):>9}"
            f" {significant(1e3 * c.calibrated):>10} {significant(1e3 * s.seconds):>9} {spread:>19}"
            f" {c.factor:7.2f}  {s.source}, {describe_layout(s.config, s.layout)}"
            f"{'' if s.whole_step else ', forward and backward'}"
        )
    yield "  factor: measured over calibrated; predicted steps were not used by the calibration"


def describe_layout(config: Config, layout: Layout) -> str:
    """Ranks and layout in a few words."""
    words = [f"{layout.world} rank{'s' * (layout.world > 1)}"]
    words += [f"tp {layout.tp}"] * (layout.tp > 1) + [f"ep {layout.ep}"] * (layout.ep > 1)
    words += [f"states over {layout.shard_ranks} ranks"] * (layout.shard_ranks > 0)
    return ", ".join(
        [*words, config.train.deepspeed, f"micro-batch {layout.micro_batch} x {config.train.accumulation}"]
    )
