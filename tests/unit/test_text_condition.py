"""Models that are conditioned by text: joint attention with a mask, pooled text, and no leak into null images."""

from dataclasses import replace

import pytest
import torch
from support.levels import full
from support.plain_dit import plain_dit

from megapromoe.config.model_options import ModelConfig
from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.nn.dit import DiT
from megapromoe.nn.text_condition import TextCondition

TOKENS, WIDTH = 5, 7
SMALL = ModelConfig(
    condition="text",
    text_width=WIDTH,
    text_tokens=TOKENS,
    hidden_size=24,
    depth=2,
    heads=3,
    input_size=6,
    num_experts=4,
    rcl_weight=0.0,
    score_function="sigmoid",
)
BLOCKS = {"activation": "swiglu", "norm": "rms", "qk_norm": "rms", "positions": "rope", "modulation": "shared"}
ALL = {**BLOCKS, "text_ffn": 20, "moe_every": 1, "shared_expert": False}
IMAGES, NUM_CONDITIONAL = 4, 3
LENGTHS = (TOKENS, 2, 0, 4)  # of the texts; the last is that of a null image


def stirred(config: ModelConfig) -> DiT:
    """A model in float64 of which no parameter is zero."""
    torch.manual_seed(0)
    model = DiT(config).double()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    return model


def texts(lengths=LENGTHS, tokens: int = TOKENS, padding: float = 3.0) -> TextCondition:
    """Texts of these lengths, the same for the same image whatever its length, with a constant as padding."""
    generator = torch.Generator().manual_seed(2)
    features_BND = torch.randn(len(lengths), TOKENS, WIDTH, generator=generator, dtype=torch.float64)[:, :tokens]
    mask_BN = torch.arange(tokens) < torch.tensor(lengths).unsqueeze(1)
    return TextCondition(features_BND.masked_fill(~mask_BN.unsqueeze(-1), padding), mask_BN)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images and their times, so small that the float32 angles of the time embedding are exact enough."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 4, 6, 6, generator=generator, dtype=torch.float64), torch.tensor([1.0, 8.0, 20.0, 40.0])


def prediction(model: DiT, condition: TextCondition, num_conditional: int = NUM_CONDITIONAL) -> torch.Tensor:
    return model(*images(), condition, num_conditional)[0]


@pytest.mark.parametrize(
    "lengths, tokens, num_conditional",
    [
        (LENGTHS, TOKENS, NUM_CONDITIONAL),
        ((0, 0, 0, 0), 0, NUM_CONDITIONAL),
        full(LENGTHS, TOKENS, 0),
        full((TOKENS,) * IMAGES, TOKENS, IMAGES),
        full((1, 0, 2, 1), 2, IMAGES),
    ],
    ids=["mixed", "no token at all", "all null", "all of the longest", "short"],
)
@pytest.mark.parametrize(
    "change",
    [
        {},
        ALL,
        full({"text_ffn": 20}),
        full({"router": "dense", **BLOCKS}),
        full({"positions": "rope"}),
        full({"modulation": "shared", "unconditional_expert": False}),
    ],
    ids=lambda change: " ".join(f"{name}={value}" for name, value in change.items()) or "defaults",
)
def test_outputs_and_gradients_of_the_plain_reference(change, lengths, tokens, num_conditional):
    """The reference leaves out the tokens that are masked here."""
    config = replace(SMALL, **change)
    model, condition = stirred(config), texts(lengths, tokens)
    condition.features_BND.requires_grad_()
    weights = torch.randn(IMAGES, config.out_channels, 6, 6, dtype=torch.float64)
    ours = prediction(model, condition, num_conditional)
    (ours * weights).sum().backward()
    plain = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    features_BND = condition.features_BND.detach().clone().requires_grad_()
    conditions = list(zip(features_BND, condition.mask_BN, strict=True))
    expected = plain_dit(plain, config, *images(), conditions, num_conditional)
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    gradients = {name: (p.grad, plain[name].grad) for name, p in model.named_parameters()}
    for name, (gradient, wanted) in (gradients | {"text": (condition.features_BND.grad, features_BND.grad)}).items():
        wanted = torch.zeros_like(gradient) if wanted is None else wanted
        assert float((gradient - wanted).norm()) <= 1e-5 * float(wanted.norm()) + 1e-8, name


@pytest.mark.parametrize("change", [{}, ALL], ids=["defaults", "all options"])
def test_a_null_image_does_not_depend_on_its_caption(change):
    """To the last bit, also if the caption is not finite; that of another image is as little seen."""
    model, condition = stirred(replace(SMALL, **change)), texts()
    before = prediction(model, condition)
    features_BND, mask_BN = condition.features_BND.clone(), condition.mask_BN.clone()
    features_BND[-1], mask_BN[-1] = torch.nan, True
    assert torch.equal(prediction(model, TextCondition(features_BND, mask_BN)), before)
    features_BND[-1], features_BND[0] = 1.0, -features_BND[0]
    after = prediction(model, TextCondition(features_BND, mask_BN))
    assert torch.equal(after[-1], before[-1]) and not torch.allclose(after[0], before[0], atol=1e-3)
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-9, atol=1e-9)  # experts get other numbers of rows


@pytest.mark.parametrize("change", [{}, ALL], ids=["defaults", "all options"])
def test_padding_is_not_seen(change):
    model = stirred(replace(SMALL, **change))
    before = prediction(model, texts())
    assert torch.equal(prediction(model, texts(padding=torch.nan)), before)
    short = (2, 2, 0, 1)
    torch.testing.assert_close(
        prediction(model, texts(short, 2)), prediction(model, texts(short)), rtol=1e-6, atol=1e-8
    )


