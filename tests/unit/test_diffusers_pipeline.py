"""`ProMoEPipeline` draws the pictures of our sampler, with every router, method and condition; outputs; refusals."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.diffusers_folders import folder_of_state, model_of, noise_of, our_images, state_with
from support.levels import full

from megapromoe.config.model_options import ROUTERS
from megapromoe.data.autoencoder import open_autoencoder
from megapromoe.diffusion.samplers import Labels, guided, sample
from megapromoe.nn.text_condition import TextCondition

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install megapromoe[images]")
from megapromoe.diffusers import (  # noqa: E402
    CUSTOM_PIPELINE,
    DiffusersInputError,
    ProMoEPipeline,
    ProMoEScheduler,
    ProMoETransformer2DModel,
)

LABELS = [3, 10, 5, 1, 10, 3]  # 10 is the null class
DDPM = ("diffusion.objective=ddpm", "model.learn_sigma=true")
TEXT = ("model.condition=text", "model.num_classes=1000", "model.text_width=6", "model.text_tokens=5")
TEXT = (*TEXT, "data.source=unset")


def opened(state, folder, **options) -> ProMoEPipeline:
    pipe = ProMoEPipeline.from_pretrained(folder_of_state(state, folder), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_images(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5


# Each is a set of options that makes a difference to sampling.
CASES = {router: (f"model.router={router}",) for router in ROUTERS} | {
    "top 2, softmax": ("model.top_k=2", "model.score_function=softmax"),
    "sigmoid": ("model.score_function=sigmoid",),
    "limited": ("model.capacity_factor=1.0",),
    "blocks": ("model.activation=swiglu", "model.norm=rms", "model.qk_norm=rms", "model.positions=rope"),
    "heun, shifted": ("sample.method=heun", "diffusion.shift=3"),
    "euler, shifted by size": ("sample.method=euler", "diffusion.shift_base=2"),
    "time of SiT": ("model.time_input=sit", "model.modulation=shared"),
    "interval": ("sample.guidance_low=0.2", "sample.guidance_high=0.7", "sample.steps=5"),
    "no guidance": ("sample.guidance=1",),
    "unipc": ("sample.method=unipc",),
    "ddim": (*DDPM, "sample.method=ddim"),
    "dpm_solver++": (*DDPM, "sample.method=dpm_solver++"),
}
FIRST = ("dense", "promoe", "promoe_ec", "diffmoe", "kmeans", "heun, shifted", "ddim", "interval")


@pytest.mark.parametrize("name", [name if name in FIRST else full(name) for name in CASES])
def test_the_images_of_classes_are_those_of_our_sampler(tmp_path, name):
    state = state_with(*CASES[name])
    images = opened(state, tmp_path / "a")(LABELS, latents=noise_of(state, len(LABELS)), output_type="latent").images
    assert_same_images(our_images(state, LABELS), images)


def random_texts() -> TextCondition:
    mask_BN = torch.arange(5) < torch.tensor([[3], [0], [5], [1]])
    return TextCondition(torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(7)), mask_BN)


@pytest.mark.parametrize(
    "router", ["dense", "promoe", full("promoe_ec"), full("tc"), full("diffmoe"), full("promoe_linear")]
)
def test_the_images_of_texts_are_those_of_our_sampler(tmp_path, router):
    state, texts = state_with(*TEXT, f"model.router={router}"), random_texts()
    pipe = opened(state, tmp_path / "a")
    latents = noise_of(state, 4)
    features, mask = texts.features_BND, texts.mask_BN
    images = pipe(prompt_embeds=features, prompt_embeds_mask=mask, latents=latents, output_type="latent").images
    assert_same_images(our_images(state, texts), images)
    if state.config.model.images_depend_on_batch:
        return
    short = pipe(prompt_embeds=features[:1, :3], latents=latents[:1], output_type="latent").images
    torch.testing.assert_close(short, images[:1], rtol=1e-4, atol=1e-4)


def test_the_noise_of_each_step_of_ddpm_comes_from_the_generator(tmp_path):
    state = state_with(*DDPM, "sample.method=ddpm", "sample.steps=4")
    m, latents = state.config.model, noise_of(state, len(LABELS))
    generator = torch.Generator().manual_seed(5)
    predict = guided(model_of(state), Labels(torch.tensor(LABELS), m.null_class), 2.5)
    ours = sample(predict, latents, "ddpm", 4, noise_at=lambda k: torch.randn(latents.shape, generator=generator))
    pipe = opened(state, tmp_path / "a")
    generator = torch.Generator().manual_seed(5)
    assert_same_images(ours, pipe(LABELS, latents=latents, generator=generator, output_type="latent").images)
    again = pipe(LABELS, latents=latents, generator=torch.Generator().manual_seed(6), output_type="latent").images
    assert (again - ours).abs().max() > 0.01


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A state of a model of classes, and its folder."""
    state = state_with()
    return state, folder_of_state(state, tmp_path_factory.mktemp("pipelines") / "digits")


