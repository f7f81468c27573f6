"""UniPC and DPM-Solver++ of diffusers against plain solvers in float64, and against exact solutions."""

import math
import sys

import numpy as np
import pytest
import torch

from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.diffusion import multistep
from megapromoe.diffusion.image_grid import generate
from megapromoe.diffusion.noise import image_noise
from megapromoe.diffusion.objectives import DDPMSchedule
from megapromoe.diffusion.samplers import sample
from megapromoe.nn.parallelize import build

pytest.importorskip("diffusers")

MEAN, STD = 0.4, 0.6  # of the data in the exact cases
STEPS = 12


def flow_velocity(x, time):
    """E[noise - clean | x] for clean ~ N(MEAN, STD^2)."""
    s = time / 1000
    variance = (1 - s) ** 2 * STD**2 + s**2
    centred = x - (1 - s) * MEAN
    return s * centred / variance - (MEAN + (1 - s) * STD**2 * centred / variance)


def exact_noise(x, time):
    """E[noise | x] for clean ~ N(MEAN, STD^2), at a step of DDPM."""
    table = DDPMSchedule().table[:2, round(time)]
    scale, sigma = table.tolist()
    return sigma * (x - scale * MEAN) / (scale**2 * STD**2 + sigma**2)


def wavy(function):
    """A prediction that is not linear in x."""
    return lambda x, time: function(x, time) + 0.3 * torch.sin(3 * x + time / 300)


def start():
    return image_noise(0, range(8), (2, 4, 4))


def with_variance(function):
    """With the channels of a learned variance, which DDPM has."""
    return lambda x, time: torch.cat([function(x, time), torch.full_like(x, 9.0)], dim=1)


def levels_of(objective, steps, shift=1.0):
    """Of each point of the path signal and noise, descending; and the model time of each step."""
    if objective == "rf":
        sigmas = [shift * s / (1 + (shift - 1) * s) for s in (1 - i / steps for i in range(steps + 1))]
        return [(max(1 - s, 1e-6), s) for s in sigmas[:-1]] + [(1.0, 0.0)], [1000 * s for s in sigmas[:-1]]
    schedule = DDPMSchedule(steps)
    pairs = schedule.table[:2].flip(1).T.tolist()
    return [*pairs, (1.0, 0.0)], [float(time) for time in reversed(schedule.times)]


def clean_of(objective, predict, x, level, time):
    scale, sigma = level
    output = predict(x, time)
    return x - sigma * output if objective == "rf" else (x - sigma * output) / scale


