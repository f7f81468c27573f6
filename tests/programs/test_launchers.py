"""The launchers without a cluster: what they print, refuse and pass on. `tests/cluster` runs them for real."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from support.launcher_scripts import DATA, ENV, LAUNCHERS, ROOT, call, printed
from support.levels import full

from megapromoe.config.resolve import resolve
from megapromoe.planning.machines import MACHINES, Assumptions
from megapromoe.planning.search import search

SIZES = ("promoe_s", "promoe_b", "promoe_l", "promoe_xl")
T2I, T2I_PRESET = (
    "promoe_t2i",
    "promoe_t2i_12b",
)  # its batch of 384 images divides over 1, 2, 3, 4, 6, 8, 12, 16 ... nodes


def settings(command: list[str]) -> list[str]:
    return [word for word in command if re.match(r"\w+\.\w+=", word)]


# ---- what they would run


@pytest.mark.parametrize("gpu", ["h100", "a100"])
@pytest.mark.parametrize("preset", SIZES)
@pytest.mark.parametrize("nodes", [1, full(2), full(8), 32])
def test_every_default_is_a_layout_that_can_run(preset, nodes, gpu):
    train = printed(preset, f"--nodes={nodes}", GPU=gpu)["train"]
    assert train[train.index("--preset") + 1] == preset
    assert f"--nodes={nodes}" in train and f"--ntasks={8 * nodes}" in train
    layout = resolve(preset, overrides=settings(train), world=8 * nodes).layout(8 * nodes)
    assert 8 % (layout.tp * layout.ep) == 0, "expert and tensor parallelism stay inside a node"


@pytest.mark.parametrize("gpu, nodes", [("h100", 2), full("a100", 16)])
def test_the_text_to_image_model_starts_on_its_nodes(gpu, nodes):
    words = [f"--nodes={nodes}"] if nodes != 2 else []  # the number in the script
    train = printed(T2I, *words, GPU=gpu)["train"]
    assert train[train.index("--preset") + 1] == T2I_PRESET and f"--ntasks={8 * nodes}" in train
    config = resolve(T2I_PRESET, overrides=settings(train), world=8 * nodes)
    assert config.layout(8 * nodes).micro_batch * 8 * nodes == config.train.global_batch
    assert "GPU=tpu: no layout is known for it" in call(T2I, "--dry-run", code=2, GPU="tpu")


@pytest.mark.full
@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6, 8, 16, 32, 64])
def test_the_defaults_are_what_the_planner_proposes(nodes):
    presets = [*SIZES] * (256 % nodes == 0) + [T2I_PRESET] * (nodes <= 16)
    for preset, gpu in product(presets, ("h100", "a100")):
        default = resolve(preset, overrides=default_layout(preset, gpu, nodes), world=8 * nodes)
        best = search(resolve(preset), 8 * nodes, MACHINES[gpu], Assumptions()).best
        assert default.layout(8 * nodes) == best.layout, (preset, gpu)
        assert default.train.deepspeed == best.config.train.deepspeed
        assert default.parallel.recompute == best.config.parallel.recompute
        assert default.train.accumulation == best.config.train.accumulation


def default_layout(preset, gpu, nodes):
    """What the function of the launchers prints; `test_every_default_is_a_layout_that_can_run` runs whole launchers."""
    text = (LAUNCHERS / "promoe.sh").read_text()
    function = text[text.index("layout() {") :]
    done = subprocess.run(
        ["bash", "-c", f"size={preset.removesuffix('_12b')}\n{function}\nlayout {gpu} {nodes}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_the_largest_size_runs_on_64_nodes():
    train = printed("promoe_xl", "--nodes=64")["train"]
    assert resolve("promoe_xl", overrides=settings(train), world=512).layout(512).dp == 256


@pytest.mark.full
def test_a_range_of_nodes_takes_the_largest_on_which_the_configuration_runs():
    for range_of_nodes, count in (("2-4", 4), ("2-3", 2)):  # 256 images do not divide over 24 ranks
        commands = printed("promoe_l", f"--nodes={range_of_nodes}")
        assert f"--nodes={range_of_nodes}" in commands["sbatch"]
        assert {"MIN_NODES=2", f"MAX_NODES={range_of_nodes[2]}"} <= set(commands["export"])
        assert {f"--nodes={count}", f"--ntasks={8 * count}"} <= set(commands["train"])
    assert "MIN_NODES=2" not in printed("promoe_l")["export"]
    assert "nearest: 240, 264" in call("promoe_l", "--dry-run", "--nodes=3-3", code=2)


def test_settings_are_passed_on_and_win():
    commands = printed("promoe_xl", "model.num_experts=64", "parallel.ep=8", "--", "--allow", "data.seed")
    assert commands["sbatch"][1:] == [
        *(str(LAUNCHERS / "promoe_xl.sh"), "model.num_experts=64", "parallel.ep=8"),
        *("--", "--allow", "data.seed"),
    ]
    assert settings(commands["train"])[-2:] == settings(commands["check"])[-2:] == commands["sbatch"][2:4]
    assert commands["train"][commands["train"].index("--allow") + 1] == "data.seed"
    config = resolve("promoe_xl", overrides=settings(commands["train"]), world=8)
    assert (config.model.num_experts, config.parallel.ep) == (64, 8)


def test_options_of_sbatch_are_passed_on():
    commands = printed("promoe_b", "--nodes=2", "--partition=gpu", "train.steps=9", "--job-name=mine")
    assert commands["sbatch"][1:4] == ["--nodes=2", "--partition=gpu", "--job-name=mine"]
    assert commands["train"][commands["train"].index("--run-dir") + 1] == str(ROOT / "runs" / "mine-JOBID")


def test_variables_do_what_the_help_describes(tmp_path):
    env = {"PRESET": "dit_b", "RUN_DIR": str(tmp_path / "with space"), "PREFLIGHT": "0", "NODE_CACHE": "/cache"}
    env |= {"CONTAINER_IMAGE": "registry#megapromoe:1", "CONTAINER_MOUNTS": "/data:/data:ro"}
    env |= {"SRUN_ARGS": "--cpu-bind=cores -v"}
    commands = printed("promoe_b", "parallel.ep=1", **env)
    train = commands["train"]
    assert "check" not in commands and commands["node"][-1] == "/cache"
    assert train[train.index("--preset") + 1] == "dit_b"
    assert train[train.index("--run-dir") + 1] == f"{tmp_path}/with space"
    assert {"--cpu-bind=cores", "-v", "--container-image=registry#megapromoe:1"} <= set(train)
    (mounts,) = [word.partition("=")[2].split(",") for word in train if word.startswith("--container-mounts=")]
    assert mounts == [f"{ROOT}:{ROOT}", *(f"{p}:{p}" for p in (f"{tmp_path}/with space", "/cache")), "/data:/data:ro"]
    assert not any(word.startswith("--container") for word in commands["node"])
    assert "TRITON_CACHE_DIR=/cache/triton" in commands["export"]
    assert not any(word.startswith("--container") for word in printed("promoe_b")["train"])
    assert "--more" in printed("promoe_b", PREFLIGHT_ARGS="--more 3")["check"]


def test_what_is_set_in_the_environment_stays():
    assert {"NCCL_DEBUG=WARN", "OMP_NUM_THREADS=12"} <= set(printed("promoe_s")["export"])
    assert {"NCCL_DEBUG=INFO", "OMP_NUM_THREADS=3"} <= set(
        printed("promoe_s", NCCL_DEBUG="INFO", OMP_NUM_THREADS="3")["export"]
    )


def test_steps_have_all_variables_and_neighbours_a_socket():
    """And no size of memory of their own: that of the job, whatever a site has set for srun."""
    commands = printed("promoe_s")
    for name in ("check", "train"):
        assert {"--export=ALL", "--distribution=block:block", "--cpu-bind=cores"} <= set(commands[name])
    assert "--export=ALL" in commands["node"]
    assert not [word for name in ("node", "check", "train") for word in commands[name] if word.startswith("--mem")]


def test_a_run_directory_that_cannot_be_made_is_a_wrong_configuration():
    """Every attempt would fail at the same place."""
    job = {"JOB_ID": "1", "JOB_NUM_NODES": "1", "NTASKS": "8", "JOB_NAME": "x", "JOB_NODELIST": "n1"}
    output = call("promoe_s", DATA, code=2, RUN_DIR="/dev/null/run", **{f"SLURM_{name}": v for name, v in job.items()})
    assert "RUN_DIR=/dev/null/run: cannot be made or written; choose another" in output


def test_ranks_connect_at_the_address_of_slurm_or_the_user():
    commands = printed("promoe_s")
    assert "--resv-ports=1" in commands["train"] and commands["node"][-1] != "ask"
    assert "--resv-ports=1" not in printed("promoe_s", MASTER_PORT="29500")["train"]


@pytest.mark.parametrize(
    "words, env, message",
    [
        (["parallel.ep=3", "train.lr=fast"], {}, "2 problems in the configuration"),
        (["--nodes=3"], {}, "nearest: 240, 264"),
        (["--nodes=few"], {}, "--nodes=few"),
        (["--partition", "gpu"], {}, "as --option=value"),
        (["-N2"], {}, "as --option=value"),
        (["--mem-per-gpu=100G"], {}, "--mem-per-gpu=100G: contradicts --mem=0 of the script"),
        (["eight"], {}, "'eight': must be section.key=value"),
        ([], {"GPU": "tpu"}, "GPU=tpu: no layout is known for it"),
        ([], {"MEGAPROMOE_ENV": "/nowhere"}, "MEGAPROMOE_ENV=/nowhere: has no bin/megapromoe"),
        ([], {"MEGAPROMOE_PYTHON": "/nowhere"}, "MEGAPROMOE_PYTHON=/nowhere: does not import megapromoe"),
        ([], {"MEGAPROMOE_ENV": "/a", "MEGAPROMOE_PYTHON": "/b"}, "MEGAPROMOE_PYTHON=/b: set one of them"),
        (["--", "--config", "no.yaml"], {}, "no.yaml: cannot be read"),
    ],
)
def test_jobs_that_cannot_run_are_refused_before_submission(words, env, message):
    assert message in call("promoe_b", "--dry-run", *words, code=2, **env)
    assert message in call("promoe_b", *words, code=2, **env)


@pytest.mark.parametrize("script, words", [("promoe_l", ()), ("local", ("promoe_b", "parallel.ep=1"))])
def test_a_large_preset_without_data_is_refused_before_it_is_submitted(script, words):
    """A dry run needs no data: it prints the commands, and what a start would be refused for."""
    assert "data.source = 'unset': no training data is chosen" in call(script, *words, code=2, NPROC="1")
    command = ["bash", str(LAUNCHERS / f"{script}.sh"), *words, "--dry-run"]
    env = ENV | {"MEGAPROMOE_PYTHON": sys.executable, "NPROC": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "megapromoe train" in done.stdout
    assert "data.source=latents data.path=DIR" in done.stderr
    done = subprocess.run([*command, "data.source=synthetic"], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_a_python_can_be_chosen(tmp_path):
    """Every step, and the check before it, uses that Python, although PATH has no megapromoe."""
    env = {"MEGAPROMOE_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    start = [sys.executable, "-m", "megapromoe"]
    commands = printed("promoe_b", **env)
    for name in ("check", "train"):
        words = commands[name]
        assert words[words.index("-m") - 1 : words.index(name)] == start
    assert "2 problems" in call("promoe_b", "parallel.ep=3", "train.lr=fast", code=2, **env)
    assert shlex.split(call("local", "--dry-run", **env).splitlines()[-1])[0] == sys.executable
    (tmp_path / "study.yaml").touch()
    study = call("scaling_experts", "--dry-run", str(tmp_path), **env).splitlines()[-1]
    assert shlex.split(study) == [*start, "study", "run", str(tmp_path), "--task", "TASK"]
    # A submitted job starts in the folder of the logs; paths are relative to the folder in which it was submitted.
    from_logs = {**env, "MEGAPROMOE_STUDY_CWD": str(tmp_path.parent)}
    assert (
        shlex.split(call("scaling_experts", "--dry-run", tmp_path.name, **from_logs).splitlines()[-1])[5]
        == tmp_path.name
    )
    container = {"CONTAINER_IMAGE": "image", "MEGAPROMOE_PYTHON": "/of/the/container/python", "PATH": "/usr/bin:/bin"}
    assert "/of/the/container/python" in printed("promoe_b", **container)["train"]


def test_without_a_choice_it_is_the_environment_beside_the_launchers_or_what_path_finds(tmp_path):
    shutil.copytree(LAUNCHERS, tmp_path / "launchers")
    on_path, beside = tmp_path / "found" / "bin", tmp_path / ".venv" / "bin"
    for folder in (on_path, beside):
        folder.mkdir(parents=True)
        (folder / "megapromoe").write_text(f'#!/bin/sh\necho "{folder}: $1" >&2\nexit 2\n')
        (folder / "megapromoe").chmod(0o755)

    def errors_with(path: str) -> str:
        command = ["bash", str(tmp_path / "launchers" / "promoe_b.sh"), "--dry-run"]
        done = subprocess.run(command, env=ENV | {"PATH": path}, capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr

    assert errors_with(f"{on_path}:/usr/bin:/bin") == f"{beside}: show\n"
    shutil.rmtree(tmp_path / ".venv")
    assert errors_with(f"{on_path}:/usr/bin:/bin") == f"{on_path}: show\n"
    assert "megapromoe is not on PATH; set MEGAPROMOE_ENV" in errors_with("/usr/bin:/bin")


def test_a_machine_without_slurm_is_reported(tmp_path):
    for name in ("bash", "sed", "realpath", "dirname", "basename", "nproc"):
        (tmp_path / name).symlink_to(shutil.which(name, path=ENV["PATH"]))
    assert "launchers/local.sh" in call("promoe_s", DATA, code=2, PATH=str(tmp_path))
    assert "--resv-ports=1" in call("promoe_s", "--dry-run", PATH=str(tmp_path))


def test_outside_a_job_the_script_submits_itself(tmp_path):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    sbatch.chmod(0o755)
    output = call("promoe_l", "--hold", DATA, PATH=f"{tmp_path}:{ENV['PATH']}")
    assert output.splitlines() == ["--hold", str(LAUNCHERS / "promoe_l.sh"), DATA]


# ---- as text


def scripts() -> list[Path]:
    return sorted(LAUNCHERS.glob("*.sh"))


@pytest.mark.full
def test_shellcheck_reports_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", *map(str, scripts())], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", scripts(), ids=lambda p: p.name)
def test_scripts_are_strict_and_name_no_site(script):
    text = script.read_text()
    sourced = script.name in ("prologue.sh", "attempts.sh", "slurm.sh", "promoe.sh")
    assert "set -euo pipefail" in text or sourced
    paths = re.findall(r"(?<![\w$}\"./*-])/(?!dev/null|tmp|usr/bin/env)[a-z]\w*/[\w/]*", text)
    assert not paths, "no path of a machine"
    assert not re.search(r"--(partition|account|qos|constraint|nodelist|mail-user|reservation)", text)
    assert os.access(script, os.X_OK) == text.startswith("#!") == (not sourced)


@pytest.mark.parametrize("name", [*SIZES, T2I, "local", "mpirun", "torchrun", "scaling_experts"])
def test_help_has_the_options_and_examples(name):
    output = call(name, "--help")
    assert f"launchers/{name}.sh" in output and "MEGAPROMOE_ENV" in output and "section.key=value" in output


@pytest.mark.parametrize("size", [*SIZES, T2I])
def test_the_sizes_differ_in_name_alone(size):
    """The text-to-image model also in the number of nodes, and in that its script has another name than its preset."""

    def rest(name: str) -> list[str]:
        text = (LAUNCHERS / f"{name}.sh").read_text().replace(f"size={T2I} preset={T2I_PRESET}", f"preset={T2I}")
        lines = text.replace("#SBATCH --nodes=2", "#SBATCH --nodes=1").splitlines()
        return [line.replace(name, "promoe_s") for line in lines if not line.startswith("## Trains")]

    assert rest(size) == rest("promoe_s")


# ---- one machine


@pytest.mark.full
def test_the_local_layout_is_what_the_planner_proposes_on_one_machine():
    for ranks in ("1", "2", "4", "6", "8"):
        command = shlex.split(
            call("local", "digits", "--dry-run", "train.global_batch=48", NPROC=ranks).splitlines()[-1]
        )
        assert f"--nproc-per-node={ranks}" in command and "parallel.ep=1" in command
    for gpu, preset in product(MACHINES, SIZES):
        machine = replace(MACHINES[gpu], gpus_per_node=8)
        for ranks in (2, 4, 8):
            assert search(resolve(preset), ranks, machine, Assumptions()).best.layout.ep == 1, (gpu, preset, ranks)


def test_host_files_give_the_number_of_processes(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nhost1 slots=3\nhost2 slots = 1\n")
    (tmp_path / "mpirun").touch(mode=0o755)
    env = {"PATH": f"{ENV['PATH']}:{tmp_path}"}
    command = shlex.split(call("mpirun", "promoe_b", "--dry-run", HOSTFILE=str(hosts), **env).splitlines()[-1])
    assert command[:5] == ["mpirun", "-n", "4", "--hostfile", str(hosts)]
    assert command[command.index("--preset") + 1] == "promoe_b" and "parallel.ep=1" in command
    assert "no.hosts: cannot be read" in call("mpirun", HOSTFILE="no.hosts", code=2, **env)
