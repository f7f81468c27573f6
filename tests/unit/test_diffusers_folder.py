"""Folders for diffusers: what `convert --to diffusers` writes, and that nothing is lost on the way there and back."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.diffusers_folders import SMALL, folder_of_state, model_of, noise_of, state_with
from support.golden_states import random_state
from support.sampled_runs import tiny
from support.text_folders import write_text_encoders
from support.text_runs import TEXT, captioned_pixels

from megapromoe.cli import main
from megapromoe.conversion.exports import export
from megapromoe.conversion.formats import detect, open_state
from megapromoe.conversion.stream import ConversionError
from megapromoe.data.text_encoder import open_text_encoder
from megapromoe.diffusion.image_grid import SampleError, generate
from megapromoe.sampling.prompt_features import PromptEncoder, condition_of

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install megapromoe[images]")
from megapromoe.diffusers import (  # noqa: E402
    DiffusersInputError,
    ProMoEPipeline,
    ProMoEScheduler,
    ProMoETransformer2DModel,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with DiffMoE, whose routers have buffers, and its state."""
    state = state_with("model.router=diffmoe")
    folder = tmp_path_factory.mktemp("folders") / "run"
    export(state, folder, "ours")
    return state, folder


def assert_same_weights(back, state, kind: str) -> None:
    assert (back.config, back.step) == (state.config, state.step)
    for name in state.shapes:
        assert torch.equal(back.read("master", name), state.read(kind, name)), name
    for name, value in state.buffers.items():
        assert torch.equal(back.buffers[name], value), name


@pytest.mark.parametrize("kind", ["ema", "master"])
def test_ours_to_diffusers_and_back_is_bit_exact(run, tmp_path, capsys, kind):
    """Also when diffusers has opened the folder and saved it again, in files of another size."""
    state, folder = run
    words = ["--to", "diffusers", "--weights", kind, "--max-shard-size", "20KB"]
    assert main(["convert", str(folder), str(tmp_path / "a"), *words]) == 0
    assert_same_weights(open_state(tmp_path / "a"), state, kind)
    ProMoEPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size="30KB")
    files = [len(list((tmp_path / name / "transformer").glob("*.safetensors"))) for name in "ab"]
    assert files[0] > files[1] > 1
    for source in ("b", "b/transformer"):
        assert main(["convert", str(tmp_path / source), str(tmp_path / "run"), "--to", "ours", "--overwrite"]) == 0
        assert_same_weights(open_state(tmp_path / "run"), state, kind)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "b"), "--what"]) == 0
    printed = capsys.readouterr().out
    assert "format: diffusers" in printed and f"weights: {kind}" in printed and "dit.final_layer.linear.bias" in printed


def test_the_files_of_the_folder(run, tmp_path):
    """They are those that diffusers writes of the same pipeline."""
    state = run[0]
    config = replace(state.config, sample=replace(state.config.sample, guidance_high=0.75))
    folder = folder_of_state(replace(state, config=config), tmp_path / "a", shard_bytes=20_000)
    files = sorted(path.name for path in (folder / "transformer").glob("*.safetensors"))
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(folder / "transformer" / file).values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    index = json.loads((folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    ProMoEPipeline.from_pretrained(folder).save_pretrained(tmp_path / "b")
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        ours, theirs = (json.loads((tmp_path / side / name).read_text()) for side in "ab")
        theirs.pop("_name_or_path", None)
        assert ours == theirs, name
    content = json.loads((folder / "model_index.json").read_text())
    assert content["guidance_scale"] == 2.5 and content["guidance_high"] == 0.75 and content["num_inference_steps"] == 3
    assert content["id2label"] == {str(n): str(n) for n in range(10)}


def test_models_made_by_hand_are_read(tmp_path):
    """Without a run, the config is that of the model; what it predicts is an option."""
    options = {"hidden_size": 16, "heads": 2, "depth": 2, "input_size": 8, "in_channels": 1, "num_classes": 10}
    model = ProMoETransformer2DModel(**options, time_input="sit", learn_sigma=False)
    with torch.no_grad():
        model.dit.final_layer.linear.weight.normal_()
    ProMoEPipeline(model, ProMoEScheduler()).save_pretrained(tmp_path / "a")
    state = open_state(tmp_path / "a")
    assert state.config.model == model.dit.config
    assert any("does not contain its training objective" in note for note in state.notes)
    weight = state.read("master", "final_layer.linear.weight")
    assert torch.equal(weight, model.dit.final_layer.linear.weight)  # in the sign of ours, not that of SiT
    half = model.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    state = open_state(tmp_path / "half")
    assert any("are bfloat16: widened" in note for note in state.notes)
    assert torch.equal(state.read("ema", "final_layer.linear.weight"), half.dit.final_layer.linear.weight.float())


def test_names_of_classes(run, tmp_path, capsys):
    command = ["convert", str(run[1]), str(tmp_path / "a"), "--to", "diffusers", "--overwrite", "--id2label"]
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"3": "three, III", "7": "seven"}))
    assert main([*command, str(names)]) == 0
    assert ProMoEPipeline.from_pretrained(tmp_path / "a").get_label_ids(["III", "seven"]) == [3, 7]
    names.write_text(json.dumps(["zero", "one"]))
    assert main([*command, str(names)]) == 0
    assert ProMoEPipeline.from_pretrained(tmp_path / "a").get_label_ids("one") == [1]
    before = (tmp_path / "a" / "model_index.json").read_bytes()
    for content, sentence in (
        ('{"10": "ten"}', "--id2label: names class 10, the model has classes 0..9"),
        ('{"three": 3}', "must be a JSON object such as"),
        ('{"3": ""}', "it has '3': ''"),
        ("[]", "or a list of names"),
        ("{", "or a list of names (Expecting"),
    ):
        names.write_text(content)
        assert main([*command, str(names)]) == 1
        error = capsys.readouterr().err
        assert sentence in error and "Traceback" not in error
    assert main([*command, str(tmp_path / "none.json")]) == 1
    assert "No such file or directory; give a JSON file" in capsys.readouterr().err
    assert (tmp_path / "a" / "model_index.json").read_bytes() == before


