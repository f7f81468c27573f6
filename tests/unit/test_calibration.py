"""`plan --measured`: what is read from files, what is fitted, and what a calibration predicts."""

import importlib
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from support.levels import full
from support.made_up_clusters import cluster_of
from support.measured_files import SOURCES, benchmark, recorded_run, write_run

from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.planning.calibration import calibrate, predict, scaled
from megapromoe.planning.machines import CPU, CPU_ASSUMPTIONS, MACHINES, Assumptions
from megapromoe.planning.measurements import (
    Measured,
    MeasuredStep,
    MeasurementError,
    read_measurements,
)
from megapromoe.planning.roofline import collective_time
from megapromoe.planning.traffic import Collective
from megapromoe.preflight.job import RULES
from megapromoe.preflight.report import as_json
from megapromoe.preflight.verdict import Limits, evaluate

ROOT = Path(__file__).parents[2]
TRUTH = {"device": 1.7, "host": 0.4, "links": 3.0}


def made_up_step(world: int, *overrides: str, factors=TRUTH, machine=CPU, assume=CPU_ASSUMPTIONS, preset="digits"):
    """A step that takes as long as a machine with these factors takes."""
    config = resolve(preset, overrides=overrides, world=world)
    step = MeasuredStep(" ".join(overrides), config, config.layout(world), 1.0, 1.0, 1.0, 9)
    seconds = predict(step, replace(machine, gpus_per_node=2), scaled(assume, factors))
    return replace(step, seconds=seconds, low=seconds, high=seconds)


def fit(*steps: MeasuredStep, validated: tuple[MeasuredStep, ...] = (), machine=CPU, assume=CPU_ASSUMPTIONS):
    return calibrate(
        Measured(steps=steps),
        replace(machine, gpus_per_node=2),
        assume,
        Measured(steps=validated) if validated else None,
    )


# ---- the fit


def test_one_rank_predicts_two_where_messages_have_little_share():
    """Device and host are fitted from one process, and the time of two processes is a prediction."""
    factors = TRUTH | {"links": 1.0}
    fitted = [made_up_step(1, f"train.global_batch={n}", factors=factors) for n in (16, 128)]
    new = made_up_step(2, "train.global_batch=64", factors=factors)
    calibration = fit(*fitted, validated=(new,))
    assert [c.fitted for c in calibration.compared] == [True, True, False]
    prediction = calibration.compared[-1]
    assert abs(prediction.calibrated / new.seconds - 1) < 0.02 < abs(prediction.assumed / new.seconds - 1)
    assert any("do not determine the factor of links" in note for note in calibration.notes)
    origins = {value.name: value.origin for value in calibration.values}
    assert origins["products of matrices"] == "fitted" and origins["collectives inside a node"] == "assumed"


def test_a_layout_predicts_another_one():
    """From replicated experts on one and two ranks to expert parallelism and to another ZeRO stage."""
    fitted = [made_up_step(1, f"train.global_batch={n}") for n in (16, 128)]
    fitted.append(made_up_step(2, "train.global_batch=16", "train.gradient_reduction=all_reduce"))  # many bytes
    new = (
        made_up_step(2, "train.global_batch=64", "parallel.ep=2"),
        made_up_step(2, "train.global_batch=32", "train.deepspeed=fp32_zero2"),
    )
    calibration = fit(*fitted, validated=new)
    assert not [note for note in calibration.notes if "determine" in note]
    for compared in calibration.compared:
        assert abs(compared.factor - 1) < 0.04, compared
    ratio = calibration.assume.links / CPU_ASSUMPTIONS.links
    assert ratio == pytest.approx(1 / TRUTH["links"], rel=0.2)


def test_a_single_run_changes_what_dominates_it():
    """Large micro-batches are limited by the device; the factors of host and links stay."""
    large = made_up_step(1, "train.global_batch=2048", factors={"device": 2.0, "host": 1.0, "links": 1.0})
    calibration = fit(large)
    assert calibration.assume.products == pytest.approx(CPU_ASSUMPTIONS.products / 2, rel=0.05)
    assert calibration.assume.launch == pytest.approx(CPU_ASSUMPTIONS.launch, rel=0.1)
    assert calibration.assume.links == CPU_ASSUMPTIONS.links
    assert calibration.compared[0].factor == pytest.approx(1, abs=0.01)


def test_a_gpu_is_calibrated_as_a_cpu_is():
    """On a GPU the larger of device and host counts; runs of 8 and 32 GPUs predict 64 over nodes."""
    h100, assume = MACHINES["h100"], Assumptions()

    def step(world, *overrides):
        config = resolve("promoe_xl", overrides=overrides, world=world)
        made = MeasuredStep("x", config, config.layout(world), 1.0, 1.0, 1.0, 9)
        return replace(made, seconds=predict(made, h100, scaled(assume, TRUTH)))

    calibration = calibrate(
        Measured(steps=(step(8), step(32), step(32, "parallel.ep=4"))), h100, assume, Measured(steps=(step(64),))
    )
    assert abs(calibration.compared[-1].factor - 1) < 0.1 < abs(calibration.compared[-1].assumed / step(64).seconds - 1)


