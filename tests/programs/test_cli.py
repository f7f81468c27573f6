"""The command line: help, what it imports, `show`, refused commands."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megapromoe import cli
from megapromoe.config.options import Config
from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import resolve, to_yaml

ROOT = Path(__file__).parents[2]


def test_show_lists_every_preset_with_its_size(capsys):
    assert cli.main(["show"]) == 0
    output = capsys.readouterr().out
    rows = {line.split()[0]: line for line in output.splitlines() if line}
    assert set(PRESETS) <= set(rows)
    assert "1,062,684,704" in rows["promoe_l"] and "458,262,560" in rows["promoe_l"]
    assert "dense" in rows["dit_l"]


def test_show_prints_a_config_that_can_be_read_back(capsys, tmp_path):
    assert cli.main(["show", "--preset", "promoe_b", "parallel.ep=8", "model.top_k=2"]) == 0
    file = tmp_path / "shown.yaml"
    file.write_text(capsys.readouterr().out)
    assert resolve(file=file) == resolve("promoe_b", overrides=["parallel.ep=8", "model.top_k=2"])
    assert cli.main(["show", "--config", str(file)]) == 0
    assert capsys.readouterr().out == file.read_text()


def test_show_prints_size_and_layout(capsys):
    cli.main(["show", "--preset", "promoe_s", "--ranks", "8", "parallel.tp=2", "parallel.ep=8"])
    output = capsys.readouterr().out
    assert "total 75,543,584  trainable 75,445,280  active 32,993,312" in output
    assert "layout over 8 ranks" in output
    assert "tp 2 x data parallel dp 4" in output
    assert "2 on 4 ranks, 1 on 4 ranks of an ep group" in output
    assert "micro-batch 64 x dp 4" in output
    assert "on the device" in output


@pytest.mark.parametrize(
    "overrides, ranks",
    [
        ([], 1),
        (["parallel.tp=2", "parallel.ep=2"], 2),
        (["parallel.tp=2", "parallel.ep=2", "parallel.expert_tp=true"], 4),
    ],
)
def test_show_takes_the_fewest_ranks(capsys, overrides, ranks):
    assert cli.main(["show", "--preset", "digits", *overrides]) == 0
    assert f"layout over {ranks} rank" in capsys.readouterr().out


def test_show_keys_lists_every_field(capsys):
    assert cli.main(["show", "--keys"]) == 0
    output = capsys.readouterr().out
    shown = [line.split("=")[0].strip() for line in output.splitlines() if line.startswith("  ")]
    everything = yaml.safe_load(to_yaml(Config()))
    assert shown == [f"{section}.{key}" for section, keys in everything.items() for key in keys]
    assert "parallel.expert_tp=false" in output and "(identity | sigmoid | softmax)" in output
    for words in ("(1 or more)", "(above 0)", "(from 0 to below 1)", "(from 0 to 1)"):
        assert words in output
    assert "inf)" not in output


def test_all_problems_of_a_config_are_in_one_message(capsys):
    assert cli.main(["show", "--preset", "digits", "model.dept=3", "--ranks", "3", "lr=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        "3 problems" in captured.err and "did you mean depth" in captured.err and "train.global_batch" in captured.err
    )


def imported_by(*words: str) -> set[str]:
    """Names of all modules that a command line imports."""
    code = (
        "import sys; from megapromoe import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('IMPORTED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    return set(done.stdout.rpartition("IMPORTED")[2].split())


SLOW = {"torch", "deepspeed", "numpy", "matplotlib", "scipy", "sklearn", "PIL", "tqdm"}


def test_help_imports_no_command_and_show_only_its_own():
    needless = SLOW | {"yaml", "logging", "pydantic"}
    modules = imported_by("--help")
    ours = {name for name in modules if name.startswith("megapromoe")}
    assert ours == {"megapromoe", "megapromoe.cli", "megapromoe.errors", "megapromoe.commands"} | {
        "megapromoe.imports",
        "megapromoe.commands.command_line",
        "megapromoe.commands.renamed_flags",
    }
    assert not needless & modules
    modules = imported_by("show", "--preset", "digits")
    commands = {name.split(".")[2] for name in modules if name.startswith("megapromoe.commands.")}
    assert commands == {"command_line", "options", "renamed_flags", "show"}
    assert not SLOW & modules


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_that_needs_no_torch(name):
    assert not {"torch", "deepspeed", "matplotlib", "sklearn", "scipy"} & imported_by(name, "--help")


def test_the_table_of_commands_and_their_files_agree():
    files = {path.stem for path in (ROOT / "megapromoe" / "commands").glob("*.py")}
    parts = {"__init__", "command_line", "encode_sources", "options", "plan_rehearsal", "plan_report", "renamed_flags"}
    parts |= {"routing_place", "routing_trace", "study_options", "study_plan"}
    assert files - parts == set(cli.COMMANDS)
    for name in cli.COMMANDS:
        command = cli.load(name)
        assert command.EPILOG and command.JOB in (True, False) and command.arguments and command.run


@pytest.mark.parametrize(
    "line", [["data", "check", "x"], ["inspect", "x"], ["launchers", "x"], ["routing", "place", "--run-dir", "x"]]
)
def test_a_command_that_takes_no_settings_refuses_them(line, capsys):
    for more, reason in (["model.depth=3"], "takes no settings"), (["a", "b"], "unrecognized arguments"):
        with pytest.raises(SystemExit) as left:
            cli.main([*line, *more])
        assert left.value.code == 2 and reason in capsys.readouterr().err


def test_an_error_of_the_operating_system_is_one_message(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["launchers", str(tmp_path / "file")]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"megapromoe: {tmp_path}/file") and errors.count("\n") == 1


@pytest.mark.parametrize(
    "module, function, line",
    [
        ("study", "open_study", ["run", "study"]),
        ("encode", "_encode", ["--npz", "latents", "--out", "out"]),
        ("benchmark", "_measure", ["layer", "--device", "cpu", "--sizes", "digits"]),
    ],
)
def test_an_interrupt_prints_how_to_continue(module, function, line, monkeypatch, capsys, alone):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.load(module), function, interrupt)
    assert cli.main([module, *line]) == 130
    errors = capsys.readouterr().err
    assert errors.startswith("megapromoe: interrupted") and "repeat the command to continue" in errors


@pytest.mark.parametrize(
    "line", [[], ["fly"], ["train"], ["train", "--run-dir", "x", "--pre", "digits"], ["show", "-q"]]
)
def test_a_wrong_command_exits_with_2(capsys, line):
    with pytest.raises(SystemExit) as left:
        cli.main(line)
    assert left.value.code == 2
    assert "error" in capsys.readouterr().err
