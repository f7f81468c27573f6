"""Captions in the stream of samples: dropped by (seed, position), masked, without influence once they are dropped."""

import numpy as np
import pytest
import torch
from support.latent_folders import Arrays, write
from support.text_folders import WordEncoder

from megapromoe.cli import main
from megapromoe.data.caption_batches import Captions, captions_beside
from megapromoe.data.captions import CaptionedItem
from megapromoe.data.encode_text import TextJob, encode_text
from megapromoe.data.latents import Latents
from megapromoe.data.sample_stream import SampleStream, prefetch
from megapromoe.data.shard_files import HEADER
from megapromoe.data.text_features import TextFeatures, TextFeaturesError

COUNT, DROPOUT = 24, 0.3

pytestmark = pytest.mark.usefixtures("impatient")


def caption(index: int, words: str) -> str:
    return " ".join([words] * (1 + index % 3)) + f" {index}"


def captioned(folder, words="some", dtype="float16"):
    """Latents of 24 records with captions of 2 to 4 tokens."""
    source = Arrays(count=COUNT)
    write(folder, source, shard_size=10)
    items = [CaptionedItem(item.path, 0, caption(i, words)) for i, item in enumerate(source.scan.items)]
    encode_text(TextJob(items, WordEncoder(), folder / "text", dtype, shard_size=10, beside=folder))
    return folder