@pytest.fixture
def pipe(digits):
    made = ProMoEPipeline.from_pretrained(digits[1])
    made.set_progress_bar_config(disable=True)
    return made


def test_diffusion_pipeline_opens_the_folder(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    state, folder = digits
    made = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=CUSTOM_PIPELINE, trust_remote_code=True)
    assert type(made) is ProMoEPipeline
    made.set_progress_bar_config(disable=True)
    assert_same_images(our_images(state, LABELS), made(LABELS, latents=noise_of(state, 6), output_type="latent").images)


def test_outputs(pipe, digits):
    latents = noise_of(digits[0], 2)
    raw = pipe([3, 4], latents=latents, output_type="latent").images
    (pixels,) = pipe([3, 4], latents=latents, output_type="np", return_dict=False)
    expected = (raw / 2 + 0.5).clamp(0, 1)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert torch.equal(pipe([3, 4], latents=latents, output_type="pt").images, expected)
    pictures = pipe([3, 4], latents=latents).images
    assert [picture.size for picture in pictures] == [(8, 8)] * 2
    np.testing.assert_array_equal(np.asarray(pictures[1]), (pixels[1, ..., 0] * 255).round().astype(np.uint8))


def test_classes_by_name_and_number(pipe, digits):
    latents = noise_of(digits[0], 4)
    images = pipe([3, 3, 7, 7], latents=latents, output_type="latent").images
    for labels in (["3", 7], torch.tensor([3, 7]), np.array([3, 7])):
        same = pipe(labels, num_images_per_prompt=2, latents=latents, output_type="latent").images
        assert torch.equal(same, images)
    assert torch.equal(
        pipe("3", latents=latents[:1], output_type="latent").images,
        pipe(3, latents=latents[:1], output_type="latent").images,
    )
    assert pipe.get_label_ids("9") == [9]
    names = {0: "tench, Tinca tinca", 1: "crane", 2: "crane, machine", 3: "maillot"}
    named = ProMoEPipeline(pipe.transformer, pipe.scheduler, id2label=names)
    assert named.get_label_ids(["Tinca tinca", "tench, Tinca tinca", "crane", "machine"]) == [0, 0, 1, 2]


def test_generators_and_defaults(pipe):
    def images(generator, labels=(3, 4), **options):
        return pipe(list(labels), generator=generator, output_type="latent", **options).images

    seeded = images([torch.Generator().manual_seed(seed) for seed in (8, 9)])
    assert torch.equal(seeded, images([torch.Generator().manual_seed(seed) for seed in (8, 9)]))
    alone = images(torch.Generator().manual_seed(9), [4])
    torch.testing.assert_close(alone, seeded[1:], rtol=1e-4, atol=1e-4)
    given = {"guidance_scale": 2.5, "num_inference_steps": 3, "guidance_low": 0.0, "guidance_high": 1.0}
    assert torch.equal(images(torch.Generator().manual_seed(1)), images(torch.Generator().manual_seed(1), **given))
    for other in ({"guidance_scale": 4.0}, {"num_inference_steps": 4}, {"guidance_high": 0.5}):
        changed = images(torch.Generator().manual_seed(1), **given | other)
        assert (changed - images(torch.Generator().manual_seed(1))).abs().max() > 0.01, other


def test_the_progress_bar_counts_the_evaluations(pipe, monkeypatch):
    shown = []
    monkeypatch.setattr(
        pipe,
        "progress_bar",
        lambda total: shown.append(total) or diffusers.utils.logging.tqdm(total=total, disable=True),
    )
    pipe([1], output_type="latent")
    pipe.scheduler = ProMoEScheduler("heun")
    pipe([1], output_type="latent")
    assert shown == [3, 5]


