"""Several decays at once: each average alone, in checkpoints, by `--weights ema=DECAY`, in conversions and plans."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.golden_states import NAMES, random_state
from support.small_studies import recipe

from megapromoe.checkpoint.average import (
    Average,
    average_metadata,
    averages_at_start,
    averages_of,
    ended_averages,
)
from megapromoe.checkpoint.disk_space import disk
from megapromoe.checkpoint.format import Checkpoint, all_kinds
from megapromoe.checkpoint.manifest import CheckpointError, seal
from megapromoe.checkpoint.step_folders import folder_of
from megapromoe.checkpoint.weights import UnknownWeights, kind_of, read_weights_choice
from megapromoe.cli import main
from megapromoe.config.options import Config, ConfigError, to_dict
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.config.train_options import TrainConfig
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import open_state
from megapromoe.diffusion.image_grid import SampleError
from megapromoe.engine.averaged_weights import EMA
from megapromoe.planning.cost import memory_per_rank
from megapromoe.sampling.run_model import identify_checkpoint, load_model
from megapromoe.studies.recipe import StudyError
from megapromoe.studies.study import plan
from megapromoe.training.step_tracker import StepTracker
from megapromoe.training.summary import summary

DECAYS = (0.9999, 0.999, 0.9)
SMALL = ("model.hidden_size=16", "model.depth=2", "model.heads=2", "model.num_experts=2")
LISTED = (*SMALL, "train.ema_decay=[0.9999,0.999,0.9]")
FURTHER = ("ema=0.999", "ema=0.9")


# ---- the option


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.9", 0.9),
        ("[0.9]", 0.9),
        ("[0.999, 0.9]", (0.999, 0.9)),
        ("0.999,0.9", (0.999, 0.9)),
        ("[0, 1e-3]", (0.0, 0.001)),
    ],
)
def test_one_number_or_a_list(tmp_path, text, value):
    config = resolve("digits", overrides=[f"train.ema_decay={text}"])
    assert config.train.ema_decay == value
    assert config.train.ema_decays == (value if isinstance(value, tuple) else (value,))
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert resolve(file=file) == config and hash(config)
    assert json.loads(json.dumps(to_dict(config))) == to_dict(config)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[0.9,1.0]", "must lie in [0, 1)"),
        ("1.0", "must lie in [0, 1)"),
        ("[0.9,0.90]", "must hold each number once"),
        ("[]", "a finite number, or a list"),
        ("[0.9,true]", "a finite number, or a list"),
        ("[0.9,[0.8]]", "a finite number, or a list"),
        ("0.9;0.8", "a finite number, or a list"),
        ("{a: 0.9}", "a finite number, or a list"),
    ],
)
def test_other_values_are_refused(text, rule):
    with pytest.raises(ConfigError) as error:
        resolve("digits", overrides=[f"train.ema_decay={text}"])
    assert rule in str(error.value) and "train.ema_decay" in str(error.value)


# ---- the averages


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("warmup", [False, True])
def test_each_average_has_the_bits_of_an_average_alone(on_device, warmup):
    """Also where some steps are skipped, and where the second average begins later than the first."""
    generator = torch.Generator().manual_seed(0)
    partitions = [SimpleNamespace(master=torch.randn(size, generator=generator)) for size in (5, 40)]
    engine = SimpleNamespace(partitions=partitions, clips_on_device=on_device, fused_averages=None)
    together = EMA(engine, DECAYS, warmup)
    alone = [EMA(engine, [decay], warmup) for decay in DECAYS]
    for ema, updates in ((together, [7, 0, 90]), *zip(alone, ([7], [0], [90]), strict=True)):
        ema.continue_from(updates, warmup)
    for step in range(12):
        for partition in partitions:
            partition.master += torch.randn(partition.master.shape, generator=generator)
        result = SimpleNamespace(applied=step % 5 != 2, applied_on_device=torch.tensor(step % 5 != 2))
        for ema in (together, *alone):
            ema.update(result)
    for index, ema in enumerate(alone):
        assert all(map(torch.equal, together.averages[index], ema.averages[0]))
    assert not torch.equal(together.averages[0][0], together.averages[1][0])


def test_a_context_swaps_one_average_in_and_out():
    partition = SimpleNamespace(master=torch.tensor([1.0]))
    engine = SimpleNamespace(partitions=[partition], sync_parameters_from_masters=lambda: None, fused_averages=None)
    ema = EMA(engine, (0.5, 0.9))
    ema.averages[0][0].fill_(2.0)
    ema.averages[1][0].fill_(3.0)
    for index, value in ((0, 2.0), (1, 3.0)):
        with ema.swapped_in(index):
            assert partition.master == value
        assert partition.master == 1.0 and ema.averages[index][0] == value


def progressed(train: TrainConfig, manifest: dict, steps: int) -> StepTracker:
    tracker = StepTracker(train, manifest)
    for step in range(1, steps + 1):
        tracker.add(step, SimpleNamespace(applied=True, stop=False, save=False, norm=1.0))
    return tracker


def manifest_of(train: TrainConfig, before: dict, steps: int) -> dict:
    """The manifest after some steps from another, as far as averages go, as it is read back."""
    content = {"run": "r", "config": to_dict(Config(train=train)), **progressed(train, before, steps).metadata()}
    return json.loads(json.dumps(content))


PLAIN = TrainConfig(ema_decay=0.9, log_every=1, save_every=0)


def test_one_decay_has_the_entries_of_earlier_versions():
    manifest = manifest_of(PLAIN, {}, 3)
    assert "ema_averages" not in manifest and manifest["config"]["train"]["ema_decay"] == 0.9
    assert manifest["ema_initial_share"] == pytest.approx(0.9**3) and manifest["ema_warmup"] is False


@pytest.mark.parametrize("warmup", [False, True])
def test_the_manifest_records_the_share_of_each(warmup):
    train = replace(PLAIN, ema_decay=(0.9, 0.5), ema_warmup=warmup)
    averages = averages_of(manifest_of(train, manifest_of(train, {}, 2), 3))
    alone = [averages_of(manifest_of(replace(train, ema_decay=decay), {}, 5))[0] for decay in (0.9, 0.5)]
    assert list(averages) == alone and [average.updates for average in averages] == [5, 5]


def starts(saved: tuple, decays: tuple) -> list[tuple]:
    """(decay, source, updates) of each average of a start."""
    averages = [Average(False, 0.1, 10, decay) for decay in saved]
    train = replace(PLAIN, ema_decay=decays)
    return [(decay, start.source, start.average.updates)
            for decay, start in zip(decays, averages_at_start(averages, train), strict=True)]  # fmt: skip


def test_the_list_may_change_as_one_decay_may():
    assert starts((0.9,), (0.5,)) == [(0.5, "ema", 10)], "the rule for one decay"
    assert starts((0.9, 0.5), (0.5, 0.9)) == [(0.5, "ema=0.5", 10), (0.9, "ema", 10)], "another order"
    assert starts((0.9, 0.5), (0.9, 0.7)) == [(0.9, "ema", 10), (0.7, "ema=0.5", 10)], "another value"
    assert starts((0.9,), (0.5, 0.9)) == [(0.5, "master", 0), (0.9, "ema", 10)], "an added one"
    assert starts((0.9, 0.5), (0.5,)) == [(0.5, "ema=0.5", 10)], "a removed one"
    ended = ended_averages([Average(False, 0.1, 10, decay) for decay in (0.9, 0.5)], replace(PLAIN, ema_decay=0.5))
    assert [average.decay for average in ended] == [0.9]


def test_an_added_average_counts_its_own_updates():
    """Its share and its warm-up are those of a run that begins where it was added."""
    warming = replace(PLAIN, ema_warmup=True)
    before = manifest_of(warming, {}, 4)
    both = manifest_of(replace(warming, ema_decay=(0.9, 0.5)), before, 3)
    first, added = averages_of(both)
    assert (first.updates, added.updates, both["updates"]) == (7, 3, 7)
    assert added.initial_share == averages_of(manifest_of(replace(warming, ema_decay=0.5), {}, 3))[0].initial_share
    alone = manifest_of(replace(warming, ema_decay=0.5), both, 2)
    (left,) = averages_of(alone)
    assert left.updates == 5 and alone["updates"] == 9, "the entry stays: its updates are not those of the run"


def test_an_earlier_version_reads_the_first_average():
    """By the entries of one decay, and the kind `ema`."""
    manifest = manifest_of(replace(PLAIN, ema_decay=(0.9, 0.5)), {}, 3)
    del manifest["ema_averages"]
    assert averages_of(manifest) == (Average(False, pytest.approx(0.9**3), 3, 0.9),)


# ---- the choice of weights


def test_the_choice_of_weights():
    assert [read_weights_choice(text) for text in ("ema", "master", "ema=0.9990", "ema=1e-3")] == [
        "ema", "master", "ema=0.999", "ema=0.001",
    ]  # fmt: skip
    assert [kind_of(weights, DECAYS, "x") for weights in ("ema", "ema=0.9999", "ema=0.9", "master")] == [
        "ema", "ema", "ema=0.9", "master",
    ]  # fmt: skip
    for wrong in ("mean", "ema=", "ema=x", "ema=1", "ema=nan", "ema=-0.1", "master=0.9"):
        with pytest.raises(UnknownWeights, match="must be ema or master, or ema=DECAY"):
            read_weights_choice(wrong)
    with pytest.raises(UnknownWeights, match=r"only ema=0\.9999, ema=0\.999, ema=0\.9; use one"):
        kind_of("ema=0.5", DECAYS, "x")
    with pytest.raises(UnknownWeights, match=r"only ema \(of an unknown decay\); use one"):
        kind_of("ema=0.5", [None], "x")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with three averages of random numbers."""
    folder = tmp_path_factory.mktemp("several") / "run"
    config = resolve("digits", overrides=LISTED)
    state = random_state(config)
    generator = torch.Generator().manual_seed(1)
    more = {(k, n): torch.randn(s, generator=generator) for k in FURTHER for n, s in state.shapes.items()}

    def read(kind: str, name: str) -> torch.Tensor:
        return more[kind, name] if (kind, name) in more else state.read(kind, name)

    averages = {kind: Average(False, decay**10, 10, decay) for kind, decay in zip(FURTHER, DECAYS[1:], strict=True)}
    first = Average(False, DECAYS[0] ** 10, 10, DECAYS[0])
    kinds = (*state.kinds, *FURTHER)
    export(replace(state, kinds=kinds, read=read, average=first, further_averages=averages), folder, "ours")
    return folder


