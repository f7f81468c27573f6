"""Images of prompts: equal at any number of ranks and layout; as a picture, a set and GenEval's folders; refusals."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import processes
from support.levels import full
from support.sampled_runs import ALONE, as_job
from support.text_folders import WordEncoder
from support.text_runs import generate_from_words, open_words, text_run

from megapromoe.cli import main
from megapromoe.config.resolve import resolve
from megapromoe.data.text_features import TextFeatures
from megapromoe.diffusion.image_grid import SampleError, to_bytes
from megapromoe.diffusion.multistep import MethodUnavailable
from megapromoe.sampling import prompt_features
from megapromoe.sampling.generation import Replica, generate_images
from megapromoe.sampling.image_set_writer import ImageSetWriter
from megapromoe.sampling.image_sets import ImageSet, ImageSetError
from megapromoe.sampling.prompt_images import images_of_prompts
from megapromoe.sampling.prompts import Prompt
from megapromoe.sampling.request import GenerationRequest
from megapromoe.training.preview import open_preview

PROMPTS = (Prompt("a red three"), Prompt(""), Prompt("two blue ones", seed=7, id="blue"))
TOO_LONG = "one two three four five six"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of a model of texts with 3 experts, which do not divide over 2 ranks."""
    folder = tmp_path_factory.mktemp("texts")
    processes.run(1, text_run, str(folder))
    return folder


@pytest.fixture(autouse=True)
def encoder_of_words(monkeypatch):
    monkeypatch.setattr(prompt_features, "open_text_encoder", open_words)


def request_of(folder: Path, out: Path, num: int = 4, prompts=PROMPTS, **options) -> GenerationRequest:
    return GenerationRequest(folder, out, num, prompts=prompts, **options)


def pixels(path: Path) -> np.ndarray:
    images = ImageSet(path)
    return images.read(0, len(images))


