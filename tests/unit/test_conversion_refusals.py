"""Conversions that must not be: malicious, damaged or mistaken files are refused, and nothing is left behind."""

import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.golden_states import NAMES, PUBLISHED, config_that_runs, state_of

from megapromoe.checkpoint.format import CheckpointError
from megapromoe.cli import main
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import open_state
from megapromoe.conversion.stream import ConversionError


class Payload:
    """Unpickling it would run a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_malicious_file_executes_nothing_and_is_refused(tmp_path, capsys, how):
    path, trace = tmp_path / "evil.pth", tmp_path / "executed"
    content = {"step": 1, "model_state_dict": Payload(f"touch {trace}")}
    if how == "torch.save":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    target = str(tmp_path / "run")
    assert main(["convert", str(path), target, "--to", "ours", "--preset", "promoe_s"]) == 1
    assert main(["convert", str(path), "--what"]) == 1
    message = capsys.readouterr().err
    assert "no code of the file was executed" in message and ("system" in message or how == "pickle")
    assert not trace.exists() and not Path(target).exists()


def test_a_malicious_deepspeed_folder_is_refused(tmp_path, capsys):
    export(state_of("promoe_tc"), tmp_path / "deep", "deepspeed")
    trace = tmp_path / "executed"
    name = "global_step12/layer_1_expert_0_mp_rank_00_model_states.pt"
    torch.save({"x": Payload(f"touch {trace}")}, tmp_path / "deep" / name)
    assert main(["convert", str(tmp_path / "deep"), str(tmp_path / "run"), "--to", "ours"]) == 1
    assert "no code of the file was executed" in capsys.readouterr().err and not trace.exists()


EVIL_ROUTER = """
from megapromoe.nn.moe.routers import PrototypeRouter
open({trace!r}, "w").close()

class Evil(PrototypeRouter):
    pass