def test_the_autoencoder_is_added(tmp_path, autoencoders, capsys):
    state = state_with("model.in_channels=2", "data.source=unset")
    export(state, tmp_path / "run", "ours")
    command = ["convert", str(tmp_path / "run"), str(tmp_path / "a"), "--to", "diffusers"]
    for name, sentence in (
        ("owner/name", "is no folder; give the local folder of the autoencoder"),
        (autoencoders, "cannot be opened"),
        (autoencoders / "pickled", "give a folder that holds config.json and a .safetensors"),
    ):
        assert main([*command, "--vae", str(name)]) in (1, 2)
        assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert main([*command, "--vae", str(autoencoders / "pipeline")]) == 0
    pipe = ProMoEPipeline.from_pretrained(tmp_path / "a")
    original = diffusers.AutoencoderKL.from_pretrained(autoencoders / "kl").state_dict()
    assert all(torch.equal(value, original[name]) for name, value in pipe.vae.state_dict().items())
    assert pipe([3], output_type="np").images.shape == (1, 16, 16, 3)
    assert detect(tmp_path / "a") == "diffusers"
    pixels = tmp_path / "pixels"
    export(state_with(), pixels, "ours")
    words = ["convert", str(pixels), str(tmp_path / "b"), "--to", "diffusers", "--vae", str(autoencoders / "kl")]
    assert main(words) == 1
    assert "the run generates pixels" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_options_of_other_formats_are_refused(run, tmp_path, capsys):
    command = ["convert", str(run[1]), str(tmp_path / "a"), "--to", "deepspeed"]
    assert main([*command, "--max-shard-size", "5GB", "--vae", "."]) == 2
    assert "--vae, --max-shard-size: only for --to diffusers; leave out" in capsys.readouterr().err
    for size in ("5XB", "0", "-1"):
        with pytest.raises(SystemExit):
            main([*command[:-1], "diffusers", f"--max-shard-size={size}"])
        assert "is not a size; give bytes, or a number with KB, MB, GB or TB" in capsys.readouterr().err


def test_code_of_users_is_not_written(tmp_path):
    state = state_with()
    router = replace(state.config, model=replace(state.config.model, router="mine.py:Mine"))
    with pytest.raises(ConversionError, match="is code of yours, and diffusers opens a folder without executing any"):
        export(replace(state, config=router), tmp_path / "a", "diffusers")
    assert not (tmp_path / "a").exists()
    sampler = replace(state.config, sample=replace(state.config.sample, method="mine.py:f"))
    notes = export(replace(state, config=sampler), tmp_path / "a", "diffusers")
    assert notes == ["sample.method = 'mine.py:f' is code, which the folder does not hold: it has euler"]
    assert ProMoEPipeline.from_pretrained(tmp_path / "a").scheduler.config["method"] == "euler"


