"""`megapromoe plan`: what it prints and writes, and the mistakes that it names."""

import json
import shlex

import pytest
from support.levels import full

from megapromoe.cli import main
from megapromoe.config.resolve import resolve


def planned(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megapromoe plan`."""
    code = main(["plan", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_ends_with_a_line_to_paste(capsys):
    code, out, err = planned(capsys, "--preset", "promoe_xl", "--experts", "64", "--nodes", "8", "--top", "3")
    assert (code, err) == (0, "")
    words = shlex.split(out.strip().splitlines()[-1])
    assert words[:4] == ["sbatch", "--nodes=8", "launchers/promoe_xl.sh", "model.num_experts=64"]
    config = resolve("promoe_xl", overrides=words[3:], world=64)
    assert config.model.num_experts == 64 and config.layout(64).world == 64
    assert "times are estimates, not measurements" in out and "all_to_all" in out and "GPU-hours" in out
    assert sum(line.lstrip()[:2] in ("1 ", "2 ", "3 ", "4 ") for line in out.splitlines()) == 3


def test_the_command_of_other_presets_is_complete(capsys):
    code, out, _ = planned(capsys, "--preset", "dit_b", "--gpus-per-node", "4", "--global-batch", "64", "train.lr=3e-4")
    words = shlex.split(out.strip().splitlines()[-1])
    assert code == 0 and words[0] == "srun" and "--ntasks-per-node=4" in words and "--resv-ports=1" not in words
    overrides = [w for w in words if "=" in w and not w.startswith("--")]
    config = resolve("dit_b", overrides=overrides, world=4)
    assert config.train.global_batch == 64 and config.train.lr == 3e-4


@pytest.mark.full
def test_json_and_plot(capsys, tmp_path):
    files = tmp_path / "plans.json", tmp_path / "memory.png"
    code, _, _ = planned(capsys, "--preset", "promoe_b", "--report", str(files[0]), "--plot", str(files[1]))
    content = json.loads(files[0].read_text())
    assert code == 0 and content["estimates"] is True and files[1].read_bytes().startswith(b"\x89PNG")
    first = content["layouts"][0]
    lines = sum(v for k, v in first["memory_bytes"].items() if k not in ("update", "host", "peak"))
    assert first["fits"] and first["memory_bytes"]["peak"] == pytest.approx(lines)
    assert first["hours"] == pytest.approx(first["step_seconds"] * 500_000 / 3600)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["memory.png", "plans.json"]


@pytest.mark.full
def test_values_of_the_machine_can_be_given(capsys):
    _, usual, _ = planned(capsys, "--preset", "promoe_xl")
    options = ("--memory-gib", "40", "--tflops", "500", "--network-gbs", "12.5", "--imbalance", "2", "--usable", "0.5")
    _, changed, _ = planned(capsys, "--preset", "promoe_xl", *options)
    assert "fit 71.1 GiB each" in usual and "fit 20.0 GiB each" in changed
    assert "H100 80GB SXM, changed: 500 TFLOP/s" in changed and "2.00 times the mean" in changed


@pytest.mark.parametrize(
    "words, message",
    [
        full(("--preset", "promoe_xl", "--memory-gib", "2", "--gpus-per-node", "2"), "no layout fits 1.8 GiB"),
        (("--preset", "promoe_xl", "--nodes", "512"), "multiple of 512"),
        (("--usable", "1.5"), "must be at most 1"),
        (("--imbalance", "0.5"), "must be at least 1"),
        (("--plot", "memory.bmp"), "must end in .png"),
        (("--report", "/nowhere/plans.json"), "/nowhere"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(capsys, words, message):
    code, out, err = planned(capsys, *words)
    assert code == 1 and not out and err.startswith("megapromoe: ") and message in err


def test_numbers_must_be_numbers(capsys):
    for words in (("--memory-gib", "-1"), ("--tflops", "nan"), ("--nodes", "0")):
        with pytest.raises(SystemExit):
            planned(capsys, *words)