def test_the_order_of_the_tokens_is_seen():
    """Binding needs it: pooled features of "red three, blue seven" and of the reverse are equal."""
    for change in ({}, {"positions": "rope"}):
        model, condition = stirred(replace(SMALL, **change)), texts()
        swapped = condition.features_BND.clone()
        swapped[0] = swapped[0].flip(0)
        gap = prediction(model, TextCondition(swapped, condition.mask_BN)) - prediction(model, condition)
        first, others = (float(part.detach().norm()) for part in (gap[0], gap[1:]))
        # Rows of the others have other places in the products of experts, which some processors round differently.
        assert first > 1e-3 and others < 1e-13 * float(prediction(model, condition).detach().norm())


def test_experts_see_tokens_of_images_alone():
    model = stirred(replace(SMALL, moe_every=1))
    _, auxiliary = model(*images(), texts(), NUM_CONDITIONAL)
    assert auxiliary.load_ME.sum(1).tolist() == [NUM_CONDITIONAL * SMALL.tokens] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_are_read_in_the_type_in_which_they_are_stored(dtype):
    model, condition = stirred(SMALL).float(), texts()
    rounded = condition.features_BND.to(dtype)
    x_BCHW, t_B = images()
    outputs = [
        model(x_BCHW.float(), t_B, TextCondition(features, condition.mask_BN), NUM_CONDITIONAL)[0]
        for features in (rounded, rounded.float())
    ]
    assert torch.equal(*outputs)


def test_every_parameter_has_a_gradient_whatever_the_texts_are():
    """ZeRO reduces gradients in the order in which they are ready: ranks must have the same ones."""
    for lengths, tokens, num_conditional in (
        (LENGTHS, TOKENS, 3),
        ((0,) * 4, 0, 3),
        ((1,) * 4, TOKENS, 4),
        (LENGTHS, 5, 0),
    ):
        model = stirred(replace(SMALL, **ALL)).train()
        output, auxiliary = model(*images(), texts(lengths, tokens), num_conditional)
        (output.square().sum() + auxiliary.total()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def wrong(**change) -> TextCondition:
    condition = texts()
    return replace(condition, **{name: how(getattr(condition, name)) for name, how in change.items()})


@pytest.mark.parametrize(
    "condition, message",
    [
        (wrong(features_BND=lambda x: x[:3]), r"shape \(3, 5, 7\): must be \(4, tokens, 7\)"),
        (wrong(features_BND=lambda x: x[..., :6]), r"shape \(4, 5, 6\): must be .* model.text_width channels"),
        (wrong(features_BND=lambda x: x[0]), r"shape \(5, 7\): must be"),
        (wrong(features_BND=lambda x: x.repeat(1, 2, 1)), "texts of 10 tokens: must be at most model.text_tokens = 5"),
        (wrong(mask_BN=lambda x: x[:, :4]), r"mask_BN is torch.bool of the shape \(4, 4\)"),
        (wrong(mask_BN=lambda x: x.float()), "mask_BN is torch.float32 .*: must be torch.bool"),
    ],
)
def test_texts_that_do_not_fit_are_refused(condition, message):
    with pytest.raises(ValueError, match=message):
        prediction(DiT(SMALL).double(), condition)


def test_labels_for_a_text_model_and_the_reverse_are_refused():
    with pytest.raises(TypeError, match="condition is a Tensor: must be a TextCondition with model.condition = 'text'"):
        DiT(SMALL)(*images(), torch.zeros(IMAGES).long())
    classes = DiT(replace(SMALL, condition="class", text_width=0, text_tokens=0))
    with pytest.raises(
        TypeError, match="is a TextCondition: must be a tensor of labels with model.condition = 'class'"
    ):
        classes(*images(), texts())


TEXT = ["model.condition=text", "model.text_width=8", "model.text_tokens=4"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (["model.text_width=8"], r"model.text_width = 8: must be 0 with model.condition = 'class'; or set .*=text"),
        (["model.text_ffn=8"], "model.text_ffn = 8: must be 0 with"),
        (["model.text_tokens=8"], "model.text_tokens = 8: must be 0 with"),
        (["model.condition=text", "model.text_tokens=4"], "model.text_width = 0: must be the channels of the text"),
        (["model.condition=text", "model.text_width=4"], "model.text_tokens = 0: must be the most tokens of a text"),
        (
            [*TEXT, "model.superclasses=modulo"],
            "model.superclasses = 'modulo': must be contiguous, its default, with model.condition",
        ),
        ([*TEXT, "model.num_classes=10"], "model.num_classes = 10: must be 1000, its default, with model.condition"),
        ([*TEXT, "model.router=classification"], "model.router = 'classification': must be another with model.cond"),
        ([*TEXT, "data.source=digits"], "data.source = 'digits': must be latents or synthetic with model.condition"),
        (
            [*TEXT, "model.text_ffn=9", "parallel.tp=2"],
            r"parallel.tp = 2: must divide model.text_ffn = 9; nearest: 1, 3",
        ),
        (["model.condition=prompt"], "must be one of class, text"),
    ],
)
def test_options_that_do_not_fit_a_condition_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve("promoe_s", overrides=settings)


def test_a_text_model_is_accepted():
    assert resolve("promoe_s", overrides=[*TEXT, "model.text_ffn=8", "parallel.tp=2"]).model.has_text