"""


@pytest.mark.parametrize("kind", ["safetensors", "deepspeed", "ours"])
def test_code_that_a_config_names_is_executed_only_if_the_user_gives_the_config(tmp_path, capsys, kind):
    trace, router = tmp_path / "executed", tmp_path / "router.py"
    router.write_text(EVIL_ROUTER.format(trace=str(trace)))
    state = state_of("promoe_tc")
    config = resolve(saved=[f"model.router={router}:Evil"])
    config = replace(state.config, model=replace(state.config.model, router=config.model.router))
    path = tmp_path / ("evil.safetensors" if kind == "safetensors" else "evil")
    export(replace(state, config=config), path, kind)
    trace.unlink(missing_ok=True)
    for name in [name for name in sys.modules if name.startswith("megapromoe_extension")]:
        del sys.modules[name]  # so that it would be executed again
    command = ["convert", str(path), str(tmp_path / "again.safetensors"), "--to", "safetensors"]
    assert main(command) == 1
    assert "names code, model.router = " in capsys.readouterr().err and not trace.exists()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert main([*command, "--config", str(tmp_path / "config.yaml")]) == 0 and trace.exists()


def test_errors_have_the_problem_and_the_remedy(tmp_path, capsys):
    def error_of(*command: str, code: int = 1) -> str:
        assert main(["convert", *map(str, command)]) == code
        return capsys.readouterr().err

    run = tmp_path / "run"
    assert "there is no such file" in error_of(tmp_path / "no.pth", run, "--to", "ours")
    assert "--config FILE" in error_of(PUBLISHED, run, "--to", "ours")
    (tmp_path / "a.txt").write_text("text")
    assert "not a checkpoint of a known format" in error_of(tmp_path / "a.txt", run, "--to", "ours")
    (tmp_path / "b.safetensors").write_text("text")
    assert "not a safetensors file, or is damaged" in error_of(tmp_path / "b.safetensors", run, "--to", "ours")
    message = error_of(PUBLISHED, run, "--to", "ours", "--preset", "promoe_s")
    assert (
        "another model" in message and "the file has (32,), the config's model (384,)" in message and "more" in message
    )
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config_that_runs()))
    assert "the given format is ours, but the checkpoint is published" in error_of(
        *(PUBLISHED, run, "--to", "ours", "--from", "ours", "--config", path)
    )
    given = ("--to", "ours", "--config", path)
    assert "did you mean depth?" in error_of(PUBLISHED, run, *given, "model.dept=3", code=2)
    assert "leave the step out" in error_of(PUBLISHED, run, *given, "--step", 3)
    assert not run.exists()
    assert main(["convert", *map(str, (PUBLISHED, run, *given))]) == 0
    capsys.readouterr()
    assert "exists; choose another, or --overwrite" in error_of(PUBLISHED, run, *given)
    assert main(["convert", *map(str, (PUBLISHED, run, *given, "--overwrite"))]) == 0
    assert "no such checkpoint; there are 3" in error_of(run, tmp_path / "d.pth", "--to", "published", "--step", 7)
    assert "its name must end in .pth" in error_of(run, tmp_path / "d", "--to", "published")
    assert "is inside the source" in error_of(run, run / "checkpoints", "--to", "deepspeed", "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    assert "known format" in error_of(run, tmp_path / "mine", "--to", "deepspeed", "--overwrite")
    (run / "metrics.jsonl").write_text("{}")
    assert "never overwritten" in error_of(PUBLISHED, run, *given, "--overwrite")
    assert "give DEST and --to FORMAT, or --what" in error_of(PUBLISHED, code=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.safetensors", "c.yaml", "mine", "run"]


def test_damage_is_noticed(tmp_path):
    export(state_of("promoe_tc"), tmp_path / "run", "ours")
    file = next(tmp_path.rglob("rank-00000.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="bytes changed"):
        open_state(tmp_path / "run")
    export(state_of("promoe_tc"), tmp_path / "a.safetensors", "safetensors")
    with open(tmp_path / "a.safetensors", "r+b") as cut:
        cut.truncate(os.path.getsize(tmp_path / "a.safetensors") - 4)
    with pytest.raises(ConversionError, match="is not within"):
        open_state(tmp_path / "a.safetensors")
    export(state_of("promoe_tc"), tmp_path / "a.pth", "published")
    with open(tmp_path / "a.pth", "r+b") as cut:
        cut.truncate(os.path.getsize(tmp_path / "a.pth") // 2)
    with pytest.raises(ConversionError, match="damaged"):
        open_state(tmp_path / "a.pth", config=config_that_runs("promoe_tc"))


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    tree = torch.load(PUBLISHED, weights_only=True)
    optimizer = tree["optimizer_state_dict"]
    optimizer["param_groups"][0]["lr"] = 0.5
    torch.save(tree, tmp_path / "a.pth")
    assert any("lr = 0.5" in note for note in open_state(tmp_path / "a.pth", config=config_that_runs()).notes)
    optimizer["state"][1]["exp_avg"] = torch.zeros(3)
    torch.save(tree, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match="the exp_avg of x_embedder.proj.weight is missing or has another shape"):
        open_state(tmp_path / "a.pth", config=config_that_runs())
    optimizer["param_groups"][0]["params"] = list(range(50))
    torch.save(tree, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match="has 50 parameters, its model 94"):
        open_state(tmp_path / "a.pth", config=config_that_runs())


def test_a_failed_conversion_leaves_nothing_behind(tmp_path):
    state = state_of("promoe_tc")

    def read(kind: str, name: str) -> torch.Tensor:
        if name.startswith("final_layer"):
            raise OSError(28, "No space left on device")
        return state.read(kind, name)

    export(state, tmp_path / "a.pth", "published")
    content = (tmp_path / "a.pth").read_bytes()
    for form in ("ours", "published", "deepspeed", "diffusers"):
        with pytest.raises(OSError, match="No space"):
            export(replace(state, read=read), tmp_path / NAMES[form], form, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"] and (tmp_path / "a.pth").read_bytes() == content
