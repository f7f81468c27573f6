"""A study whose recipe evaluates its trainings, on a real SLURM: one array that waits, job by job, for another."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import slurm
from support.small_studies import TINY

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing()), pytest.mark.full]

# A launcher: the second seed's training fails, everything else is what it is.
LAUNCHER = """\
import os, sys
if "train" in sys.argv and "seed1" in " ".join(sys.argv):
    sys.exit(3)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.Cluster(tmp_path_factory.mktemp("slurm"), nodes=2) as made:
        yield made


def test_an_evaluation_waits_for_its_training_and_goes_where_that_failed(cluster, tmp_path):
    study, launcher = tmp_path / "study", tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER)
    recipe = {"preset": "digits", "settings": TINY | {"sample.batch": 60, "model.num_experts": 2}, "seeds": [0, 1]}
    recipe |= {"variants": {"promoe": {}}, "launcher": [sys.executable, str(launcher)]}
    recipe["evaluate"] = {"num": 120, "guidance": [1.0], "steps": 2, "features": "digits"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    env = {**cluster.env, "OMP_NUM_THREADS": "1", "NODE_CACHE": str(tmp_path / "cache"), "PREFLIGHT": "0"}
    tool = [sys.executable, str(ROOT / "tools" / "scaling_study.py")]

    def call(*words: str) -> str:
        done = subprocess.run([*tool, *words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call("plan", str(study), "--recipe", str(tmp_path / "recipe.yaml"))
    output = call("submit", str(study), f"--output={tmp_path}/%A_%a.log", "--cpus-per-task=1")
    assert output.count("Submitted batch job") == 2 and "--dependency=aftercorr:" in output
    cluster.wait(lambda: not cluster.command("squeue", "-h", "-o", "%F").strip(), "both arrays", 400)
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    status = call("status", str(study))
    states = {line.split()[1]: line.split()[2] for line in status.splitlines()[1:-1]}
    assert states == {
        "promoe-seed0": "done",
        "promoe-seed0-evaluation": "done",
        "promoe-seed1": "failed",
        "promoe-seed1-evaluation": "waiting",
    }, status + logs
    (record,) = map(json.loads, (study / "runs" / "promoe-seed0" / "evaluation.jsonl").read_text().splitlines())
    assert record["step"] == 3 and not (study / "logs" / "promoe-seed1-evaluation.log").exists()
