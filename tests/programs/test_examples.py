"""The programs of examples/, and the code of docs/library.md."""

import contextlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.command_ranks import leave_job
from support.processes import run
from support.sampled_runs import saved_run, tiny
from support.training_runs import train as train_run

from megapromoe import cli
from megapromoe.config.resolve import to_yaml
from megapromoe.run_lines import metrics_of

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def output_of(name: str, *arguments) -> str:
    """What `main` of an example prints on this rank. Collective if the example is."""
    sys.path.insert(0, str(EXAMPLES))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)
    finally:
        sys.path.remove(str(EXAMPLES))
    return printed.getvalue()


def losses(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss ([\d.]+)", text)]


def test_own_transformer():
    (text,) = run(1, output_of, "own_transformer")
    first, last = losses(text)
    assert last < 0.5 * first
    assert sum(map(int, re.findall(r"\[(.*)\]", text)[0].split(","))) == 7 * 16


def test_over_ranks():
    text, silent = run(2, output_of, "over_ranks")
    first, last = losses(text)
    assert last < 0.5 * first and not silent
    assert "this rank has experts (4, 32, 32), the saved model (8, 32, 32)" in text


@pytest.mark.full
def test_over_ranks_by_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, EXAMPLES / "over_ranks.py"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0 and len(losses(done.stdout)) == 2, done.stderr


def test_model_from_preset():
    (text,) = run(1, output_of, "model_from_preset")
    assert re.search(r"[\d,]+ parameters, loss [\d.]+, losses \['rcl'\]", text)


@pytest.mark.full
def test_my_router(tmp_path):
    """In a run: its loss is logged, and the images of its checkpoint can be generated."""
    router = f"model.router={EXAMPLES / 'my_router.py'}:BiasedRouter"
    run(1, train_run, str(tmp_path), router, "train.steps=2")
    lines = metrics_of(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and all(line["z_loss"] > 0 for line in lines)
    (text,) = run(1, output_of, "sample_checkpoint", tmp_path)
    assert text.startswith("step 2: images (4, 4, 8, 8), values from ")


def test_sample_checkpoint(tmp_path):
    run(1, saved_run, str(tmp_path))
    (tmp_path / "config.yaml").write_text(to_yaml(tiny()))
    (text,) = run(1, output_of, "sample_checkpoint", tmp_path)
    assert text.startswith("step 2: images (4, 1, 8, 8), values from ")


@pytest.mark.full
def test_finetune_digits(tmp_path):
    (text,) = run(1, in_own_job, "finetune_digits", tmp_path, 2, 2, 1, 64)
    assert re.search(r"^seed 0: from scratch [\d.]+, fine-tuned [\d.]+, difference [-+][\d.]+$", text, re.M)
    assert text.count("$ megapromoe train") == 3 and text.count("train.init_from=") == 1


def in_own_job(name: str, *arguments) -> str:
    """`output_of` in a worker that leaves its torch.distributed job: commands of the example join their own."""
    leave_job()
    return output_of(name, *arguments)


def test_diffusers_pipeline(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install megapromoe[images]")
    (tmp_path / "run").mkdir()
    run(1, saved_run, str(tmp_path / "run"))
    command = ["convert", str(tmp_path / "run"), str(tmp_path / "folder"), "--to", "diffusers"]
    assert cli.main([*command, "--config", str(tmp_path / "run" / "config.yaml")]) == 0
    (text,) = run(1, output_of, "diffusers_pipeline", tmp_path / "folder", tmp_path / "digits.png")
    assert text == "digits.png: 4 images (8, 8), router promoe\n"
    assert Image.open(tmp_path / "digits.png").size == (4 * 64, 64)


def test_every_example_is_tested_and_documented():
    documented = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    for file in EXAMPLES.glob("*.py"):
        assert file.stem in tests and f"`examples/{file.name}`" in documented, file.name


def document_code() -> None:
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)), {"__name__": "library"})


def test_the_code_of_the_document_runs():
    run(1, document_code)
