"""Many images: the same at any number of ranks and layout, taken up where they were left, and refused with a reason."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import command_words, processes
from support.sampled_runs import ALONE, as_job, stirred_run, tiny
from torch.distributed.run import get_args_parser

from megapromoe.commands import evaluate
from megapromoe.commands import sample as command
from megapromoe.config.options import ConfigError
from megapromoe.data.autoencoder import AutoencoderError
from megapromoe.diffusion.image_grid import SampleError, generate, to_bytes
from megapromoe.distributed.mesh import Group, Mesh
from megapromoe.sampling import decoding, generation
from megapromoe.sampling.generation import generate_images
from megapromoe.sampling.image_set_writer import ImageSetWriter
from megapromoe.sampling.image_sets import ImageSet, ImageSetError
from megapromoe.sampling.replica_layout import ReplicaLayout
from megapromoe.sampling.request import GenerationRequest
from megapromoe.sampling.run_model import load_model


def parsed(*words):
    return command_words.parsed(command, *words)


# ---- who draws what


@pytest.mark.parametrize("tp, ep, etp", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2), (2, 3, 1)])
def test_every_missing_chunk_is_generated_and_written_once(tp, ep, etp):
    group = ReplicaLayout.of(0, 24, tp, ep, etp).group_size * tp
    company = {}
    for world in (group, 2 * group, 24):
        for missing in ([], [4], list(range(11)), [0, 3, 4, 9, 10]):
            generated = []
            ranks = [ReplicaLayout.of(rank, world, tp, ep, etp) for rank in range(world)]
            rounds = [list(layout.rounds(missing, 10)) for layout in ranks]
            assert len({len(r) for r in rounds}) == 1
            for now in zip(*rounds, strict=True):
                kept = [c for layout, (c, _) in zip(ranks, now, strict=True) if c in missing and layout.writes(c)]
                assert sorted(kept) == now[0][1]
                generated += kept
                for start in range(0, world, group):  # all replicas of a group generate, or none does
                    chunks = [c for c, _ in now[start : start + group]]
                    assert set(chunks) == {None} or all(c in range(11) for c in chunks)
                    for c in set(chunks) - {None}:  # in a company that is always the same
                        assert company.setdefault(c, chunks) == chunks
                    for replica in range(start, start + group, tp):
                        assert len(set(chunks[replica - start : replica - start + tp])) == 1
            assert sorted(generated) == missing


def test_a_group_is_the_ranks_that_share_experts_or_matrices():
    assert ReplicaLayout.of(5, 8, 1, 4, 1) == ReplicaLayout(1, group_size=4, group=1, num_groups=2, is_first=True)
    assert ReplicaLayout.of(5, 8, 2, 2, 1) == ReplicaLayout(0, group_size=1, group=2, num_groups=4, is_first=False)
    assert ReplicaLayout.of(6, 8, 2, 2, 2) == ReplicaLayout(1, group_size=2, group=1, num_groups=2, is_first=True)


def test_labels_are_balanced_or_random_for_each_image(run):
    config = tiny()
    request = GenerationRequest(run, Path("x"), 25)
    assert request.labels(config).tolist() == [i % 10 for i in range(25)]
    assert GenerationRequest(run, Path("x"), 5, only=(7, 2)).labels(config).tolist() == [7, 2, 7, 2, 7]
    random_labels = GenerationRequest(run, Path("x"), 4000, classes="random").labels(config)
    assert np.abs(np.bincount(random_labels, minlength=10) - 400).max() < 100
    assert (GenerationRequest(run, Path("x"), 30, classes="random").labels(config) == random_labels[:30]).all()
    assert (
        GenerationRequest(run, Path("x"), 30, classes="random").labels(tiny("sample.seed=1")) != random_labels[:30]
    ).any()


# ---- what is drawn


def test_a_set_holds_the_images_of_the_model(run, tmp_path):
    assert generate_images(GenerationRequest(run, tmp_path / "set.npz", 10), ALONE) == [tmp_path / "set.npz"]
    model, config, _ = load_model(run)
    images = generate(model, config, [i % 10 for i in range(10)], range(10)).numpy()
    assert images.std() > 0.3
    expected = np.round((images.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    with np.load(tmp_path / "set.npz") as stored:
        assert stored["arr_0"].dtype == np.uint8 and stored["arr_1"].dtype == np.int64
        np.testing.assert_array_equal(stored["arr_0"], expected)
        assert stored["arr_1"].tolist() == list(range(10))
    generate_images(GenerationRequest(run, tmp_path / "set", 10), ALONE)
    for i in range(10):
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "set" / f"{i:06d}.png")), expected[i, ..., 0])
    assert np.load(tmp_path / "set" / "labels.npy").tolist() == list(range(10))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "set.npz"]
    assert sorted(p.name for p in (tmp_path / "set").iterdir())[-2:] == ["labels.npy", "request.json"]


@pytest.mark.parametrize("only, each, count", [(None, 1, 10), ((3,), 7, 7)], ids=["one of each class", "one class"])
def test_a_preview_and_a_set_hold_the_same_images(run, tmp_path, only, each, count):
    """Where their images have the same numbers and classes."""
    for world in (1, 2):
        preview = GenerationRequest(run, tmp_path / f"preview{world}.npz", each, only=only, preview=True)
        whole_set = GenerationRequest(run, tmp_path / f"set{world}.npz", count, only=only)
        for request in (preview, whole_set):
            if world == 1:
                generate_images(request, ALONE)
            else:
                assert as_job(world, tmp_path, generate_images, request) == [[request.out]] * world
        with np.load(preview.out) as floats, np.load(whole_set.out) as stored:
            assert floats["images"].std() > 0.3
            np.testing.assert_array_equal(to_bytes(floats["images"]), stored["arr_0"])
            np.testing.assert_array_equal(floats["labels"], stored["arr_1"])


def test_each_guidance_scale_has_a_set(run, tmp_path):
    places = generate_images(GenerationRequest(run, tmp_path / "a.npz", 5, scales=("1.0", "2.5")), ALONE)
    assert [p.name for p in places] == ["a-guidance-1.npz", "a-guidance-2.5.npz"]
    generate_images(GenerationRequest(run, tmp_path / "b.npz", 5, overrides=("sample.guidance=2.5",)), ALONE)
    first, two, alone = (ImageSet(p).read(0, 5) for p in (*places, tmp_path / "b.npz"))
    np.testing.assert_array_equal(two, alone)
    assert (first != two).any()
    folders = generate_images(GenerationRequest(run, tmp_path / "c", 5, scales=(1, 2.5)), ALONE)
    assert folders == [tmp_path / "c" / "guidance-1", tmp_path / "c" / "guidance-2.5"]
    np.testing.assert_array_equal(ImageSet(folders[1]).read(0, 5), alone)


def test_three_ranks_sample_the_set_of_one_rank(run, tmp_path):
    generate_images(GenerationRequest(run, tmp_path / "one.npz", 18, classes="random"), ALONE)
    as_job(3, tmp_path, generate_images, GenerationRequest(run, tmp_path / "three.npz", 18, classes="random"))
    with np.load(tmp_path / "one.npz") as single, np.load(tmp_path / "three.npz") as three:
        for name in ("arr_0", "arr_1"):
            np.testing.assert_array_equal(single[name], three[name])


def test_a_model_split_over_ranks_draws_the_same_images(run, tmp_path):
    """22 images are 6 chunks, so 4 ranks of ep 2 have a round in which one block idles; 3 experts do not divide."""
    generate_images(GenerationRequest(run, tmp_path / "whole.npz", 22), ALONE)
    for name, world, tp, ep in (("two", 2, 1, 2), ("four", 4, 1, 2), ("both", 4, 2, 2)):
        as_job(world, tmp_path, generate_images, GenerationRequest(run, tmp_path / f"{name}.npz", 22, tp=tp, ep=ep))
    unsplit, two, four, both = (
        ImageSet(tmp_path / f"{name}.npz").read(0, 22).astype(int) for name in ("whole", "two", "four", "both")
    )
    np.testing.assert_array_equal(two, four)
    for split in (two, both):  # equal to rounding: a byte may differ by one, here and there
        assert np.abs(split - unsplit).max() <= 1 and (split != unsplit).mean() < 0.01


def test_a_rank_loads_its_part_only(run):
    single_rank = Group((0,), 0)
    unsplit, *_ = load_model(run)
    for rank, experts in ((0, 2), (1, 1)):
        ep = Group((0, 1), rank)
        part, *_ = load_model(run, mesh=Mesh(single_rank, single_rank, single_rank, ep, single_rank))
        name = "blocks.1.mlp.experts.fc1.weight"
        held, logical = dict(part.named_parameters())[name], dict(unsplit.named_parameters())[name]
        assert held.shape[0] == 2 and logical.shape[0] == 3
        assert torch.equal(held[:experts], logical[2 * rank : 2 * rank + experts])


def test_the_command_draws_a_set(run, tmp_path):
    words = [
        "--run-dir",
        str(run),
        "--num-images",
        "5",
        "--class",
        "3",
        "--guidance",
        "1",
        "2",
        "--seed",
        "4",
        "--steps",
        "2",
    ]
    assert command.run(parsed(*words, "--out", str(tmp_path / "a.npz")), ALONE) == 0
    with np.load(tmp_path / "a-guidance-2.npz") as stored:
        facts = json.loads(str(stored["request"]))
        assert stored["arr_1"].tolist() == [3] * 5
    assert (facts["sample"]["seed"], facts["sample"]["steps"], facts["sample"]["guidance"]) == (4, 2, 2.0)
    with pytest.raises(ConfigError) as error:
        command.run(parsed("--run-dir", "r", "--out", "o.png", "--tp", "2", "--guidance", "1", "2"), ALONE)
    assert "--tp: needs --num-images" in str(error.value) and "several scales: needs --num-images" in str(error.value)


@pytest.mark.parametrize("module", [command, evaluate], ids=["sample", "evaluate"])
def test_torchrun_takes_no_option_for_its_own(module):
    """It reads abbreviations of its options wherever they stand, also behind the program's name."""
    theirs = [o for action in get_args_parser()._actions for o in action.option_strings]
    parser = argparse.ArgumentParser()
    module.arguments(parser)
    for action in parser._actions:
        if action.option_strings and "-h" not in action.option_strings:
            assert any(not any(t.startswith(ours) for t in theirs) for ours in action.option_strings), action


