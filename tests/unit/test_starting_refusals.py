"""What cannot be the start of a run is refused with the reason; what a start reports."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.golden_states import NAMES, random_state
from support.starting_runs import MODELS, TABLE, config_of, read, saved_run, started

from megapromoe.checkpoint.manifest import seal
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.conversion.exports import export
from megapromoe.conversion.start_report import lines, report
from megapromoe.errors import UserError

ROOT = Path(__file__).parents[2]


# ---- what cannot be the start of a run


REFUSED = {
    "width": (("model.hidden_size=64",), "model.hidden_size = 64: must be the source's 32"),
    "depth": (("model.depth=4",), "model.depth = 4: must be the source's 2"),
    "text from class": (MODELS["text"], "model.condition = text: must be the source's class"),
    "router": (("model.router=tc",), "model.router = tc: must be the source's promoe"),
    "no experts": (("model.router=dense",), "model.router = dense: must be the source's promoe"),
    "expert width": (("model.expert_ratio=3.0",), "model.expert_width = 0: must be 64, the width of the source's"),
    "blocks": (("model.norm=rms",), "model.norm = rms: must be the source's layer"),
    "time": (("model.time_input=sit",), "model.time_input = sit: must be the source's dit"),
    "shared": (("model.shared_expert=false",), "must give 1 shared experts in a block, as in the source, not 0"),
    "moe_every": (("model.moe_every=1",), "model.moe_every = 1: must be the source's 2"),
    "mlp": (("model.mlp_ratio=2.0",), "model.mlp_ratio = 2.0: must be the source's 4.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_network_is_refused(source_run, case):
    settings, message = REFUSED[case]
    path, _ = source_run
    with pytest.raises(UserError, match=message):
        started(path, *settings)


@pytest.mark.parametrize("case", [case for case in REFUSED if case not in ("blocks", "time")])
def test_another_network_is_refused_by_its_tensors(tmp_path, case):
    """Without a configuration; that the norm and the time input are others does not show."""
    settings, message = REFUSED[case]
    made = random_state(config_of())
    save_file({name: made.read("ema", name) for name in made.shapes}, tmp_path / "a.safetensors")
    described = case in ("width", "depth", "text from class")
    with pytest.raises(UserError, match=message if described else "is of another model than the config's"):
        started(tmp_path / "a.safetensors", *settings)


def test_what_does_not_fit_for_experts_from_mlps(tmp_path):
    path, _ = saved_run(tmp_path, "model.router=dense")
    with pytest.raises(UserError, match="model.mlp_ratio = 3.0: must be the source's 4.0"):
        started(path, "model.mlp_ratio=3.0")
    with pytest.raises(UserError, match="model.num_shared_experts = 2: must be 1; several are not supported"):
        started(path, "model.num_shared_experts=2")
    with pytest.raises(UserError, match="must be the source's dense, or promoe or promoe_ec for experts from its MLPs"):
        started(path, "model.router=tc")


def test_keys_of_another_model_are_named(tmp_path):
    made = random_state(config_of())
    tensors = {name: made.read("ema", name) for name in made.shapes}
    save_file(tensors | {"controlnet.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="only in the file: controlnet.weight"):
        started(tmp_path / "a.safetensors")
    del tensors["blocks.1.attn.proj.bias"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="only in the model: blocks.1.attn.proj.bias"):
        started(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("y_embedder.embedding_table.weight", (1 << 60, 0)),
        ("blocks.1.mlp.experts.fc1.weight", (1 << 60, 0, 32)),
        ("x_embedder.proj.weight", (32, 1 << 40, 0, 0)),
        ("pos_embed", (1, 1 << 60, 0)),
        ("blocks.1.mlp.experts.99999999999.up_proj.weight", (64, 32)),
        ("blocks.99999999999.mlp.fc1.bias", (4,)),
    ],
)
def test_a_file_cannot_claim_sizes_that_it_does_not_hold(tmp_path, name, shape):
    made = random_state(config_of())
    tensors = {key: made.read("ema", key) for key in made.shapes} | {name: torch.zeros(shape)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pth")
    for file in ("a.safetensors", "a.pth"):
        with pytest.raises(UserError):
            started(tmp_path / file)


def test_a_router_of_ones_own_is_executed_only_if_the_run_names_it(tmp_path):
    router = f"model.router={ROOT / 'examples' / 'my_router.py'}:BiasedRouter"
    path, made = saved_run(tmp_path, router)
    start, state = started(path, router, "model.num_classes=3", "train.init_classes=new")
    name = "blocks.1.mlp.router.gate"
    assert torch.equal(read(start, state, name), made.read("ema", name))
    assert all(torch.equal(state.buffers[name], value) for name, value in made.buffers.items())
    with pytest.raises(UserError, match="names code, model.router = "):
        started(path)


def test_snapshots_have_averages_alone(tmp_path):
    path, made = saved_run(tmp_path)
    (folder,) = (path / "checkpoints").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    (folder / "manifest.json").write_text(seal(manifest | {"kinds": ["ema"]}))
    assert torch.equal(read(*started(folder), TABLE), made.read("ema", TABLE))
    with pytest.raises(UserError, match="has ema only; set train.init_weights=ema"):
        started(folder, "train.init_weights=master")


def test_a_class_model_from_a_text_model(tmp_path):
    path, _ = saved_run(tmp_path, *MODELS["text"])
    with pytest.raises(UserError, match="model.condition = class: must be the source's text"):
        started(path)


def test_values_that_are_not_finite_are_refused_when_they_are_read(tmp_path):
    made = random_state(config_of())
    broken = "final_layer.linear.bias"
    spoilt = replace(made, read=lambda kind, name: made.read(kind, name) * (float("nan") if name == broken else 1))
    for form in ("ours", "safetensors"):
        export(spoilt, tmp_path / NAMES[form], form, allow_nonfinite=True)
        start, state = started(tmp_path / NAMES[form])
        with pytest.raises(UserError, match=f"{broken} holds NaN or infinity"):
            read(start, state, broken)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "nothing", "text"])
def test_damage_is_found(tmp_path, damage):
    path, _ = saved_run(tmp_path)
    file = next((path / "checkpoints").glob("*/rank-00000.safetensors"))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    elif damage == "nothing":
        path = tmp_path / "nothing"
    else:
        path = tmp_path / "notes.txt"
        path.write_text("weights")
    with pytest.raises(UserError):
        started(path)


def test_a_truncated_pickle_and_a_pickle_with_code(tmp_path):
    export(random_state(config_of()), tmp_path / "a.pth", "published")
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a complete zip archive"):
        started(tmp_path / "a.pth")

    class Harmful:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"model": Harmful()}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="no code of the file was executed"):
        started(tmp_path / "b.pth")
    assert not (tmp_path / "ran").exists()


def test_the_table_names_everything(source_run):
    path, _ = source_run
    start, _ = started(path, "train.init_weights=master")
    text = "\n".join(lines(report(start)))
    assert "(ours, step 12), the weights as trained (master)" in text
    assert "left out: the moments of AdamW\nleft out: the averaged weights" in text
    count = len(start.source.shapes)
    assert f"taken: {count} of {count} tensors as they are" in text


@pytest.mark.parametrize(
    "settings, message",
    [
        (["train.init_classes=new"], "train.init_classes = 'new': must be same without train.init_from"),
        (["train.init_weights=master"], "train.init_weights = 'master': must be ema without train.init_from"),
        (["train.init_from=a", "train.init_classes=all"], "must be one of same, new, FILE.yaml"),
        (["train.init_from=a", "train.init_weights=raw"], "must be one of ema, master, ema=DECAY"),
        (
            ["train.init_from=a", "train.init_classes=new", *MODELS["text"]],
            "train.init_classes = 'new': must be same with model.condition = 'text'",
        ),
    ],
)
def test_options_that_cannot_be_together(settings, message):
    with pytest.raises(UserError, match=message):
        config_of(*settings)


def test_options_of_a_start_are_read_back_from_a_configuration(tmp_path):
    config = config_of("train.init_from=a", "train.init_weights=ema=0.5", "train.init_classes=classes.json")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert resolve(file=tmp_path / "config.yaml") == config
