"""`megapromoe plan` for several numbers of nodes and experts, for two configurations, and beside published times."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megapromoe.cli import main
from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.planning import published
from megapromoe.planning.machines import CPU, CPU_ASSUMPTIONS, MACHINES, Assumptions
from megapromoe.planning.roofline import step_time
from megapromoe.planning.scaling import FASTER, Point, cost_of, efficiency, make_point, verdicts
from megapromoe.planning.search import PlanError, search

ROOT = Path(__file__).parents[2]
FIXED = ("parallel.tp=1", "parallel.ep=1", "parallel.recompute=none", "train.deepspeed=bf16_zero1")  # few layouts


def planned(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def answer(capsys, *words: str) -> dict:
    code, out, err = planned(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


# ---- nodes and experts


def test_a_table_has_each_combination_with_its_cost_and_shows_where_more_is_worse(capsys):
    words = ("--preset", "promoe_b", "--nodes", "8", "1", "2", "4", "--experts", "4", "8", *FIXED)
    content = answer(capsys, *words, "--num-images", "128M")
    points = content["points"]
    assert [(p["experts"], p["nodes"]) for p in points] == [(e, n) for e in (4, 8) for n in (1, 2, 4, 8)]
    for p in points:
        assert p["steps"] == 500_000 == 128_000_000 // 256 and p["world"] == 8 * p["nodes"]
        assert p["hours"] == pytest.approx(p["step_seconds"] * p["steps"] / 3600)
        assert p["gpu_hours"] == pytest.approx(p["hours"] * p["world"])
        first = next(q for q in points if q["experts"] == p["experts"])
        assert p["efficiency"] == pytest.approx(first["gpu_hours"] / p["gpu_hours"])
    code, out, _ = planned(capsys, *words)
    times = {(p["experts"], p["nodes"]): p["step_seconds"] for p in points}
    worse = [(e, n) for e in (4, 8) for n in (2, 4, 8) if times[e, n // 2] < FASTER * times[e, n]]
    assert code == 0 and worse
    assert re.findall(r"(\d+) experts: (\d+) nodes are .*: more is worse", out) == [(str(e), str(n)) for e, n in worse]
    assert re.search(r"1 node: 8 experts take \d\.\d\d times the hours of 4", out)


def test_nodes_that_cannot_run_have_their_reason_in_the_table(capsys):
    """256 images do not divide over 24 GPUs. If no point can run, the reason is the error."""
    code, out, _ = planned(capsys, "--preset", "promoe_s", "--nodes", "1", "3", *FIXED)
    assert code == 0 and re.search(r"^ +3 +12 +train.global_batch = 256: .* multiple of 24", out, re.M)
    code, out, err = planned(capsys, "--preset", "promoe_s", "--nodes", "3", "5", *FIXED)
    assert code == 1 and not out and "must be a multiple of 24" in err and err.count("\n") == 1


def test_verdicts_follow_from_the_times():
    config = resolve("promoe_s", overrides=FIXED)
    fixed = frozenset(word.partition("=")[0] for word in FIXED)
    plan = search(config, 8, MACHINES["h100"], Assumptions(), fixed).best

    def points(*milliseconds):
        plans = [
            replace(plan, layout=replace(plan.layout, world=8 * n), time=replace(plan.time, **timed(ms / 1e3)))
            for n, ms in zip((1, 2, 4), milliseconds, strict=False)
        ]
        return [Point(p.layout.world // 8, 12, p) for p in plans]

    def timed(seconds):
        return dict.fromkeys(
            ("attention", "elementwise", "host", "layers_traffic", "exposed_gradients", "update"), 0.0
        ) | {"products": seconds}

    assert not list(verdicts(points(100, 50, 26), None))
    (line,) = verdicts(points(100, 80), None)
    assert line.startswith("2 nodes are 1.25 times as fast as 1 node, less than half")
    for slow, word in ((99, "no faster"), (110, "slower")):
        (line,) = verdicts(points(100, slow), None)
        assert f"2 nodes are {word} than 1 node: more is worse" in line
    series = points(100, 50, 50)
    assert [efficiency(series, p) for p in series] == pytest.approx([1.0, 1.0, 0.5])
    assert cost_of(series[0].plan, 257).steps == 2
    problem = make_point(config, 3, PlanError("does\n not fit"))
    assert (problem.plan, problem.problem, efficiency([*series, problem], problem)) == (None, "does not fit", None)
    assert make_point(resolve("dit_b"), 1, ConfigError(["x"])).experts == 0


def test_numbers_of_images(capsys):
    text = answer(capsys, "--preset", "promoe_s", *FIXED, "--num-images", "1281167")
    assert text["num_images"] == 1_281_167 and text["cost"]["steps"] == -(-1_281_167 // 256)
    assert (
        "1,281,167 images: 5,005 steps" in planned(capsys, "--preset", "promoe_s", *FIXED, "--num-images", "1281167")[1]
    )
    for wrong in ("0", "1.5", "-1", "many", "1e6", "9999999B9"):
        with pytest.raises(SystemExit) as left:
            planned(capsys, "--num-images", wrong)
        assert left.value.code == 2 and "is not a number of images" in capsys.readouterr().err


# ---- two configurations


def test_two_configurations_side_by_side(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {router: promoe, hidden_size: 384, depth: 12, heads: 6, num_experts: 24}\n")
    content = answer(capsys, "--compare", "promoe_s", str(file), *FIXED)
    first, second = content["compared"]
    assert (first["name"], second["name"]) == ("promoe_s", str(file)) and content["machine"]["name"] == "H100 80GB SXM"
    alone = answer(capsys, "--preset", "promoe_s", *FIXED)["layouts"][0]
    assert {key: first[key] for key in alone} == alone
    code, out, _ = planned(capsys, "--compare", "promoe_s", str(file), *FIXED)
    ratio = second["step_seconds"] / first["step_seconds"]
    assert code == 0 and re.search(rf"ms of a step .* {ratio:.2f}$", out, re.M) and "B over A" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (("--compare", "promoe_s", "nowhere.yaml"), "nowhere.yaml: is neither a preset nor a file"),
        (("--compare", "promoe_s", "dit_b", "--preset", "dit_b"), "takes the place of --preset"),
        (("--compare", "promoe_s", "dit_b", "--nodes", "1", "2"), "one number of --nodes"),
        (("--nodes", "1", "2", "--plot", "x.png"), "--plot: shows the layouts of one plan"),
        (("--validate", "pyproject.toml"), "is not JSON"),
    ],
)
def test_options_that_cannot_be_combined_are_refused(capsys, monkeypatch, words, message):
    monkeypatch.chdir(ROOT)
    code, out, err = planned(capsys, *words)
    assert code == 2 and not out and message in err and err.count("\n") == 1


def test_json_is_what_the_report_has(capsys, tmp_path):
    file = tmp_path / "plans.json"
    content = answer(capsys, "--preset", "promoe_s", *FIXED, "--report", str(file))
    assert json.loads(file.read_text()) == content and content["estimates"] is True


# ---- machines


def test_a_cpu_adds_the_times_of_host_and_kernels():
    config = resolve("digits", world=1)
    t = step_time(config, config.layout(1), CPU, CPU_ASSUMPTIONS)
    assert t.compute == pytest.approx(t.host + t.products + t.attention + t.elementwise) and t.host > 0
    t = step_time(config, config.layout(1), replace(CPU, asynchronous=True), CPU_ASSUMPTIONS)
    assert t.compute == pytest.approx(max(t.host, t.products + t.attention + t.elementwise))


def test_a_plan_for_a_cpu_starts_no_launcher(capsys):
    code, out, _ = planned(capsys, "--preset", "digits", "--gpu", "cpu", "--gpus-per-node", "2")
    assert code == 0 and "CPU core: 0.0500 TFLOP/s" in out
    assert "srun --nodes=1 --ntasks=2 --ntasks-per-node=2 megapromoe train" in out and "--gpus-per-node" not in out


def test_gb200_has_trays_of_four_in_racks_of_72(capsys):
    content = answer(capsys, "--preset", "promoe_s", "--nodes", "16", "--gpu", "gb200", *FIXED)
    assert content["layouts"][0]["world"] == 64 and content["machine"]["nvlink_domain"] == 72
    assert "inside an NVLink domain of 72" in planned(capsys, "--preset", "promoe_s", "--gpu", "gb200", *FIXED)[1]


# ---- published times


def test_published_times_are_those_of_the_recipe_of_table_14():
    recipe = yaml.safe_load((ROOT / "megapromoe/studies/recipes/paper/t14.yaml").read_text())
    names = {"dense": "dit_l", "tc": "tc_l_e8", "ec": "ec_l_e8", "diffmoe": "diffmoe_l_e8", "promoe": "promoe_l"}
    hours = {
        names[variant]: content["published"][0]["figures"]["training GPU-hours, 4 A800"]
        for variant, content in recipe["variants"].items()
    }
    assert hours == published.GPU_HOURS and recipe["settings"]["train.steps"] == published.STEPS
    assert published.seconds("dit_l") == pytest.approx(0.3, abs=1e-3)
    assert published.seconds("promoe_l") == pytest.approx(0.6, abs=1e-3)
    for preset in names.values():
        assert resolve(preset).train.global_batch == published.IMAGES


def test_a_plan_of_a_published_model_has_its_time_beside_it(capsys):
    """The parts of the explanation and the remainder add up; docs/performance.md has these numbers."""
    a800 = ("--gpu", "a800", "--gpus-per-node", "4", *FIXED)
    _, out, _ = planned(capsys, "--preset", "promoe_l", *a800)
    lines = out[out.index("published:") : out.index("tp 1:")].splitlines()
    rest = int(re.search(r"the other (\d+) ms", out)[1])
    parts = [int(match[1]) for line in lines if (match := re.match(r" +(\d+) ms  ", line))]
    assert len(parts) == 5 and sum(parts) == pytest.approx(rest, abs=3) and all(part > 0 for part in parts)
    page = (ROOT / "docs" / "performance.md").read_text()
    for number in (*parts, rest, *(int(n) for n in re.findall(r"(\d+) ms (?:published|planned)", out))):
        assert re.search(rf"\b{number} ms", page), f"docs/performance.md lacks {number} ms"
    _, out, _ = planned(capsys, "--preset", "dit_l", *a800)
    assert "published: 300 ms a step" in out and "the other" not in out
    for words in (("--gpu", "a100"), ("--gpus-per-node", "8"), ("--global-batch", "512")):
        assert "published" not in planned(capsys, "--preset", "dit_l", *a800, *words)[1]