def test_without_measurements_nothing_changes():
    calibration = calibrate(Measured(), MACHINES["h100"], Assumptions())
    assert (calibration.machine, calibration.assume) == (MACHINES["h100"], Assumptions())
    assert not calibration.is_measured


# ---- reports of `megapromoe check`


def report_of(nodes: int, ranks: int, bandwidths: dict[str, float], latencies: dict[str, float]) -> dict:
    """A report of a check of a cluster with the given bandwidths and latencies of messages."""
    cluster = cluster_of(nodes, ranks)
    config = resolve("promoe_xl", world=nodes * ranks)
    layout = config.layout(nodes * ranks)
    machine = replace(MACHINES["h100"], gpus_per_node=ranks, nvlink=bandwidths["inside"], network=bandwidths["between"])
    assume = Assumptions(links=1.0, imbalance=1.0, **latencies)

    def seconds(op: str, over: str, size: int, payload: float) -> float:
        return collective_time(Collective("x", op, over, size, 1, payload, "forward"), config, layout, machine, assume)

    for rank, network in cluster.findings["network"].items():
        node = cluster.ranks_on(cluster.node_of[rank])
        groups = dict(network.groups)
        groups["dp"] = replace(groups["world"])
        times = {
            direction: {
                op: [4096.0, seconds(op, direction, size, 1.0), 64e6, seconds(op, direction, size, 64e6)]
                for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
            }
            for direction, size in (("world", nodes * ranks), ("ep", len(node)))
        }
        cluster.findings["network"][rank] = replace(network, groups=groups, collectives=times)
    for rank, examined in cluster.findings["machine"].items():
        examined = replace(examined, name="NVIDIA H100 80GB HBM3", elementwise=2.5e12, launch=4e-6, teraflops=700.0)
        cluster.findings["machine"][rank] = examined
    slow = cluster.findings["machine"][nodes * ranks - 1]
    cluster.findings["machine"][nodes * ranks - 1] = replace(slow, teraflops=650.0)
    limits = Limits()
    return json.loads(json.dumps(as_json(cluster, limits, evaluate(cluster, limits, RULES))))


def test_a_check_gives_the_rates_of_devices_and_links(tmp_path):
    latencies = {"near": 20e-6, "far": 12e-6, "peer": 3e-6}
    report = report_of(4, 8, {"inside": 310e9, "between": 41e9}, latencies)
    (tmp_path / "check.json").write_text(json.dumps(report))
    measured = read_measurements([tmp_path / "check.json"])
    assert measured.device == "NVIDIA H100 80GB HBM3" and not measured.steps
    h100 = MACHINES["h100"]
    used = calibrate(measured, h100, Assumptions()).assume
    assert used.products * h100.peak == pytest.approx(650e12)  # the slowest device
    assert used.memory * h100.hbm == pytest.approx(2.5e12)
    assert used.launch == pytest.approx(4e-6) and used.hook == pytest.approx(Assumptions().hook * 4 / 5)
    assert used.links * h100.nvlink == pytest.approx(310e9, rel=0.02)
    assert used.between_nodes * h100.network == pytest.approx(41e9, rel=0.02)
    assert used.near == pytest.approx(20e-6, rel=0.01)
    assert used.far == pytest.approx(12e-6, rel=0.05) and used.peer == pytest.approx(3e-6, rel=0.05)
    assert used.imbalance == Assumptions().imbalance


def test_a_check_on_one_node_leaves_the_network_assumed(tmp_path):
    report = report_of(1, 8, {"inside": 310e9, "between": 41e9}, {"near": 20e-6, "far": 12e-6, "peer": 3e-6})
    (tmp_path / "check.json").write_text(json.dumps(report))
    calibration = calibrate(read_measurements([tmp_path / "check.json"]), MACHINES["h100"], Assumptions())
    origins = {value.name: value.origin.split(" ")[0] for value in calibration.values}
    assert origins["collectives inside a node"] == "measured"
    assert origins["collectives between nodes"] in ("assumed", "assumed,")
    assert origins["rows of the fullest rank over the mean"] == "assumed"