# ---- begun again


def test_a_stopped_job_continues(run, tmp_path, monkeypatch):
    generate_images(GenerationRequest(run, tmp_path / "whole.npz", 10), ALONE)
    drawn, write = [], ImageSetWriter.write
    for out in (tmp_path / "set.npz", tmp_path / "set"):
        parts = tmp_path / f"{out.name}.parts"
        request = GenerationRequest(run, out, 10)

        def full(self, chunk, images):
            if chunk == 2:
                raise OSError(28, "No space left on device")
            write(self, chunk, images)

        monkeypatch.setattr(ImageSetWriter, "write", full)
        with pytest.raises(SampleError, match="No space left on device.*kept"):
            generate_images(request, ALONE)
        assert parts.is_dir() and not out.exists()
        monkeypatch.setattr(
            ImageSetWriter, "write", lambda self, chunk, images: (drawn.append(chunk), write(self, chunk, images))
        )
        damaged = next(iter(sorted(parts.glob("chunk-000001.npy")) or [parts / "000005.png"]))
        damaged.write_bytes(damaged.read_bytes()[:-9])
        generate_images(request, ALONE)
        assert drawn == [1, 2]
        np.testing.assert_array_equal(ImageSet(out).read(0, 10), ImageSet(tmp_path / "whole.npz").read(0, 10))
        assert not parts.exists()
        generate_images(request, ALONE)  # nothing is left to do
        assert drawn == [1, 2]
        drawn.clear()


