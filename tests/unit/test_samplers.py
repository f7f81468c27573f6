"""Samplers against the exact solution for normal data, and guidance against two separate passes."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.operator_trace import OperatorTrace

from megapromoe.config.resolve import resolve
from megapromoe.diffusion.image_grid import generate
from megapromoe.diffusion.noise import image_noise
from megapromoe.diffusion.objectives import DDPMSchedule
from megapromoe.diffusion.samplers import Labels, guided, sample
from megapromoe.nn.parallelize import build

MEAN, STD = 0.4, 0.6  # of the data in the exact cases


def flow_velocity(x, time):
    """E[noise - clean | x] for clean ~ N(MEAN, STD^2): what a perfect rectified flow predicts."""
    s = time / 1000
    variance = (1 - s) ** 2 * STD**2 + s**2
    centred = x - (1 - s) * MEAN
    return s * centred / variance - (MEAN + (1 - s) * STD**2 * centred / variance)


class PerfectDDPM:
    """Noise and reverse variance that are exact for clean ~ N(MEAN, STD^2), on the steps of a schedule."""

    def __init__(self, steps):
        schedule = DDPMSchedule(steps)
        self.rows = {
            float(time): dict(zip(schedule.ROWS, column.tolist(), strict=True))
            for time, column in zip(schedule.times, schedule.table.T, strict=True)
        }

    def __call__(self, x, time):
        at = self.rows[time]
        scale, sigma = at["sqrt_alpha_bar"], at["sqrt_one_minus"]
        variance = scale**2 * STD**2 + sigma**2
        eps = sigma * (x - scale * MEAN) / variance
        clean_variance = STD**2 * sigma**2 / variance  # of clean given x
        reverse = math.exp(at["log_var_min"]) + at["mean_clean"] ** 2 * clean_variance
        width = at["log_var_max"] - at["log_var_min"]
        share = (math.log(reverse) - at["log_var_min"]) / width if width else 0.0
        return torch.cat([eps, torch.full_like(x, 2 * share - 1)], dim=1)


def start(B=8, draw=0):
    return image_noise(0, range(B), (2, 4, 4), draw)


def flow_error(method, steps, shift=1.0):
    """Largest distance from the exact end of the path, MEAN + STD · noise."""
    noise = start()
    return (sample(flow_velocity, noise, method, steps, shift) - (MEAN + STD * noise)).abs().max().item()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_samplers_land_on_the_data_at_their_order(shift):
    euler = [flow_error("euler", steps, shift) for steps in (40, 80)]
    heun = [flow_error("heun", steps, shift) for steps in (40, 80)]
    assert 1.8 < euler[0] / euler[1] < 2.2
    assert 3.5 < heun[0] / heun[1] < 4.6
    assert heun[1] < euler[1] / 10


def test_shift_puts_the_steps_at_the_shifted_noise_levels():
    times = []
    sample(lambda x, time: times.append(time) or flow_velocity(x, time), start(), "euler", 4, shift=3.0)
    assert times == pytest.approx([1000, 900, 750, 500])  # sigma 3/4, 1/2, 1/4 in odds times 3


def test_heun_calls_the_model_twice_in_each_step_but_the_last():
    times = []
    sample(lambda x, time: times.append(time) or flow_velocity(x, time), start(), "heun", 4)
    assert times == [1000, 750, 750, 500, 500, 250, 250]


def test_euler_ignores_a_learned_variance():
    noise = start()

    def with_variance(x, time):
        return torch.cat([flow_velocity(x, time), torch.full_like(x, 9.0)], dim=1)

    assert torch.equal(sample(with_variance, noise, "euler", 3), sample(flow_velocity, noise, "euler", 3))


def test_ddim_lands_on_the_data():
    """At first order; the exact path for normal data keeps the normalised deviate of each image."""
    noise = start()
    at = DDPMSchedule().table[:, -1].tolist()
    deviate = (noise - at[0] * MEAN) / math.sqrt(at[0] ** 2 * STD**2 + at[1] ** 2)
    errors = []
    for steps in (125, 250, 500, 1000):
        images = sample(PerfectDDPM(steps), noise, "ddim", steps)
        errors.append((images - (MEAN + STD * deviate)).abs().max().item())
    assert errors[-1] < 0.01
    assert all(1.8 < coarse / fine < 2.2 for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("steps", [100, 1000])
def test_ddpm_lands_on_the_data_with_exact_reverse_variance(steps):
    B, shape = 2, (1, 50, 100)
    count = B * math.prod(shape)
    images = sample(
        PerfectDDPM(steps),
        image_noise(3, range(B), shape),
        "ddpm",
        steps,
        noise_at=lambda k: image_noise(3, range(B), shape, k),
    )
    # The last step returns the mean of clean given x_1, whose spread is a little below the data's.
    at = dict(zip(DDPMSchedule.ROWS, DDPMSchedule(steps).table[:, 0].tolist(), strict=True))
    gain = at["sqrt_alpha_bar"] * STD / math.sqrt(at["sqrt_alpha_bar"] ** 2 * STD**2 + at["sqrt_one_minus"] ** 2)
    assert images.mean().item() == pytest.approx(MEAN, abs=5 * STD / math.sqrt(count))
    assert images.std().item() == pytest.approx(STD * gain, abs=5 * STD / math.sqrt(2 * count))


def test_ddpm_step_adds_noise_of_the_learned_deviation():
    """With eps = 0 and v = 0: clean is x rescaled, and the variance is half-way between its bounds."""
    inputs = []

    def predict(x, time):
        inputs.append(x)
        return torch.cat([torch.zeros_like(x), torch.zeros_like(x)], dim=1)

    noise, fresh = start(), start(draw=1)
    sample(predict, noise, "ddpm", 2, noise_at=lambda k: fresh)
    at = dict(zip(DDPMSchedule.ROWS, DDPMSchedule(2).table[:, 1].tolist(), strict=True))
    mean = (at["mean_clean"] / at["sqrt_alpha_bar"] + at["mean_x"]) * noise
    std = math.exp((at["log_var_min"] + at["log_var_max"]) / 4)
    torch.testing.assert_close(inputs[1], mean + std * fresh, rtol=1e-5, atol=1e-5)


def test_ddpm_draws_each_noise_once_and_none_at_the_end():
    requested, done = [], []
    sample(
        PerfectDDPM(5),
        start(),
        "ddpm",
        5,
        noise_at=lambda k: requested.append(k) or start(draw=k),
        progress=done.append,
    )
    assert requested == [1, 2, 3, 4] and done == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("method", ["euler", "heun", "ddpm", "ddim"])
def test_a_sampler_adds_no_dependence_on_the_batch(method):
    def predict(x, time):
        return torch.cat([torch.tanh(x) * time / 1000, torch.cos(x)], dim=1)

    def images(indices):
        def noise(draw):
            return image_noise(7, indices, (2, 4, 4), draw)

        return sample(predict, noise(0), method, 6, noise_at=noise)

    batch = images([0, 1, 2, 3, 4])
    assert torch.equal(batch, torch.cat([images([0, 1, 2]), images([3, 4])]))
    assert torch.equal(batch[[4, 0, 2]], images([4, 0, 2]))


@pytest.mark.parametrize("method", ["euler", "heun", "ddpm", "ddim"])
def test_a_step_makes_no_tensor_from_numbers_of_the_host(method):
    """On a GPU the host would wait in each step until it is copied."""

    def copies(steps):
        noise = start()
        with OperatorTrace() as trace:
            sample(lambda x, time: torch.cat([x, x], dim=1), noise, method, steps, noise_at=lambda k: noise)
        return trace.copies_from_host

    assert copies(2) == copies(6)


def test_sample_refuses_what_it_cannot_do():
    with pytest.raises(
        ValueError, match="'rk4' is not known; use one of euler, heun, ddpm, ddim, unipc, dpm_solver\\+\\+"
    ):
        sample(flow_velocity, start(), "rk4", 5)
    with pytest.raises(ValueError, match="sample.steps: 0"):
        sample(flow_velocity, start(), "euler", 0)
    with pytest.raises(ValueError, match="1001 is not within 1..1000"):
        sample(PerfectDDPM(5), start(), "ddim", 1001)
    with pytest.raises(ValueError, match="give noise_at, or use 'ddim'"):
        sample(PerfectDDPM(5), start(), "ddpm", 5)
    with pytest.raises(ValueError, match="needs 2 x 2 output channels, got 2"):
        sample(flow_velocity, start(), "ddim", 5)


# Guidance

NULL = 10


class Model:
    """A function of each image, its label and its time, that checks and records how it is called."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y, num_conditional):
        assert (y[:num_conditional] != NULL).all() and (y[num_conditional:] == NULL).all()
        assert t.dtype == torch.float32 and t.shape == y.shape
        self.calls.append((len(x), num_conditional))
        per_image = (y + 1.0 + t / 1000)[:, None, None, None]
        return torch.cat([torch.sin(per_image * x), per_image * x], dim=1).bfloat16(), "aux"


