"""Text features: the same bytes at any number of ranks, resumed, read back to the bit, and damage that is named."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.latent_folders import Arrays, write
from support.text_folders import CAPTIONS, WordEncoder, items, write_text

from megapromoe.cli import main
from megapromoe.data.datasets import DamagedRecords
from megapromoe.data.encode_text import TextJob, encode_text, largest_difference
from megapromoe.data.latents import LatentsError, read_manifest
from megapromoe.data.shard_files import HEADER
from megapromoe.data.shard_job import EncodeError
from megapromoe.data.text_encoder import TextEncoderError
from megapromoe.data.text_features import (
    TextFeatures,
    TextFeaturesError,
    check_text,
    decoded,
    encoded,
    read_text_manifest,
)
from megapromoe.io import sha256_of_json

pytestmark = pytest.mark.usefixtures("impatient")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_output_is_the_same_at_any_number_of_ranks_and_is_what_the_encoder_gives(tmp_path):
    single = files(write_text(tmp_path / "one"))
    assert single == files(write_text(tmp_path / "two", world=2)) == files(write_text(tmp_path / "five", world=5))
    shards = [f"text-0000{i}.npy" for i in range(3)]
    assert sorted(single) == ["plan.json", *shards, "text.json", "text.safetensors"]
    assert check_text(tmp_path / "one") == []
    data, encoder = TextFeatures(tmp_path / "one"), WordEncoder()
    assert len(data) == 20 and data.width == 6 and data.manifest.latents_sha256 == ""
    assert data.manifest.encoder == encoder.identity and data.manifest.max_tokens == 8 and data.manifest.cut == 5
    for index in (0, 3, 7, 19):
        assert data.caption(index) == CAPTIONS[index]
        words = CAPTIONS[index].split()[:8]
        expected = np.stack([encoder.feature(word) for word in words]).astype(np.float16).astype(np.float32)
        assert data.features(index).dtype == np.float32 and np.array_equal(data.features(index), expected)
    assert data.tokens.tolist() == [min(8, len(caption.split())) for caption in CAPTIONS]


def test_shards_are_plain_arrays_and_equal_captions_are_stored_once(tmp_path):
    encoder = WordEncoder()
    folder = write_text(tmp_path / "t", ["a b", "c", "a b", "c", "a b"], encoder, shard_size=4, batch=1)
    assert encoder.batches == [["c"], ["a b"], ["a b"]], "sorted by length; each caption once in a shard"
    index = load_file(folder / "text.safetensors")
    assert index["first"].tolist() == [0, 2, 0, 2, 0] and index["rows"].tolist() == [2, 1, 2, 1, 2]
    assert index["shard"].tolist() == [0, 0, 0, 0, 1] and bytes(index["captions"]) == b"a bca bca b"
    shard = np.load(folder / "text-00000.npy", mmap_mode="r", allow_pickle=False)
    assert shard.shape == (3, 6) and shard.dtype == np.float16
    assert np.array_equal(TextFeatures(folder).features(1)[0], shard[2].astype(np.float32))


def test_bfloat16_is_rounded_as_torch_does(tmp_path):
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * np.float32(1e3)
    values[:6] = [0.0, -0.0, 3.0e38, np.inf, np.nan, 1 + 2**-8]
    bits = torch.from_numpy(values).bfloat16()
    ours = encoded(values, "bfloat16")
    assert np.array_equal(decoded(ours, "bfloat16"), bits.float().numpy(), equal_nan=True)
    folder = write_text(tmp_path / "t", dtype="bfloat16")
    data = TextFeatures(folder)
    exact = np.stack([WordEncoder().feature(word) for word in CAPTIONS[5].split()])
    assert np.array_equal(data.features(5), torch.from_numpy(exact).bfloat16().float().numpy())
    assert check_text(folder) == [] and np.load(folder / "text-00000.npy").dtype == np.uint16


def test_a_killed_job_goes_on_with_the_first_unfinished_shard(tmp_path):
    complete = files(write_text(tmp_path / "whole"))

    class Dying(WordEncoder):
        def encode(self, captions):
            if len(self.batches) == 1:
                raise KeyboardInterrupt
            return super().encode(captions)

    with pytest.raises(KeyboardInterrupt):
        encode_text(TextJob(items(), Dying(), tmp_path / "killed", shard_size=8))
    assert sorted(files(tmp_path / "killed")) == ["part-00000.json", "plan.json", "text-00000.npy"]
    encoder, reported = WordEncoder(), []
    encode_text(TextJob(items(), encoder, tmp_path / "killed", shard_size=8), progress=reported.append)
    assert len(encoder.batches) == 2 and sum(reported) == 20 and files(tmp_path / "killed") == complete
    again = WordEncoder()
    assert encode_text(TextJob(items(), again, tmp_path / "killed", shard_size=8)).records == 20 and not again.batches


def test_another_encoder_or_other_captions_in_the_same_folder_are_refused(tmp_path):
    folder = write_text(tmp_path / "t")
    with pytest.raises(EncodeError, match='other settings or captions: encoder_sha256 was "abab.*give another folder'):
        write_text(folder, encoder=WordEncoder(sha256="ee" * 32))
    with pytest.raises(EncodeError, match="captions_sha256 was"):
        write_text(folder, [*CAPTIONS[:-1], "another"])
    with pytest.raises(EncodeError, match="max_tokens was 8, is 5"):
        write_text(folder, encoder=WordEncoder(max_tokens=5))
    with pytest.raises(EncodeError, match="width was 6, is 7"):
        write_text(folder, encoder=WordEncoder(width=7))


class Broken(WordEncoder):
    """Gives a wrong value for one word."""

    def __init__(self, value, extra=0):
        super().__init__()
        self.value, self.extra = value, extra

    def encode(self, captions):
        features, cut = super().encode(captions)
        return [np.concatenate([f * self.value, f[:, : self.extra]], axis=1) for f in features], cut


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (Broken(np.nan), {}, "caption 'small picture 0': its features are not finite; check the encoder"),
        (Broken(np.inf), {"dtype": "bfloat16"}, "its features are not finite"),
        (Broken(1e6), {}, r"beyond float16; store as bfloat16 \(--text-dtype bfloat16\)"),
        (Broken(1, extra=2), {}, "its features have width 8, the encoder's configuration gives 6; check the encoder"),
    ],
    ids=["nan", "infinite", "float16", "width"],
)
def test_features_that_cannot_be_stored_end_the_job_with_the_caption(encoder, options, message, tmp_path):
    with pytest.raises(EncodeError, match=message):
        write_text(tmp_path / "t", encoder=encoder, **options)
    assert not (tmp_path / "t").exists(), "another attempt may have other settings"
    if message.startswith("beyond"):
        assert check_text(write_text(tmp_path / "t", encoder=encoder, dtype="bfloat16")) == []


# ---- beside latents


class Skipping(Arrays):
    """A source of which two images cannot be read."""

    def records(self, some):
        for item, record, reason in super().records(some):
            number = self.scan.items.index(item)
            yield (item, None, "broken") if number in (1, 9) else (item, record, reason)


def beside(tmp_path, count=20, shard_size=8):
    source = Skipping(count=count)
    folder = write(tmp_path / "latents", source, shard_size=shard_size)
    captions = [f"caption of {item.path}" for item in source.scan.items]
    captioned = tuple(
        type(item)(old.path, 0, caption)
        for item, old, caption in zip(items(captions), source.scan.items, captions, strict=True)
    )
    encode_text(TextJob(captioned, WordEncoder(), folder / "text", shard_size=shard_size, beside=folder))
    return folder


def test_record_i_of_text_belongs_to_record_i_of_the_latents(tmp_path, capsys):
    from megapromoe.data.latents import Latents

    folder = beside(tmp_path)
    latents, text = Latents(folder), TextFeatures(folder / "text")
    assert len(latents) == len(text) == 18 and text.manifest.latents_sha256 == latents.manifest.identity
    for index in range(18):
        assert text.caption(index) == f"caption of {latents.name(index)}"
        assert text.features(index).shape == (3, 6)
    assert main(["data", "check", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "18 captions, width 6 float16" in shown and "by words (WordEncoder) abababababab" in shown
    assert "3 to 3 tokens" in shown and "the first: 'caption of class0/0000.png'" in shown and "no problems" in shown


def test_text_beside_other_latents_is_named(tmp_path, capsys):
    folder = beside(tmp_path)
    other = write(tmp_path / "other", Arrays(count=18), shard_size=8)
    shutil.copytree(folder / "text", other / "text")
    assert main(["data", "check", str(other)]) == 1
    assert f"{other / 'text'} belongs to other latents than {other}; encode again" in capsys.readouterr().out
    job = TextJob(items(CAPTIONS[:18]), WordEncoder(), tmp_path / "t", beside=other)
    with pytest.raises(EncodeError, match="holds latents of other images; encode into a new folder"):
        encode_text(job)
    (folder / "text" / "text.json").unlink()
    assert main(["data", "check", str(folder)]) == 1
    assert f"{folder / 'text'} is not finished; repeat megapromoe encode" in capsys.readouterr().out


# ---- damage


def test_a_damaged_record_is_named_and_the_others_are_read(tmp_path, capsys):
    folder = write_text(tmp_path / "t")
    path = folder / "text-00001.npy"
    content = bytearray(path.read_bytes())
    content[HEADER + 5] ^= 1
    path.write_bytes(content)
    data = TextFeatures(folder)
    with pytest.raises(DamagedRecords, match="text-00001.npy, record 8 is damaged: wrong checksum"):
        data.features(8)
    assert data.features(7).any() and data.features(9).any() and TextFeatures(folder, verify=False).features(8).any()
    assert main(["data", "check", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "text-00001.npy: its SHA-256 differs" in shown and "record 8 is damaged" in shown and "2 problems" in shown


def test_every_missing_or_wrong_file_is_in_one_message(tmp_path):
    folder = write_text(tmp_path / "t")
    (folder / "text-00000.npy").unlink()
    with open(folder / "text-00001.npy", "ab") as file:
        file.write(b"more")
    with pytest.raises(TextFeaturesError, match="00000.npy cannot be opened: .*00001.npy has .* bytes, not"):
        TextFeatures(folder)
    with pytest.raises(TextFeaturesError, match="none holds no text.json; create it with megapromoe encode --captions"):
        TextFeatures(tmp_path / "none")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 0, "width 0 is not a whole number, 1 to 1048576"),
        ("width", True, "width True is not a whole number"),
        ("records", -1, "records -1 is not"),
        ("dtype", "float64", "dtype 'float64' is not one of float16, bfloat16"),
        ("encoder", "t5", "encoder, index_sha256 or latents_sha256 are not of this format"),
        ("shards", [{"file": "../a.npy", "rows": 1, "sha256": ""}], "shards are not different files of this folder"),
        ("shards", [{"file": "a.npy"}], "is damaged"),
        ("colour", "red", r"keys \['colour'\] are missing or unknown"),
        ("format", 2, "format 2, this version reads 1"),
    ],
)
def test_manifests_that_are_not_valid_are_refused(field, value, message, tmp_path):
    path = write_text(tmp_path / "t") / "text.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    content[field] = value
    path.write_text(json.dumps(content | {"sha256": sha256_of_json(content)}))
    with pytest.raises(TextFeaturesError, match=message) as refused:
        read_text_manifest(tmp_path / "t")
    assert str(path) in str(refused.value)


def test_features_are_compared_with_those_of_the_encoder(tmp_path):
    data = TextFeatures(write_text(tmp_path / "t"))
    difference, compared = largest_difference(data, WordEncoder())
    assert 0 < difference < 1e-3 and compared == 20
    with pytest.raises(
        TextEncoderError, match=r"made by 'words' \(WordEncoder, sha256 abababababab\), not by .*eeeeee"
    ):
        largest_difference(data, WordEncoder(sha256="ee" * 32))
    assert largest_difference(data, Broken(0.9))[0] > 0.05
    assert largest_difference(data, Broken(1, extra=1))[0] == np.inf


def test_captions_alone_have_no_pictures(tmp_path, capsys):
    folder = write_text(tmp_path / "t")
    assert main(["data", "show", str(folder)]) == 1
    assert (
        f"{folder} holds text features without images; see them with megapromoe data check" in capsys.readouterr().err
    )
    with pytest.raises(LatentsError, match="holds no manifest.json; it holds text features alone: give the folder of"):
        read_manifest(folder)
    latents = write(tmp_path / "l")
    assert main(["data", "check", str(latents), "--text-encoder", "minilm"]) == 1
    assert f"--text-encoder: {latents} holds no text features; leave it out" in capsys.readouterr().err
    assert read_manifest(latents).records == 40
