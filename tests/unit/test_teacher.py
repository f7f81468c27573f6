"""Features of a teacher: a toy DINOv2 made from a config, stored beside latents, read with them, and aligned with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.latent_folders import damage
from torch.nn import functional as F

from megapromoe.checkpoint.data_identity import data_identity
from megapromoe.checkpoint.format import Checkpoint
from megapromoe.checkpoint.step_folders import folder_of
from megapromoe.cli import main
from megapromoe.config.options import Config
from megapromoe.config.resolve import ConfigError, resolve
from megapromoe.conversion.formats import open_state
from megapromoe.data.datasets import DatasetError
from megapromoe.data.images import read_image
from megapromoe.data.latents import Latents
from megapromoe.data.sample_stream import SampleStream
from megapromoe.data.sources import open_dataset, open_teacher_features
from megapromoe.data.teacher import FOLDER, TeacherError, open_teacher, teacher_beside
from megapromoe.nn.alignment import PROJECTOR_PARAMETERS, Projector, alignment_loss
from megapromoe.nn.compile import compile_model
from megapromoe.nn.dit import DiT
from megapromoe.nn.parallelize import build
from megapromoe.planning.cost import flops_per_image, parameters
from megapromoe.sampling.run_model import load_model

pytestmark = pytest.mark.usefixtures("impatient")
WIDTH, SIDE = 12, 4  # of the toy's features; pixels of resolution 16 in patches of 4
transformers = pytest.importorskip("transformers")


def write_teacher(folder: Path, seed: int = 0, registers: int = 2) -> Path:
    """A small random DINOv2 with register tokens."""
    torch.manual_seed(seed)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        num_register_tokens=registers,
    )
    transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "dinov2")


def encode(images: Path, out: Path, *more: str) -> int:
    words = ["encode", "--images", str(images), "--autoencoder", "none", "--resolution", "16", "--out", str(out)]
    return main([*words, "--batch", "5", "--shard-size", "6", *more])


@pytest.fixture
def folder(images, teacher, tmp_path):
    """Latents (pixels) of the folder of images, and the teacher's features beside them."""
    assert encode(images, tmp_path / "latents", "--teacher", str(teacher), "--teacher-side", str(SIDE)) == 0
    return tmp_path / "latents"


def config_of(folder: Path, *overrides: str) -> Config:
    size = ("model.hidden_size=16", "model.depth=2", "model.heads=2", "model.num_experts=2", "model.patch_size=4")
    data = ("data.source=latents", f"data.path={folder}", "model.input_size=16", "model.in_channels=3")
    batch = ("model.num_classes=3", "train.global_batch=4", "train.deepspeed=fp32_zero0", "train.ema_decay=0.5")
    aligned = ("model.align_block=1", f"model.align_width={WIDTH}", "model.align_hidden=20")
    return resolve(overrides=(*size, *data, *batch, *aligned, *overrides))


# ---- what is stored


def test_features_are_those_of_the_model_for_each_image_and_its_mirror_image(folder, images, teacher):
    """By transformers alone: resized to 4 x 7 pixels, normalised as ImageNet, the last 16 tokens in rows."""
    latents, features = Latents(folder), Latents(folder / FOLDER)
    assert len(features) == len(latents) and features.shape == (WIDTH, SIDE, SIDE)
    assert (features.labels == latents.labels).all()
    model = transformers.AutoModel.from_pretrained(teacher).eval()
    for index in (0, len(latents) - 1):
        pixels = torch.from_numpy(read_image(images / latents.name(index), 16, 3)).float() / 255
        for mirror in (False, True):
            x = F.interpolate(
                (pixels.flip(-1) if mirror else pixels)[None], size=(28, 28), mode="bicubic", antialias=True
            )
            mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
            x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
            with torch.no_grad():
                expected = model(pixel_values=x).last_hidden_state[0, 3:]  # after the class and two registers
            stored = features.sample(np.array([index]), np.array([mirror]), None)[0]
            ours = torch.from_numpy(stored).flatten(1).T
            assert (ours - expected).norm() < 2e-3 * expected.norm()
    manifest = json.loads((folder / FOLDER / "manifest.json").read_text())
    assert manifest["autoencoder"]["kind"] == "teacher Dinov2WithRegistersModel" and manifest["dtype"] == "float16"