def pass_of(x, labels, time):
    """One pass of the model over images under given labels, each on its own."""
    rows = [
        Model()(x[[i]], torch.tensor([float(time)]), y.view(1), num_conditional=int(y != NULL))[0]
        for i, y in enumerate(labels)
    ]
    return torch.cat(rows).float()


@pytest.mark.parametrize("labels", [[3, 1, 4, 1], [NULL, 3, NULL, 2], [NULL, NULL]])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_is_two_separate_passes(labels, scale):
    labels = torch.tensor(labels)
    x = start(len(labels))
    model = Model()
    out = guided(model, Labels(labels, NULL), scale)(x, 600.0)
    conditional, null = pass_of(x, labels, 600.0), pass_of(x, torch.full_like(labels, NULL), 600.0)
    expected = null[:, :2] + scale * (conditional[:, :2] - null[:, :2])
    torch.testing.assert_close(out[:, :2], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:, 2:], conditional[:, 2:])  # a learned variance is not extrapolated
    named = int((labels != NULL).sum())
    both = scale != 1 and named
    assert model.calls == [(named + len(labels) if both else len(labels), named)]


@pytest.mark.parametrize("labels", [[3, 1, 4, 1], [NULL, 3, NULL, 2], [NULL, NULL]])
def test_two_calls_give_the_same_and_their_number_does_not_depend_on_the_labels(labels):
    """Else ranks that share experts would wait for each other."""
    labels = torch.tensor(labels)
    x, named = start(len(labels)), int((labels != NULL).sum())
    model, other = Model(), Model()
    predict = guided(model, Labels(labels, NULL), 2.5, high=0.7, two_calls=True)
    torch.testing.assert_close(
        predict(x, 600.0), guided(other, Labels(labels, NULL), 2.5)(x, 600.0), rtol=1e-6, atol=1e-6
    )
    assert model.calls == [(named or 1, named), (len(labels), 0)]
    predict(x, 800.0)
    assert model.calls[2:] == [(len(labels), named)]