def test_damaged_folders_are_refused(run, tmp_path):
    folder = folder_of_state(run[0], tmp_path / "a")
    config = folder / "transformer" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"hidden_size": 32}))
    with pytest.raises(ConversionError, match="config.json has hidden_size = 32, but 16 in its _megapromoe; restore"):
        open_state(folder)
    config.write_text(json.dumps(content | {"router": "mine.py:Mine"}))
    with pytest.raises(ConversionError, match="router = 'mine.py:Mine'"):
        open_state(folder)
    with pytest.raises(DiffusersInputError, match="executes no code of users"):
        ProMoEPipeline.from_pretrained(folder)
    config.write_text(json.dumps(content | {"depht": 3}))
    with pytest.raises(ConversionError, match="config.json has depht = 3, but None in its _megapromoe"):
        open_state(folder)
    with pytest.raises(DiffusersInputError, match="config.json has depht: no option of model"):
        ProMoEPipeline.from_pretrained(folder)
    for changed, sentence in (
        (
            {"moe_every": 1},
            r"of its config.json \(\d+ missing, such as dit.blocks.0.mlp.experts.*\d+ unexpected, such as",
        ),
        ({"num_classes": 11}, "dit.y_embedder.embedding_table.weight: copying a param .* that of another model"),
    ):
        config.write_text(json.dumps(content | changed))
        with pytest.raises(DiffusersInputError, match=sentence):
            ProMoEPipeline.from_pretrained(folder)
    config.write_text(json.dumps(content))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):
        ProMoEPipeline.from_pretrained(folder)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(ConversionError, match="transformer: has no weights"):
        open_state(folder)


# ---- prompts


def test_the_folder_names_the_encoder_of_the_captions(tmp_path):
    data = captioned_pixels(tmp_path / "data")
    state = random_state(tiny(*SMALL, *TEXT, f"data.path={data}"))
    assert export(state, tmp_path / "a", "diffusers") == []
    identity = json.loads((tmp_path / "a" / "model_index.json").read_text())["encoder_identity"]
    expected = {"name": "words", "kind": "WordEncoder", "sha256": "ab" * 32, "tokenizer_sha256": "cd" * 32}
    assert identity == expected | {"rounded_to": "bfloat16", "max_tokens": 8}
    moved = replace(state.config, data=replace(state.config.data, path=str(tmp_path / "none")))
    (note,) = export(replace(state, config=moved), tmp_path / "b", "diffusers")
    assert note.startswith("the folder does not name the text encoder of its prompts")


def test_prompts_are_encoded_as_by_our_sampler(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install megapromoe[text]")
    encoders = write_text_encoders(tmp_path / "encoders")
    encoder = open_text_encoder(str(encoders / "t5"))
    text = ("model.condition=text", "model.num_classes=1000", f"model.text_width={encoder.width}")
    state = state_with(*text, "model.text_tokens=8", "data.source=unset")
    folder = folder_of_state(state, tmp_path / "a")
    content = json.loads((folder / "model_index.json").read_text())
    content["encoder_identity"] = {**encoder.identity, "rounded_to": "bfloat16", "max_tokens": 8}
    (folder / "model_index.json").write_text(json.dumps(content))
    pipe = ProMoEPipeline.from_pretrained(folder)
    pipe.load_text_encoder(str(encoders / "t5"))
    pipe.save_pretrained(tmp_path / "b")
    prompts = ["a red three", "", "two blue"]
    condition = condition_of(PromptEncoder(encoder, "bfloat16", 8).encode(prompts), prompts, 8)
    ours = generate(model_of(state), state.config, condition, range(3))
    for made in (pipe, ProMoEPipeline.from_pretrained(tmp_path / "b")):
        theirs = made(prompt=prompts, latents=noise_of(state, 3), output_type="latent").images
        assert ours.std() > 0.1 and (theirs - ours).abs().max() <= 1e-5
    with pytest.raises(SampleError, match="longer than the 8 tokens"):
        pipe(prompt=" ".join(["red"] * 12))
    with pytest.raises(DiffusersInputError, match="did not encode the captions of the training; give the one that did"):
        pipe.load_text_encoder(str(encoders / "clip"))
    pipe.text_encoder.to(torch.bfloat16)
    with pytest.raises(DiffusersInputError, match="text_encoder: is torch.bfloat16"):
        pipe(prompt="a red three")