def plain_dpm_solver(objective, predict, x, levels, times):
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095; the first and the last step are of first order."""
    before, width_before = None, None
    for i, time in enumerate(times):
        (scale, sigma), (next_scale, next_sigma) = levels[i : i + 2]
        clean = clean_of(objective, predict, x, levels[i], time)
        if next_sigma == 0:
            return clean
        width = math.log(next_scale / next_sigma) - math.log(scale / sigma)
        extrapolated = clean if before is None else clean + (clean - before) * width / (2 * width_before)
        x = next_sigma / sigma * x - next_scale * math.expm1(-width) * extrapolated
        before, width_before = clean, width
    return x


def plain_unipc(objective, predict, x, levels, times):
    """UniPC-2 with B_2(h), algorithms 5 to 8 of arXiv 2302.04867, on the predicted clean images."""

    def log_ratio(i):
        return math.log(levels[i][0] / levels[i][1])

    def update(i, x, clean, slopes, weights):
        """From point i to the next."""
        width = log_ratio(i + 1) - log_ratio(i)
        ratio, scale = levels[i + 1][1] / levels[i][1], levels[i + 1][0]
        correction = sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
        return ratio * x - scale * math.expm1(-width) * (clean + correction)

    cleans, last = [], None
    for i, time in enumerate(times):
        clean = clean_of(objective, predict, x, levels[i], time)
        if i:  # correct the step to this point
            width = log_ratio(i) - log_ratio(i - 1)
            slopes, positions = [clean - cleans[i - 1]], [1.0]
            if i > 1:
                position = (log_ratio(i - 2) - log_ratio(i - 1)) / width
                slopes.insert(0, (cleans[i - 2] - cleans[i - 1]) / position)
                positions.insert(0, position)
            z = -width
            first = (math.expm1(z) / z - 1) / math.expm1(z)
            second = 2 * ((math.expm1(z) / z - 1) / z - 0.5) / math.expm1(z)
            weights = np.linalg.solve([[1, 1], positions], [first, second]).tolist() if i > 1 else [0.5]
            x = update(i - 1, last, cleans[i - 1], slopes, weights)
        if levels[i + 1][1] == 0:
            return clean
        slopes, weights = [], []
        if i:
            position = (log_ratio(i - 1) - log_ratio(i)) / (log_ratio(i + 1) - log_ratio(i))
            slopes, weights = [(cleans[i - 1] - clean) / position], [0.5]
        cleans.append(clean)
        last, x = x, update(i, x, clean, slopes, weights)
    return x


PLAIN = {"dpm_solver++": plain_dpm_solver, "unipc": plain_unipc}


@pytest.mark.parametrize("method", multistep.METHODS)
@pytest.mark.parametrize(("objective", "shift", "steps"), [("rf", 1.0, STEPS), ("rf", 3.0, 30), ("ddpm", 1.0, 25)])
def test_the_solvers_are_the_published_ones(method, objective, shift, steps):
    predict = wavy(flow_velocity if objective == "rf" else exact_noise)
    levels, times = levels_of(objective, steps, shift)
    expected = PLAIN[method](objective, predict, start().double(), levels, times)
    images = sample(with_variance(predict), start(), method, steps, shift, objective=objective)
    assert expected.std() > 0.3
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", multistep.METHODS)
@pytest.mark.parametrize("objective", ["rf", "ddpm"])
def test_they_land_on_the_data_at_second_order(method, objective):
    noise = deviate = start()
    predict, steps = (flow_velocity, 160) if objective == "rf" else (exact_noise, 80)
    if objective == "ddpm":  # the path begins at the last step of DDPM, which has a little signal
        scale, sigma = DDPMSchedule().table[:2, -1].tolist()
        deviate = (noise - scale * MEAN) / math.sqrt(scale**2 * STD**2 + sigma**2)
    coarse, fine = (
        (sample(with_variance(predict), noise, method, n, objective=objective) - (MEAN + STD * deviate)).abs().max()
        for n in (steps, 2 * steps)
    )
    assert 3.2 < coarse / fine < 5.0 and fine < 0.01  # Euler's method and DDIM: 2


@pytest.mark.parametrize("method", multistep.METHODS)
def test_the_model_is_evaluated_once_a_step_at_the_times_of_euler(method):
    times, euler, done = [], [], []

    def predict(record):
        return lambda x, time: record.append(time) or flow_velocity(x, time)

    sample(predict(times), start(), method, 4, 3.0, progress=done.append)
    sample(predict(euler), start(), "euler", 4, 3.0)
    assert times == euler and times == pytest.approx([1000, 900, 750, 500]) and done == [1, 2, 3, 4]
    # A single step is that of Euler.
    images = sample(flow_velocity, start(), method, 1)
    torch.testing.assert_close(images, sample(flow_velocity, start(), "euler", 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", multistep.METHODS)
def test_a_large_shift_has_levels_close_to_noise(method):
    """Closer than the level that stands for pure noise, which must remain the first."""
    images = sample(flow_velocity, start(), method, 50, shift=20_000.0)
    torch.testing.assert_close(images, sample(flow_velocity, start(), "euler", 50, shift=20_000.0), rtol=0, atol=0.01)


@pytest.mark.parametrize("method", multistep.METHODS)
def test_an_image_does_not_depend_on_the_others(method):
    images = sample(flow_velocity, start(), method, 5)
    assert torch.equal(sample(flow_velocity, start()[3:4], method, 5)[0], images[3])


def test_euler_draws_the_bits_that_it_drew_before():
    """Of a model, with guidance: the steps of Euler's method, written out."""
    config = resolve("digits", overrides=["sample.steps=3", "sample.guidance=2.5", "model.depth=2"])
    model, null = build(config).eval().requires_grad_(False), config.model.null_class
    for number, parameter in enumerate(model.parameters()):
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    labels = torch.tensor([3, null, 1])
    x = image_noise(config.sample.seed, [0, 1, 2], (1, 8, 8))
    rows, conditional = torch.tensor([0, 2, 0, 1, 2]), torch.tensor([0, 2])
    y = torch.tensor([3, 1, null, null, null])
    for i in range(3):
        before, after = 1 - i / 3, 1 - (i + 1) / 3
        both, _ = model(x[rows], torch.full((5,), 1000 * before), y, num_conditional=2)
        velocity = both[2:].clone()
        guided = velocity[conditional] + 2.5 * (both[:2] - velocity[conditional])
        x = x + (after - before) * velocity.index_copy_(0, conditional, guided)[:, :1]
    assert torch.equal(generate(model, config, labels.tolist(), [0, 1, 2]), x)


@pytest.mark.parametrize("method", multistep.METHODS)
def test_both_objectives_take_the_methods_and_neither_takes_those_of_the_other(method):
    assert resolve("digits", overrides=[f"sample.method={method}"]).sample.method == method
    ddpm = ["diffusion.objective=ddpm", "model.learn_sigma=true"]
    assert resolve("digits", overrides=[*ddpm, f"sample.method={method}"]).sample.method == method
    with pytest.raises(ConfigError, match="sample.method = 'heun': must be ddpm, ddim, unipc or dpm_solver"):
        resolve("digits", overrides=[*ddpm, "sample.method=heun"])


def test_without_diffusers_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    multistep.check_available("heun")
    with pytest.raises(
        multistep.MethodUnavailable, match=r"'unipc' needs diffusers: pip install 'megapromoe\[images\]'"
    ):
        sample(flow_velocity, start(), "unipc", 4)
