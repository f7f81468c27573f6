"""Flags of all commands: launchers pass them on, a name has one meaning, and old spellings still work."""

import argparse
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest
from support.documented_commands import documented, parsers

from megapromoe import cli
from megapromoe.commands.renamed_flags import RENAMED, WITH_VALUE
from megapromoe.distributed import launch_environment
from megapromoe.distributed.launch_environment import LaunchEnvironment

# Commands with the words that they need beside flags.
NEEDED = {
    "plan": [],
    "check": [],
    "train": ["--run-dir", "r"],
    "sample": ["--run-dir", "r"],
    "evaluate": ["--run-dir", "r"],
    "routing": ["--run-dir", "r"],
    "upcycle": ["a", "b"],
    "study plan": ["s"],
    "study submit": ["s"],
    "benchmark": ["layer"],
}
OLD = [(command, old) for command, table in RENAMED.items() for old in table]
TORCHRUN = ("--standalone", "--nproc-per-node", "2", "-m"), ("--nproc-per-node", "2", "--no-python")
NUMBERS = {"N", "X", "S", "B", "E", "I", "K", "C", "SECONDS", "SHARE", "FLOPS", "B,B,...", "Q,Q,..."}
PATHS = {"DIR", "FILE", "PATH", "PAGE"}


def flags() -> dict[str, list[argparse.Action]]:
    """The actions of each flag, over the parsers of all commands; without that which deepspeed's launcher inserts."""
    actions = defaultdict(list)
    for parser in parsers().values():
        for action in parser._actions:
            for flag in {*action.option_strings} - {"--local_rank"}:
                actions[flag].append(action)
    return actions


def beginnings(ours: Iterable[str], theirs: argparse.ArgumentParser) -> list[str]:
    """Those of our flags with which longer options of another parser begin."""
    others = [option for action in theirs._actions for option in action.option_strings]
    return sorted({f"{flag}: {other}" for flag in ours for other in others if other != flag and other.startswith(flag)})


def passed_on(words: Sequence[str], capsys) -> list[str]:
    """The words that torchrun gives to `megapromoe`; fails if it refuses them."""
    from torch.distributed.run import get_args_parser

    try:
        read = get_args_parser().parse_args(list(words))
    except SystemExit:
        pytest.fail(f"torchrun {' '.join(words)}: {capsys.readouterr().err}")
    assert read.training_script == "megapromoe"
    return read.training_script_args


def test_no_flag_is_the_beginning_of_one_of_torchrun():
    from torch.distributed.run import get_args_parser

    assert len(flags()) > 100
    assert beginnings(flags(), get_args_parser()) == []
    assert beginnings(["--run", "--num"], get_args_parser())  # so the check sees what it is to see


@pytest.mark.full
def test_no_flag_is_refused_by_the_launcher_of_deepspeed(capsys):
    """Its parser is built inside of its function. `--num` is the beginning of three of its options."""
    from deepspeed.launcher.runner import parse_args

    for flag in flags():
        words = ["train", flag, "x", f"{flag}=x"]
        assert parse_args(["--num_gpus", "2", "--module", "megapromoe", *words]).user_args == words, flag
    with pytest.raises(SystemExit):
        parse_args(["--num_gpus", "2", "--module", "megapromoe", "sample", "--num", "3"])
    assert "ambiguous option: --num" in capsys.readouterr().err


@pytest.mark.parametrize("start", TORCHRUN, ids=["-m megapromoe", "--no-python megapromoe"])
def test_torchrun_passes_every_flag_on(start, capsys):
    for name, parser in parsers().items():
        command = name.removeprefix("megapromoe ").removesuffix(" --help").split()
        for action in parser._actions:
            for flag in action.option_strings:
                words = [*command, flag, "x", f"{flag}=x"]
                assert passed_on([*start, "megapromoe", *words], capsys) == words


@pytest.mark.parametrize("start", TORCHRUN, ids=["-m megapromoe", "--no-python megapromoe"])
def test_torchrun_passes_every_documented_command_on(start, capsys):
    """Commands that start with torchrun, as they are written, and all others behind torchrun."""
    ours = [shlex.split(command.text) for command in documented() if "megapromoe" in command.text.split()]
    commands = [words for words in ours if words[0] in ("megapromoe", "torchrun")]
    assert len(commands) > 60 and sum(words[0] == "torchrun" for words in commands) > 5
    for words in commands:
        rest = words[words.index("megapromoe") + 1 :]
        before = words[1 : words.index("megapromoe")] if words[0] == "torchrun" else start
        assert passed_on([*before, "megapromoe", *rest], capsys) == rest


