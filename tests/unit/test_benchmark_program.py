"""The benchmark program from end to end: what it measures, keeps, reports and refuses."""

import json
from pathlib import Path

import pytest
import torch

from megapromoe.benchmark import baselines, report, routing_patterns, suite
from megapromoe.benchmark.layer import BenchmarkError
from megapromoe.cli import main
from megapromoe.commands import benchmark


def words(out: Path, *more: str) -> list[str]:
    some = ["--sizes", "digits", "--batch", "4", "--rounds", "2", "--steps", "2", "--null", "0.25", "--device", "cpu"]
    return [*some, "--out", str(out), *more]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("benchmark")
    for experiment in ("layer", "step", "sample"):
        names = ["ours", "loop", "dense", "bmm"]
        assert (
            main(["benchmark", experiment, *words(out, "--routing", "real", "skewed", "--implementations", *names)])
            == 0
        )
    return out


def test_the_program_from_end_to_end(measured):
    document = json.loads((measured / "benchmark.json").read_text())
    assert [s["experiment"] for s in document["scenes"].values()] == ["layer"] * 2 + ["step"] * 2 + ["sample"] * 2
    for case in document["scenes"].values():
        assert [*case["contenders"]] == ["ours", "loop", "dense", "bmm"]
        for f in case["contenders"].values():
            assert f["total"]["median"] > 0 and f["counts"]["total"]["kernels"] > 0 and f["ratio"]["median"] > 0
            assert all(len(values) == 2 for values in f["rounds"].values())
    skewed = document["scenes"]["step digits E4 B4 skewed"]["contenders"]
    waits = {name: skewed[name]["counts"]["total"]["waits"] for name in ("ours", "loop")}
    assert (
        waits["ours"] == {"tolist": 2} and sum(waits["loop"].values()) > 20
    )  # ours: once for each of 2 layers, on a CPU
    page = (measured / "benchmark.md").read_text()
    for heading in ("The MoE layer", "Parts of ours", "The training step", "Sampling"):
        assert heading in page
    for experiment in ("layer", "step", "sample"):
        picture = measured / f"benchmark-{experiment}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.name in page


def test_the_ratio_of_a_step_is_also_given_without_the_update(measured):
    """More parameters take a longer update, whatever forward and backward cost."""
    document = json.loads((measured / "benchmark.json").read_text())
    case = document["scenes"]["step digits E4 B4 real"]
    for f in case["contenders"].values():
        f["rounds"] = {"forward": [1.0, 1.0], "backward": [2.0, 2.0], "update": [9.0, 9.0]}
    case["contenders"]["ours"]["rounds"] |= {"forward": [2.0, 2.0], "update": [900.0, 900.0]}
    page = report.markdown(document | {"scenes": {"step": case}}, {})
    heads, _, *rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][:6]
    column = heads.index("forward and backward × dense (95 %)")
    assert [row[column] for row in rows] == ["1.33 (1.33–1.33)", *["1.00 (1.00–1.00)"] * 3]
    layer = report.markdown(document | {"scenes": {"layer": document["scenes"]["layer digits E4 B4 real"]}}, {})
    assert "forward and backward × dense" not in layer


@pytest.mark.full
def test_a_repeated_command_measures_nothing(measured, monkeypatch):
    monkeypatch.setattr(suite, "_measure", None)  # a call would raise
    before = json.loads((measured / "benchmark.json").read_text())["scenes"]
    names = ["ours", "loop", "dense", "bmm"]
    assert main(["benchmark", "step", *words(measured, "--routing", "skewed", "--implementations", *names)]) == 0
    assert json.loads((measured / "benchmark.json").read_text())["scenes"] == before


def test_other_settings_are_not_mixed_in(measured, capsys):
    assert main(["benchmark", "step", *words(measured, "--routing", "real", "--implementations", "ours", "dense")]) == 1
    message = capsys.readouterr().err
    assert "contenders: ['ours', 'loop', 'dense', 'bmm'] in the file, ['ours', 'dense'] now" in message
    assert "use another --out, or --again" in message


