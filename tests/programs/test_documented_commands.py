"""Every command in the documents, helps and comments of launchers is run in a small form; none is without a rule."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support import processes
from support.backends import benchmarks_without_inductor
from support.command_ranks import exit_codes, leave_job
from support.documented_commands import ROOT, documented
from support.documented_commands_small import TINY as TINY_MODEL
from support.documented_commands_small import NoRule, Small, small
from support.golden_states import random_state
from support.image_folder import write_images
from support.latent_folders import Arrays, write
from support.levels import full
from support.small_autoencoders import write_autoencoders
from support.small_studies import TINY

from megapromoe import cli
from megapromoe.config.resolve import resolve
from megapromoe.conversion.exports import export
from megapromoe.data.autoencoder import open_autoencoder
from megapromoe.distributed import launch_environment
from megapromoe.distributed.launch_environment import LaunchEnvironment

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = documented()


def forms(kind: str, cheap: bool | None = None) -> list[str]:
    """Documented commands whose small form is of a kind; a command without a rule is of every kind, and fails."""
    texts = []
    for command in COMMANDS:
        try:
            form = small(command.text)
        except NoRule:
            texts.append(command.text)
        else:
            if form.kind == kind and cheap in (None, form.cheap):
                texts.append(command.text)
    return texts


def test_there_are_commands_of_every_place():
    places = {command.place.split(" ")[0] for command in COMMANDS}
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "docs/cluster.md",
        "docs/data.md",
        "docs/study.md",
        "megapromoe",
    } <= places
    assert {
        "launchers/local.sh",
        "launchers/mpirun.sh",
        "launchers/promoe.sh",
        "launchers/scaling_experts.sh",
    } <= places
    assert len(COMMANDS) > 100


def one_plan(texts: list[str]) -> list:
    """At the quick level one search for a layout, the first: each takes seconds."""
    plans = [text for text in texts if "plan --" in text]
    return [full(text) if text in plans[1:] else text for text in texts]


def test_a_command_without_a_rule_fails():
    for text in ("megapromoe fly --high", "python tools/plot_routing.py --run-dir x", "docker run megapromoe"):
        with pytest.raises(NoRule, match="how a test runs this command"):
            small(text)


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> Path:
    """A folder with the studies that `submit` is documented for."""
    folder = tmp_path_factory.mktemp("plans")
    for name in ("study", "experts"):
        assert cli.main(["study", "plan", str(folder / "studies" / name), "--preset", "digits", "--seeds", "0"]) == 0
    return folder


@pytest.mark.parametrize("text", one_plan(forms("run", cheap=True)))
def test_commands_without_torch_run(text, plans, monkeypatch):
    monkeypatch.chdir(plans)
    if "--help" in text:
        with pytest.raises(SystemExit) as left:
            cli.main(small(text).words)
        assert left.value.code == 0
    else:
        assert cli.main(small(text).words) == 0


@pytest.mark.parametrize("text", forms("run", cheap=False))
def test_options_of_all_other_commands_exist(text, capsys):
    """The quick level reads their words, as they are documented; they are run below."""
    form = small(text)
    try:
        options = cli.parse(form.words)
    except SystemExit:
        pytest.fail(f"{text}: {capsys.readouterr().err}")
    assert options.command == form.words[0]


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """A folder `latents` as documents name it, whose `train` has a batch of records in the shape of ImageNet's."""
    folder = tmp_path_factory.mktemp("documented") / "latents"
    write(folder / "train", Arrays(count=256, classes=1000, shape=(4, 32, 32), dtype="float16"), shard_size=256)
    return folder


@pytest.mark.parametrize("text", [text for text in forms("run") if re.search(r"(?<![\w/-])train(?: |$)", text)])
def test_documented_trainings_can_start(text, latents, tmp_path, monkeypatch):
    """Their whole configuration at the documented number of ranks, and their data."""
    words = [re.sub("JOBID|DEST", "x", word) for word in text.split()]
    words = [word for word in words[words.index("train") :] if word not in ("--config", "x/config.yaml")]
    monkeypatch.chdir(tmp_path)
    Path("latents").symlink_to(latents)
    Path("examples").symlink_to(EXAMPLES)
    if "train.init_from=runs/base" in words:
        export(random_state(resolve("digits")), Path("runs/base"), "ours")
    world = 1 if text.startswith("megapromoe") else 4 if "--nproc-per-node 4" in text else 8
    monkeypatch.setattr(launch_environment, "detect", lambda: LaunchEnvironment("test", world=world))
    assert cli.main([*words, "--dry-run"]) == 0


