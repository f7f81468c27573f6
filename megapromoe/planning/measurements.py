"""Reads what was measured on a cluster: reports of `megapromoe check`, benchmark.json, and the steps of runs.

* A report of `megapromoe check`: rates of products, elementwise kernels and launches on every device; bandwidth and
  latency of collectives inside and between nodes.
* benchmark.json: the rate of products; forward and backward of our model in one process, if it measured steps.
* A run directory: the time of a step, with all that it contains; with `parallel.ep` above 1 also the imbalance.

`calibration.py` turns them into a machine and assumptions. Rates are per device and second.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megapromoe.config.layout import Layout
from megapromoe.config.options import Config, ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.errors import ExitCode, UserError
from megapromoe.planning.machines import MACHINES
from megapromoe.planning.zero import zero_of
from megapromoe.run_lines import lines_of

FEWEST = 4  # log lines after the first, which has the warm-up, whose median is the time of a step
KINDS = "a report of `megapromoe check --report`, a benchmark.json, or a run directory"


class MeasurementError(UserError):
    """A file that has no measurements, or those of another machine. The message is one sentence."""

    exit_code = ExitCode.MISCONFIGURED


@dataclass(frozen=True)
class Message:
    """The time of a small and of a large message of one collective, on the slowest rank.

    `size` ranks in a group, on `nodes` nodes; bytes as `planning.traffic.Collective.payload`.
    """

    op: str
    size: int
    nodes: int
    small: tuple[float, float]
    large: tuple[float, float]


@dataclass(frozen=True)
class Rates:
    """Rates of a device and of its links; None or empty where they were not measured.

    Attributes:
        source: the file.
        device: "cpu", or the name that CUDA reports.
        width: bytes of an element of the products: 2 for bf16, 4 for fp32.
        products: FLOP/s of large products, on the slowest device.
        elementwise: bytes per second that an elementwise kernel reads and writes.
        launch: seconds of the host for a kernel.
        memory: bytes for each device.
        messages: times of collectives.
        pairs: bytes per second that a rank sends to a rank of another node while all ranks of both nodes send.
    """

    source: str
    device: str
    width: int
    products: float | None = None
    elementwise: float | None = None
    launch: float | None = None
    memory: int | None = None
    messages: tuple[Message, ...] = ()
    pairs: float | None = None


@dataclass(frozen=True)
class MeasuredStep:
    """The median time of an optimizer step, or of its forward and backward pass in one process without the engine.

    Attributes:
        source: the file or folder.
        seconds, low, high: median and quartiles.
        count: number of values.
        whole_step: false for forward and backward alone.
    """

    source: str
    config: Config
    layout: Layout
    seconds: float
    low: float
    high: float
    count: int
    whole_step: bool = True


@dataclass(frozen=True)
class Measured:
    """All measurements. `imbalance`: (rows of the fullest rank over the mean, the run); `device`: as in `Rates`."""

    rates: tuple[Rates, ...] = ()
    steps: tuple[MeasuredStep, ...] = ()
    imbalance: tuple[float, str] | None = None
    device: str | None = None
    notes: tuple[str, ...] = ()


def gpu_of(device: str | None) -> str | None:
    """The name of the device in `MACHINES`, or "cpu"; None if it is not known."""
    if device is None or device == "cpu":
        return device
    return next((name for name, machine in MACHINES.items() if re.search(machine.cuda_name, device)), None)


def read_measurements(paths: Sequence[Path]) -> Measured:
    """Reads all files and folders. Raises MeasurementError for one that is none of `KINDS`, or of several devices."""
    parts = [_read(path) for path in paths]
    devices = {part.device: str(path) for part, path in zip(parts, paths, strict=True) if part.device is not None}
    if len({gpu_of(device) or device for device in devices}) > 1:
        listed = ", ".join(f"{source} ({device})" for device, source in devices.items())
        raise MeasurementError(f"{listed}: were measured on different devices; give measurements of one kind of device")
    return Measured(
        rates=tuple(rates for part in parts for rates in part.rates),
        steps=tuple(step for part in parts for step in part.steps),
        imbalance=max((part.imbalance for part in parts if part.imbalance), default=None),
        device=next(iter(devices), None),
        notes=tuple(note for part in parts for note in part.notes),
    )


def _read(path: Path) -> Measured:
    if path.is_dir():
        return _read_run(path)
    if not path.is_file():
        raise MeasurementError(f"{path}: does not exist or is no regular file; give {KINDS}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MeasurementError(f"{path}: is not JSON ({type(error).__name__}); give {KINDS}") from error
    file = _File(path)
    if isinstance(content, dict) and {"found", "world", "nodes", "exit_code"} <= content.keys():
        return _read_check(file, content)
    if isinstance(content, dict) and {"machine", "settings", "scenes"} <= content.keys():
        return _read_benchmark(file, content)
    raise MeasurementError(f"{path}: has none of the contents of {KINDS}")


class _File:
    """Strict access to the values of a JSON file; a wrong one raises MeasurementError with its place."""

    def __init__(self, path: Path):
        self.path = path

    def error(self, place: str, rule: str, value: Any) -> MeasurementError:
        shown = repr(value)
        return MeasurementError(
            f"{self.path}: {place} = {shown if len(shown) < 60 else shown[:57] + '...'}: must be {rule}, as in {KINDS}"
        )

    def mapping(self, place: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.error(place, "a mapping", value)
        return value

    def number(self, place: str, value: Any) -> float:
        """A finite number above 0."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(place, "a number above 0", value)
        return float(value)

    def optional(self, place: str, value: Any) -> float | None:
        """A number above 0; None for 0 or nothing, which stand for not measured."""
        return None if value is None or value == 0 else self.number(place, value)

    def count(self, place: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
            raise self.error(place, "a whole number above 0", value)
        return value

    def text(self, place: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.error(place, "a text", value)
        return value


# ---- reports of `megapromoe check`


def _read_check(file: _File, content: Mapping[str, Any]) -> Measured:
    if content["exit_code"] != 0:
        raise MeasurementError(
            f"{file.path}: this check failed with exit code {content['exit_code']!r}, so its rates may be those of"
            " faulty nodes; measure again when it passes"
        )
    findings = file.mapping("found", content["found"])
    node_of: dict[str, str] = {}
    for node, ranks in file.mapping("nodes", content["nodes"]).items():
        if not isinstance(ranks, list):
            raise file.error(f"nodes.{node}", "a list of ranks", ranks)
        node_of |= {str(rank): node for rank in ranks}
    machines = {
        rank: file.mapping(f"found.machine.{rank}", value)
        for rank, value in file.mapping("found.machine", findings.get("machine")).items()
    }
    if not machines or set(machines) - set(node_of):
        raise file.error("found.machine", "the findings of all ranks in `nodes`", sorted(machines))
    devices = set()
    columns: dict[str, list[float]] = {"teraflops": [], "elementwise": [], "launch": [], "memory": []}
    for rank, machine in machines.items():
        place = f"found.machine.{rank}"
        kind = file.text(f"{place}.device", machine.get("device"))
        devices.add("cpu" if kind == "cpu" else file.text(f"{place}.name", machine.get("name")))
        for name, values in columns.items():
            value = file.optional(f"{place}.{name}", machine.get(name))
            if name == "memory" and kind == "cpu":
                host = file.optional(f"{place}.host_memory", machine.get("host_memory"))
                value = host and host / list(node_of.values()).count(node_of[rank])
            if value is not None:
                values.append(value)
    if len(devices) > 1:
        raise MeasurementError(f"{file.path}: has devices of several kinds ({', '.join(sorted(devices))})")
    (device,) = devices
    products = min(columns["teraflops"], default=None)
    networks = file.mapping("found.network", findings.get("network", {}))
    messages, pairs = _messages(file, networks, node_of)
    rates = Rates(
        source=str(file.path),
        device=device,
        width=4 if device == "cpu" else 2,
        products=products and products * 1e12,
        elementwise=min(columns["elementwise"], default=None),
        launch=max(columns["launch"], default=None),
        memory=int(min(columns["memory"])) if device == "cpu" and columns["memory"] else None,
        messages=messages,
        pairs=pairs,
    )
    return Measured(rates=(rates,), device=device)


def _messages(
    file: _File, networks: Mapping[str, Any], node_of: Mapping[str, str]
) -> tuple[tuple[Message, ...], float | None]:
    """The times of collectives, of the slowest rank of each kind of group; bytes per second between nodes."""
    slowest: dict[tuple[str, str], Message] = {}
    pairs: list[float] = []
    for rank, value in networks.items():
        place = f"found.network.{rank}"
        network = file.mapping(place, value)
        for other, speed in file.mapping(f"{place}.pairs", network.get("pairs", {})).items():
            pairs.append(1e9 * file.number(f"{place}.pairs.{other}", speed))
        groups = file.mapping(f"{place}.groups", network.get("groups", {}))
        for direction, operations in file.mapping(f"{place}.collectives", network.get("collectives", {})).items():
            group = file.mapping(f"{place}.groups.{direction}", groups.get(direction))
            ranks = group.get("ranks")
            if not isinstance(ranks, list) or len(ranks) < 2 or not {str(r) for r in ranks} <= set(node_of):
                raise file.error(f"{place}.groups.{direction}.ranks", "at least two ranks of `nodes`", ranks)
            nodes = len({node_of[str(r)] for r in ranks})
            for op, values in file.mapping(f"{place}.collectives.{direction}", operations).items():
                where = f"{place}.collectives.{direction}.{op}"
                if not isinstance(values, list) or len(values) != 4:
                    raise file.error(where, "bytes and seconds of two messages", values)
                a, b, c, d = (file.number(where, v) for v in values)
                message = Message(op, len(ranks), nodes, (a, b), (c, d))
                known = slowest.get((direction, op))
                if known is None or message.large[1] > known.large[1]:
                    slowest[direction, op] = message
    return tuple(slowest.values()), statistics.median(pairs) if pairs else None


# ---- benchmark.json


def _read_benchmark(file: _File, content: Mapping[str, Any]) -> Measured:
    machine = file.mapping("machine", content["machine"])
    settings = file.mapping("settings", content["settings"])
    kind = file.text("machine.kind", machine.get("kind"))
    device = "cpu" if kind == "cpu" else file.text("machine.device", machine.get("device"))
    dtype = file.text("machine.dtype", machine.get("dtype"))
    if dtype not in ("bfloat16", "float32"):
        raise file.error("machine.dtype", "bfloat16 or float32", dtype)
    peak = file.mapping("machine.peak", machine.get("peak"))
    products = file.number("machine.peak.flop_per_second", peak.get("flop_per_second"))
    rates = Rates(str(file.path), device, 2 if dtype == "bfloat16" else 4, products)
    steps, notes = [], []
    for name, value in file.mapping("scenes", content["scenes"]).items():
        scene = file.mapping(f"scenes.{name}", value)
        if scene.get("experiment") != "step":
            continue
        if settings.get("compile"):
            notes = [f"{file.path}: its steps are compiled, which a plan does not estimate; they are not used"]
            continue
        ours = file.mapping(f"scenes.{name}.contenders", scene.get("contenders")).get("ours")
        if isinstance(ours, dict) and "cannot" not in ours:
            steps.append(_benchmark_step(file, f"scenes.{name}", scene, ours, dtype))
    return Measured(rates=(rates,), steps=tuple(steps), device=device, notes=tuple(notes))


def _benchmark_step(file: _File, place: str, scene: Mapping, ours: Mapping, dtype: str) -> MeasuredStep:
    """Forward and backward of our model in one process: no engine, no ZeRO."""
    seconds = file.mapping(f"{place}.contenders.ours.seconds", ours.get("seconds"))
    phases = [file.mapping(f"{place}: {phase}", seconds.get(phase)) for phase in ("forward", "backward")]
    median, low, high = (
        sum(file.number(f"{place}: {key}", phase.get(key)) for phase in phases) for key in ("median", "low", "high")
    )
    size, experts = file.text(f"{place}.size", scene.get("size")), file.count(f"{place}.experts", scene.get("experts"))
    images = file.count(f"{place}.images", scene.get("images"))
    rounds = file.mapping(f"{place}.contenders.ours.rounds", ours.get("rounds")).get("forward")
    words = [f"model.num_experts={experts}", f"train.global_batch={images}"]
    words.append(f"train.deepspeed={'bf16' if dtype == 'bfloat16' else 'fp32'}_zero1")
    try:
        config = resolve("digits" if size == "digits" else f"promoe_{size}", overrides=words, world=1)
    except ConfigError as error:
        raise file.error(f"{place}.size and experts", "those of a benchmark", (size, experts)) from error
    source = f"{file.path} ({size} E{experts} B{images})"
    count = len(rounds) if isinstance(rounds, list) else 1
    return MeasuredStep(source, config, config.layout(1), median, low, high, count, whole_step=False)


# ---- runs


def _read_run(folder: Path) -> Measured:
    """The steps of the newest start of a run, without its first log line, which has the warm-up."""
    file = _File(folder / "environment.json")
    if not (folder / "config.yaml").is_file() or not file.path.is_file():
        raise MeasurementError(f"{folder}: has no config.yaml and environment.json; give {KINDS}")
    try:
        starts = json.loads(file.path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MeasurementError(f"{file.path}: is not JSON; give a folder that `megapromoe train` made") from error
    if not isinstance(starts, list) or not starts:
        raise file.error("the file", "a list of starts", starts)
    start = file.mapping("the last start", starts[-1])
    world = file.count("layout.world", file.mapping("layout", start.get("layout")).get("world"))
    try:
        config = resolve(file=folder / "config.yaml", world=world, file_is_saved=True)
        layout = config.layout(world)
    except ConfigError as error:
        reason = " ".join(str(error).split())
        raise MeasurementError(f"{folder / 'config.yaml'}: is not the configuration of a run: {reason}") from error
    try:
        began = datetime.fromisoformat(file.text("started", start.get("started"))).timestamp()
    except ValueError as error:
        raise file.error("started", "a date with a time", start.get("started")) from error
    path = folder / "metrics.jsonl"
    lines = [line for line in lines_of(path) if _is_number(line.get("wall_time")) and line["wall_time"] >= began]
    lines = [line for line in lines if _is_number(line.get("images_per_second"))][1:]
    if len(lines) < FEWEST:
        raise MeasurementError(
            f"{path}: has {len(lines)} log lines after the first of the newest start; at least {FEWEST} are needed:"
            " train longer, or set a smaller train.log_every"
        )
    seconds = [config.train.global_batch / line["images_per_second"] for line in lines]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    step = MeasuredStep(str(folder), config, layout, median, low, high, len(seconds))
    value = _imbalance(config, layout, lines)
    return Measured(
        steps=(step,), imbalance=None if value is None else (value, str(folder)), device=_device(lines, world, config)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _device(lines: Sequence[Mapping[str, Any]], world: int, config: Config) -> str | None:
    """The GPU of a run, by the peak that its logged utilisation refers to; "cpu" if it logged none in fp32."""
    line = lines[-1]
    if not (_is_number(line.get("mfu")) and _is_number(line.get("flops_per_second"))):
        return "cpu" if zero_of(config).width == 4 else None  # a GPU that is not in the table logs none either
    peak = line["flops_per_second"] / (world * line["mfu"])
    close = [machine for machine in MACHINES.values() if abs(machine.peak / peak - 1) < 0.001]
    # GPUs with the same peak (A100, A800; H100, H200) cannot be told apart.
    return close[0].name if len(close) == 1 else None


def _imbalance(config: Config, layout: Layout, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Rows of the fullest rank over the mean, the mean over layers and log lines; None unless ep divides the experts.

    Every MoE layer waits for its own fullest rank. Each rank has E/ep neighbouring experts.
    """
    experts, ep = config.model.num_experts, layout.ep
    if ep == 1 or experts % ep or not config.model.moe_blocks:
        return None
    values = []
    for line in lines:
        load = line.get("expert_load")
        for row in load if isinstance(load, list) else ():
            if not (isinstance(row, list) and len(row) == experts and all(isinstance(n, int | float) for n in row)):
                continue
            per_rank = [sum(row[i : i + experts // ep]) for i in range(0, experts, experts // ep)]
            if sum(per_rank) > 0:
                values.append(max(per_rank) * ep / sum(per_rank))
    return statistics.mean(values) if values else None
