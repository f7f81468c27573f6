"""Training on latents with captions: at two layouts, resumed at another, and refusals of captions that do not fit."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.latent_folders import Arrays, write
from support.processes import run
from support.text_folders import WordEncoder
from support.training_runs import losses, state, train

from megapromoe.checkpoint.data_identity import data_identity
from megapromoe.cli import main
from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.data.caption_batches import SyntheticCaptions
from megapromoe.data.captions import CaptionedItem
from megapromoe.data.datasets import DatasetError
from megapromoe.data.encode_text import TextJob, encode_text
from megapromoe.data.sources import open_captions, open_dataset
from megapromoe.data.text_features import TextFeatures
from megapromoe.diffusion.noise import normals, permutation
from megapromoe.diffusion.objectives import RectifiedFlow
from megapromoe.evaluation.heldout import objective_loss
from megapromoe.training import loop
from megapromoe.training.dry_run import examine_start
from megapromoe.training.preview import open_preview

COUNT = 64
TEXT = ("data.source=latents", "data.flip=true", "data.workers=2", "model.condition=text", "model.num_classes=1000")
TEXT = (*TEXT, "model.text_width=6", "model.text_tokens=4", "model.positions=rope", "model.text_ffn=16")


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """Records whose captions have 2 to 4 tokens."""
    folder = tmp_path_factory.mktemp("captioned") / "latents"
    write(folder, Arrays(count=COUNT, shape=(4, 8, 8)), shard_size=32)
    write_captions(folder, WordEncoder())
    return folder


def write_captions(folder: Path, encoder: WordEncoder) -> None:
    captions = (" ".join(["some"] * (1 + i % 3)) + f" {i}" for i in range(COUNT))
    records = Arrays(count=COUNT).scan.items
    items = [CaptionedItem(item.path, 0, caption) for item, caption in zip(records, captions, strict=True)]
    encode_text(TextJob(items, encoder, folder / "text", "float16", shard_size=32, beside=folder))


def try_to_train(folder: str, *overrides: str) -> str:
    try:
        train(folder, *TEXT, *overrides)
    except loop.TrainingError as error:
        return str(error)
    return "trained"


def test_a_run_on_captions_is_the_same_at_another_layout_and_resumes_at_it(latents, tmp_path):
    """With experts that do not divide over the ranks."""
    data = (f"data.path={latents}", "model.num_experts=3")
    single, divided = tmp_path / "one", tmp_path / "two"
    assert run(1, try_to_train, str(single), *data) == ["trained"]
    assert run(1, try_to_train, str(divided), *data, "train.steps=3") == ["trained"]
    pictures = ("train.sample_every=5", "sample.steps=2", "sample.method=heun")
    assert run(2, try_to_train, str(divided), *data, "parallel.tp=2", "parallel.ep=2", *pictures) == ["trained"] * 2
    with Image.open(divided / "samples" / "step-00000005.png") as picture:
        assert picture.size[0] > 500 and len(picture.getcolors(1 << 20)) > 100
    assert len(losses(single)) == 6 and losses(divided) == pytest.approx(losses(single), rel=1e-4)
    expected, ours = state(single, 6), state(divided, 6)
    assert expected.keys() == ours.keys() and ("master", "text_embedder.null") in ours
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-5, msg=str(key))


@pytest.mark.full
def test_a_run_on_captions_continues_from_safetensors_at_another_layout(latents, tmp_path):
    """Converted there and back, it trains on as the run itself does, to the bit."""
    data = (f"data.path={latents}", "model.num_experts=3")
    divided = (*data, "parallel.tp=2", "parallel.ep=2")
    assert run(1, try_to_train, str(tmp_path / "run"), *data, "train.steps=3") == ["trained"]
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "a.safetensors"), "--to", "safetensors"]) == 0
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "back"), "--to", "ours"]) == 0
    for folder in ("run", "back"):
        assert run(2, try_to_train, str(tmp_path / folder), *divided) == ["trained"] * 2
    expected, ours = state(tmp_path / "run", 6), state(tmp_path / "back", 6)
    assert expected.keys() == ours.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())


def test_a_text_model_trains_on_random_data_for_timing(tmp_path):
    assert run(1, try_to_train, str(tmp_path / "run"), "data.source=synthetic", "train.steps=2") == ["trained"]
    assert len(losses(tmp_path / "run")) == 2


def test_random_captions_depend_on_the_record_and_are_dropped():
    captions = SyntheticCaptions(6, 4, seed=0)
    indices_B, drop_B = np.array([3, 5, 3, 6]), np.array([False, False, True, False])
    batch = captions.batch(indices_B, drop_B)
    assert batch.mask_BN.sum(1).tolist() == [4, 2, 0, 3] and batch.features_BND.dtype == torch.float16
    assert not batch.features_BND[~batch.mask_BN].any() and batch.features_BND[batch.mask_BN].all(dim=-1).all()
    again = captions.batch(indices_B[3:], drop_B[3:])
    assert torch.equal(again.features_BND[0], batch.features_BND[3])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.text_width=8"], "text features have 6 channels, the model takes 8: set model.text_width=6"),
        (["model.text_tokens=3"], "captions have more than 3 tokens, record 2 has 4"),
    ],
)
def test_captions_that_do_not_fit_are_refused(latents, tmp_path, overrides, message):
    (error,) = run(1, try_to_train, str(tmp_path / "run"), f"data.path={latents}", *overrides)
    assert message in error


def test_captions_of_another_encoder_are_other_data(latents, tmp_path):
    """So a run does not continue on them unless `--allow data` says so."""
    folder = tmp_path / "latents"
    shutil.copytree(latents, folder)
    texts = resolve("promoe_s", overrides=[*TEXT, f"data.path={folder}"])
    classes = resolve("promoe_s", overrides=["data.source=latents", f"data.path={folder}"])
    before = data_identity(texts), data_identity(classes)
    shutil.rmtree(folder / "text")
    assert data_identity(texts) is None and data_identity(classes) == before[1]
    write_captions(folder, WordEncoder(sha256="cd" * 32))
    assert data_identity(texts) not in (None, before[0]) and data_identity(classes) == before[1] != before[0]


def test_latents_without_captions_are_refused(tmp_path, capsys):
    write(tmp_path / "plain", Arrays(count=COUNT, shape=(4, 8, 8)))
    settings = [*TEXT, f"data.path={tmp_path / 'plain'}", "model.in_channels=4", "model.input_size=8"]
    command = ["train", "--run-dir", str(tmp_path / "run"), "--dry-run", *settings, "train.global_batch=16"]
    assert main(command) == 2
    assert f"{tmp_path / 'plain' / 'text'}" in capsys.readouterr().err


def test_pictures_during_training_show_captions_that_training_does_not_use(latents, tmp_path):
    settings = [*TEXT, f"data.path={latents}", "model.in_channels=4", "model.input_size=8", "train.sample_every=5"]
    config = resolve("promoe_s", overrides=[*settings, "train.global_batch=16"])
    captions = open_captions(config, open_dataset(config))
    preview = open_preview(config, captions)
    assert len(preview.captions) == 8 and len(preview.condition) == 32
    assert preview.captions[0] == "some 0" and preview.captions[-1] == f"some {COUNT - 1}"
    last = captions.batch(np.array([COUNT - 1]), np.array([False]))
    assert torch.equal(preview.condition.features_BND[-1:], last.features_BND)
    assert torch.equal(preview.condition.mask_BN[-1:], last.mask_BN)
    write(tmp_path / "test", Arrays(count=4, shape=(4, 8, 8)))
    items = [CaptionedItem(item.path, 0, f"held out {i}") for i, item in enumerate(Arrays(count=4).scan.items)]
    encode_text(TextJob(items, WordEncoder(), tmp_path / "test" / "text", "float16", beside=tmp_path / "test"))
    config = replace(config, data=replace(config.data, test_path=str(tmp_path / "test")))
    assert open_preview(config, captions).captions == [f"held out {i}" for i in range(4)]
    assert open_preview(replace(config, train=replace(config.train, sample_every=0)), captions) is None


def test_a_start_whose_test_captions_are_of_another_encoder_is_refused(latents, tmp_path):
    """As one whose test images have none. A dry run reports it, as the start does."""
    test = tmp_path / "test"
    write(test, Arrays(count=COUNT, shape=(4, 8, 8)))
    data = [f"data.path={latents}", f"data.test_path={test}", "train.sample_every=5", "train.global_batch=16"]
    config = resolve("promoe_s", overrides=[*TEXT, *data, "model.in_channels=4", "model.input_size=8"])

    def refusal() -> str:
        return str(examine_start(config, tmp_path / "run").refused or "")

    assert f"{test / 'text'} holds no text.json" in refusal()
    write_captions(test, WordEncoder(sha256="ef" * 32))
    with pytest.raises(
        DatasetError, match="by the text encoder 'words' .*sha256 efefefefefef.*, the captions of train"
    ):
        open_captions(config, open_dataset(config, "test"))
    assert "encode it again with that one" in refusal()
    shutil.rmtree(test / "text")
    write_captions(test, WordEncoder())
    assert refusal() == ""


def test_random_captions_have_no_pictures():
    overrides = ["model.condition=text", "model.text_width=6", "model.text_tokens=4", "train.sample_every=5"]
    with pytest.raises(ConfigError, match="train.sample_every = 5: must be 0 with data.source = 'synthetic'"):
        resolve("promoe_s", overrides=[*overrides, "data.source=synthetic"])


def test_the_loss_on_fixed_draws_follows_its_definition_with_captions(latents):
    settings = [*TEXT, f"data.path={latents}", "model.in_channels=4", "model.input_size=8", "train.global_batch=16"]
    config = resolve("promoe_s", overrides=[*settings, "sample.batch=7"])
    dataset, text = open_dataset(config), TextFeatures(latents / "text")

    class Guess(torch.nn.Linear):  # a velocity of the noise level and the text
        def forward(self, x_BCHW, t_B, texts, conditional):
            assert conditional == len(texts) == len(x_BCHW) and not texts.is_null().any()
            guess_B = t_B / 1000 + texts.features_BND.float().sum((1, 2))
            return guess_B[:, None, None, None].expand(-1, 8, 8, 8), None

    mean, _ = objective_loss(Guess(1, 1), config, dataset, draws=40, seed=3)
    record = permutation(3, "held-out record", 0, COUNT)[:40]
    noise = normals(3, "held-out noise", np.arange(40), (4, 8, 8))
    u = (permutation(3, "held-out time", 0, 40) + 0.5) / 40
    guess = RectifiedFlow().sigma(torch.from_numpy(u)).numpy() + [text.features(int(r)).sum() for r in record]
    clean = dataset.sample(record, np.zeros(40, dtype=bool), None)
    assert mean == pytest.approx(((guess[:, None, None, None] - noise + clean) ** 2).mean(), rel=1e-5)


def test_evaluate_refuses_a_run_on_captions_other_than_scenes(latents, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(1, try_to_train, str(folder), f"data.path={latents}", "train.steps=3") == ["trained"]
    assert main(["evaluate", "--num-images", "8", "--run-dir", str(folder)]) in (1, 2)
    assert "is a model with model.condition = 'text' that was not trained on scenes" in capsys.readouterr().err