def test_ranks_stop_and_continue_together(run, tmp_path):
    (tmp_path / "set.npz.parts" / "chunk-000001.npy.writing").mkdir(parents=True)  # one rank cannot write its chunk
    messages = as_job(2, tmp_path, generate_images, GenerationRequest(run, tmp_path / "set.npz", 18))
    assert len(set(messages)) == 1 and "cannot be written (Is a directory); completed images are kept" in messages[0]
    assert (tmp_path / "set.npz.parts" / "chunk-000000.npy").exists()
    (tmp_path / "set.npz.parts" / "chunk-000001.npy.writing").rmdir()
    assert (
        as_job(2, tmp_path, generate_images, GenerationRequest(run, tmp_path / "set.npz", 18))
        == [[tmp_path / "set.npz"]] * 2
    )
    generate_images(GenerationRequest(run, tmp_path / "one.npz", 18), ALONE)
    np.testing.assert_array_equal(
        ImageSet(tmp_path / "set.npz").read(0, 18), ImageSet(tmp_path / "one.npz").read(0, 18)
    )


def test_another_request_is_refused(run, tmp_path):
    for out in (tmp_path / "set.npz", tmp_path / "set"):
        generate_images(GenerationRequest(run, out, 5), ALONE)
        with pytest.raises(ImageSetError, match=r"another request \(num: 5 stored, 6 requested\)"):
            generate_images(GenerationRequest(run, out, 6), ALONE)
        with pytest.raises(ImageSetError, match="weights: 'ema' stored, 'master' requested"):
            generate_images(GenerationRequest(run, out, 5, weights="master"), ALONE)
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    with pytest.raises(ImageSetError, match="was not made by this command"):
        generate_images(GenerationRequest(run, tmp_path / "other.npz", 5), ALONE)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").touch()
    with pytest.raises(ImageSetError, match="is not empty"):
        generate_images(GenerationRequest(run, tmp_path / "letters", 5), ALONE)
    (tmp_path / "word").touch()
    with pytest.raises(ImageSetError, match="is a file"):
        generate_images(GenerationRequest(run, tmp_path / "word", 5), ALONE)