def stream(folder, max_tokens=None, with_captions=True, dropout=DROPOUT):
    data = Latents(folder)
    captions = captions_beside(data, max_tokens) if with_captions else None
    return SampleStream(data, 7, dropout, True, data.num_classes, captions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return captioned(tmp_path_factory.mktemp("captioned") / "latents")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_batch_has_the_captions_of_its_records(dtype, tmp_path):
    folder = captioned(tmp_path / "latents", dtype=dtype)
    samples, text = stream(folder, max_tokens=6), TextFeatures(folder / "text")
    batch = samples.batch(0, 2 * COUNT)
    features, mask = batch.captions.features_BND, batch.captions.mask_BN
    assert features.shape == (2 * COUNT, 6, 6) and features.dtype == getattr(torch, dtype) and mask.dtype == torch.bool
    indices = samples.indices(batch.positions_B.numpy())
    assert 0 < batch.num_conditional < 2 * COUNT
    for row, index in enumerate(indices.tolist()):
        expected = text.features(index) if row < batch.num_conditional else np.zeros((0, 6), np.float32)
        assert mask[row].tolist() == [token < len(expected) for token in range(6)]
        assert np.array_equal(features[row, : len(expected)].float().numpy(), expected)
        assert not features[row, len(expected) :].any()


def test_the_stream_without_captions_is_the_same(folder):
    """The same positions are dropped, and neither images nor noise depend on captions."""
    with_captions, without = stream(folder).batch(5, 30), stream(folder, with_captions=False).batch(5, 30)
    for name in ("clean_BCHW", "noise_BCHW", "u_B", "labels_B", "positions_B"):
        assert torch.equal(getattr(with_captions, name), getattr(without, name))
    assert with_captions.num_conditional == without.num_conditional and without.captions is None


def test_a_null_image_does_not_depend_on_its_caption(folder, tmp_path):
    batch, other = (stream(path).batch(0, 40) for path in (folder, captioned(tmp_path / "other", words="different")))
    assert torch.equal(batch.clean_BCHW, other.clean_BCHW) and 5 < len(batch) - batch.num_conditional < 20
    for tensor, changed in (
        (batch.captions.features_BND, other.captions.features_BND),
        (batch.captions.mask_BN, other.captions.mask_BN),
    ):
        assert torch.equal(tensor[batch.num_conditional :], changed[batch.num_conditional :])
    rows = (batch.captions.features_BND != other.captions.features_BND).flatten(1).any(dim=1)
    assert rows.tolist() == [row < batch.num_conditional for row in range(40)]


def test_captions_belong_to_their_position_at_every_layout(folder):
    samples = stream(folder)
    complete = samples.batch(10, 24)
    parts = [samples.batch(10, 7), samples.batch(17, 5), samples.batch(22, 12)]
    for name in ("features_BND", "mask_BN"):
        joined = torch.cat([getattr(part.captions, name) for part in parts])
        order = torch.cat([part.positions_B for part in parts]).argsort()
        assert torch.equal(joined[order], getattr(complete.captions, name)[complete.positions_B.argsort()])


def test_stratified_dropout_drops_captions_with_their_labels(folder):
    """Of each 8 samples 2 have neither label nor caption, in batches of any layout."""
    data = Latents(folder)
    samples = SampleStream(data, 7, 0.25, True, data.num_classes, captions_beside(data), dropout_stratum=8)
    for first, count in ((0, 24), (24, 8), (32, 16)):
        batch = samples.batch(first, count)
        assert batch.num_conditional == count * 3 // 4
        assert batch.captions.mask_BN.any(dim=1).tolist() == [row < batch.num_conditional for row in range(count)]
        assert not batch.captions.features_BND[batch.num_conditional :].any()


@pytest.mark.parametrize(("dropout", "conditional"), [(0.0, 12), (1.0, 0)])
def test_batches_without_null_or_without_conditional_images(dropout, conditional, folder):
    batch = stream(folder, dropout=dropout).batch(0, 12)
    assert batch.num_conditional == conditional and batch.captions.mask_BN.any(dim=1).sum() == conditional
    assert batch.captions.features_BND.shape == (12, 4, 6)


def test_batches_move_with_their_captions(folder):
    (batch,) = prefetch(stream(folder), [range(3, 9)], workers=2)
    moved = batch.to("meta")
    assert moved.captions.features_BND.device.type == moved.captions.mask_BN.device.type == "meta"
    assert torch.equal(batch.captions.mask_BN, stream(folder).batch(3, 6).captions.mask_BN)


def test_a_record_with_a_damaged_caption_is_replaced_on_every_layout(tmp_path):
    folder = captioned(tmp_path / "latents")
    good = stream(folder, dropout=0.0)
    first = int(good.indices(np.array([0]))[0])
    shard, place = divmod(first, 10)
    row = sum(2 + i % 3 for i in range(shard * 10, shard * 10 + place))  # all captions are different
    path = folder / "text" / f"text-0000{shard}.npy"
    content = bytearray(path.read_bytes())
    content[HEADER + row * 12] ^= 1
    path.write_bytes(content)
    batch = stream(folder, dropout=0.0).batch(0, 6)
    assert batch.damaged == 1 and torch.equal(batch.clean_BCHW[1:], good.batch(0, 6).clean_BCHW[1:])
    assert torch.equal(batch.captions.features_BND[0], batch.captions.features_BND[1]), "the next one of the epoch"
    assert stream(folder, dropout=0.0).batch(0, 1).damaged == 1
    assert stream(folder, dropout=1.0).batch(0, 6).damaged == 0, "a dropped caption is not read"


def test_captions_longer_than_trained_or_of_other_latents_are_refused(folder, tmp_path):
    with pytest.raises(TextFeaturesError, match="8 captions have more than 3 tokens, record 2 has 4; encode again"):
        Captions(TextFeatures(folder / "text"), 3)
    assert stream(folder).captions.max_tokens == 4
    other = write(tmp_path / "other", Arrays(count=COUNT + 1))
    (other / "text").symlink_to(folder / "text")
    with pytest.raises(TextFeaturesError, match="belongs to other latents"):
        captions_beside(Latents(other))
    with pytest.raises(TextFeaturesError, match="holds no text.json"):
        captions_beside(Latents(write(tmp_path / "plain")))


def test_speed_reads_captions_too(folder, capsys):
    assert main(["data", "speed", str(folder), "--seconds", "1", "--batch", "4"]) == 0
    assert "2x4x4 with captions of 4 tokens, width 6, batches of 4" in capsys.readouterr().out
