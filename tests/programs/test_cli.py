"""The command line: what it prints, what it hands on, and its exit codes."""

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import yaml
from support.latent_folders import Arrays, write
from support.levels import full

from megapromoe import cli
from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError, RunInUse
from megapromoe.config.options import Config
from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.distributed import launch_environment
from megapromoe.distributed.launch_environment import LaunchEnvironment, LaunchError, RanksMissing, StoreUnreachable
from megapromoe.planning.cost import parameters
from megapromoe.sampling.request import GenerationRequest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def alone(monkeypatch):
    """One process, whatever launched the tests."""
    monkeypatch.setattr(launch_environment, "detect", lambda: LaunchEnvironment("python"))


@pytest.fixture
def trained(monkeypatch, alone):
    """`training.loop`, replaced by one that notes its arguments."""
    calls = []
    loop = types.ModuleType("megapromoe.training.loop")
    loop.train = lambda *arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "megapromoe.training.loop", loop)
    return calls


@pytest.fixture
def sampled(monkeypatch, alone):
    """`sampling.generation`, replaced by one that notes its arguments."""
    calls = []
    generation = types.ModuleType("megapromoe.sampling.generation")
    generation.generate_images = lambda *arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "megapromoe.sampling.generation", generation)
    return calls


def fails_with(monkeypatch, trained, error: BaseException) -> None:
    def train(*arguments):
        raise error

    monkeypatch.setattr(sys.modules["megapromoe.training.loop"], "train", train)


# ---- show


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
    assert files - {"__init__", "command_line", "options", "renamed_flags"} == set(cli.COMMANDS)
    for name in cli.COMMANDS:
        command = cli.load(name)
        assert command.EPILOG and command.JOB in (True, False) and command.arguments and command.run