def diffmoe():
    """A DiffMoE on digits, in eval mode, whose experts take about half of the tokens of a batch."""
    config = resolve("digits", overrides=["model.router=diffmoe", "sample.steps=2", "sample.guidance=2.5"])
    model = build(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(0.5)
    return model, config


def test_diffmoe_gets_conditional_and_null_images_in_separate_batches():
    """As in published sampling: experts choose among all tokens of a call."""
    model, config = diffmoe()
    labels, null = torch.tensor([3, 1, 4, 1]), torch.full((4,), config.model.null_class)
    x = image_noise(0, range(4), (1, 8, 8))
    calls = []

    def counted(*given, **named):
        calls.append(len(given[0]))
        return model(*given, **named)

    t = torch.full((4,), 600.0)
    conditional, uncond = model(x, t, labels, 4)[0], model(x, t, null, 0)[0]
    expected = uncond[:, :1] + 2.5 * (conditional[:, :1] - uncond[:, :1])
    arguments = (counted, Labels(labels, config.model.null_class), 2.5)
    two_calls, one_call = (guided(*arguments, two_calls=two)(x, 600.0)[:, :1] for two in (True, False))
    torch.testing.assert_close(two_calls, expected, rtol=1e-5, atol=1e-6)
    assert calls == [4, 4, 8] and (one_call - expected).norm() > 1e-4 * expected.norm()

    # So do generated images, which depend on their chunk; other models' do not.
    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("pos_embed", torch.zeros(1))

        def forward(self, *given, **named):
            return counted(*given, **named)

    calls.clear()
    generate(Recorder(), config, [3, 1, 4], range(3))
    assert calls == [3, 3] * 2
    assert config.model.images_depend_on_batch
    for other in ("dense", "conditional", "promoe", "promoe_ec", "tc", "ec", "kmeans", "gmm", "race"):
        assert not replace(config.model, router=other).images_depend_on_batch
    assert replace(config.model, router="promoe", capacity_factor=2.0).images_depend_on_batch


def test_guidance_acts_in_its_interval_only():
    labels = torch.tensor([2, 5])
    x = start(2)
    model = Model()
    predict = guided(model, Labels(labels, NULL), 3.0, low=0.25, high=0.75)
    for time, acts in [
        (0.0, False),
        (249.0, False),
        (250.0, True),
        (750.0, True),
        (751.0, False),
        (1000.0, False),
    ]:
        out = predict(x, time)
        assert torch.equal(out, pass_of(x, labels, time)) == (not acts)
        assert model.calls[-1] == (4 if acts else 2, 2)


# Per-image noise


def test_image_noise_is_unit_normal_and_fresh_for_each_image_draw_and_seed():
    a = image_noise(0, range(4), (3, 16, 16))
    assert a.dtype == torch.float32 and a.shape == (4, 3, 16, 16)
    others = [image_noise(0, range(4, 8), (3, 16, 16)), image_noise(0, range(4), (3, 16, 16), 1)]
    others.append(image_noise(1, range(4), (3, 16, 16)))
    for other in others:
        correlation = np.corrcoef(a.flatten().numpy(), other.flatten().numpy())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(a.numel())