def test_features_are_added_to_complete_latents_and_a_job_resumes(images, teacher, tmp_path, folder, capsys):
    """The latents keep their bytes; features that a kill left unfinished become those of one run."""
    other = tmp_path / "later"
    assert encode(images, other) == 0
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    arguments = ("--teacher", str(teacher), "--teacher-side", str(SIDE))
    assert encode(images, other, *arguments) == 0
    assert {path.name: path.read_bytes() for path in other.iterdir() if path.is_file()} == before
    names = sorted(path.name for path in (folder / FOLDER).iterdir())
    (other / FOLDER / "manifest.json").unlink()
    (other / FOLDER / "index.safetensors").unlink()
    (other / FOLDER / "shard-00001.npy").unlink()
    assert encode(images, other, *arguments) == 0
    for name in names:
        assert (other / FOLDER / name).read_bytes() == (folder / FOLDER / name).read_bytes(), name
    capsys.readouterr()
    assert main(["data", "check", str(other)]) == 0
    assert "teacher Dinov2" not in capsys.readouterr().err
    damage(other / FOLDER, 1, 2)
    assert main(["data", "check", str(other)]) == 1


# ---- what is read


def test_a_batch_has_the_features_of_its_images(folder):
    """In the order of the batch, mirrored with them; of damaged features both records are replaced."""
    config = config_of(folder, "data.flip=true")
    dataset = open_dataset(config)
    stream = SampleStream(dataset, 3, 0.3, True, 3, teacher=open_teacher_features(config, dataset))
    batch = stream.batch(0, 8)
    assert batch.teacher_BWHW is not None and batch.teacher_BWHW.dtype == torch.float16
    features = Latents(folder / FOLDER)
    order = stream.indices(np.arange(8))
    matched = 0
    for row in range(8):
        index = order[int(batch.positions_B[row])]
        for mirror in (False, True):
            image = dataset.sample(np.array([index]), np.array([mirror]), None)[0]
            if np.array_equal(image, batch.clean_BCHW[row].numpy()):
                expected = features.sample(np.array([index]), np.array([mirror]), None)[0]
                assert np.array_equal(expected.astype(np.float16), batch.teacher_BWHW[row].numpy())
                matched += 1
    assert matched == 8
    damage(folder / FOLDER, *features.locate(int(order[2])))
    damaged = SampleStream(dataset, 3, 0.3, True, 3, teacher=open_teacher_features(config, dataset)).batch(0, 8)
    assert damaged.damaged == 1
    rows = [int(np.flatnonzero(b.positions_B.numpy() == 2)[0]) for b in (batch, damaged)]
    assert not torch.equal(batch.clean_BCHW[rows[0]], damaged.clean_BCHW[rows[1]])


def test_the_identity_of_the_data_includes_the_features(folder, images, tmp_path):
    config = config_of(folder)
    identity = data_identity(config)
    assert identity != data_identity(config_of(folder, "model.align_block=0", "model.align_width=0"))
    shutil.rmtree(folder / FOLDER)
    assert data_identity(config) is None
    other = write_teacher(tmp_path / "other", seed=1)
    assert encode(images, folder, "--teacher", str(other), "--teacher-side", str(SIDE)) == 0
    assert data_identity(config) not in (identity, None)


# ---- the loss, and what has the projector


def test_the_loss_is_minus_the_mean_cosine():
    generator = torch.Generator().manual_seed(0)
    projected, teacher = torch.randn(3, 16, 5, generator=generator), torch.randn(3, 5, 4, 4, generator=generator)
    expected = 0.0
    for b in range(3):
        for row in range(4):
            for column in range(4):
                y, z = projected[b, 4 * row + column], teacher[b, :, row, column]
                expected -= float(y @ z / (y.norm() * z.norm())) / 48
    assert float(alignment_loss(projected, teacher)) == pytest.approx(expected, abs=1e-6)
    assert float(alignment_loss(teacher.flatten(2).transpose(1, 2), teacher)) == pytest.approx(-1)
    with pytest.raises(ValueError, match="must be equal"):
        alignment_loss(projected[:, :4], teacher)