@pytest.mark.parametrize(
    "line", [["data", "check", "x"], ["inspect", "x"], ["launchers", "x"], ["routing", "--run-dir", "x"]]
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


# ---- tools/, the same commands from a checkout

TOOLS = {
    "benchmark": "benchmark",
    "convert_checkpoint": "convert",
    "encode_latents": "encode",
    "inspect_checkpoint": "inspect",
    "plot_routing": "routing",
    "scaling_study": "study",
    "upcycle": "upcycle",
}


def from_checkout(folder, *words: str) -> subprocess.CompletedProcess:
    """Runs a tool with the installed packages but without the editable installation of this one."""
    site = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-S", str(ROOT / "tools" / f"{words[0]}.py"), *words[1:]]
    env = {**os.environ, "PYTHONPATH": site}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_its_command_and_needs_no_installation(tool, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main([TOOLS[tool], "--help"])
    done = from_checkout(tmp_path, tool, "--help")
    assert done.returncode == 0 and done.stdout == capsys.readouterr().out, done.stderr
    assert from_checkout(tmp_path, tool, "--no-such-option").returncode == 2


def test_every_tool_is_known():
    others = {"checkout", "fuzz", "gpu_run", "train_digits"}
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} == {*TOOLS, *others}


def test_what_a_tool_starts_imports_the_same_package(tmp_path):
    """A study of an uninstalled checkout, whose trainings are processes of their own."""
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\necho "$PYTHONPATH" > "$(dirname "$0")/path"\n')
    launcher.chmod(0o755)
    plan = ["plan", "study", "--preset", "digits", "--seeds", "0", "--launcher", str(launcher)]
    assert from_checkout(tmp_path, "scaling_study", *plan).returncode == 0
    assert from_checkout(tmp_path, "scaling_study", "run", "study").returncode == 1
    assert (tmp_path / "path").read_text().split(os.pathsep)[0] == str(ROOT)


@pytest.mark.parametrize(
    "line", [[], ["fly"], ["train"], ["train", "--run-dir", "x", "--pre", "digits"], ["show", "-q"]]
)
def test_a_wrong_command_exits_with_2(capsys, line):
    with pytest.raises(SystemExit) as left:
        cli.main(line)
    assert left.value.code == 2
    assert "error" in capsys.readouterr().err


def test_an_early_reader_is_no_error():
    command = f"{sys.executable} -m megapromoe show --keys | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("model:") and done.stderr == ""


def with_output(line: list[str], output, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megapromoe", *line]
    return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=120, **more)


@pytest.fixture
def unread():
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


OUTPUTS = {  # of each command that prints without a run: words that print much
    "show": ["show", "--keys"],
    "plan": ["plan", "--preset", "promoe_s", "--gpus-per-node", "2", "--top", "40"],
    "launchers": ["launchers", "scripts"],
}


@pytest.mark.parametrize(
    "line", [*OUTPUTS.values(), ["--help"], ["--version"], ["data", "check", "--help"]], ids=" ".join
)
@pytest.mark.parametrize("unbuffered", ["", full("1")], ids=["buffered", "unbuffered"])
def test_closed_output_ends_a_command_without_a_message(line, unbuffered, unread, tmp_path):
    done = with_output(line, unread, cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.full
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_with_closed_output_ends_without_a_message(name, unread):
    done = with_output([name, "--help"], unread)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.full
def test_a_dry_run_with_closed_output_ends_without_a_message(unread, tmp_path):
    done = with_output(["train", "--run-dir", str(tmp_path / "run"), "--dry-run"], unread)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_to_a_full_disk_is_a_sentence():
    with open("/dev/full", "w") as disk:
        done = with_output(["show", "--keys"], disk)
    assert done.returncode == 1
    assert done.stderr == "megapromoe: the output cannot be written: No space left on device\n"


def test_an_error_of_a_pipe_that_is_not_the_output_is_a_bug(monkeypatch):
    def run(options, launch):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli.load("show"), "run", run)
    with pytest.raises(BrokenPipeError):
        cli.main(["show"])


@pytest.mark.parametrize("where", ["unread", "/dev/full"])
def test_a_rank_goes_on_where_its_output_cannot_be_written(where, unread, tmp_path):
    """It ends as if somebody had read; an error there would leave the other ranks waiting."""
    code = (
        "import sys; from megapromoe import cli\n"
        "def run(options, launch):\n"
        "    for i in range(20000): print('x' * 80); print('x' * 80, file=sys.stderr)\n"
        "    sys.stdout.flush(); open(options.run / 'end', 'w').close(); return 0\n"
        "cli.load('train').run = run; sys.exit(cli.main(['train', '--run-dir', '.']))"
    )
    with contextlib.ExitStack() as stack:
        output = unread if where == "unread" else stack.enter_context(open(where, "w"))
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=output, stderr=output, cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and (tmp_path / "end").exists()


# ---- train


def test_train_passes_the_resolved_config_on(trained, tmp_path):
    line = ["train", "train.lr=1e-2", "--run-dir", str(tmp_path), "model.depth=2"]
    assert cli.main(line) == 0
    config = resolve("digits", overrides=["train.lr=1e-2", "model.depth=2"])
    assert trained == [(config, tmp_path, LaunchEnvironment("python"), None, (), None)]
    assert cli.main([*line, "--step", "7", "--allow", "data.seed", "--allow", "train.seed"]) == 0
    assert trained[1][3:] == (7, ("data.seed", "train.seed"), None)


def test_the_option_that_the_deepspeed_launcher_adds_is_accepted(trained, tmp_path):
    assert cli.main(["--local_rank=1", "train", "--run-dir", str(tmp_path)]) == 0
    assert trained


def test_a_config_file_replaces_the_default_preset(trained, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: {source: synthetic}\n")
    assert cli.main(["train", "--run-dir", str(tmp_path), "--config", str(file)]) == 0
    assert trained[0][0] == resolve(file=file)


def test_train_checks_the_ranks_of_the_launcher(trained, monkeypatch, capsys):
    monkeypatch.setattr(launch_environment, "detect", lambda: LaunchEnvironment("torchrun", world=3))
    assert cli.main(["train", "--run-dir", "x", "parallel.tp=2"]) == 2
    errors = capsys.readouterr().err
    assert "parallel.tp = 2: must divide the 3 ranks" in errors and "--run-dir" not in errors
    assert not trained


def test_other_ranks_leave_a_config_error_to_rank_0(trained, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(launch_environment, "detect", lambda: LaunchEnvironment("torchrun", rank=1, world=2))
    assert cli.main(["train", "--run-dir", "x", "model.dept=2"]) == 2
    assert capsys.readouterr().err == ""
    assert waited == [cli.GRACE]


def test_a_wrong_launch_exits_with_2(trained, monkeypatch, capsys):
    def detect():
        raise LaunchError("RANK is set but WORLD_SIZE not")

    monkeypatch.setattr(launch_environment, "detect", detect)
    assert cli.main(["train", "--run-dir", "x"]) == 2
    assert capsys.readouterr().err == "megapromoe: RANK is set but WORLD_SIZE not\n"


def test_dry_run_describes_and_starts_nothing(trained, tmp_path, capsys):
    line = ["train", "--run-dir", str(tmp_path / "new"), "--dry-run"]
    assert cli.main([*line, "--yaml"]) == 0
    output = capsys.readouterr().out
    assert "layout over 1 rank" in output and f"{tmp_path / 'new'}: a new run" in output
    assert yaml.safe_load(output)["model"]["depth"] == resolve("digits").model.depth
    assert cli.main([*line, "data.condition_dropout=0.2", "train.steps=1000", "train.accumulation=2"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["parameters"] == parameters(resolve("digits").model).in_words
    assert lines["data"] == "digits: 1,797 records of 1x8x8, 10 classes"
    assert lines["steps"].startswith("1,000 of 128 images")
    assert lines["batch"] == "128 images = 64 for a rank x data parallel 1 x accumulation 2"
    assert lines["run"] == f"{tmp_path / 'new'}: a new run"
    assert {"model", "layout", "precision", "optimizer"} <= lines.keys()
    assert not trained and not (tmp_path / "new").exists()


def test_dry_run_reports_that_the_start_would_be_refused(trained, tmp_path, capsys):
    with RunDirectory.open(tmp_path, resolve("digits"), 1) as run:
        run.metrics.write_text('{"step": 1}\n')
    assert cli.main(["train", "--run-dir", str(tmp_path), "--dry-run", "model.depth=6"]) == 2
    assert "model.depth: the run has 4, not 6" in capsys.readouterr().err
    before = sorted(tmp_path.rglob("*"))
    latents = ["data.source=latents", f"data.path={tmp_path / 'nowhere'}", f"data.cache={tmp_path / 'cache'}"]
    assert cli.main(["train", "--run-dir", str(tmp_path), "--dry-run", *latents]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("megapromoe: 2 problems in this start:") and "data.source: the run has" in captured.err
    )
    assert f"{tmp_path / 'nowhere'} holds no manifest.json; create it with megapromoe encode" in captured.err
    assert "4 blocks" in captured.out and f"{tmp_path}: refused, see below" in captured.out
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_opens_the_data(trained, tmp_path, capsys):
    """Each fault is found as by the start itself, and nothing is copied to the cache."""
    write(tmp_path / "latents", Arrays(count=40, classes=4, shape=(2, 4, 4)))
    model = ["model.in_channels=2", "model.input_size=4", "model.num_classes=4", "train.global_batch=8"]
    data = ["data.source=latents", f"data.path={tmp_path / 'latents'}", f"data.cache={tmp_path / 'cache'}"]
    line = ["train", "--run-dir", str(tmp_path / "new"), "--dry-run", *model, *data]
    assert cli.main(line) == 0
    assert "latents: 40 records of 2x4x4, 4 classes" in capsys.readouterr().out
    for fault, message in {
        "train.global_batch=41": "holds 40 records, fewer than train.global_batch = 41",
        "model.in_channels=4": "records have shape (2, 4, 4), the model takes (4, 4, 4)",
        "model.num_classes=9": "4 classes, the model has 9",
    }.items():
        assert cli.main([*line, fault]) == 2
        assert message in capsys.readouterr().err
    next((tmp_path / "latents").glob("shard-*")).unlink()
    assert cli.main(line) == 2
    assert "cannot be opened" in capsys.readouterr().err
    assert not trained and sorted(p.name for p in tmp_path.iterdir()) == ["latents"]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("digits", "fashion")])
def test_a_large_preset_trains_on_nothing_that_was_not_chosen(preset, trained, tmp_path, capsys):
    line = ["train", "--preset", preset, "--run-dir", str(tmp_path / "run")]
    remedies = ["data.source=latents data.path=DIR", "data.source=synthetic"]
    for words in ([], ["--dry-run"]):
        assert cli.main([*line, *words]) == 2
        errors = capsys.readouterr().err
        assert "data.source = 'unset': no training data is chosen" in errors and all(r in errors for r in remedies)
    assert not trained and not (tmp_path / "run").exists()
    assert cli.main([*line, "data.path=latents"]) == 2
    assert "data.path = 'latents': is for data.source = latents or fashion_mnist: set that" in capsys.readouterr().err
    assert cli.main([*line, "data.source=synthetic"]) == 0 and trained[0][0].data.source == "synthetic"
    assert cli.main([*line, "data.source=latents", "data.path=DIR"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["show", "--preset", "promoe_l"],
        ["plan", "--preset", "promoe_xl", "--nodes", "1"],
        ["study", "plan", "study", "--preset", "promoe_b"],
        ["benchmark", "all", "--quick", "--dry-run"],
    ],
    ids=lambda words: words[0],
)
def test_what_reads_no_data_needs_none(words, alone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 0
    if words[0] == "show":
        assert "source: unset" in capsys.readouterr().out
        assert cli.main([*words, "--to-train"]) == 2
    if words[0] == "study":
        assert "cannot be trained yet: data.source = 'unset'" in capsys.readouterr().out
        for action in (["run"], ["submit", "--dry-run"]):
            assert cli.main(["study", action[0], "study", *action[1:]]) == 2
            assert "data.source=synthetic" in capsys.readouterr().err


def test_changing_the_steps_of_a_run_does_not_change_its_warm_up(trained, tmp_path, capsys):
    def warmup(*words: str) -> int:
        assert cli.main(["train", "--run-dir", str(tmp_path), *words]) == 0
        return trained[-1][0].train.warmup

    with RunDirectory.open(tmp_path, resolve("digits", overrides=["train.steps=20"]), 1) as run:
        assert warmup() == 30, "of a run that took no step nothing is kept"
        run.metrics.write_text('{"step": 1}\n')
    assert warmup("train.steps=20") == warmup() == warmup("train.steps=9000") == 2
    assert warmup("train.warmup=7") == 7
    assert cli.main(["train", "--run-dir", str(tmp_path), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "train.steps: 20 -> 500" in output and "train.warmup" not in output


def test_dry_run_of_a_run_in_use_may_be_tried_again(trained, tmp_path, capsys):
    with RunDirectory.claim(tmp_path, resolve("digits"), 1):
        assert cli.main(["train", "--run-dir", str(tmp_path), "--dry-run"]) == 1
    assert "in use by a live run" in capsys.readouterr().err
    assert cli.main(["train", "--run-dir", str(tmp_path), "--yaml"]) == 2 and not trained


def test_errors_of_the_package_are_sentences(trained, monkeypatch, capsys):
    fails_with(monkeypatch, trained, RunInUse("runs/a: in use"))
    assert cli.main(["train", "--run-dir", "x"]) == 1
    assert capsys.readouterr().err == "megapromoe: runs/a: in use\n"


@pytest.mark.parametrize(
    "error, message, code",
    [
        (RunInUse, "", 1),
        (RunDirectoryError, "", 2),
        (RanksMissing, "megapromoe, rank 1: why\n", 1),
        (StoreUnreachable, "megapromoe, rank 1: why\n", 1),
        (LaunchError, "megapromoe, rank 1: why\n", 2),
    ],
)
def test_another_rank_than_0_reports_its_own_error(trained, monkeypatch, capsys, error, message, code):
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(launch_environment, "detect", lambda: LaunchEnvironment("torchrun", rank=1, world=2))
    fails_with(monkeypatch, trained, error("why"))
    assert cli.main(["train", "--run-dir", "x"]) == code
    assert capsys.readouterr().err == message


def test_what_is_no_error_for_the_user_is_a_bug_and_keeps_its_traceback(trained, monkeypatch):
    from megapromoe.data.sample_stream import SampleStream

    loop = sys.modules["megapromoe.training.loop"]
    monkeypatch.setattr(loop, "train", lambda *_: SampleStream.micro_batches(0, 2, 0, 1, 7))
    with pytest.raises(ValueError, match="train.global_batch: 7"):
        cli.main(["train", "--run-dir", "x"])
    monkeypatch.setattr(loop, "train", lambda *_: json.loads("no json"))
    with pytest.raises(ValueError):
        cli.main(["train", "--run-dir", "x"])
    fails_with(monkeypatch, trained, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", "--run-dir", "x"])


def test_a_package_that_is_missing_is_named_with_the_environment_and_is_not_tried_again(trained, monkeypatch, capsys):
    fails_with(monkeypatch, trained, ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed.ops"))
    assert cli.main(["train", "--run-dir", "x"]) == 2
    errors = capsys.readouterr().err
    assert f"deepspeed is not installed in the environment that this process runs in, {sys.prefix}; install" in errors
    wheel = ImportError("libcudart.so.12: cannot open shared object file", name="torch._C", path="/x/torch/_C.so")
    fails_with(monkeypatch, trained, wheel)
    assert cli.main(["train", "--run-dir", "x"]) == 2
    assert "torch, in the environment" in capsys.readouterr().err
    for bug in (
        ModuleNotFoundError("no", name="megapromoe.nothing"),
        ImportError("cannot import name 'x' from 'torch'", name="torch", path="/x/torch/__init__.py"),
        ImportError("no name"),
    ):
        fails_with(monkeypatch, trained, bug)
        with pytest.raises(ImportError):
            cli.main(["train", "--run-dir", "x"])


def test_an_interrupt_exits_with_130(trained, monkeypatch, capsys):
    fails_with(monkeypatch, trained, KeyboardInterrupt())
    assert cli.main(["train", "--run-dir", "x"]) == 130
    assert capsys.readouterr().err == "megapromoe: interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_exit_code_needs_no_place_for_the_message():
    """stderr is a file on a full disk, or a terminal that is gone."""
    with open("/dev/full", "w") as full:
        words = ["train", "--run-dir", "x", "train.steps=none"]
        done = subprocess.run([sys.executable, "-m", "megapromoe", *words], stderr=full, timeout=60)
    assert done.returncode == 2


def test_torchrun_passes_the_command_on_and_one_rank_reports_the_error(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "megapromoe", "train", "--run-dir", str(tmp_path / "run"), "trian.lr=1", "parallel.tp=4"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode
    assert done.stderr.count("2 problems in the configuration") == 1
    assert "did you mean train?" in done.stderr and "parallel.tp = 4: must divide the 2 ranks" in done.stderr
    assert not (tmp_path / "run").exists()


# ---- sample


def test_sample_passes_all_options_on(sampled, tmp_path):
    out = tmp_path / "grid.png"
    line = ["sample", "--run-dir", str(tmp_path), "--class", "3", "5", "sample.batch=8", "--guidance", "1.5"]
    line += [
        "--out",
        str(out),
        "--count",
        "4",
        "--step",
        "500",
        "--weights",
        "master",
        "--seed",
        "7",
        "--steps",
        "9",
    ]
    assert cli.main([*line, "--method", "heun"]) == 0
    request = GenerationRequest(
        tmp_path,
        out,
        4,
        only=(3, 5),
        scales=("1.5",),
        step=500,
        weights="master",
        overrides=("sample.batch=8", "sample.steps=9", "sample.seed=7", "sample.method=heun"),
        preview=True,
    )
    assert sampled == [(request, LaunchEnvironment("python"))]


def test_sample_draws_all_classes_by_default(sampled, tmp_path):
    assert cli.main(["sample", "--run-dir", "r", "--out", "o.png", "--per-class", "2"]) == 0
    assert sampled[0][0] == GenerationRequest(Path("r"), Path("o.png"), 2, preview=True)
    assert (sampled[0][0].step, sampled[0][0].weights, sampled[0][0].overrides) == (None, "ema", ())


def test_sample_writes_into_the_run_by_default(sampled):
    assert cli.main(["sample", "--run-dir", "r"]) == 0
    assert sampled[0][0] == GenerationRequest(
        Path("r"), Path("r/samples/step.png"), 10, preview=True, complete_name=True
    )
    assert cli.main(["sample", "--run-dir", "r", "--num-images", "8"]) == 0
    assert sampled[1][0] == GenerationRequest(Path("r"), Path("r/samples/step"), 8, complete_name=True)


def test_sample_changes_only_how_images_are_drawn(sampled, capsys):
    assert cli.main(["sample", "--run-dir", "r", "--out", "o.png", "model.depth=3", "train.lr=1"]) == 2
    errors = capsys.readouterr().err
    assert "'model.depth=3'" in errors and "'train.lr=1'" in errors
    assert not sampled


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_count_must_be_positive(sampled, capsys, count):
    with pytest.raises(SystemExit) as left:
        cli.main(["sample", "--run-dir", "r", "--out", "o.png", "--count", count])
    assert left.value.code == 2