def test_one_job_at_a_time_draws_a_set(tmp_path):
    first, second = (ImageSetWriter(tmp_path / "set", 4, 2, (8, 8, 1)) for _ in range(2))
    assert first.open({"num": 4}) == [0, 1]
    with pytest.raises(ImageSetError, match="another process generates these images"):
        second.open({"num": 4})
    first.close()
    assert second.open({"num": 4}) == [0, 1]
    second.close()


# ---- refused


def test_all_problems_are_reported_together(run, tmp_path):
    with pytest.raises(SampleError) as error:
        bad = GenerationRequest(run, tmp_path / "x.png", 0, "sorted", (3, 10), scales=(1, "1.0"), tp=2, ep=2)
        generate_images(bad, ALONE)
    for part in (
        "class 10: the run's classes are 0..9",
        "num = 0",
        "classes = 'sorted'",
        "PNG files",
        "each scale once",
    ):
        assert part in str(error.value)
    assert "tp 2, ep 2: need a multiple of 2 ranks, not 1" in str(error.value)
    with pytest.raises(ConfigError, match="parallel.ep = 4: must be at most model.num_experts = 3"):
        generate_images(GenerationRequest(run, tmp_path / "x", 5, ep=4), ALONE)
    with pytest.raises(ConfigError, match="sample.guidance"):
        generate_images(GenerationRequest(run, tmp_path / "x", 5, scales=("-1",)), ALONE)
    with pytest.raises(SampleError, match="has no such checkpoint; there are 3"):
        generate_images(GenerationRequest(run, tmp_path / "x", 5, step=7), ALONE)
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_are_no_images(run, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda *a, **k: torch.full((4, 1, 8, 8), torch.nan))
    with pytest.raises(SampleError, match=r"images 0\.\.3: .* not finite"):
        generate_images(GenerationRequest(run, tmp_path / "x", 5), ALONE)