@pytest.mark.parametrize("text", [(), ("model.condition=text", "model.text_width=6", "model.text_tokens=5")])
def test_the_projector_is_counted_and_runs_in_training_alone(text):
    words = ("data.source=synthetic", "model.hidden_size=16", "model.depth=2", "model.heads=2", "model.input_size=8")
    aligned = ("model.align_block=1", "model.align_width=6", "model.align_hidden=20")
    plain, config = resolve(overrides=(*words, *text)), resolve(overrides=(*words, *text, *aligned))
    added = sum(p.numel() for p in Projector(16, 20, 6).parameters())
    assert parameters(config.model).total - parameters(plain.model).total == added
    with torch.device("meta"):
        assert parameters(config.model).trainable == sum(p.numel() for p in DiT(config.model).parameters())
    products = 2 * config.model.tokens * (16 * 20 + 20 * 20 + 20 * 6)
    assert flops_per_image(config.model).forward - flops_per_image(plain.model).forward == products
    if text:
        return
    model = build(config)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([1, 1000]), 1
    _, auxiliary = model.train()(*inputs)
    assert auxiliary.projected_BSW.shape == (2, 16, 6)
    teacher = torch.randn(2, 6, 4, 4)
    losses = auxiliary.aligned(teacher, 0.5).losses
    expected = 0.5 * alignment_loss(auxiliary.projected_BSW, teacher)
    assert torch.equal(losses["alignment"], expected[None]) and set(auxiliary.losses) < set(losses)
    assert model.eval()(*inputs)[1].projected_BSW is None


@pytest.mark.full
@pytest.mark.parametrize("align_block", [1, 2])
def test_compiled_blocks_give_the_same_tokens(align_block):
    """Also where pairs of blocks are one graph, and the aligned block would be the first of a pair."""
    words = ("data.source=synthetic", "model.hidden_size=16", "model.depth=2", "model.heads=2", "model.input_size=8")
    aligned = (f"model.align_block={align_block}", "model.align_width=6", "model.align_hidden=20")
    config = resolve(overrides=(*words, *aligned, "model.num_experts=2"))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10.0, 900.0]), torch.tensor([1, 1000]), 1
    teacher, losses, gradients = torch.randn(2, 6, 4, 4, generator=generator), [], []
    for compiled in (False, True):
        model = build(config).train()
        for p in model.parameters():  # what starts at zero would hide the blocks
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
        if compiled:
            compile_model(model, "eager")
        loss = model(*inputs)[1].aligned(teacher, 1.0).losses["alignment"].sum()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6) and gradients[0].any()


# ---- what is refused


def test_training_without_fitting_features_is_refused(folder, images, teacher, tmp_path):
    dataset = open_dataset(config_of(folder))
    with pytest.raises(DatasetError, match=r"features have 12 channels and 4x4 tokens.*set model.align_width=12"):
        open_teacher_features(config_of(folder, "model.align_width=13"), dataset)
    with pytest.raises(DatasetError, match=r"encode again with --teacher-side 8"):
        open_teacher_features(config_of(folder, "model.patch_size=2"), dataset)
    assert open_teacher_features(config_of(folder, "model.align_block=0", "model.align_width=0"), dataset) is None
    bare = tmp_path / "bare"
    assert encode(images, bare) == 0
    with pytest.raises(DatasetError, match="holds no features of a teacher.*with --teacher PATH"):
        teacher_beside(Latents(bare))
    shutil.copytree(folder, bare / FOLDER, ignore=shutil.ignore_patterns(FOLDER))
    with pytest.raises(DatasetError, match="holds latents, not features"):
        teacher_beside(Latents(bare))
    fewer = tmp_path / "fewer"
    shutil.copytree(images, tmp_path / "some")
    (tmp_path / "some" / "class0" / "im00.png").unlink()
    assert encode(tmp_path / "some", fewer, "--teacher", str(teacher), "--teacher-side", str(SIDE)) == 0
    shutil.rmtree(folder / FOLDER)
    shutil.copytree(fewer / FOLDER, folder / FOLDER)
    with pytest.raises(DatasetError, match="features of other images"):
        teacher_beside(Latents(folder))


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (("model.align_block=3",), "model.align_block = 3: must be at most model.depth = 2"),
        (("model.align_width=0",), "model.align_width = 0: must be the channels of the teacher's features"),
        (("model.align_block=0",), "model.align_width = 12: must be 0 without model.align_block"),
    ],
)
def test_options_that_do_not_fit(overrides, sentence):
    with pytest.raises(ConfigError) as error:
        config_of(Path("nowhere"), *overrides)
    assert sentence in str(error.value)


