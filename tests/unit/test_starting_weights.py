"""A run that starts from a checkpoint: which weights it gets, from every format.

`test_starting_sizes.py` has other sizes, `test_starting_refusals.py` what cannot be the start of a run.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from support.foreign_files import diffusers, safetensors_file, saved, training, weights, zero
from support.foreign_files import tensors as foreign_tensors
from support.golden_states import NAMES, config_that_runs, random_state
from support.levels import full
from support.starting_runs import MODELS, TABLE, config_of, read, started

from megapromoe.checkpoint.average import Average
from megapromoe.checkpoint.format import KINDS
from megapromoe.conversion.exports import export
from megapromoe.conversion.start_report import report
from megapromoe.conversion.starting_weights import newest_checkpoint, open_start
from megapromoe.errors import UserError

# ---- the same model, from every format


FORMATS = [
    *(("ours", "ema"), ("published", "master"), ("deepspeed", "ema"), ("safetensors", "master")),
    *(full("ours", "master"), full("published", "ema"), full("deepspeed", "master"), full("safetensors", "ema")),
    *(full("diffusers", "ema"), full("diffusers", "master")),
]


@pytest.mark.parametrize("form, kind", FORMATS)
def test_every_format_gives_the_weights_bit_for_bit(tmp_path, form, kind):
    made = random_state(config_of())
    export(made, tmp_path / NAMES[form], form)
    start, state = started(tmp_path / NAMES[form], f"train.init_weights={kind}")
    same = "ema" if form == "diffusers" else kind  # its folders hold one set of weights
    assert state.shapes == made.shapes
    for name in made.shapes:
        assert torch.equal(read(start, state, name), made.read(same, name)), name


@pytest.mark.parametrize("model", [name if name in ("promoe", "kmeans", "text") else full(name) for name in MODELS])
def test_a_file_without_a_configuration_gets_what_it_lacks_from_the_run(tmp_path, model):
    """Names and tensors alone, of every router and block: the classes and the experts are counted in the file."""
    settings = MODELS[model]
    made = random_state(config_of(*settings))
    bare = {name: made.read("ema", name) for name in made.shapes} | made.buffers
    save_file(bare, tmp_path / "a.safetensors")
    start, state = started(tmp_path / "a.safetensors", *settings)
    assert all(torch.equal(read(start, state, name), made.read("ema", name)) for name in made.shapes)
    assert all(torch.equal(state.buffers[name], value) for name, value in made.buffers.items())
    assert "objective" in report(start)["note"][0]
    if model != "text":
        start, _ = started(tmp_path / "a.safetensors", *settings, "model.num_classes=12", "train.init_classes=new")
        assert start.source.config.model.num_classes == 10


FOREIGN = {
    "bare .pth": saved(weights),
    "training of DiT": saved(training),
    "training with its arguments": saved(
        lambda: training(model="SiT-S/2", path_type="Linear", prediction="velocity", num_classes=1)
    ),
    "wrapped names": saved(lambda: {"model": weights(prefix="module.")}),
    "bare safetensors": safetensors_file(weights),
    "diffusers' own": diffusers(),
    "ZeRO shards": zero(),
}


@pytest.mark.parametrize(
    "layout", [full(name) if name in ("training of DiT", "wrapped names") else name for name in FOREIGN]
)
def test_checkpoints_of_others_need_no_conversion(tmp_path, layout):
    model = config_that_runs("dense")
    config = replace(model, train=replace(model.train, init_from=str(tmp_path), init_classes="new"))
    config = replace(config, model=replace(model.model, num_classes=model.model.num_classes + 3))
    arguments = "arguments" in layout
    if arguments:
        config = replace(config, model=replace(config.model, time_input="sit"))
    path = FOREIGN[layout](tmp_path)
    config = replace(config, model=replace(config.model, input_size=2 * config.model.input_size, position_scale=0.5))
    start = open_start(config, newest_checkpoint(path))
    kind = (
        "master"
        if layout in ("bare .pth", "wrapped names", "bare safetensors", "diffusers' own", "ZeRO shards")
        else "ema"
    )
    state = start.state({})
    for name, value in foreign_tensors()[kind].items():
        if name != TABLE:
            sign = -1 if arguments and name.startswith("final_layer.linear") else 1
            assert torch.equal(read(start, state, name), sign * value), name
    assert torch.equal(read(start, state, TABLE)[-1], foreign_tensors()[kind][TABLE][-1])


def test_the_average_of_one_of_several_decays(tmp_path):
    made = random_state(config_of("train.ema_decay=[0.9,0.5]"))
    averages = {kind: Average(False, 0.01, 10, decay) for kind, decay in (("ema", 0.9), ("ema=0.5", 0.5))}
    several = replace(
        made,
        kinds=(*KINDS, "ema=0.5"),
        average=averages["ema"],
        further_averages={"ema=0.5": averages["ema=0.5"]},
        read=lambda kind, name: 2 * made.read("ema", name) if kind == "ema=0.5" else made.read(kind, name),
    )
    export(several, tmp_path / "source", "ours")
    start, state = started(tmp_path / "source", "train.init_weights=ema=0.5")
    assert torch.equal(read(start, state, TABLE), 2 * made.read("ema", TABLE))
    assert "the averaged weights (ema=0.5), 1.0% of them still the initial weights" in report(start)["source"][0]
    with pytest.raises(UserError, match=r"weights = ema=0\.7: .* has no average of that decay"):
        started(tmp_path / "source", "train.init_weights=ema=0.7")
    with pytest.raises(UserError, match=r"weights = 'ema=high': must be ema or master"):
        started(tmp_path / "source", "train.init_weights=ema=high")
