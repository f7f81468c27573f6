"""Former names of options on command lines: one notice on one rank, and none for files that the program wrote."""

import pytest

from megapromoe import cli
from megapromoe.config import renamed_options
from megapromoe.distributed import launch_environment
from megapromoe.distributed.launch_environment import LaunchEnvironment


@pytest.fixture
def notices(caplog):
    """A function that starts a command and returns the notices about former names of options in it."""

    def start(*words: str) -> list[str]:
        caplog.clear()
        renamed_options._log_once.cache_clear()  # as in a new process
        assert cli.main(words) == 0
        return [r.getMessage() for r in caplog.records if r.name == renamed_options.__name__]

    return start


CLIP = "train.clip: is now spelled train.max_grad_norm; the next release refuses the former spelling"


def test_rank_0_gives_one_notice_of_a_former_name(trained, monkeypatch, notices, tmp_path):
    line = ["train", "--run-dir", str(tmp_path), "train.clip=2"]
    for rank, expected in ((1, []), (0, [CLIP]), (1, [])):
        monkeypatch.setattr(
            launch_environment, "detect", lambda rank=rank: LaunchEnvironment("torchrun", rank, world=2)
        )
        assert notices(*line) == expected
    assert {call[0].train.max_grad_norm for call in trained} == {2.0}


def test_files_that_the_program_wrote_with_former_names_give_no_notice(trained, notices, tmp_path):
    run, study, copied = tmp_path / "run", tmp_path / "study", tmp_path / "mine" / "config.yaml"
    (run / "checkpoints").mkdir(parents=True)
    (study / "tasks").mkdir(parents=True)
    (study / "study.yaml").touch()
    copied.parent.mkdir()
    for file, expected in ((run / "config.yaml", []), (study / "tasks" / "tc.yaml", []), (copied, [CLIP])):
        file.write_text("train: {clip: 2}\ndata: {source: synthetic}\n")
        assert notices("train", "--config", str(file), "--run-dir", str(tmp_path / "new")) == expected
        assert trained.pop()[0].train.max_grad_norm == 2


def test_a_former_name_in_allow(trained, notices, tmp_path):
    messages = notices("train", "--run-dir", str(tmp_path), "--allow", "data.label_drop", "--allow", "data")
    assert messages == [
        "data.label_drop: is now spelled data.condition_dropout; the next release refuses the former spelling"
    ]
    assert trained[0][4] == ("data.condition_dropout", "data")


def test_a_command_that_plan_proposes_has_the_present_names(notices, capsys):
    assert notices("plan", "--preset", "promoe_b", "--gpus-per-node", "2", "train.clip=2") == [CLIP]
    output = capsys.readouterr().out
    assert "train.max_grad_norm=2" in output and "train.clip" not in output
