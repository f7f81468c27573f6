"""torchrun.sh: the nodes that platforms name, what is refused, and which ends of an attempt are repeated."""

import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
from support.launcher_scripts import DATA, ENV, LAUNCHERS, ROOT, call
from support.levels import full


def attempt(preset: str, *words: str, **env: str) -> dict[str, str]:
    """The options of an attempt that torchrun.sh would run, and its `train` words."""
    command = shlex.split(call("torchrun", preset, "--dry-run", *words, **env).splitlines()[-1])
    *_, train = " ".join(command).split(" -- ")
    return dict(word[2:].split("=", 1) for word in command[: command.index("--")] if "=" in word) | {"train": train}


PLATFORMS = {
    "by hand": {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "gpu01", "MASTER_PORT": "29600", "NPROC": "8"},
    "Kubeflow Trainer": {
        **{"PET_NNODES": "4", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "gpu01", "PET_MASTER_PORT": "29600"},
        **{"PET_NPROC_PER_NODE": "8", "JOB_COMPLETION_INDEX": "3"},
    },
    "SkyPilot": {
        **{"SKYPILOT_NUM_NODES": "4", "SKYPILOT_NODE_RANK": "2", "SKYPILOT_NODE_IPS": "gpu01\ngpu02\ngpu03\ngpu04"},
        **{"SKYPILOT_NUM_GPUS_PER_NODE": "8", "MASTER_PORT": "29600"},
    },
}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_torchrun_takes_the_nodes_from_the_platform_or_the_user(platform):
    options = attempt("promoe_b", DATA, "--", "--allow", "data.seed", **PLATFORMS[platform])
    assert [options[name] for name in ("node", "counts", "address", "port", "ranks-per-node")] == [
        *("2", "4", "gpu01", "29600", "8")
    ]
    assert options["train"].split()[:2] == ["train", "--preset"] and "--allow data.seed" in options["train"]
    assert options["job"] == str(ROOT / "runs" / "promoe_b") == options["train"].split()[4]
    if platform == "Kubeflow Trainer":
        by_hand = {"NNODES": "2:4", "NODE_RANK": "0", "NPROC": "4", "MASTER_ADDR": "other"}
        options = attempt("promoe_b", DATA, **PLATFORMS[platform], **by_hand)
        assert [options[name] for name in ("node", "ranks-per-node", "address")] == ["0", "4", "other"]


def test_torchrun_runs_on_the_numbers_of_nodes_that_the_configuration_allows():
    env = PLATFORMS["SkyPilot"]
    assert attempt("promoe_b", DATA, MIN_NODES="1", **env)["counts"] == "1,2,4", "256 images, 24 ranks"
    assert attempt("promoe_b", DATA, "train.global_batch=384", MIN_NODES="1", **env)["counts"] == "1,2,3,4"
    command = shlex.split(call("torchrun", "--dry-run", PREFLIGHT="0", NNODES="1", NPROC="2").splitlines()[-1])
    assert "check" not in command and "--address=127.0.0.1" in command


@pytest.mark.parametrize(
    "env, message",
    [
        ({"NNODES": "2"}, "MASTER_ADDR is not set; give the name or address of node 0"),
        ({"NNODES": "4:2", "MASTER_ADDR": "a"}, "NNODES=2 MIN_NODES=4: must be a number of nodes, or MIN:MAX"),
        ({"NNODES": "two", "MASTER_ADDR": "a"}, "NNODES=two"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2: must be a number from 0 to 1"),
        ({"MASTER_PORT": "65534"}, "MASTER_PORT=65534: must be a port up to 65533"),
        ({"NODE_WAIT": "long"}, "NODE_WAIT=long: must be a whole number"),
        ({"NNODES": "3", "NPROC": "8", "MASTER_ADDR": "a", "PRESET": "promoe_b"}, "nearest: 240, 264"),
    ],
)
def test_torchrun_refuses_nodes_that_cannot_be(env, message):
    assert message in call("torchrun", DATA, "--dry-run", code=2, **env)


@pytest.mark.parametrize(
    "codes, env, expected",
    [
        ((75, 76, 1, 0), {}, ["75", "76", "1", "0"]),
        full((76, 2, 0), {}, ["76", "2"]),
        full((1,) * 6, {}, ["1"] * 4),  # 3 retries without a new checkpoint
        full((76, 76, 0), {"RETRIES": "0"}, ["76"]),
        full((75,) * 6 + (0,), {}, ["75"] * 6 + ["0"]),  # a stop is no failure
        full((3, 0), {"bad_nodes": "another"}, ["3", "0"]),  # it goes on without the other node
        full((3, 1), {"bad_nodes": f"another\n{socket.gethostname()}"}, ["3"]),
        full(("USR1", 0), {}, ["75", "0"]),
        full(("TERM", 0), {}, ["75"]),
    ],
)
def test_torchrun_repeats_what_can_pass_and_ends_on_what_cannot(codes, env, expected, tmp_path):
    """Its program is replaced by one that ends with the next code, or waits for a signal and returns 75."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[[ "$*" == *node_attempt* ]] || exec {sys.executable} "$@"\n'
        f"code=$(head -n 1 {tmp_path}/codes); sed -i 1d {tmp_path}/codes\n"
        f'[[ $code != USR1 && $code != TERM ]] || {{ trap "exit 75" "$code"; touch {tmp_path}/waits; }}\n'
        "while [[ -n ${code//[0-9]/} ]]; do sleep 0.1; done\n"
        'exit "$code"\n'
    )
    python.chmod(0o755)

    def codes_of(*codes: int | str, bad_nodes: str = "", **env: str) -> list[str]:
        run = tmp_path / "-".join(map(str, codes))
        (run / "logs").mkdir(parents=True, exist_ok=True)
        (run / "logs" / "bad_nodes").write_text(bad_nodes)
        (tmp_path / "waits").unlink(missing_ok=True)
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        env = ENV | {"MEGAPROMOE_PYTHON": str(python), "NPROC": "1", "RUN_DIR": str(run), **env}
        env |= {"NODE_CACHE": str(tmp_path / "cache")}
        command = ["bash", str(LAUNCHERS / "torchrun.sh"), "digits"]
        job = subprocess.Popen(
            command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if isinstance(codes[0], str):
            while not (tmp_path / "waits").exists():
                assert job.poll() is None, job.communicate()[0]
                time.sleep(0.05)
            job.send_signal(getattr(signal, f"SIG{codes[0]}"))
        output, _ = job.communicate(timeout=120)
        attempts = [line.split("\t")[2] for line in (run / "logs" / "attempts-node0.tsv").read_text().splitlines()]
        assert job.returncode == int(attempts[-1]), output
        return attempts

    assert codes_of(*codes, **env) == expected