# ---- latents

IDENTITY = {"name": "doubling", "kind": "AutoencoderKL", "sha256": "ab" * 32}


class Doubling:
    """Latents of 4 channels, whose first three, each pixel twice, are the image."""

    identity, channels = IDENTITY, 3

    def latent_shape(self, resolution):
        return 4, resolution // 2, resolution // 2

    def resolution(self, size):
        return size * 2

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    processes.run(1, stirred_run, str(folder), "model.in_channels=4", "data.source=synthetic")
    return folder


def test_latents_are_decoded(latent_run, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(decoding, "open_autoencoder", lambda name, device: opened.append(name) or Doubling())
    generate_images(GenerationRequest(latent_run, tmp_path / "set.npz", 6, autoencoder="doubling"), ALONE)
    images = ImageSet(tmp_path / "set.npz").read(0, 6)
    assert opened == ["doubling"] and images.shape == (6, 16, 16, 3)
    model, config, _ = load_model(latent_run)
    latents = generate(model, config, list(range(6)), range(6))
    np.testing.assert_array_equal(images[:, ::2, 1::2], to_bytes(latents[:, :3]))
    with np.load(tmp_path / "set.npz") as stored:
        assert json.loads(str(stored["request"]))["autoencoder"] == IDENTITY["sha256"]


def test_a_preview_of_decoded_latents(latent_run, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "open_autoencoder", lambda name, device: Doubling())

    def preview(name, autoencoder="doubling"):
        request = GenerationRequest(latent_run, tmp_path / name, 3, only=(1, 2), preview=True, autoencoder=autoencoder)
        generate_images(request, ALONE)

    preview("grid.png")
    assert np.array(Image.open(tmp_path / "grid.png")).shape[:2] == (2 * 65 + 1, 3 * 65 + 1)
    preview("a.npz")
    preview("b.npz", None)
    with np.load(tmp_path / "a.npz") as decoded, np.load(tmp_path / "b.npz") as latents:
        np.testing.assert_array_equal(decoded["images"][:, :, ::2, ::2], latents["images"][:, :3])


def test_the_autoencoder_must_be_that_of_the_latents(latent_run, run, tmp_path, monkeypatch):
    out = tmp_path / "set.npz"
    with pytest.raises(SampleError, match="model.in_channels = 4: .* give --autoencoder"):
        generate_images(GenerationRequest(latent_run, out, 6), ALONE)
    with pytest.raises(SampleError, match="generates pixels .*leave it out"):
        generate_images(GenerationRequest(run, out, 6, autoencoder="doubling"), ALONE)
    other = SimpleNamespace(identity=IDENTITY, latent_shape=lambda r: (16, 8, 8), resolution=lambda s: 64)
    monkeypatch.setattr(decoding, "open_autoencoder", lambda name, device: other)
    with pytest.raises(SampleError, match=r"shape \(16, 8, 8\), the run generates \(4, 8, 8\)"):
        generate_images(GenerationRequest(latent_run, out, 6, autoencoder="other"), ALONE)
    monkeypatch.setattr(decoding, "open_autoencoder", lambda name, device: Doubling())
    monkeypatch.setattr(decoding, "autoencoder_identity", lambda config: IDENTITY | {"sha256": "cd" * 32})
    with pytest.raises(SampleError, match=r"sha256 abab.*the run's latents were encoded by 'doubling' \(sha256 cdcd"):
        generate_images(GenerationRequest(latent_run, out, 6, autoencoder="doubling"), ALONE)

    def missing(name, device):
        raise AutoencoderError(f"{name}: no such folder")

    monkeypatch.setattr(decoding, "open_autoencoder", missing)
    with pytest.raises(SampleError, match="gone: no such folder"):
        generate_images(GenerationRequest(latent_run, out, 6, autoencoder="gone"), ALONE)
    assert not list(tmp_path.iterdir())
