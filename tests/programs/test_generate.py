"""Sampling a run: the same images on any number of ranks, what is written, and what is refused."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from support import processes
from support.sampled_runs import ALONE, as_job, saved_run, tiny

from megapromoe.checkpoint.format import CheckpointError, OtherModel
from megapromoe.checkpoint.manifest import seal
from megapromoe.config.options import ConfigError, to_dict
from megapromoe.config.resolve import to_yaml
from megapromoe.diffusion.image_grid import SampleError, chunk_ranges, generate, grid
from megapromoe.distributed.agreement import distributed_session
from megapromoe.distributed.launch_environment import LaunchEnvironment
from megapromoe.nn.parallelize import build
from megapromoe.sampling.generation import generate_images
from megapromoe.sampling.image_sets import ImageSetError
from megapromoe.sampling.preview_writer import PreviewWriter
from megapromoe.sampling.replica_layout import ReplicaLayout
from megapromoe.sampling.request import GenerationRequest
from megapromoe.sampling.run_model import load_model


def stirred(config):
    """A model whose output layer and modulation are not zero."""
    model = build(config)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "adaLN" in name or name.startswith("final_layer.linear"):
                value = np.random.default_rng(number).standard_normal(model.layouts[name].shape) * 0.1
                parameter.copy_(torch.from_numpy(value).float())
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    processes.run(2, saved_run, str(folder), "parallel.tp=2", "parallel.ep=2")
    return folder


def ranges_of(rank: int, world: int, count: int, batch: int) -> list[range]:
    """The numbers of the images that a rank generates, chunk by chunk."""
    ranges = chunk_ranges(count, batch)
    rounds = ReplicaLayout.of(rank, world).rounds(list(range(len(ranges))), len(ranges) - 1)
    return [ranges[chunk] for chunk, _ in rounds if chunk is not None]


def test_chunks_share_out_every_image_once():
    for count, batch, world in ((10, 4, 3), (3, 4, 2), (12, 4, 2), (9, 1, 4)):
        by_rank = [ranges_of(rank, world, count, batch) for rank in range(world)]
        assert sorted(i for ranges in by_rank for numbers in ranges for i in numbers) == list(range(count))
        assert sorted((r.start, r.stop) for ranges in by_rank for r in ranges) == [
            (r.start, r.stop) for r in chunk_ranges(count, batch)
        ]


@pytest.mark.parametrize(
    "overrides",
    [
        ("sample.method=euler", "sample.guidance=2"),
        ("diffusion.objective=ddpm", "sample.method=ddpm"),
        ("model.router=diffmoe",),
    ],
)
def test_several_ranks_sample_the_images_of_one_rank(overrides):
    config = tiny(*overrides)
    model = stirred(config)
    labels = [i % 11 for i in range(10)]  # 10 is the null class
    single = generate(model, config, labels, range(10))
    assert single.shape == (10, 1, 8, 8) and single.std() > 0.1
    for world in (2, 4):
        for rank in range(world):
            for numbers in ranges_of(rank, world, 10, 4):
                part = generate(model, config, labels[numbers.start : numbers.stop], numbers)
                assert torch.equal(part, single[numbers.start : numbers.stop])


def test_an_image_is_fixed_by_seed_index_and_label():
    config = tiny()
    model = stirred(config)
    images = generate(model, config, [1, 2, 3, 4, 5, 6], range(6))
    for index in (0, 3, 5):  # in other company, equal to rounding
        torch.testing.assert_close(generate(model, config, [index + 1], [index])[0], images[index])
    assert not torch.equal(generate(model, config, [7], [0])[0], images[0])
    assert not torch.equal(generate(model, config, [1], [1])[0], images[0])
    assert not torch.equal(generate(model, tiny("sample.seed=1"), [1], [0])[0], images[0])


def test_the_run_s_shift_of_noise_levels_is_used():
    model = stirred(tiny())
    plain, moved = (generate(model, tiny(f"diffusion.shift={s}"), [1], [0]) for s in (1.0, 3.0))
    assert not torch.allclose(plain, moved, atol=1e-4)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_shift_by_size_is_that_of_its_square_root(method):
    """Latents of side 8 have four times the pixels of side 4: a factor of 2, which multiplies the run's own."""
    model, words = stirred(tiny()), f"sample.method={method}"
    for by_size, by_hand in ((("diffusion.shift_base=4",), 2), (("diffusion.shift_base=2", "diffusion.shift=0.75"), 3)):
        config = tiny(words, *by_size)
        assert config.time_shift == by_hand
        expected = generate(model, tiny(words, f"diffusion.shift={by_hand}"), [1, 5], [0, 1])
        assert torch.equal(generate(model, config, [1, 5], [0, 1]), expected)
    assert tiny("diffusion.shift=1.5").time_shift == 1.5