@pytest.mark.full
def test_again_measures_again_and_keeps_other_cases(measured, tmp_path):
    held = json.loads((measured / "benchmark.json").read_text())
    (tmp_path / "benchmark.json").write_text(json.dumps(held))
    names = ["ours", "loop", "dense", "bmm"]
    more = ["--routing", "real", "--implementations", *names, "--again"]
    assert main(["benchmark", "sample", *words(tmp_path, *more)]) == 0
    now = json.loads((tmp_path / "benchmark.json").read_text())["scenes"]
    assert [key for key in now if now[key] != held["scenes"][key]] == ["sample digits E4 B4 real"]
    more[3:-1] = ["ours"]
    assert main(["benchmark", "sample", *words(tmp_path, *more)]) == 0  # other settings: previous cases are removed
    assert [*json.loads((tmp_path / "benchmark.json").read_text())["scenes"]] == ["sample digits E4 B4 real"]
    (tmp_path / "benchmark.json").write_text("{")
    assert main(["benchmark", "sample", *words(tmp_path, *more)]) == 1


def test_a_page_is_filled_between_its_marks(measured, tmp_path):
    document, page = json.loads((measured / "benchmark.json").read_text()), tmp_path / "page.md"
    page.write_text("before\n<!-- begin cpu -->\nold\n<!-- end cpu -->\nafter\n")
    report.fill(page, document, measured)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "benchmark-layer-cpu.png" in text and (tmp_path / "benchmark-layer-cpu.png").is_file()
    report.fill(page, document, measured)
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(BenchmarkError, match="needs the lines"):
        report.fill(page, document, measured)


def test_contenders_that_cannot_run_are_listed_with_the_reason(measured):
    document = json.loads((measured / "benchmark.json").read_text())
    document["scenes"]["layer digits E4 B4 real"]["contenders"]["loop"] = {"cannot": "no luck"}
    page = report.markdown(document, {})
    assert "* loop did not run: no luck (digits 4 4 real)." in page


def test_the_tables_of_the_documentation_can_be_filled():
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    for mark in ("begin cpu", "end cpu", "begin cuda", "end cuda"):
        assert page.count(f"<!-- {mark} -->") == 1


WRONG = {
    "an unknown size": (["layer", "--sizes", "xxl"], "invalid choice: 'xxl'"),
    "an unknown contender": (["layer", "--implementations", "ous"], "invalid choice: 'ous'"),
    "no rounds": (["layer", "--rounds", "0"], "must be a whole number of at least 1, not '0'"),
    "a share of 2": (["layer", "--null", "2"], "must be a number from 0 to 1, not '2'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_words_get_a_message(what, capsys):
    argv, sentence = WRONG[what]
    with pytest.raises(SystemExit) as error:
        main(["benchmark", *argv])
    assert error.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_gets_a_sentence(capsys):
    assert main(["benchmark", "layer", "--device", "cuda"]) == 2
    assert "torch has no GPU on this machine" in capsys.readouterr().err


def test_what_is_not_compiled_gets_a_sentence(capsys):
    assert main(["benchmark", "all", "--compile", "--device", "cpu"]) == 2
    assert "--compile all: only `step` can be compiled" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message", [((), "--capture: only a compiled step"), (("--compile",), "--capture: needs a GPU")]
)
def test_what_is_not_captured_gets_a_sentence(words, message, capsys):
    assert main(["benchmark", "step", "--capture", *words, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_lists_the_cases(capsys):
    assert main(["benchmark", "all", "--sizes", "s", "--experts", "4", "256", "--routing", "real", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 2 + 2 * 2 and any("E256" in line for line in lines)


def test_the_program_has_the_names_of_the_library():
    assert benchmark.CONTENDERS == baselines.CONTENDERS and benchmark.ROUTINGS == routing_patterns.ROUTINGS
    assert benchmark.SIZES == suite.SIZES and benchmark.EXPERIMENTS == suite.EXPERIMENTS