def test_commands_use_the_first_or_the_chosen_average(run):
    state = open_state(run)
    assert state.kinds == ("master", "exp_avg", "exp_avg_sq", "ema", *FURTHER)
    name = "final_layer.linear.weight"
    for weights, kind in (("ema", "ema"), ("ema=0.9999", "ema"), ("ema=0.9", "ema=0.9"), ("master", "master")):
        model, _, _ = load_model(run, weights=weights)
        assert torch.equal(model.state_dict()[name], state.read(kind, name)), weights
        identity = identify_checkpoint(run, None, weights, SimpleNamespace(rank=0))
        decay = {"ema": 0.9999, "ema=0.9": 0.9}.get(kind)
        assert identity.initial_share == (0.0 if decay is None else decay**10)
    with pytest.raises(SampleError, match=r"step-00000012 has no average of that decay, only ema=0\.9999, ema=0\.99"):
        load_model(run, weights="ema=0.5")


def test_a_warning_is_of_the_chosen_average(run, caplog):
    load_model(run, weights="ema=0.999")
    assert "train.ema_decay = 0.999, 10 updates" in caplog.text


def test_our_formats_keep_all_averages(run, tmp_path):
    state = open_state(run)
    for form in ("ours", "safetensors"):
        assert export(state, tmp_path / NAMES[form], form) == []
        back = open_state(tmp_path / NAMES[form])
        assert back.kinds == state.kinds
        assert [(a.decay, a.initial_share, a.updates) for a in back.averages.values()] == [
            (decay, decay**10, 10) for decay in DECAYS
        ]
        for kind in state.kinds:
            assert all(torch.equal(back.read(kind, name), state.read(kind, name)) for name in state.shapes)
    manifests = [Checkpoint(folder_of(folder / "checkpoints", 12)).manifest for folder in (run, tmp_path / "run")]
    assert manifests[0]["ema_averages"] == manifests[1]["ema_averages"] and manifests[1]["ema_warmup"] is False


