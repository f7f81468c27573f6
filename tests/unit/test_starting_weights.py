"""A run that starts from a checkpoint: which weights it gets, from every format and to every other size."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.foreign_files import diffusers, safetensors_file, saved, training, weights, zero
from support.foreign_files import tensors as foreign_tensors
from support.golden_states import NAMES, config_that_runs, random_state
from support.levels import full

from megapromoe.checkpoint.average import Average
from megapromoe.checkpoint.format import KINDS
from megapromoe.checkpoint.manifest import seal
from megapromoe.config.options import Config
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.conversion.exports import export
from megapromoe.conversion.start_report import lines, report
from megapromoe.conversion.starting_weights import StartingWeights, newest_checkpoint, open_start
from megapromoe.conversion.state import State, model_shapes
from megapromoe.distributed.mesh import UNSHARDED
from megapromoe.distributed.shard_ranges import ShardRange
from megapromoe.errors import UserError
from megapromoe.nn.parallelize import initial_values

SMALL = (
    *("model.hidden_size=32", "model.depth=2", "model.heads=2", "model.num_experts=4", "model.input_size=8"),
    *("model.in_channels=4", "model.num_classes=10", "data.source=synthetic", "data.size=64"),
)
ROOT = Path(__file__).parents[2]
BALANCE_BIAS = "model.balance_bias=0.01"
TABLE = "y_embedder.embedding_table.weight"
MODELS = {
    "promoe": (),
    "promoe_ec": ("model.router=promoe_ec",),
    "dense": ("model.router=dense",),
    "conditional": ("model.router=conditional",),
    "tc": ("model.router=tc",),
    "diffmoe": ("model.router=diffmoe",),
    "kmeans": ("model.router=kmeans",),
    "race": ("model.router=race",),
    "gmm": ("model.router=gmm", "model.mixture_variance=isotropic"),
    "balance_bias": ("model.balance_bias=0.01",),
    "several": ("model.num_shared_experts=2", "model.num_unconditional_experts=2"),
    "no_unconditional": ("model.unconditional_expert=false",),
    "blocks": ("model.activation=swiglu", "model.norm=rms", "model.positions=rope", "model.modulation=shared"),
    "text": ("model.condition=text", "model.text_width=8", "model.text_tokens=4", "model.num_classes=1000"),
}


def config_of(*settings: str) -> Config:
    return resolve(overrides=[*SMALL, *settings])


def started(path: Path, *settings: str) -> tuple[StartingWeights, State]:
    """A start of a run with these settings from the checkpoint at a path, and the weights that it gets."""
    start = open_start(config_of(f"train.init_from={path}", *settings), newest_checkpoint(path))
    return start, start.state(start.prototypes() if start.needs_prototypes else {})


def initial(config: Config, name: str) -> torch.Tensor:
    out = torch.empty(model_shapes(config.model)[0][name])
    initial_values(config, UNSHARDED).write(name, out.view(-1))
    return out


def read(start: StartingWeights, state: State, name: str) -> torch.Tensor:
    """A weight, as a rank without parallelism reads it."""
    out = torch.full(state.shapes[name], 7.0)
    start.read_into(state, name, ShardRange.of_tensor(tuple(out.shape)), out.view(-1))
    return out


def saved_run(folder: Path, *settings: str) -> tuple[Path, State]:
    made = random_state(config_of(*settings))
    export(made, folder / "source", "ours")
    return folder / "source", made


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, State]:
    """A run of the small model; tests read it only."""
    return saved_run(tmp_path_factory.mktemp("plain"))


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


# ---- other classes


def test_rows_of_classes_follow_the_file(plain, tmp_path):
    path, made = plain
    (tmp_path / "classes.yaml").write_text("0: 7\n2: 3\n1: new\n")
    start, state = started(path, "model.num_classes=4", f"train.init_classes={tmp_path / 'classes.yaml'}")
    old, table = made.read("ema", TABLE), read(start, state, TABLE)
    mean = old[:-1].double().mean(dim=0).float()
    assert torch.equal(table, torch.stack([old[7], mean, old[3], mean, old[10]]))
    others = [name for name in made.shapes if name != TABLE]
    assert all(torch.equal(read(start, state, name), made.read("ema", name)) for name in others)
    table = report(start)
    assert table["classes"] == [
        "2 of 4 rows are those of classes of the source; new, the mean of the source's 10 classes: classes 1, 3; the"
        " row of the null class is kept",
        "left out, of the source: classes 0, 1, 2, 4 and 4 more",
    ]


def test_the_same_classes_and_new_ones(plain):
    path, made = plain
    old = made.read("ema", TABLE)
    assert torch.equal(read(*started(path), TABLE), old)
    table = read(*started(path, "train.init_classes=new", "model.num_classes=3"), TABLE)
    assert table.shape == (4, 32) and torch.equal(table[-1], old[-1]) and torch.equal(table[0], table[2])
    with pytest.raises(UserError, match="model.num_classes = 3: the source has 10 classes; set train.init_classes"):
        started(path, "model.num_classes=3")


@pytest.mark.parametrize(
    "content, message",
    [
        ("0: 10", "10 is not a class of the source; its classes are 0 to 9"),
        ("3: 0", "3 is not a class of the run; its classes are 0 to 2"),
        (
            "cat: 0",
            "'cat' is not a class of the run; its classes are 0 to 2; the names of the run's classes are not known",
        ),
        ("0: cat", "'cat' is not a class of the source"),
        ("[1, 2]", "lists 2 classes, the run has 3"),
        ("[]", "lists 0 classes, the run has 3"),
        ("{}", "must be a mapping"),
        ("5", "must be a mapping"),
        ("0: -1", "-1 is not a class of the source"),
        ("0: true", "True is not a class of the source"),
        ("0: [1]", r"\[1\] is not a class of the source"),
        ("a: [", "give a YAML or JSON file"),
    ],
)
def test_a_file_of_classes_that_cannot_be_used(plain, tmp_path, content, message):
    path, _ = plain
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        started(path, "model.num_classes=3", f"train.init_classes={tmp_path / 'c.yaml'}")


def test_classes_by_name(tmp_path):
    """Names of the data sets on both sides: digits to digits, in another order."""
    digits = ("data.source=digits", "model.in_channels=1", "model.input_size=8")
    path, made = saved_run(tmp_path, *digits)
    (tmp_path / "c.json").write_text(json.dumps({str(digit): str(9 - digit) for digit in range(10)}))
    table = read(*started(path, *digits, f"train.init_classes={tmp_path / 'c.json'}"), TABLE)
    old = made.read("ema", TABLE)
    assert torch.equal(table, torch.cat([old[:-1].flip(0), old[-1:]]))
    (tmp_path / "c.json").write_text('{"0": "ten"}')
    with pytest.raises(UserError, match="'ten' is not a class of the source; its classes are 0 to 9, or 0, 1, 2"):
        started(path, *digits, f"train.init_classes={tmp_path / 'c.json'}")
    fashion = ("data.source=fashion_mnist", "model.in_channels=1", "model.input_size=32")
    assert "have other names" in report(started(path, *fashion)[0])["note"][0]


# ---- other sizes


def test_another_grid_changes_positions_alone(plain):
    path, made = plain
    start, state = started(path, "model.input_size=16")
    assert all(torch.equal(read(start, state, name), made.read("ema", name)) for name in made.shapes)
    assert report(start)["positions"] == ["computed for 8x8 tokens; the source has 4x4"]
    start, _ = started(path, "model.input_size=16", "model.position_scale=0.5")
    assert report(start)["positions"][1] == "model.position_scale = 0.5, not 1"


@pytest.mark.parametrize("size", ["model.patch_size=4", "model.in_channels=3"])
def test_other_patches_start_from_the_models_own_values(plain, size):
    path, made = plain
    start, state = started(path, size)
    fresh = {"x_embedder.proj.weight", "x_embedder.proj.bias", "final_layer.linear.weight", "final_layer.linear.bias"}
    for name in state.shapes:
        expected = initial(start.config, name) if name in fresh else made.read("ema", name)
        assert torch.equal(read(start, state, name), expected), name
    assert size.replace("=", " = ") in report(start)["new"][0]


def test_the_variance_is_dropped_or_begins_at_zero(plain, tmp_path):
    path, made = plain
    weight = made.read("ema", "final_layer.linear.weight")
    start, state = started(path, "model.learn_sigma=false")
    mean = weight.view(4, 2, 4, 32)[:, 0].reshape(16, 32)
    assert torch.equal(read(start, state, "final_layer.linear.weight"), mean)
    export(replace(random_state(start.config), read=lambda kind, name: state.read("ema", name)), tmp_path / "b", "ours")
    again = read(*started(tmp_path / "b"), "final_layer.linear.weight").view(4, 2, 4, 32)
    assert torch.equal(again[:, 0].reshape(16, 32), mean) and not again[:, 1].any()


# ---- other experts


def test_balance_biases_start_at_zero_or_are_those_of_the_source(tmp_path, plain):
    """From a file with biases, from files without, into more experts; without biases a run would route otherwise."""
    path, made = plain
    export(made, tmp_path / "a.pth", "published")
    for source in (path, tmp_path / "a.pth"):
        assert not started(source, BALANCE_BIAS)[1].buffers
    path, made = saved_run(tmp_path, BALANCE_BIAS)
    (name,) = made.buffers
    assert made.buffers[name].any()
    assert torch.equal(started(path, BALANCE_BIAS)[1].buffers[name], made.buffers[name])
    grown = started(path, BALANCE_BIAS, "model.num_experts=8")[1]
    assert torch.equal(grown.buffers[name], made.buffers[name].repeat(2))
    with pytest.raises(UserError, match=r"model\.balance_bias = 0: must be more than 0"):
        started(path)


def test_each_expert_is_split(plain):
    from megapromoe.conversion.upcycle import grow

    path, made = plain
    start, state = started(path, "model.num_experts=8", "model.num_classes=3", "train.init_classes=new")
    expected = grow(made, replace(made.config, model=replace(made.config.model, num_experts=8)))
    for name in (name for name in expected.shapes if name != TABLE):
        assert torch.equal(read(start, state, name), expected.read("ema", name)), name
    assert report(start)["experts"] == ["8 in each layer, each of the source's 4 split into 2, with noise"]
    with pytest.raises(UserError, match="model.num_experts = 6: must be a multiple of the source's 4"):
        started(path, "model.num_experts=6")


@pytest.mark.parametrize("ratio, how", [full("2.0", "slices"), full("4.0", "copies")])
def test_experts_from_the_mlps_of_a_dense_model(tmp_path, ratio, how):
    from megapromoe.conversion.upcycle import cluster, from_dense, moe_inputs

    path, made = saved_run(tmp_path, "model.router=dense")
    settings = (f"model.expert_ratio={ratio}", "model.input_size=16", "train.init_classes=new")
    start, state = started(path, *settings)
    assert how in report(start)["experts"][0]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        again = start.state(start.prototypes())
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(read(start, again, name), read(start, state, name)) for name in state.shapes)
    dense = replace(
        made,
        config=replace(start.config, model=replace(start.config.model, router="dense")),
        read=lambda kind, name: read(start, start._adapted(), name),
    )
    tokens = moe_inputs(dense, start.config, 64)
    prototypes = {block: cluster(x, start.config) for block, x in tokens.items()}
    expected = from_dense(dense, start.config, prototypes, how.replace("slices", "slice").replace("copies", "copy"))
    for name in expected.shapes:
        assert torch.equal(read(start, state, name), expected.read("ema", name)), name


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
def test_another_network_is_refused(plain, case):
    settings, message = REFUSED[case]
    path, _ = plain
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


def test_the_table_names_everything(plain):
    path, _ = plain
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