def test_a_set_holds_the_images_of_its_prompts(folder, tmp_path):
    generate_images(request_of(folder, tmp_path / "set.npz"), ALONE)
    images = images_of_prompts(folder, PROMPTS, 4)
    assert images.shape == (12, 3, 8, 8) and images.std() > 0.3
    with np.load(tmp_path / "set.npz") as stored:
        np.testing.assert_array_equal(stored["arr_0"], to_bytes(images))
        assert stored["arr_1"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert stored["prompts"].tolist() == ["a red three", "", "two blue ones"]
    generate_images(request_of(folder, tmp_path / "set"), ALONE)
    np.testing.assert_array_equal(pixels(tmp_path / "set"), to_bytes(images))
    lines = [json.loads(line) for line in (tmp_path / "set" / "prompts.jsonl").read_text().splitlines()]
    assert lines[0] == {"file": "000000.png", "prompt": "a red three"} and len(lines) == 12
    assert lines[11] == {"file": "000011.png", "prompt": "two blue ones", "seed": 7, "id": "blue"}


def test_an_image_depends_on_its_prompt_number_and_seed_alone(folder):
    """To rounding: the other images of its chunk have their part in products of matrices."""
    images = images_of_prompts(folder, PROMPTS, 4)
    seeded = images_of_prompts(folder, ["two blue ones"], 4, overrides=["sample.seed=7"])
    torch.testing.assert_close(seeded, images[8:], rtol=1e-4, atol=1e-4)
    others = images_of_prompts(folder, ["a red three", "something else"], 4)
    torch.testing.assert_close(others[:4], images[:4], rtol=1e-4, atol=1e-4)
    assert (others[4:] - images[4:8]).abs().max() > 0.01
    null = images_of_prompts(folder, ["", ""], 4, overrides=["sample.guidance=9"])  # guidance has nothing to guide
    torch.testing.assert_close(null[4:], images[4:8], rtol=1e-4, atol=1e-4)
    plain = images_of_prompts(folder, ["a red three"], 4, overrides=["sample.guidance=1"])
    assert (plain - images[:4]).abs().max() > 0.01


def test_the_features_are_those_of_training(folder):
    """Rounded as the stored ones are, and none for an empty prompt."""
    opened = prompt_features.open_prompt_encoder(GenerationRequest(folder, Path("x"), 1).outputs()[0][0], None, "cpu")
    features = opened.encode(["some 3", ""])
    text = prompt_features.read_text_manifest(folder / "data" / "text")
    assert text.dtype == "bfloat16" and features[""].shape == (0, 6)
    np.testing.assert_array_equal(features["some 3"], TextFeatures(folder / "data" / "text").features(3))
    condition = prompt_features.condition_of(features, ["", "some 3"], 5)
    assert condition.mask_BN.sum(1).tolist() == [0, 2] and condition.is_null().tolist() == [True, False]


@pytest.mark.parametrize("texts", [True, full(False)])
def test_the_command_takes_the_methods_of_diffusers(folder, run, tmp_path, texts):
    pytest.importorskip("diffusers")
    words = ["--run-dir", str(folder), "--prompt", "a red three"] if texts else ["--run-dir", str(run), "--class", "3"]
    images = {}
    for method in ("heun", "unipc", "dpm_solver++"):
        out = tmp_path / f"{method}.npz"
        assert main(["sample", *words, "--out", str(out), "--method", method, "--steps", "40", "--guidance", "1"]) == 0
        with np.load(out) as stored:
            images[method] = torch.from_numpy(stored["images"])
    for method in ("unipc", "dpm_solver++"):
        error = (images[method] - images["heun"]).norm() / images["heun"].norm()
        assert 0 < error < 0.25, method


@pytest.mark.full
@pytest.mark.parametrize("method", ["euler", "unipc"])
def test_the_images_are_the_same_at_any_number_of_ranks(folder, tmp_path, method):
    """Bit by bit for whole models, and for models that are divided alike; to rounding between these."""
    overrides = (f"sample.method={method}",)
    alone = request_of(folder, tmp_path / "one.npz", 6, overrides=overrides)
    generate_images(alone, ALONE)
    for name, world, tp, ep in (("three", 3, 1, 1), ("two", 2, 1, 2), ("four", 4, 1, 2), ("both", 4, 2, 2)):
        request = replace(alone, out=tmp_path / f"{name}.npz", tp=tp, ep=ep)
        assert as_job(world, tmp_path, generate_from_words, request) == [[request.out]] * world
    single, three, two, four, both = (pixels(tmp_path / f"{n}.npz") for n in ("one", "three", "two", "four", "both"))
    assert single.std() > 30
    np.testing.assert_array_equal(single, three)
    np.testing.assert_array_equal(two, four)
    for split in (two, both):
        assert np.abs(split.astype(int) - single).max() <= 1 and (split != single).mean() < 0.01


# ---- the command


def test_the_command_draws_a_picture_with_captions(folder, tmp_path):
    words = ["sample", "--run-dir", str(folder), "--prompt", "a red three", "--prompt", "", "--guidance", "3"]
    assert main([*words, "--steps", "2", "--out", str(tmp_path / "a.png")]) == 0
    picture = np.array(Image.open(tmp_path / "a.png").convert("RGB"))
    assert picture[:60].std() > 30 and (picture == 255).all(axis=2).any(axis=1)[64:].any()  # images, and white letters
    assert main([*words, "--count", "2", "--out", str(tmp_path / "a.npz")]) == 0
    with np.load(tmp_path / "a.npz") as stored:
        assert stored["images"].shape == (4, 3, 8, 8) and stored["prompts"].tolist() == ["a red three", ""]
        assert stored["labels"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("geneval", [False, True], ids=["set", "geneval"])
def test_an_interrupted_set_of_prompts_is_continued(folder, tmp_path, monkeypatch, geneval):
    """Other prompts are not continued, and finished chunks are not encoded or drawn again."""
    prompts = tuple(replace(prompt, metadata=json.dumps({"prompt": prompt.text})) for prompt in PROMPTS)
    request = request_of(folder, tmp_path / "set", prompts=prompts, geneval=geneval)
    written, write = [], ImageSetWriter.write

    def fail_at_the_third(self, chunk, images):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(chunk)
        write(self, chunk, images)

    monkeypatch.setattr(ImageSetWriter, "write", fail_at_the_third)
    with pytest.raises(SampleError, match="repeat the command to continue"):
        generate_images(request, ALONE)
    monkeypatch.setattr(ImageSetWriter, "write", write)
    with pytest.raises(ImageSetError, match="images of another request .prompts: '3, sha256"):
        generate_images(replace(request, prompts=(Prompt("another"), *prompts[1:])), ALONE)
    encoded: list[str] = []
    monkeypatch.setattr(
        WordEncoder,
        "encode",
        lambda self, texts, encode=WordEncoder.encode: encoded.extend(texts) or encode(self, texts),
    )
    generate_images(request, ALONE)
    assert written == [0, 1] and encoded == ["two blue ones"]
    generate_images(replace(request, out=tmp_path / "whole"), ALONE)
    files = sorted(path.relative_to(tmp_path / "set") for path in (tmp_path / "set").rglob("*") if path.is_file())
    assert len(files) == (19 if geneval else 14) and not (tmp_path / "set.parts").exists()
    for file in files:
        assert (tmp_path / "set" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    monkeypatch.setattr(Replica, "generate_chunks", None)
    generate_images(request, ALONE)  # complete already


def test_geneval_gets_its_folders(folder, tmp_path):
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "counting", "include": [], "exclude": [], "prompt": "three caf\u00e9s"},
    ]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["sample", "--run-dir", str(folder), "--geneval", str(file), "--out", str(tmp_path / "out")]
    assert main([*command, "--steps", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000", "00001", "request.json"]
    for number, line in enumerate(lines):
        place = tmp_path / "out" / f"{number:05d}"
        assert json.loads((place / "metadata.jsonl").read_text()) == line
        assert sorted(path.name for path in (place / "samples").iterdir()) == [f"000{i}.png" for i in range(4)]
        assert Image.open(place / "grid.png").size == (16, 16)
        images = images_of_prompts(folder, [entry["prompt"] for entry in lines], 4, overrides=["sample.steps=2"])
        np.testing.assert_array_equal(pixels(place / "samples"), to_bytes(images[4 * number : 4 * number + 4]))
    assert main([*command, "--steps", "2"]) == 0
    assert main([*command, "--steps", "3"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "is a model with model.condition = 'text'; give --prompt TEXT, --prompts FILE or --geneval"),
        (["--prompt", "a", "--class", "3"], "classes: the run has model.condition = 'text' and no classes"),
        (["--class", "3"], "^megapromoe: classes: the run has .* no classes; leave them out, and give --prompt[^;]*$"),
        (
            ["--prompt", "a", "--num-images", "2", "--labels", "random"],
            "--labels random: is for classes, and the command has prompts",
        ),
        (
            ["--prompt", "a", "--prompt", TOO_LONG],
            f"1 of 2 prompts are longer than the 5 tokens .* '{TOO_LONG}' with 6",
        ),
        (
            ["--prompt", "a", "--text-encoder", "other"],
            "sha256 efefefefefef. did not encode the captions of the run; give .* abababababab",
        ),
        (["--prompt", "a", "--num-images", "2", "--tp", "2"], "tp 2, ep 1: need a multiple of 2 ranks, not 1"),
    ],
)
def test_a_model_of_texts_refuses(folder, tmp_path, capsys, words, message):
    assert main(["sample", "--run-dir", str(folder), "--out", str(tmp_path / "a.png"), *words]) in (1, 2)
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") <= 2 and not (tmp_path / "a.png").exists()


def test_a_method_without_its_package_is_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    words = ["sample", "--run-dir", str(folder), "--prompt", "a", "--out", str(tmp_path / "a.npz"), "--method", "unipc"]
    assert main(words) == 2
    assert "sample.method = 'unipc' needs diffusers: pip install 'megapromoe[images]'" in capsys.readouterr().err
    config = resolve("digits", overrides=["sample.method=unipc", "train.sample_every=5"])
    with pytest.raises(MethodUnavailable):  # before the first step, not at the first picture
        open_preview(config, None)


@pytest.mark.parametrize("words", [["--prompt", "a"], ["--text-encoder", "x"]])
def test_a_model_of_classes_refuses_prompts(run, tmp_path, capsys, words):
    assert main(["sample", "--run-dir", str(run), "--out", str(tmp_path / "a.png"), *words]) == 1
    assert "for model.condition = 'text'; the run has classes, see --class" in capsys.readouterr().err


def test_a_run_whose_data_have_moved_needs_the_encoder(folder, tmp_path, capsys, caplog):
    moved = shutil.copytree(folder, tmp_path / "moved")
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace(str(folder / "data"), str(tmp_path / "gone")))
    command = ["sample", "--run-dir", str(moved), "--prompt", "a", "--out", str(tmp_path / "a.npz"), "--steps", "1"]
    assert main(command) == 1
    assert "or give the text encoder of the run's captions with --text-encoder" in capsys.readouterr().err
    assert main([*command, "--text-encoder", "words"]) == 0
    assert "cannot check which text encoder encoded the captions of the run" in caplog.text