def test_the_model_s_mode_is_restored_and_progress_reported():
    model, reported = stirred(tiny()).train(), []
    generate(model, tiny(), [1] * 6, range(6), progress=lambda done, total: reported.append((done, total)))
    assert model.training
    assert reported == [(done, 6) for done in range(1, 7)]  # two chunks of three steps


def gathered(request: tuple[Path, int], launch: LaunchEnvironment) -> list | None:
    """Images that hold their number, written by the ranks that would generate them."""
    out, count = request
    writer = PreviewWriter(out, count, batch=4, columns=1, seed=0)
    with distributed_session(launch, 60):
        chunks = list(range(len(chunk_ranges(count, 4))))
        assert launch.rank or writer.open({}) == chunks
        for chunk, _ in ReplicaLayout.of(launch.rank, launch.world).rounds(chunks, chunks[-1]):
            if chunk is not None:
                numbers = torch.tensor(chunk_ranges(count, 4)[chunk], dtype=torch.float32)
                writer.write(chunk, numbers[:, None, None, None].expand(-1, 1, 2, 2))
        writer.finish(np.arange(count))
    if launch.rank:
        return None
    with np.load(out) as written:
        return written["images"][:, 0, 1, 1].tolist()


def test_images_of_all_ranks_are_gathered_in_order(tmp_path):
    first, *others = as_job(3, tmp_path, gathered, (tmp_path / "a.npz", 18))
    assert first == list(range(18)) and others == [None, None]
    # two ranks have nothing to send
    assert as_job(3, tmp_path, gathered, (tmp_path / "b.npz", 3))[0] == [0, 1, 2]


def test_grid_places_and_scales_pixels():
    images = np.stack([np.full((1, 2, 2), value) for value in (-1.0, 0.0, 5.0)])
    picture = grid(images, columns=2, scale=4)
    assert picture.shape == (2 * 9 + 1, 2 * 9 + 1, 3) and picture.dtype == np.uint8
    assert (picture[1:9, 1:9] == 0).all()
    assert (picture[1:9, 10:18] == 128).all()
    assert (picture[10:18, 1:9] == 255).all()
    assert (picture[10:18, 10:18] == 40).all()  # nobody's place
    colour = np.zeros((1, 3, 1, 1))
    colour[0, 1] = 1
    assert grid(colour, 1)[1, 1].tolist() == [128, 255, 128]
    with pytest.raises(SampleError, match="in_channels = 4: .*autoencoder.*npz"):
        grid(np.zeros((1, 4, 2, 2)), 1)


def test_the_whole_model_is_read_from_a_sharded_run(run):
    averaged, config, step = load_model(run)
    weights, _, first = load_model(run, step=1, weights="master", overrides=["sample.seed=5"])
    assert (step, first) == (2, 1) and not averaged.training
    fresh = dict(build(tiny()).named_parameters())
    for name, value in weights.named_parameters():
        assert torch.equal(value, fresh[name]), name
    for name, value in averaged.named_parameters():
        assert torch.equal(value, 2 * fresh[name] + 0.01), name


def test_weights_are_not_used_with_another_config_than_theirs(run, tmp_path):
    """As when config.yaml was edited, or its checkpoints came from elsewhere."""
    other = shutil.copytree(run, tmp_path / "run")
    manifest = other / "checkpoints" / "step-00000002" / "manifest.json"
    content = json.loads(manifest.read_text())
    trained = to_dict(tiny("diffusion.shift=2.0", "train.lr=1e-3"))
    manifest.write_text(seal({**content, "config": trained}))
    with pytest.raises(CheckpointError, match=r"config.yaml: .*\n  - diffusion.shift: 2.0 in the checkpoint"):
        load_model(other)
    config = other / "config.yaml"
    config.write_text(to_yaml(tiny("diffusion.shift=2.0")))
    assert load_model(other)[2] == 2, "the learning rate is free"


def test_a_run_that_cannot_be_loaded_is_refused_with_the_reason(run, tmp_path):
    with pytest.raises(SampleError, match="no config.yaml"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"step = 7: .* there are 1, 2"):
        load_model(run, step=7)
    with pytest.raises(SampleError, match="weights = 'best': must be ema or master"):
        load_model(run, weights="best")
    with pytest.raises(SampleError, match="model.depth=4: .*only sample"):
        load_model(run, overrides=["model.depth=4"])
    with pytest.raises(ConfigError, match="sample.stepz"):
        load_model(run, overrides=["sample.stepz=4"])
    (tmp_path / "config.yaml").write_text(to_yaml(tiny()))
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_model(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(tiny("model.hidden_size=24")))
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    with pytest.raises(OtherModel, match="another model"):
        load_model(tmp_path)