def test_teachers_that_cannot_be_opened(teacher, tmp_path):
    with pytest.raises(TeacherError, match=r"config.json does not exist; give a folder as transformers saves it"):
        open_teacher(str(tmp_path / "none"), 4)
    damaged = tmp_path / "damaged"
    shutil.copytree(teacher, damaged)
    (damaged / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(TeacherError, match="cannot be opened"):
        open_teacher(str(damaged), 4)
    language = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.BertModel(language).save_pretrained(tmp_path / "bert")
    with pytest.raises(TeacherError, match="is a BertModel, not a vision transformer"):
        open_teacher(str(tmp_path / "bert"), 4)
    shutil.copytree(teacher, tmp_path / "grey")
    (tmp_path / "grey" / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    with pytest.raises(TeacherError, match="image_mean and image_std must be three numbers each"):
        open_teacher(str(tmp_path / "grey"), 4)


def test_a_refused_command_writes_nothing(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert encode(images, out, "--teacher", str(tmp_path / "none")) == 1
    assert "config.json does not exist" in capsys.readouterr().err and not out.exists()
    assert main(["encode", "--scenes", "4", "--text-encoder", "minilm", "--teacher", "x", "--out", str(out)]) == 2
    assert encode(images, out, "--teacher-side", "4") == 2
    assert not out.exists()


# ---- a run


def run_and_reload(folder: str, run: str, *more: str) -> None:
    from support.training_runs import train

    train(run, "data.flip=true", *words_of(Path(folder)), *more)


def words_of(folder: Path) -> tuple[str, ...]:
    data = ("data.source=latents", f"data.path={folder}", "model.input_size=16", "model.in_channels=3")
    model = ("model.patch_size=4", "model.num_classes=3", "model.depth=2", "train.global_batch=4", "train.steps=2")
    return (*data, *model, "model.align_block=1", f"model.align_width={WIDTH}", "model.align_hidden=20")


@pytest.mark.full
def test_a_run_logs_the_loss_and_leaves_the_projector_out_of_sampling_and_conversion(folder, tmp_path):
    from support.processes import run

    run(1, run_and_reload, str(folder), str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert -0.5 <= line["alignment_loss"] <= 0.5
        losses = sum(value for key, value in line.items() if key.endswith("_loss") and key != "total_loss")
        assert line["total_loss"] == pytest.approx(losses, rel=1e-5)
    stored = Checkpoint(folder_of(tmp_path / "run" / "checkpoints", 2))
    projector = {name for name in stored.shapes if name.startswith("projector.")}
    assert projector == set(PROJECTOR_PARAMETERS)
    model, config, step = load_model(tmp_path / "run")
    assert step == 2 and config.model.align_block == 1
    assert {name for name, _ in model.named_parameters()} == set(stored.shapes) - projector
    state = open_state(tmp_path / "run")
    assert set(state.shapes) == set(stored.shapes) - projector and state.config.model.align_block == 0
    assert any("projector" in note for note in state.notes)
    assert "exp_avg" in state.kinds
    # A run that starts from these weights gets a projector of its own.
    begun = (f"train.init_from={tmp_path / 'run'}", "train.seed=5")
    run(1, run_and_reload, str(folder), str(tmp_path / "begun"), *begun)
    assert set(Checkpoint(folder_of(tmp_path / "begun" / "checkpoints", 2)).shapes) == set(stored.shapes)