@pytest.mark.parametrize("router", ["diffmoe", full("kmeans")])
def test_bfloat16_keeps_running_statistics_in_float32(tmp_path, router):
    state = state_with(f"model.router={router}")
    pipe = opened(state, tmp_path / "a", torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    tensors = pipe.transformer.dit.state_dict()
    assert state.buffers and all(torch.equal(tensors[name], value) for name, value in state.buffers.items())
    images = pipe(LABELS, latents=noise_of(state, 6), output_type="latent").images
    ours = our_images(state, LABELS)
    assert images.dtype == torch.float32 and 0 < (images - ours).norm() / ours.norm() < 0.5


def test_latents_are_decoded_as_our_sampler_decodes_them(tmp_path, autoencoders):
    state = state_with("model.in_channels=2", "data.source=unset")
    vae = diffusers.AutoencoderKL.from_pretrained(autoencoders / "per_channel")
    pipe = opened(state, tmp_path / "a", vae=vae)
    latents = noise_of(state, 2)
    raw = pipe([3, 4], latents=latents, output_type="latent").images
    expected = open_autoencoder(str(autoencoders / "per_channel")).decode(raw)
    images = pipe([3, 4], latents=latents, output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images, expected / 2 + 0.5, rtol=0, atol=1e-5)
    pipe.to(dtype=torch.bfloat16)
    half = pipe([3, 4], latents=latents, output_type="pt").images
    assert 0 < (half - images).abs().mean() < 0.1


# ---- the model and the scheduler by themselves


def test_the_model_takes_classes_in_any_order():
    model = ProMoETransformer2DModel(hidden_size=16, heads=2, depth=2, input_size=8, in_channels=1, num_classes=10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    model.eval()
    x, labels = torch.randn(6, 1, 8, 8), torch.tensor(LABELS)
    mixed = model(x, 500.0, class_labels=labels)
    order = torch.tensor([0, 2, 3, 5, 1, 4])
    ordered, auxiliary = model(x[order], torch.full((6,), 500), labels[order], num_conditional=4, return_dict=False)
    torch.testing.assert_close(mixed.sample[order], ordered, rtol=1e-5, atol=1e-5)
    assert mixed.sample.shape == (6, 2, 8, 8) and mixed.auxiliary.load_ME.shape == auxiliary.load_ME.shape == (1, 12)
    wrong = model(x, 500.0, class_labels=labels, num_conditional=6).sample  # nulls routed as if they had a class
    assert (wrong - mixed.sample).abs().max() > 1e-3
    model.train()
    assert set(model(x, 500.0, class_labels=labels).auxiliary.losses) == {"rcl"}
    assert {"router", "hidden_size"} <= set(inspect.signature(ProMoETransformer2DModel.__init__).parameters)
    with pytest.raises(DiffusersInputError, match="condition = 'class': give class_labels"):
        model(x, 500.0, encoder_hidden_states=torch.zeros(6, 5, 6))


@pytest.mark.parametrize(
    "scheduler, options",
    [
        ("UniPCMultistepScheduler", ("sample.method=unipc",)),
        full("DPMSolverMultistepScheduler", ("diffusion.shift=2", "sample.method=dpm_solver++")),
        ("FlowMatchEulerDiscreteScheduler", ("diffusion.shift=2", "sample.method=euler")),
        ("DDIMScheduler", (*DDPM, "sample.method=ddim")),
    ],
)
def test_schedulers_of_diffusers_take_the_place_of_ours(tmp_path, scheduler, options):
    """Their noise levels differ a little from ours: the images get close with many steps."""
    state = state_with(*options, "sample.guidance=1", "sample.steps=40")
    pipe = opened(state, tmp_path / "a")
    latents = noise_of(state, 6)
    ours = pipe(LABELS, latents=latents, output_type="latent").images
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    theirs = pipe(LABELS, latents=latents, output_type="latent").images
    assert 0 < (theirs - ours).norm() / ours.norm() < 0.2


def test_the_scheduler_is_saved_with_what_others_need(tmp_path):
    scheduler = ProMoEScheduler("heun", shift=3.0)
    scheduler.save_pretrained(tmp_path)
    again = ProMoEScheduler.from_pretrained(tmp_path)
    assert again.config["method"] == "heun" and again.config["shift"] == again.config["flow_shift"] == 3.0
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [1000.0, 750.0, 750.0]
    x = torch.randn(1, 1, 4, 4)
    for timestep in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), timestep, x).prev_sample
    with pytest.raises(DiffusersInputError, match="all steps are made; call set_timesteps"):
        scheduler.step(x, 0.0, x)
    scheduler.set_timesteps(2)
    with pytest.raises(DiffusersInputError, match="timestep = 750: the next of scheduler.timesteps is 1000"):
        scheduler.step(x, 750.0, x)


