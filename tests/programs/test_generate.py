"""Sampling a run: the same images on any number of ranks, what is written, and what is refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from support import processes

from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.diffusion.image_grid import SampleError, chunks, generate, grid
from megapromoe.distributed.mesh import make_mesh
from megapromoe.distributed.runtime import Launch
from megapromoe.nn.parallelize import build
from megapromoe.sampling.generate import gather, load_model, sample_command

TINY = (
    "model.hidden_size=16",
    "model.heads=2",
    "model.depth=2",
    "sample.steps=3",
    "sample.batch=4",
    "train.global_batch=8",
    "train.timeout=60",
)
ALONE = Launch("python")


def tiny(*overrides):
    return resolve("digits", overrides=(*TINY, *overrides))


def stirred(config):
    """A model whose output layer and modulation are not zero."""
    model = build(config)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "adaLN" in name or name.startswith("final_layer.linear"):
                value = np.random.default_rng(number).standard_normal(model.layouts[name].shape) * 0.1
                parameter.copy_(torch.from_numpy(value).float())
    return model


def saved_run(folder: str, *overrides: str) -> None:
    """Writes a run directory with checkpoints of steps 1 and 2, whose averages are unlike the weights."""
    from megapromoe.checkpoint.manager import Saver
    from megapromoe.engine.averaged_weights import EMA
    from megapromoe.engine.engine import Engine

    config = tiny(*overrides)
    mesh = make_mesh(config.parallel.tp, config.parallel.ep, timeout=60)
    engine = Engine(build(config, mesh), config, mesh)
    ema = EMA(engine, 0.5)
    for average in ema.averages:
        average.mul_(2.0).add_(0.01)
    (Path(folder) / "checkpoints").mkdir(exist_ok=True)
    saver = Saver(Path(folder) / "checkpoints", engine, ema, patience=60)
    for step in (1, 2):
        saver.save({"step": step, "updates": step})
    saver.finish(last=True)
    if mesh.rank == 0:
        (Path(folder) / "config.yaml").write_text(to_yaml(config))
    torch.distributed.barrier()
    engine.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    processes.run(2, saved_run, str(folder), "parallel.tp=2", "parallel.ep=2")
    return folder


def test_chunks_share_out_every_image_once():
    for count, batch, world in ((10, 4, 3), (3, 4, 2), (12, 4, 2), (9, 1, 4)):
        mine = [chunks(count, batch, rank, world) for rank in range(world)]
        assert sorted(i for rank in mine for stretch in rank for i in stretch) == list(range(count))
        assert sorted((s.start, s.stop) for rank in mine for s in rank) == [
            (s.start, s.stop) for s in chunks(count, batch, 0, 1)
        ]


@pytest.mark.parametrize(
    "overrides",
    [
        ("sample.method=euler", "sample.guidance=2"),
        ("diffusion.objective=ddpm", "sample.method=ddpm"),
        ("model.router=diffmoe",),
    ],
)
def test_ranks_draw_the_images_of_one(overrides):
    config = tiny(*overrides)
    model = stirred(config)
    labels = [i % 11 for i in range(10)]  # 10 is the null class
    whole = generate(model, config, labels, range(10))
    assert whole.shape == (10, 1, 8, 8) and whole.std() > 0.1
    for world in (2, 4):
        parts = [generate(model, config, labels, range(10), rank, world) for rank in range(world)]
        for rank, part in enumerate(parts):
            images = [i for stretch in chunks(10, 4, rank, world) for i in stretch]
            assert torch.equal(part, whole[images])


def test_an_image_is_fixed_by_seed_index_and_label():
    config = tiny()
    model = stirred(config)
    whole = generate(model, config, [1, 2, 3, 4, 5, 6], range(6))
    for index in (0, 3, 5):  # in other company, equal to rounding
        torch.testing.assert_close(generate(model, config, [index + 1], [index])[0], whole[index])
    assert not torch.equal(generate(model, config, [7], [0])[0], whole[0])
    assert not torch.equal(generate(model, config, [1], [1])[0], whole[0])
    assert not torch.equal(generate(model, tiny("sample.seed=1"), [1], [0])[0], whole[0])


def test_the_run_s_shift_of_noise_levels_is_used():
    model = stirred(tiny())
    plain, moved = (generate(model, tiny(f"diffusion.shift={s}"), [1], [0]) for s in (1.0, 3.0))
    assert not torch.allclose(plain, moved, atol=1e-4)


def test_the_model_s_mode_is_restored_and_progress_reported():
    model, seen = stirred(tiny()).train(), []
    generate(model, tiny(), [1] * 6, range(6), progress=lambda done, total: seen.append((done, total)))
    assert model.training
    assert seen == [(done, 6) for done in range(1, 7)]  # two chunks of three steps


def gathered(count: int) -> list | None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = [i for stretch in chunks(count, 4, rank, world) for i in stretch]
    images = torch.tensor(mine, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 2, 2)
    whole = gather(images, count, 4, rank, world)
    return None if whole is None else whole[:, 0, 1, 1].tolist()


def test_images_of_all_ranks_meet_in_order():
    first, *others = processes.run(3, gathered, 18)
    assert first == list(range(18)) and others == [None, None]
    assert processes.run(3, gathered, 3)[0] == [0, 1, 2]  # two ranks have nothing to send


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


def test_what_cannot_be_loaded_is_said(run, tmp_path):
    with pytest.raises(SampleError, match="no config.yaml"):
        load_model(tmp_path)
    with pytest.raises(SampleError, match=r"step = 7: .* there are 1, 2"):
        load_model(run, step=7)
    with pytest.raises(SampleError, match="weights = 'best': must be ema or master"):
        load_model(run, weights="best")
    with pytest.raises(SampleError, match="model.depth=4: .*only sample"):
        load_model(run, overrides=["model.depth=4"])
    with pytest.raises(ConfigError, match="sample.stepz"):
        load_model(run, overrides=["sample.stepz=4"])
    (tmp_path / "config.yaml").write_text(to_yaml(tiny()))
    with pytest.raises(SampleError, match="no complete checkpoint"):
        load_model(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(tiny("model.hidden_size=24")))
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    with pytest.raises(RuntimeError, match="another model"):
        load_model(tmp_path)


def test_a_picture_has_a_row_for_each_class(run, tmp_path):
    out = tmp_path / "made" / "grid.png"
    sample_command(run, out, [3, 5], 3, None, "ema", [], ALONE)
    assert imread(out).shape[:2] == (2 * 66 + 2, 3 * 66 + 2)
    assert os.listdir(out.parent) == ["grid.png"]


def launched(run: str, out: str, store: str, port: int, arguments: tuple) -> str | None:
    """sample_command on a rank that starts a job of its own, as under a launcher."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.barrier()  # who leaves while others still connect ends them
    torch.distributed.destroy_process_group()
    launch = Launch("torchrun", rank, world, rank, world, "127.0.0.1", port)
    said = None
    try:
        os.environ["OMP_NUM_THREADS"] = "1"
        sample_command(Path(run), Path(out), *arguments, launch)
    except SampleError as error:
        said = str(error)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.distributed.barrier()
    return said


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_three_ranks_write_the_images_of_one(run, tmp_path):
    arguments = ([3, 5], 5, None, "ema", ["sample.guidance=2"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sample_command(run, tmp_path / "one.npz", *arguments, ALONE)
    finally:
        torch.set_num_threads(threads)
    said = processes.run(
        3, launched, str(run), str(tmp_path / "three.npz"), str(tmp_path / "store"), free_port(), arguments
    )
    assert said == [None] * 3
    one, three = (np.load(tmp_path / f"{name}.npz") for name in ("one", "three"))
    assert one["labels"].tolist() == [3] * 5 + [5] * 5 and one["seed"] == 0
    np.testing.assert_array_equal(one["images"], three["images"])
    np.testing.assert_array_equal(one["labels"], three["labels"])


def test_what_cannot_be_asked_is_told_at_once(run, tmp_path):
    with pytest.raises(SampleError) as error:
        sample_command(run, tmp_path / "x.gif", [3, 10, -1], 0, None, "ema", [], ALONE)
    for part in ("class 10, -1", "0..9", "count = 0", "must end in .png or .npz"):
        assert part in str(error.value)
    with pytest.raises(SampleError, match="is a folder"):
        (tmp_path / "folder.png").mkdir()
        sample_command(run, tmp_path / "folder.png", None, 1, None, "ema", [], ALONE)
    (tmp_path / "file").touch()
    with pytest.raises(SampleError, match="cannot be written"):
        sample_command(run, tmp_path / "file" / "x.png", None, 1, None, "ema", [], ALONE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


def test_latents_have_no_picture_without_an_autoencoder(tmp_path):
    latents = ("model.in_channels=4", "data.source=synthetic")
    (tmp_path / "config.yaml").write_text(to_yaml(tiny(*latents)))
    with pytest.raises(SampleError, match="autoencoder"):
        sample_command(tmp_path, tmp_path / "x.png", [1], 1, None, "ema", [], ALONE)


def test_all_ranks_refuse_what_one_cannot_do(run, tmp_path):
    """Only rank 0 looks at the file to be written."""
    (tmp_path / "file").touch()
    arguments = ([3], 1, None, "ema", [])
    out = tmp_path / "file" / "x.png"
    said = processes.run(2, launched, str(run), str(out), str(tmp_path / "store"), free_port(), arguments)
    assert len(set(said)) == 1 and "cannot be written" in said[0]


def test_sampling_does_without_deepspeed():
    """It is slow to import, and imported after a job was joined it keeps the job's threads alive beyond its end."""
    code = "import sys, megapromoe.sampling.generate; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