def kind(action: argparse.Action) -> str:
    """What a flag takes: nothing, a number, a path, one of some words, or a text."""
    if action.nargs == 0:
        return "nothing"
    if action.choices:
        return "a choice" if not isinstance(next(iter(action.choices)), int) else "a number"
    metavar = action.metavar or ("N" if action.type in (int, float) else "TEXT")
    return "a number" if metavar in NUMBERS else "a path" if metavar in PATHS else "a text"


def test_a_flag_takes_the_same_in_every_command():
    different = {flag: kinds for flag, actions in flags().items() if len(kinds := {kind(a) for a in actions}) > 1}
    assert different.pop("--sizes") == {"a text", "a choice"}  # names of presets, or of their sizes
    assert different.pop("--device") == {"a text", "a choice"}  # also a GPU of several, or cuda and cpu
    assert different.pop("--scale") == {"a number", "a text"}  # of latents in `encode`, of a recipe in `study plan`
    assert different == {}


# ---- old spellings


def value_of(command: str, flag: str) -> list[str]:
    """A value that a flag takes."""
    (action,) = (a for a in parsers()[f"megapromoe {command} --help"]._actions if flag in a.option_strings)
    return [next(iter(action.choices))] if action.choices else ["3"]


@pytest.mark.parametrize("command, old", OLD)
def test_an_old_spelling_is_read_as_the_new_one_with_a_notice(command, old):
    new = RENAMED[command][old]
    value = value_of(command, new)
    needed = [] if new in NEEDED[command] else NEEDED[command]
    expected = cli.parse([*command.split(), *needed, new, *value])
    assert expected.notices == []
    for words in ([old, *value], [f"{old}={value[0]}"]):
        read = cli.parse([*command.split(), *needed, *words])
        (notice,) = read.notices
        assert notice == f"{old} is now spelled {new}; the next release refuses the former spelling"
        same = {"notices": [], "words": expected.words}
        assert vars(read) | same == vars(expected)


def test_every_new_spelling_exists_and_no_old_one_is_shown():
    for command, table in RENAMED.items():
        parser = parsers()[f"megapromoe {command} --help"]
        options = {flag for action in parser._actions for flag in action.option_strings}
        kept = {flag for name, flag in WITH_VALUE if name == command}
        assert set(table.values()) <= options and set(table) & options == kept
    assert sorted(NEEDED) == sorted(RENAMED)


def test_a_flag_that_had_a_value_has_its_present_meaning_without_it():
    for words in (["--json"], ["--json", "--top", "3"], ["--json", "model.num_experts=8"], ["--top", "3", "--json"]):
        read = cli.parse(["plan", *words])
        assert read.json is True and read.report is None and read.notices == []
    for words in (["--json", "plans.json"], ["--json=plans.json"], ["--json", "plans.json", "parallel.tp=2"]):
        read = cli.parse(["plan", *words])
        assert read.json is False and str(read.report) == "plans.json" and len(read.notices) == 1


@pytest.mark.parametrize("rank, lines", [(0, 1), (1, 0)])
def test_one_rank_prints_one_notice(rank, lines, monkeypatch, capsys):
    """Two old spellings are one line, and a job of many ranks prints it once."""
    monkeypatch.setattr(launch_environment, "detect", lambda: LaunchEnvironment("test", rank=rank, world=2))
    monkeypatch.setattr(cli.load("sample"), "run", lambda options, launch: 0)
    assert cli.main(["sample", "--run", "r", "--num=4"]) == 0
    notices = [line for line in capsys.readouterr().err.splitlines() if "former spelling" in line]
    start = "megapromoe: --run is now spelled --run-dir, --num is now spelled --num-images; the next"
    assert len(notices) == lines and all(line.startswith(start) for line in notices)


def test_a_command_without_ranks_prints_the_notice(monkeypatch, capsys):
    monkeypatch.setattr(cli.load("plan"), "run", lambda options, launch: 0)
    assert cli.main(["plan", "--batch", "64"]) == 0
    assert "--batch is now spelled --global-batch" in capsys.readouterr().err
    assert cli.main(["plan", "--global-batch", "64"]) == 0
    assert capsys.readouterr().err == ""


def test_the_words_of_other_commands_and_values_stay(capsys):
    """`--batch` of `encode` and sbatch's options are no old spellings, and a value is not a flag."""
    read = cli.parse(["encode", "--images", "x", "--autoencoder", "none", "--out", "o", "--batch", "4"])
    assert read.notices == [] and read.batch == 4
    read = cli.parse(["study", "submit", "s", "--jobs", "2", "--batch", "--steps"])
    assert read.notices == [] and read.passed_on == ["--batch", "--steps"]
