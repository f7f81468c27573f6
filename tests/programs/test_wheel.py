"""The wheel: built from the files of the checkout, unpacked elsewhere, and used without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BESIDE = {"ds_configs": ("json",), "launchers": ("sh", "yaml")}  # folders that are inside the package once installed


def files_beside(folder: str) -> set[str]:
    """Their paths in the checkout."""
    return {p.relative_to(ROOT).as_posix() for end in BESIDE[folder] for p in (ROOT / folder).rglob(f"*.{end}")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel; it comes with megapromoe[dev]")
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("megapromoe", *BESIDE):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("megapromoe-*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def call(unpacked: Path, folder: Path, *command: str, **env: str) -> str:
    """Runs a command in `folder` with the unpacked wheel in the place of an installation; returns its stdout."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("MEGAPROMOE", "RUN_DIR", "NPROC"))}
    keep |= {"PYTHONPATH": str(unpacked), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=keep | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def program(unpacked: Path, folder: Path, *words: str) -> str:
    return call(unpacked, folder, sys.executable, "-m", "megapromoe", *words)


def test_the_wheel_has_the_complete_package_and_nothing_else(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        p.relative_to(ROOT).as_posix() for end in ("py", "yaml", "typed") for p in ROOT.glob(f"megapromoe/**/*.{end}")
    }
    beside = {f"megapromoe/{name}" for folder in BESIDE for name in files_beside(folder)}
    assert files == package | beside
    assert {"megapromoe/py.typed", "megapromoe/studies/recipes/digits.yaml", "megapromoe/launchers/slurm.sh"} <= files
    assert "megapromoe/launchers/kubernetes/jobset.yaml" in files


def test_show_finds_the_deepspeed_files(unpacked, tmp_path):
    where = call(unpacked, tmp_path, sys.executable, "-c", "import megapromoe; print(megapromoe.__file__)")
    assert Path(where.strip()).parent == unpacked / "megapromoe"
    assert "deepspeed: bf16_zero2" in program(
        unpacked, tmp_path, "show", "--preset", "promoe_b", "train.deepspeed=bf16_zero2"
    )


@pytest.mark.full
def test_a_study_is_planned_by_the_name_of_its_recipe(unpacked, tmp_path):
    program(unpacked, tmp_path, "study", "plan", "study", "--recipe", "digits")
    assert (tmp_path / "study" / "study.yaml").is_file()
    assert len(list((tmp_path / "study" / "tasks").iterdir())) == 27
    submitted = program(unpacked, tmp_path, "study", "submit", "study", "--dry-run").split()
    assert submitted[2:] == [str(unpacked / "megapromoe/launchers/scaling_experts.sh"), str(tmp_path / "study")]


@pytest.mark.full
def test_launchers_are_written_out_and_start_the_installed_package(unpacked, tmp_path):
    output = program(unpacked, tmp_path, "launchers", "jobs")
    written = {f"launchers/{Path(line).relative_to('jobs')}": tmp_path / line for line in output.splitlines()}
    assert set(written) == files_beside("launchers")
    assert set(written.values()) == {path for path in (tmp_path / "jobs").rglob("*") if path.is_file()}
    for name, path in written.items():
        assert path.read_bytes() == (ROOT / name).read_bytes()
        assert os.access(path, os.X_OK) == os.access(ROOT / name, os.X_OK)
    chosen = {"MEGAPROMOE_PYTHON": sys.executable}
    output = call(unpacked, tmp_path, "bash", "jobs/promoe_xl.sh", "--dry-run", "--nodes=2", **chosen)
    assert f"{tmp_path}/jobs/promoe_xl.sh" in output and f"{sys.executable} -m megapromoe train" in output
    tiny = ["train.steps=2", "train.warmup=0", "model.hidden_size=32", "train.save_every=0"]
    run = {"NPROC": "1", "RUN_DIR": "run", "NODE_CACHE": str(tmp_path / "cache")}
    call(unpacked, tmp_path, "jobs/local.sh", "digits", *tiny, **chosen, **run)
    assert list((tmp_path / "run" / "checkpoints").glob("step-00000002"))


def test_launchers_overwrite_nothing(unpacked, tmp_path):
    program(unpacked, tmp_path, "launchers", "jobs")
    program(unpacked, tmp_path, "launchers", "jobs")
    (tmp_path / "jobs" / "local.sh").write_text("years of work")
    (tmp_path / "jobs" / "node.sh").unlink()
    with pytest.raises(AssertionError, match="local.sh would be overwritten; choose another folder"):
        program(unpacked, tmp_path, "launchers", "jobs")
    assert (tmp_path / "jobs" / "local.sh").read_text() == "years of work"
    assert not (tmp_path / "jobs" / "node.sh").exists()