def test_measurements_of_another_gpu_are_refused(tmp_path, capsys):
    report = report_of(1, 8, {"inside": 310e9, "between": 41e9}, {"near": 20e-6, "far": 12e-6, "peer": 3e-6})
    (tmp_path / "check.json").write_text(json.dumps(report))
    words = ["plan", "--preset", "promoe_s", "--measured", str(tmp_path / "check.json")]
    assert main([*words, "--gpu", "a100"]) == 2
    assert "give --gpu h100" in capsys.readouterr().err
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["name"] == "H100 80GB SXM"


def test_a_failed_check_is_refused(tmp_path):
    report = report_of(1, 8, {"inside": 310e9, "between": 41e9}, {"near": 20e-6, "far": 12e-6, "peer": 3e-6})
    (tmp_path / "check.json").write_text(json.dumps(report | {"exit_code": 3}))
    with pytest.raises(MeasurementError, match="failed with exit code 3"):
        read_measurements([tmp_path / "check.json"])


# ---- benchmark.json


def test_a_benchmark_gives_products_and_steps_of_one_process(tmp_path):
    (tmp_path / "benchmark.json").write_text(json.dumps(benchmark()))
    measured = read_measurements([tmp_path / "benchmark.json"])
    (step,) = measured.steps
    assert measured.device == "cpu" and measured.rates[0].products == 109e9 and not step.whole_step
    assert step.seconds == pytest.approx(0.050 + 0.100) and step.config.model.num_experts == 8
    assert step.layout.world == 1 and step.layout.micro_batch == 64
    # No hooks of DeepSpeed and no update.
    assert predict(step, CPU, CPU_ASSUMPTIONS) == predict(step, CPU, replace(CPU_ASSUMPTIONS, hook=1.0))
    compiled = benchmark()
    compiled["settings"]["compile"] = True
    (tmp_path / "benchmark.json").write_text(json.dumps(compiled))
    measured = read_measurements([tmp_path / "benchmark.json"])
    assert measured.steps == () and "compiled" in measured.notes[0]


# ---- runs


def test_the_steps_of_a_run_are_those_of_its_newest_start_without_the_first_line(tmp_path):
    speeds = [10.0, 640.0, 320.0, 160.0, 320.0, 320.0]
    run = write_run(tmp_path / "run", speeds, world=2, before=[1.0, 2.0, 3.0], overrides=("train.global_batch=64",))
    (step,) = read_measurements([run]).steps
    assert step.seconds == pytest.approx(64 / 320) and step.count == 5 and step.layout.world == 2
    assert step.low <= step.seconds <= step.high


def test_the_imbalance_is_that_of_the_ranks_of_the_run(tmp_path):
    load = [[40.0, 40.0, 10.0, 10.0], [25.0, 25.0, 25.0, 25.0]]
    words = ("train.global_batch=64", "parallel.ep=2")
    run = write_run(tmp_path / "run", [1.0] * 6, world=2, overrides=words, load=load)
    measured = read_measurements([run])
    assert measured.imbalance[0] == pytest.approx((1.6 + 1.0) / 2)
    assert calibrate(measured, CPU, CPU_ASSUMPTIONS).assume.imbalance == pytest.approx(1.3)
    alone = write_run(tmp_path / "alone", [1.0] * 6, world=1, overrides=words[:1], load=load)
    assert read_measurements([alone]).imbalance is None


def test_the_gpu_of_a_run_follows_from_its_utilisation(tmp_path):
    speed, flops, world = 100.0, 5e14, 8
    for peak, device in ((2250e12, "b200"), (2500e12, "gb200"), (312e12, None)):
        more = {"flops_per_second": flops, "mfu": flops / (world * peak)}
        words = ("train.deepspeed=bf16_zero1", "train.global_batch=64")
        run = write_run(tmp_path / str(peak), [speed] * 6, world=world, overrides=words, more=more)
        measured = read_measurements([run])
        assert (measured.device is None) == (device is None)
        if device:
            with pytest.raises(MeasurementError, match=f"give --gpu {device}"):
                calibrate(measured, MACHINES["h100"], Assumptions())


def test_a_run_with_few_lines_is_refused(tmp_path):
    run = write_run(tmp_path / "run", [1.0] * 4, world=1)
    with pytest.raises(MeasurementError, match="has 3 log lines after the first .* train.log_every"):
        read_measurements([run])


# ---- files of strangers


STRANGERS = (
    *("", "{", "[]", "null", "3", '"check"', "{}", "[" * 100_000, "\x00\x01", '{"found": 1}', '{"world": NaN}'),
    '{"machine": 1, "settings": 2, "scenes": 3}',
    '{"found": 1, "world": 1, "nodes": 1, "exit_code": 0}',
    '{"found": {}, "world": 1, "nodes": {}, "exit_code": 0}',
)


@pytest.mark.parametrize("content", STRANGERS, ids=range(len(STRANGERS)))
def test_a_file_without_measurements_is_refused_in_one_sentence(content, tmp_path, capsys):
    path = tmp_path / "stranger.json"
    path.write_text(content)
    assert main(["plan", "--measured", str(path)]) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.startswith(f"megapromoe: {path}: ") and captured.err.count("\n") == 1