# ---- refusals


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({}, "generates images of classes: give class_labels, no prompts"),
        ({"prompt": "a cat"}, "generates images of classes: give class_labels, no prompts"),
        ({"class_labels": [3, 11]}, "11 must be a class, 0..9, its name, or 10 for no class"),
        ({"class_labels": [2.5]}, "2.5 must be a class"),
        ({"class_labels": []}, "is empty; give at least one class"),
        ({"class_labels": "cat"}, "'cat' is no name of a class; names are '0', '1', '2', '3', '4' ...; or give"),
        ({"class_labels": 3, "output_type": "jpg"}, "output_type = 'jpg': must be one of pil, np, pt, latent"),
        ({"class_labels": 3, "num_inference_steps": 0}, "num_inference_steps = 0: must be a whole number, at least 1"),
        ({"class_labels": 3, "num_images_per_prompt": 0}, "num_images_per_prompt = 0: must be a whole number"),
        ({"class_labels": 3, "latents": torch.zeros(2, 1, 8, 8)}, "latents: have the shape (2, 1, 8, 8), must be (1"),
        ({"class_labels": 3, "guidance_scale": float("nan")}, "guidance_scale = nan: must be a number"),
        ({"class_labels": [3, 3, 3], "generator": [torch.Generator()] * 2}, "a list of 2, must be one for each of 3"),
        ({"class_labels": 3, "latents": torch.full((1, 1, 8, 8), float("nan"))}, "values that are not finite"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(pipe, arguments, sentence):
    with pytest.raises(DiffusersInputError) as caught:
        pipe(**arguments)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_parts_that_do_not_fit_are_refused(pipe, tmp_path):
    with pytest.raises(DiffusersInputError, match="id2label: has '12': 'x', must have names of the classes 0..9"):
        ProMoEPipeline(pipe.transformer, pipe.scheduler, id2label={12: "x"})
    with pytest.raises(DiffusersInputError, match="transformer: is a Linear, must be a ProMoETransformer2DModel"):
        ProMoEPipeline(torch.nn.Linear(1, 1), pipe.scheduler)
    twice = ProMoEPipeline(pipe.transformer, pipe.scheduler, id2label={1: "crane", 2: "crane"})
    with pytest.raises(DiffusersInputError, match=r"'crane' is the name of the classes \[1, 2\]"):
        twice("crane")
    with pytest.raises(DiffusersInputError, match="router = 'mine.py:Mine': must be one of dense"):
        ProMoETransformer2DModel(router="mine.py:Mine")
    with pytest.raises(DiffusersInputError, match="method = 'mine.py:f': must be one of euler"):
        ProMoEScheduler("mine.py:f")
    with pytest.raises(Exception, match="sample.method = 'heun': must be ddpm, ddim"):
        ProMoEScheduler("heun", objective="ddpm")
    with pytest.raises(DiffusersInputError, match="num_inference_steps = 2000: steps: 2000 is not within 1..1000"):
        ProMoEScheduler("ddim", objective="ddpm").set_timesteps(2000)
    state = state_with("model.in_channels=4", "data.source=unset")
    latents = opened(state, tmp_path / "a")
    with pytest.raises(DiffusersInputError, match="generates latents of 4 channels, and the pipeline has no vae"):
        latents([3])
    text = opened(replace(state_with(*TEXT)), tmp_path / "b")
    with pytest.raises(DiffusersInputError, match="must have name, kind, sha256, tokenizer_sha256, rounded_to"):
        ProMoEPipeline(text.transformer, text.scheduler, encoder_identity={"name": "t5"})
    for arguments, sentence in (
        ({"class_labels": 3}, "of texts: give either prompt or prompt_embeds"),
        ({"prompt": []}, "prompt = []: give a text, or a list of texts"),
        ({"prompt": "a cat"}, "no text encoder; open that of the training with pipe.load_text_encoder"),
        ({"prompt_embeds": torch.zeros(1, 6, 6)}, "texts of 6 tokens: must be at most model.text_tokens = 5"),
        ({"prompt_embeds": torch.zeros(1, 5, 7)}, "must be (1, tokens, 6)"),
    ):
        with pytest.raises(DiffusersInputError) as caught:
            text(**arguments)
        assert sentence in str(caught.value)