@pytest.mark.parametrize("form", ["published", "deepspeed", "safetensors", "diffusers"])
def test_other_formats_hold_the_chosen_average(run, tmp_path, capsys, form):
    state, name = open_state(run), "final_layer.linear.weight"
    command = ["convert", str(run), str(tmp_path / NAMES[form]), "--to", form]
    for words, kind in ((["--weights", "ema=0.90"], "ema=0.9"), ([], "ema")):
        if form == "safetensors" and not words:
            continue  # the full state: see above
        assert main([*command, *words, "--overwrite"]) == 0
        printed = capsys.readouterr().out
        back = open_state(tmp_path / NAMES[form], config=state.config if form == "published" else None)
        assert torch.equal(back.read("ema", name), state.read(kind, name))
        assert not back.further_averages
        share = "34.9%" if words else "99.9%"
        assert f"{share} of them still the initial weights" in printed
        if form in ("published", "deepspeed"):
            assert torch.equal(back.read("master", name), state.read("master", name))
            assert ("holds one average: ema; not written: ema=0.999, ema=0.9" in printed) is (not words)
        elif words:
            assert "written: averaged weights (ema=0.9), 34.9%" in printed and back.average.decay == 0.9
    assert main([*command, "--weights", "ema=0.5", "--overwrite"]) == 1
    assert "only ema=0.9999, ema=0.999, ema=0.9; use one" in capsys.readouterr().err


