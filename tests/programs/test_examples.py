"""The programs of examples/, and the code of docs/library.md."""

import contextlib
import io
import re
import runpy
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from support.command_ranks import leave_job
from support.processes import run
from support.sampled_runs import saved_run, tiny
from support.training_runs import train as train_run

from megapromoe import cli
from megapromoe.config.resolve import to_yaml
from megapromoe.nn import MoE, auxiliary_losses
from megapromoe.run_lines import metrics_of
from megapromoe.studies.grid import expand
from megapromoe.studies.recipe import make_recipe

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


def test_smoothed_router():
    """The contrastive loss and the addition are cross-entropy with smoothed labels, among the experts that are used."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        example = runpy.run_path(str(EXAMPLES / "smoothed_router.py"))
    finally:
        sys.path.remove(str(EXAMPLES))
    torch.manual_seed(0)
    layer = MoE(hidden_size=16, num_experts=6, router=example["SmoothedRouter"], rcl_weight=2.0).train()
    x = torch.randn(3, 8, 16, requires_grad=True)
    y, auxiliary = layer(x)
    losses = auxiliary_losses([auxiliary])
    prototypes, tokens = layer.router.prototypes, x.flatten(0, 1)
    cosines = torch.nn.functional.normalize(tokens, dim=1) @ torch.nn.functional.normalize(prototypes, dim=1).T
    chosen = cosines.argmax(1)
    used = chosen.unique()
    assert 2 < len(used) <= 6 and set(losses) == {"rcl", "smoothing"}
    means = torch.stack([tokens[chosen == expert].mean(0) for expert in used])
    logits = torch.nn.functional.cosine_similarity(prototypes[used].unsqueeze(1), means.unsqueeze(0), dim=2) / 0.07
    share = example["EPSILON"] * len(used) / (len(used) - 1)  # torch smooths over all classes, the true one included
    smoothed = torch.nn.functional.cross_entropy(logits, torch.arange(len(used)), label_smoothing=share)
    ours, plain = losses["rcl"].sum() + losses["smoothing"].sum(), 2.0 * smoothed
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, [x, prototypes], retain_graph=True) for loss in (ours, plain)]
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    one_used = example["smoothing"](prototypes, torch.ones(6, 16), torch.eye(6)[0], 0.07)
    assert one_used.item() == 0
    assert not auxiliary_losses([layer.eval()(x)[1]])


def test_output_contrast():
    example = runpy.run_path(str(EXAMPLES / "output_contrast.py"))
    torch.manual_seed(1)
    layer = example["ContrastedMoE"](3.0, hidden_size=16, num_experts=4, expert_width=8).train()
    x = torch.randn(5, 8, 16)
    y, auxiliary = layer(x, num_conditional=4)
    tokens, moe = x[:4].flatten(0, 1), layer.moe
    chosen = torch.nn.functional.cosine_similarity(
        tokens.unsqueeze(1), moe.router.prototypes.unsqueeze(0), dim=2
    ).argmax(1)
    first, second = moe.experts.fc1, moe.experts.fc2
    means = []
    for expert in chosen.unique():
        hidden = tokens[chosen == expert] @ first.weight[expert].T + first.bias[expert]
        hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        means.append((hidden @ second.weight[expert].T + second.bias[expert]).mean(0))
    assert len(means) > 2
    pairs = [(-(a - b).norm() / example["TEMPERATURE"]).exp() for a, b in combinations(means, 2)]
    expected = 3.0 * sum(pairs) / len(pairs)
    loss = auxiliary.losses["output_contrast"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradient, plain = (torch.autograd.grad(value, first.weight, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-6)
    assert float(example["repulsion"](torch.ones(1, 4))) == 0 and float(example["repulsion"](torch.ones(3, 4))) == 1
    assert "output_contrast" not in layer.eval()(x)[1].losses
    assert output_of("output_contrast", 2).count("mean distance of mean outputs") == 2


def test_the_code_and_the_recipe_of_the_variants(monkeypatch):
    """Experts with units of zero compute, and learn, what narrower experts do."""
    text = (ROOT / "docs" / "variants.md").read_text(encoding="utf-8")
    names: dict = {"__name__": "variants"}
    torch.manual_seed(0)
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)), names)
    moe, widths = names["moe"].train(), (32, 43, 53, 64)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        y, _ = moe(torch.randn(4, 32, 32))
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
    first, second = moe.experts.fc1, moe.experts.fc2
    for expert, width in enumerate(widths):
        assert not first.weight[expert, width:].any() and not second.weight[expert, :, width:].any()
        assert first.weight[expert, :width].any(1).all() and second.weight[expert, :, :width].any(0).all()
    monkeypatch.chdir(ROOT)
    (recipe,) = (yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S))
    assert {task.variant for task in expand(make_recipe(recipe))} == {"promoe", "smoothed"}


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