def preview(run: Path, out: Path, classes: tuple[int, ...] | None, count: int, *overrides: str) -> None:
    generate_images(GenerationRequest(run, out, count, only=classes, preview=True, overrides=overrides), ALONE)


def test_a_picture_has_a_row_for_each_class(run, tmp_path):
    out = tmp_path / "made" / "grid.png"
    preview(run, out, (3, 5), 3)
    assert imread(out).shape[:2] == (2 * 66 + 2, 3 * 66 + 2)
    assert os.listdir(out.parent) == ["grid.png"]


def test_images_of_one_class_form_a_square(run, tmp_path):
    preview(run, tmp_path / "grid.png", (3,), 5)
    assert imread(tmp_path / "grid.png").shape[:2] == (2 * 66 + 2, 3 * 66 + 2)


def test_a_preview_is_replaced(run, tmp_path):
    """Unlike a set, which refuses another request."""
    out = tmp_path / "few.npz"
    preview(run, out, (3,), 2)
    before = np.load(out)["images"]
    preview(run, out, (3,), 2, "sample.seed=1")
    with np.load(out) as stored:
        assert stored["seed"] == 1 and not np.array_equal(stored["images"], before)
    assert os.listdir(tmp_path) == ["few.npz"]


def test_requests_that_differ_have_default_places_that_differ(run, tmp_path):
    """And one that is repeated has the same."""
    folder = tmp_path / "samples"
    first = GenerationRequest(run, folder / "step.png", 1, only=(3,), preview=True, complete_name=True)
    others = [replace(first, num=2), replace(first, only=(4,)), replace(first, overrides=("sample.seed=1",))]
    places = [generate_images(request, ALONE) for request in (first, *others, first)]
    assert places[0] == places[-1] and len(set(map(str, places))) == 4
    sets = [replace(first, out=folder / "step", preview=False, scales=scales) for scales in ((1.0, 2.0), (1.0,))]
    places += [generate_images(request, ALONE) for request in sets]
    assert len({path.parent.name for path in places[-2]}) == 1, "the sets of one request beside each other"
    names = sorted(p.name for p in folder.iterdir())
    assert len(names) == 6 and all(re.fullmatch(r"step-00000002-[0-9a-f]{6}(\.png)?", name) for name in names)


def test_three_ranks_write_the_images_of_one_rank(run, tmp_path):
    request = GenerationRequest(
        run, tmp_path / "one.npz", 5, only=(3, 5), preview=True, overrides=("sample.guidance=2",)
    )
    generate_images(request, ALONE)
    file = tmp_path / "three.npz"
    assert as_job(3, tmp_path, generate_images, replace(request, out=file)) == [[file]] * 3
    single, three = (np.load(tmp_path / f"{name}.npz") for name in ("one", "three"))
    assert single["labels"].tolist() == [3] * 5 + [5] * 5 and single["seed"] == 0
    np.testing.assert_array_equal(single["images"], three["images"])
    np.testing.assert_array_equal(single["labels"], three["labels"])


def test_all_that_is_wrong_is_reported_at_once(run, tmp_path):
    with pytest.raises(SampleError) as error:
        preview(run, tmp_path / "x.gif", (3, 10, -1), 0)
    for part in ("class 10, -1", "0..9", "count = 0", "must end in .png or .npz"):
        assert part in str(error.value)
    with pytest.raises(ImageSetError, match="is a folder"):
        (tmp_path / "folder.png").mkdir()
        preview(run, tmp_path / "folder.png", None, 1)
    (tmp_path / "file").touch()
    with pytest.raises(ImageSetError, match="cannot be written"):
        preview(run, tmp_path / "file" / "x.png", None, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


def test_latents_have_no_picture_without_an_autoencoder(tmp_path):
    latents = ("model.in_channels=4", "data.source=synthetic")
    (tmp_path / "config.yaml").write_text(to_yaml(tiny(*latents)))
    with pytest.raises(SampleError, match="autoencoder"):
        preview(tmp_path, tmp_path / "x.png", (1,), 1)


def test_all_ranks_refuse_what_one_cannot_do(run, tmp_path):
    """Only rank 0 looks at the file to be written."""
    (tmp_path / "file").touch()
    request = GenerationRequest(run, tmp_path / "file" / "x.png", 1, only=(3,), preview=True)
    messages = as_job(2, tmp_path, generate_images, request)
    assert len(set(messages)) == 1 and "cannot be written" in messages[0]