def test_a_snapshot_gives_the_chosen_average_as_both_weights(run, tmp_path):
    state, name = open_state(run), "final_layer.linear.weight"
    snapshot = replace(state, kinds=("ema", *FURTHER))
    for weights, kind in ((None, "ema"), ("ema=0.9", "ema=0.9")):
        export(snapshot, tmp_path / "a.pth", "published", weights, overwrite=True)
        back = open_state(tmp_path / "a.pth", config=state.config)
        for written in ("master", "ema"):
            assert torch.equal(back.read(written, name), state.read(kind, name))
    export(snapshot, tmp_path / "new", "ours")
    back = open_state(tmp_path / "new")
    for written, kind in (("master", "ema"), ("ema", "ema"), ("ema=0.9", "ema=0.9")):
        assert torch.equal(back.read(written, name), state.read(kind, name))


def test_ours_takes_no_choice(run, tmp_path, capsys):
    assert main(["convert", str(run), str(tmp_path / "new"), "--to", "ours", "--weights", "ema=0.9"]) == 1
    assert "holds both weights; leave the weights out" in capsys.readouterr().err


def test_inspect_shows_each(run, capsys):
    assert main(["inspect", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "kinds: master, exp_avg, exp_avg_sq, ema, ema=0.999, ema=0.9\n" in printed
    assert "averaged weights (ema, decay 0.9999): 99.9% of them" in printed
    assert "averaged weights (ema=0.9, decay 0.9): 34.9% of them" in printed
    assert main(["inspect", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["averages"]["ema=0.9"] == {"decay": 0.9, "initial_share": 0.9**10, "updates": 10}


def test_upcycling_begins_with_the_chosen_average(run, tmp_path, capsys):
    command = ["upcycle", str(run), str(tmp_path / "new"), "model.num_experts=4", "--noise", "0", "--spread", "0"]
    assert main([*command, "--weights", "ema=0.999"]) == 0
    assert "from averaged weights (ema=0.999), 99.0% of them" in capsys.readouterr().out
    new, name = open_state(tmp_path / "new"), "final_layer.linear.weight"
    for kind in ("master", "ema"):
        assert torch.equal(new.read(kind, name), open_state(run).read("ema=0.999", name))
    assert list(new.averages) == ["ema"], "a run of several decays begins the others at its first start"


def test_help_and_errors_name_the_choices(capsys):
    for command in ("sample", "evaluate", "routing", "upcycle", "convert"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "ema=DECAY" in " ".join(capsys.readouterr().out.split()), command
    with pytest.raises(SystemExit):
        main(["sample", "--run-dir", "x", "--out", "y", "--weights", "ema=2"])
    assert "weights = 'ema=2': must be ema or master, or ema=DECAY" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        ({"decay": 1.0}, "decay = 1.0: must be a number from 0 to below 1"),
        ({"decay": 0.9999}, "the decays must be different"),
        ({"decay": "x"}, "decay = 'x'"),
        ({"initial_share": 2}, "initial_share = 2: must be a number from 0 to 1"),
        ({"updates": -1}, "updates = -1: must be a whole number"),
        ({"updates": None}, "updates = None: must be a whole number"),
    ],
)
def test_a_wrong_entry_of_a_manifest_is_refused(run, tmp_path, entry, rule):
    content = json.loads((folder_of(run / "checkpoints", 12) / "manifest.json").read_text())
    content["ema_averages"][1] |= entry
    folder = tmp_path / "step-00000012"
    folder.mkdir()
    (folder / "manifest.json").write_text(seal(content))
    with pytest.raises(CheckpointError) as error:
        Checkpoint(folder)
    assert rule in str(error.value)


# ---- plans, the log, studies


def test_plans_count_the_averages():
    single, three = (resolve("dit_b", overrides=["train.snapshot_every=1000", *more]) for more in ((), LISTED[-1:]))
    assert memory_per_rank(three, 4).ema == 3 * memory_per_rank(single, 4).ema
    assert memory_per_rank(three, 4).optimizer == memory_per_rank(single, 4).optimizer
    assert disk(three).snapshot == 3 * disk(single).snapshot
    assert disk(three).checkpoint == disk(single).checkpoint + 2 * disk(single).snapshot
    assert len(all_kinds(("ema", *FURTHER))) == 6


def test_the_summary_names_the_decays(tmp_path):
    def optimizer(*overrides: str) -> str:
        lines = summary(resolve("digits", overrides=overrides), 1, tmp_path, "begins at step 0")
        return next(line for line in lines if line.startswith("optimizer"))

    assert optimizer("train.ema_decay=0.9").endswith("averaged weights with decay 0.9")
    assert optimizer("train.ema_decay=[0.9999,0.9]").endswith("2 averages of the weights, with decays 0.9999, 0.9")


def test_a_study_evaluates_one_of_several_averages(tmp_path):
    settings = {"train.ema_decay": [0.99, 0.9]}
    study = plan(tmp_path / "study", recipe(settings=settings, weights="ema=0.90"))
    assert study.recipe.weights == "ema=0.9" and study.tasks[0].config.train.ema_decays == (0.99, 0.9)
    with pytest.raises(StudyError, match=r"weights = ema=0\.5: train\.ema_decay = .* only ema=0\.99, ema=0\.9;"):
        plan(tmp_path / "other", recipe(settings=settings, weights="ema=0.5"))


def test_metadata_of_one_average_that_has_all_updates():
    assert average_metadata([Average(True, 0.5, 3, 0.9)], 3) == {"ema_initial_share": 0.5, "ema_warmup": True}
    added = [{"decay": 0.9, "initial_share": 0.5, "updates": 2}]
    assert average_metadata([Average(True, 0.5, 2, 0.9)], 3)["ema_averages"] == added