@pytest.mark.parametrize("text", forms("elsewhere"))
def test_what_commands_of_others_name_exists(text):
    form = small(text)
    if form.by == "target":
        done = subprocess.run(["make", "-n", form.words[0]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif form.by.startswith("file"):
        assert (ROOT / (form.by.partition(":")[2] or form.words[0])).is_file()
    elif form.by.startswith("tests/"):
        assert (ROOT / form.by).is_file()
        if match := re.match(r"(?:torchrun .* -m )?megapromoe (.*)", text):
            assert cli.parse(shlex.split(match[1])).command == match[1].split()[0]
        elif text.startswith("python -m megapromoe."):
            assert (ROOT / text.split()[2].replace(".", "/")).with_suffix(".py").is_file()
        elif text.startswith("python examples/"):
            assert (ROOT / text.split()[1]).is_file()
        else:
            assert text.split("gpu_run.py ")[1].split()[0] in ("all", "step")


@pytest.mark.parametrize("text", forms("script"))
def test_launchers_print_what_they_would_run(text, tmp_path):
    form = small(text)
    variables = [word for word in form.words if re.match(r"[A-Z_]+=", word)]
    script, *words = form.words[len(variables) :]
    (tmp_path / "hosts").write_text("gpu01 slots=8\n")
    (tmp_path / "runs" / "study").mkdir(parents=True)
    (tmp_path / "runs" / "study" / "study.yaml").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MEGAPROMOE", "RUN_DIR", "NPROC", "SLURM"))}
    environment |= {"MEGAPROMOE_PYTHON": sys.executable} | dict(word.split("=", 1) for word in variables)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(ROOT / script), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "megapromoe" in done.stdout
    starts = "--dry-run" not in text and "PRESET" not in text and "[section.key" not in text
    assert not (starts and "no training data is chosen" in done.stderr), "the command itself would be refused"


# ---- in full


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A folder in which the documents' names exist: runs, latents, images, checkpoints, an autoencoder, a network."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "examples").symlink_to(EXAMPLES)
    processes.run(1, make_workspace, str(folder))
    return folder


def make_workspace(folder: str) -> None:
    """Writes it; in a worker, since it trains."""
    leave_job()
    os.chdir(folder)
    autoencoders = write_autoencoders(Path("autoencoders"))
    for name in ("sd-vae-ft-ema", "stabilityai/sd-vae-ft-ema", "models/sd-vae-ft-ema", "models/sd-vae"):
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copytree(autoencoders / "kl", name)
    write_images(Path("imagenet/train"))
    write_images(Path("photos"))
    encoded = Arrays(classes=3, shape=(2, 8, 8))
    encoded.manifest_fields["autoencoder"] = open_autoencoder("models/sd-vae-ft-ema", "cpu").identity
    write(Path("latents/train"), encoded)
    latents = ["data.source=latents", "data.path=latents/train", "model.in_channels=2", "model.num_classes=3"]
    runs = {"digits": [], "kmeans": ["model.router=kmeans"], "dit_b": ["model.router=dense", "model.mlp_ratio=4.0"]}
    for name, settings in (runs | {"xl": latents}).items():
        saved = [
            "train.save_every=1",
            "train.warmup=0",
            "train.steps=2",
            "train.global_batch=8",
            "train.deepspeed=fp32_zero1",
            "train.routing_trace_every=1",
        ]
        assert cli.main(["train", "--run-dir", f"runs/{name}", *TINY_MODEL.split(), *saved, *settings]) == 0
    for name in ("promoe_l", "promoe_b"):
        shutil.copytree("runs/digits", f"runs/{name}")
    shutil.copytree("runs/xl", "runs/promoe_xl")
    Path("tiny.yaml").write_text(yaml.safe_dump({"preset": "digits", "settings": TINY, "variants": {"promoe": {}}}))
    variants = {
        "promoe": {},
        "dense": {"settings": {"model.router": "dense"}},
        "tc": {"settings": {"model.router": "tc"}},
    }
    for place, names in (("studies", [*variants]), ("jobs", ["promoe", "dense"])):  # the second for two jobs at once
        chosen = {name: variants[name] for name in names}
        Path("study.yaml").write_text(yaml.safe_dump({"preset": "digits", "settings": TINY, "variants": chosen}))
        assert cli.main(["study", "plan", f"{place}/study", "--recipe", "study.yaml"]) == 0
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    Path("pictures").mkdir()
    for number, image in enumerate(images[::-1]):
        Image.fromarray(image).save(f"pictures/{number}.png")
    for name in ("samples.npz", "VIRTUAL_imagenet256_labeled.npz"):
        np.savez(name, arr_0=images)
    torch.jit.script(Network()).save("inception.pth")
    Path("animals_and_vehicles.yaml").write_text("animals: [2, 3, '5-7']\nvehicles: [0, 1, 8, 9]\n")
    for dest in ("promoe_l.pth", "unknown.pth"):
        assert cli.main(["convert", "runs/promoe_l", dest, "--to", "published"]) == 0


class Network(torch.nn.Module):
    """Stands for a network that looks at images: uint8 (N, 3, H, W) -> (N, 3)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


def distinct(texts: list[str]) -> list[str]:
    """Commands of which no earlier one has the same small form."""
    return list({repr(small(text)): text for text in reversed(texts)}.values())[::-1]


STARTS = count()


def start_processes(*arguments, start_method: str, real=torch.multiprocessing.start_processes, **options):
    """The first call is torch's. Later ones fork from the server of the workers, which has imported everything."""
    if next(STARTS):
        processes.start_server()
        start_method = "forkserver"
    return real(*arguments, start_method=start_method, **options)


@pytest.mark.full
@pytest.mark.parametrize("text", distinct(forms("run", cheap=False)))
def test_every_other_command_runs(text, workspace, monkeypatch):
    form: Small = small(text)
    words = form.words
    if "HASH" in words:
        words = [
            hashlib.sha256((workspace / "inception.pth").read_bytes()).hexdigest() if w == "HASH" else w for w in words
        ]
    if "runs/dest/config.yaml" in words:
        words = [word.replace("runs/dest", "runs/digits") for word in words]
    for word in words:
        if words[0] == "train" and word.startswith("new/"):  # documents name one folder for several runs
            shutil.rmtree(workspace / word, ignore_errors=True)
    if words[0] == "benchmark":  # it starts processes of its own, here from the server of the workers
        monkeypatch.chdir(workspace)
        monkeypatch.setattr(torch.multiprocessing, "start_processes", start_processes)
        with benchmarks_without_inductor():
            assert cli.main(words) == 0
        return
    if words[0] == "study" and words[1] in ("collect", "plot"):
        assert exit_codes(1, workspace, ["study", "run", words[2]]) == [0]
    if words[:2] == ["study", "plot"]:
        assert exit_codes(1, workspace, ["study", "collect", words[2], "--draws", "8"]) == [0]
    assert exit_codes(form.ranks, workspace, words) == [0] * form.ranks