def test_paths_that_are_no_measurements_are_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent.json", tmp_path / "empty"):
        assert main(["plan", "--measured", str(path)]) == 2
        assert str(path) in capsys.readouterr().err
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    assert main(["plan", "--measured", str(tmp_path / "bytes.json")]) == 2


def leaves(content, path=()):
    """The paths of all values of a JSON document, mappings and lists included."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))


def with_value(content, path, value):
    copy = json.loads(json.dumps(content))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


@pytest.mark.parametrize("source", [full("benchmark"), full("check"), full("run")])
def test_every_changed_value_is_used_or_refused(source, tmp_path):
    """Each value of a recorded file is replaced by others; nothing but a MeasurementError may be raised."""
    make, write = SOURCES[source]
    content, refused = make(), 0
    for path in leaves(content):
        if not path or path[0] in ("rows", "limits") or {"versions", "files", "settings", "clock", "data"} & {*path}:
            continue  # values that are not read
        if path[0] == "lines" and len(path) > 1 and path[1] != 5:
            continue  # of the log lines the last one
        for value in (None, -1, "x", [], 1e400, 10**30):
            file = write(tmp_path / "changed", with_value(content, path, value))
            try:
                measured = read_measurements([file])
                if gpu := measured.device:
                    calibrate(measured, CPU if gpu == "cpu" else MACHINES["h100"], CPU_ASSUMPTIONS)
            except MeasurementError as error:
                refused += 1
                assert "\n" not in str(error) and str(tmp_path) in str(error)
    assert refused > 20


# ---- recorded runs of one machine


def test_recorded_runs_of_replicated_experts_predict_expert_parallelism():
    """Runs of the preset digits in one and two processes, recorded on two cores without other work.

    A calibration is within 15 % of the median steps that it was fitted to, of one process and of two, and of larger
    batches and expert parallelism, which it predicts. Assumed rates give half of some.
    """
    machine = replace(CPU, gpus_per_node=2)
    for fitted, predicted in (
        (("check.json", "one-32", "one-128"), ("two-256", "two-64-ep")),
        (("check.json", "one-32", "one-128", "two-64"), ("two-256", "two-64-ep")),
        (("check.json", "two-64", "two-256"), ("one-128", "two-64-ep")),
    ):
        measured, validated = (read_measurements([recorded_run(n) for n in names]) for names in (fitted, predicted))
        calibration = calibrate(measured, machine, CPU_ASSUMPTIONS, validated)
        for compared in calibration.compared:
            assert compared.step.seconds == pytest.approx(statistics.median(recorded_seconds(compared.step)), rel=1e-6)
            assert abs(compared.calibrated / compared.step.seconds - 1) < 0.15, compared.step.source
        assert min(compared.assumed / compared.step.seconds for compared in calibration.compared) < 0.6


def recorded_seconds(step: MeasuredStep) -> list[float]:
    """Seconds of the steps of a recorded run, read anew from its metrics."""
    lines = [json.loads(line) for line in (Path(step.source) / "metrics.jsonl").read_text().splitlines()]
    return [step.config.train.global_batch / line["images_per_second"] for line in lines[1:]]


def test_the_command_plans_the_measured_run_and_prints_it(capsys):
    single, double = recorded_run("one-32"), recorded_run("two-64")
    assert main(["plan", "--measured", str(single), "--validate", str(double)]) == 0
    out = capsys.readouterr().out
    assert "calibration" in out and "fitted" in out and "predicted" in out and "CPU core" in out
    assert main(["plan", "--measured", str(single), "--validate", str(double), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    fitted, predicted = content["calibration"]["steps"]
    assert fitted["fitted"] and not predicted["fitted"]
    assert predicted["factor"] == pytest.approx(predicted["measured_seconds"] / predicted["calibrated_seconds"])


# ---- tools/measure_plan.py


def test_the_steps_of_alternating_runs_exclude_those_that_a_stop_interrupted(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    program = importlib.import_module("measure_plan")
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": i, "wall_time": 100.0 + i}) + "\n" for i in range(1, 9)))
    program.remove_interrupted(file, [103.5, 103.9, 106.0, 200.0])
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 5, 7, 8]
    words = program.compared(Path("out"), ["check", "one-32"])
    assert words[words.index("--measured") + 1 : words.index("--validate")] == ["out/check.json", "out/one-32"]
    assert words[words.index("--validate") + 1 :] == ["out/one-128", "out/two-64", "out/two-64-ep", "out/two-256"]
    assert "--validate" not in program.compared(Path("out"), [*program.RUNS])
