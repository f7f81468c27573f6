"""Options that documents, helps and messages name exist: `section.option` words, and `--flags` of our programs."""

import argparse
import ast
import re
from pathlib import Path

from support import fuzz_program
from support.documented_commands import DOCUMENTS, ROOT, helps, parsers

from megapromoe.benchmark import gpu_program, launch_program
from megapromoe.commands.renamed_flags import RENAMED as RENAMED_FLAGS
from megapromoe.config.options import Config, to_dict
from megapromoe.config.renamed_options import RENAMED
from megapromoe.evaluation import scene_tasks

SETTINGS = {f"{section}.{name}" for section, values in to_dict(Config()).items() for name in values}
SECTIONS = "|".join(to_dict(Config()))
# A setting, unless it is part of a path, of a module's name, or of a longer word.
SETTING = re.compile(rf"(?<![\w./])({SECTIONS})\.([a-z][a-z0-9_]*)(?![\w./(])")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w-])")
# Words that look like a setting and are none: files, a placeholder, a part of torch's files, attributes in docstrings.
NO_SETTINGS = {
    "sample.py",
    "train.py",
    "data.md",
    "data.noun",
    "train.md",
    "sample.key",
    "data.pkl",
    "model.null_class",
    "model.layouts",
}
# Flags of other programs that our documents and messages name.
OTHERS = {
    "SLURM": "--account --array --batch --cpus-per-task --exclude --gpus-per-node --job-name --kill-on-bad-exit --nodes"
    " --no-requeue --ntasks --ntasks-per-node --nodelist --option --partition --requeue --cpu-bind --distribution"
    " --export --mem --mem-per-cpu --mem-per-gpu --mpi --pty --resv-ports --signal --time",
    "torchrun": "--max-restarts --nproc-per-node --shutdown-timeout --standalone",
    "deepspeed": "--module",
    "tensorboard": "--logdir",
    "Open MPI": "--prefix",
    "pip": "--force-reinstall --no-binary --no-deps",
    "docker": "--ipc --shm-size",
    "nvidia-smi": "--gpu-reset",
}


def flags() -> set[str]:
    """Of every command, of the tools and of the launchers."""
    known = {flag for parser in parsers().values() for action in parser._actions for flag in action.option_strings}

    # Programs in `tools/`, and `python -m megapromoe.evaluation.scene_tasks`.
    for program in (gpu_program, launch_program, fuzz_program, scene_tasks):
        known |= set(FLAG.findall(Path(program.__file__).read_text()))
    known |= set(FLAG.findall((ROOT / "tools" / "train_scenes.py").read_text()))
    known.add("--dry-run")  # of launchers
    return known | {flag for words in OTHERS.values() for flag in words.split()}


def strings_of(file: Path) -> list[tuple[int, str]]:
    """The strings of a file with their lines, docstrings among them; a formatted one in one piece."""
    strings = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
            strings.append((node.lineno, "".join(map(str, parts))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append((node.lineno, node.value))
    return strings


def texts() -> list[tuple[str, str]]:
    """Everything that users read, with its place."""
    places = [(str(path.relative_to(ROOT)), path.read_text()) for path in [*DOCUMENTS, ROOT / "CHANGELOG.md"]]
    for script in (ROOT / "launchers").glob("*.sh"):
        messages = re.findall(r"^##.*|HELP\+?='[^']*'|(?:die|note|echo) \"[^\"]*\"", script.read_text(), flags=re.M)
        places.append((f"launchers/{script.name}", "\n".join(messages)))
    places += list(helps().items())
    for file in (file for folder in ("megapromoe", "examples", "tools") for file in (ROOT / folder).rglob("*.py")):
        sentences = [(line, text) for line, text in strings_of(file) if text.count(" ") > 2]
        places += [(f"{file.relative_to(ROOT)}:{line}", text) for line, text in sentences]
    return places


def test_every_setting_that_is_named_exists():
    named = [(place, match[0]) for place, text in texts() for match in SETTING.finditer(text)]
    assert len(named) > 300
    assert sorted({name for _, name in named} & SETTINGS) and len({name for _, name in named} & SETTINGS) > 60
    unknown = {(place, name) for place, name in named if name not in SETTINGS | NO_SETTINGS}
    # The changelog lists the former names, which `test_renamed_options.py` compares with the table.
    allowed = {("CHANGELOG.md", name) for name in RENAMED}
    assert sorted(f"{place}: {name}" for place, name in unknown - allowed) == []


def test_every_flag_that_is_named_exists():
    known = flags()
    named = [(place, flag) for place, text in texts() for flag in FLAG.findall(text)]
    assert len(named) > 300
    old = {("docs/troubleshooting.md", "--run"), ("docs/troubleshooting.md", "--num")}  # what torchrun refuses
    old |= {("CHANGELOG.md", flag) for table in RENAMED_FLAGS.values() for flag in table}
    assert {flag for _, flag in old & set(named)} == {flag for _, flag in old}
    assert sorted({f"{place}: {flag}" for place, flag in set(named) - old if flag not in known}) == []


def test_flags_of_others_are_not_ours():
    """A name on that list must not hide that an option of ours is gone."""
    ours = {flag for parser in parsers().values() for action in parser._actions for flag in action.option_strings}
    assert {flag for words in OTHERS.values() for flag in words.split()} & ours == {
        "--batch",
        "--gpus-per-node",
        "--nodes",
    }


def test_the_tests_detect_what_is_missing():
    assert SETTING.search("set train.lrr=1")[0] == "train.lrr" not in SETTINGS
    assert FLAG.findall("give --no-such-flag=1") == ["--no-such-flag"] and "--no-such-flag" not in flags()
    assert isinstance(parsers()["megapromoe --help"], argparse.ArgumentParser) and not SETTING.search(
        "megapromoe.data.latents"
    )
