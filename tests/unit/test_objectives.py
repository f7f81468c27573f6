"""Objectives against direct formulas, numerical integrals and known answers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megapromoe.config.resolve import ConfigError, resolve
from megapromoe.diffusion.objectives import (
    DDPM,
    DDPMSchedule,
    RectifiedFlow,
    learned_log_variance,
    make_objective,
    normal_kl,
    pixel_nll,
    posterior_mean,
    shifted,
)


def quantiles(count=4001):
    """Evenly spaced points of (0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def batch(B=16, C=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(B, C, 4, 4, generator=generator) * 2 - 1
    noise = torch.randn(B, C, 4, 4, generator=generator)
    out = torch.randn(B, 2 * C, 4, 4, generator=generator)
    return clean, noise, out


def u_of(steps):
    """Draws that fall in the middle of DDPM steps."""
    return (torch.tensor(steps, dtype=torch.float32) + 0.5) / 1000


def diffusion_config(**changes):
    fields = dict(objective="rf", time="mode", logit_mean=0.1, logit_std=0.9, mode_scale=0.7, shift=3.0)
    return SimpleNamespace(diffusion=SimpleNamespace(**(fields | changes)), time_shift=fields["shift"])


# Rectified flow


def test_logit_normal_has_the_stated_mean_and_deviation_of_its_logit():
    logit = torch.logit(RectifiedFlow("logit_normal", logit_mean=-0.4, logit_std=0.7).sigma(quantiles()).double())
    assert logit.mean().item() == pytest.approx(-0.4, abs=1e-4)
    assert logit.std().item() == pytest.approx(0.7, rel=1e-3)


@pytest.mark.parametrize("scale", [-0.9, 0.0, 1.0, 1.29])
def test_mode_sampling_density_is_the_inverse_slope_of_its_formula(scale):
    """At sigma = f(u) the density is 1 / |f'(u)|: a histogram of draws must show it."""
    sigma = RectifiedFlow("mode", mode_scale=scale).sigma(quantiles(400_001)).double()
    assert sigma.min() >= 0 and sigma.max() <= 1
    u = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    f = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    slope = 1 + scale * (1 - math.pi / 2 * torch.sin(math.pi * u))
    for centre, steepness in zip(f, slope, strict=True):
        density = ((sigma - centre).abs() < 0.005).double().mean() / 0.01
        assert density.item() == pytest.approx(1 / abs(steepness.item()), rel=0.02)


def test_uniform_time_is_the_draw_itself_and_shift_moves_it_to_noise():
    u = quantiles(11).float()
    assert torch.equal(RectifiedFlow("uniform").sigma(u), u)
    moved = RectifiedFlow("uniform", shift=3.0).sigma(u)
    # In odds, the shift is a factor.
    torch.testing.assert_close(moved / (1 - moved), 3 * u / (1 - u), rtol=1e-5, atol=0)
    assert (shifted(0.0, 3.0), shifted(1.0, 3.0)) == (0.0, 1.0)


@pytest.mark.parametrize(
    "model",
    [(), ("model.condition=text", "model.text_width=6", "model.text_tokens=5")],
    ids=["classes", "texts"],
)
def test_the_shift_by_size_in_training(model):
    """Eq. 23 of SD3: latents of side 16 have 16 times the pixels of side 4, so odds of noise are 4 times as large."""
    words = ("data.source=synthetic", "model.input_size=16", "model.patch_size=2", *model)
    u = torch.linspace(0.01, 0.99, 50)
    plain, moved = (
        make_objective(resolve(overrides=[*words, f"diffusion.shift_base={base}"])).sigma(u) for base in (0, 4)
    )
    assert torch.allclose(moved / (1 - moved), 4 * plain / (1 - plain), rtol=1e-4)
    with pytest.raises(ConfigError, match="diffusion.shift_base = 4: must be 0 with diffusion.objective = 'ddpm'"):
        resolve(overrides=[*words, "diffusion.shift_base=4", "diffusion.objective=ddpm", "sample.method=ddim"])


def test_flow_corrupts_along_the_straight_line_and_scores_the_velocity():
    clean, noise, out = batch()
    u = quantiles(len(clean)).float()
    flow = RectifiedFlow("uniform")
    x, t = flow.corrupt(clean, noise, u)
    s = u[:, None, None, None]
    torch.testing.assert_close(x, (1 - s) * clean + s * noise)
    torch.testing.assert_close(t, 1000 * u)
    assert t.dtype == x.dtype == torch.float32
    expected = ((out[:, :2] - (noise - clean)) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(flow.losses_B(out, clean, noise, u), expected)
    torch.testing.assert_close(flow.loss(out, clean, noise, u), expected.mean())
    assert flow.loss(noise - clean, clean, noise, u) == 0  # also without a variance half


def test_flow_loss_of_a_half_precision_output_is_computed_in_float32():
    clean, noise, out = batch()
    loss = RectifiedFlow().loss(out.bfloat16(), clean, noise, quantiles(len(clean)).float())
    assert loss.dtype == torch.float32
    assert loss == RectifiedFlow().loss(out.bfloat16().float(), clean, noise, quantiles(len(clean)).float())


def test_extreme_draws_stay_finite():
    u = torch.tensor([2.0**-53, 1 - 2.0**-24])
    clean, noise, out = batch(B=2)
    for objective in (RectifiedFlow(), RectifiedFlow("mode"), RectifiedFlow("uniform", shift=5.0), DDPM()):
        x, t = objective.corrupt(clean, noise, u)
        assert x.isfinite().all() and objective.losses_B(out, clean, noise, u).isfinite().all()
        assert t.min() >= 0 and t.max() <= 1000


def test_make_objective_takes_every_field_and_names_unknown_ones():
    assert make_objective(diffusion_config()) == RectifiedFlow("mode", 0.1, 0.9, 0.7, 3.0)
    assert isinstance(make_objective(diffusion_config(objective="ddpm")), DDPM)
    with pytest.raises(ValueError, match="diffusion.objective: 'edm'"):
        make_objective(diffusion_config(objective="edm"))
    with pytest.raises(ValueError, match="time: 'cosine'"):
        make_objective(diffusion_config(time="cosine"))


# DDPM


def direct_schedule():
    beta = np.linspace(1e-4, 0.02, 1000)
    return beta, np.cumprod(1 - beta)


def test_ddpm_step_is_the_floor_of_a_thousand_draws():
    step = DDPM().step(torch.tensor([1e-9, 0.0015, 0.9985, 1 - 2.0**-24]))
    assert step.tolist() == [0, 1, 998, 999]


def test_ddpm_corruption_is_the_product_of_all_single_steps():
    """Variance and mean of q(x_t | x_0) from the chain x_t = sqrt(1-beta) x_{t-1} + sqrt(beta) noise."""
    scale, variance = 1.0, 0.0
    chain = []
    for beta in direct_schedule()[0]:
        scale *= math.sqrt(1 - beta)
        variance = (1 - beta) * variance + beta
        chain.append((scale, math.sqrt(variance)))
    ones = torch.ones(1000, 1, 1, 1)
    u = u_of(range(1000))
    from_clean, t = DDPM().corrupt(ones, 0 * ones, u)
    from_noise, _ = DDPM().corrupt(0 * ones, ones, u)
    measured = torch.cat([from_clean, from_noise], dim=1)[:, :, 0, 0].double()
    torch.testing.assert_close(measured, torch.tensor(chain, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert t.tolist() == list(range(1000))


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) as the product of the two normals q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    beta, bar = direct_schedule()
    step = torch.tensor([1, 10, 500, 999])
    at = DDPMSchedule().at(step)
    clean, x = torch.tensor(0.7), torch.tensor(-1.1)
    mean = posterior_mean(at, clean, x)[:, 0, 0, 0]
    for row, t in enumerate(step.tolist()):
        precision = (1 - beta[t]) / beta[t] + 1 / (1 - bar[t - 1])
        weighted = math.sqrt(1 - beta[t]) / beta[t] * -1.1 + math.sqrt(bar[t - 1]) / (1 - bar[t - 1]) * 0.7
        assert mean[row].item() == pytest.approx(weighted / precision, rel=1e-5)
        assert at["log_var_min"][row].item() == pytest.approx(-math.log(precision), rel=1e-5)
        assert at["log_var_max"][row].item() == pytest.approx(math.log(beta[t]), rel=1e-5)


def test_learned_variance_spans_posterior_to_beta():
    at = DDPMSchedule().at(torch.tensor([300]))
    low, middle, high = (learned_log_variance(at, torch.full((1, 1, 1, 1), v)) for v in (-1.0, 0.0, 1.0))
    torch.testing.assert_close(low, at["log_var_min"])
    torch.testing.assert_close(high, at["log_var_max"])
    torch.testing.assert_close(middle, (low + high) / 2)


def test_normal_kl_is_the_integral():
    grid = np.linspace(-30, 30, 600_001)
    for m1, v1, m2, v2 in [(0.3, 0.5, -0.2, 1.5), (0.0, 2.0, 1.0, 0.7)]:
        log_p, log_q = (-0.5 * (grid - m) ** 2 / v - 0.5 * np.log(2 * np.pi * v) for m, v in ((m1, v1), (m2, v2)))
        integral = np.trapezoid(np.exp(log_p) * (log_p - log_q), grid)
        kl = normal_kl(*(torch.tensor(a) for a in (m1, math.log(v1), m2, math.log(v2))))
        assert kl.item() == pytest.approx(integral, rel=1e-5)


def test_pixel_likelihood_sums_to_one_and_is_close_to_the_true_normal():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in [(0.1, 0.2), (-0.98, 0.05), (0.98, 0.05), (0.5, 0.01)]:
        probability = torch.exp(-pixel_nll(levels, torch.tensor(mean), torch.tensor(2 * math.log(std))))
        assert probability.sum().item() == pytest.approx(1, abs=1e-5)
        edges = torch.cat([levels.new_tensor([-math.inf]), levels[:-1] + 1 / 255, levels.new_tensor([math.inf])])
        exact = torch.special.ndtr((edges - mean) / std).diff()
        assert (probability - exact).abs().max() < 1e-3


def test_variational_term_is_the_kl_between_posterior_and_model_in_bits():
    """Each step by torch.distributions in float64, from the definition of model mean and variance."""
    beta, bar = direct_schedule()
    steps = [1, 2, 40, 500, 998, 999]
    clean, noise, out = batch(B=len(steps))
    u = u_of(steps)
    measured = DDPM().variational_B(out, clean, noise, u)
    x = DDPM().corrupt(clean, noise, u)[0].double()
    for row, t in enumerate(steps):
        prev = bar[t - 1]
        variance = beta[t] * (1 - prev) / (1 - bar[t])

        def mean(x0, row=row, t=t, prev=prev):
            weight = math.sqrt(prev) * beta[t] / (1 - bar[t])
            return weight * x0 + math.sqrt(1 - beta[t]) * (1 - prev) / (1 - bar[t]) * x[row]

        eps, v = out[row].double().chunk(2)
        guess = (x[row] - math.sqrt(1 - bar[t]) * eps) / math.sqrt(bar[t])
        share = (v + 1) / 2
        std = torch.exp(0.5 * (share * math.log(beta[t]) + (1 - share) * math.log(variance)))
        truth = torch.distributions.Normal(mean(clean[row].double()), math.sqrt(variance))
        kl = torch.distributions.kl_divergence(truth, torch.distributions.Normal(mean(guess), std))
        assert measured[row].item() == pytest.approx(kl.mean().item() / math.log(2), rel=1e-3)


def test_first_step_scores_the_likelihood_of_the_data():
    clean, noise, out = batch(B=1)
    u = u_of([0])
    at = DDPMSchedule().at(torch.tensor([0]))
    x, _ = DDPM().corrupt(clean, noise, u)
    guess = (x - math.sqrt(1e-4) * out[:, :2]) / math.sqrt(1 - 1e-4)  # at step 0 the posterior is the clean image
    nll = pixel_nll(clean, guess, learned_log_variance(at, out[:, 2:])).mean() / math.log(2)
    torch.testing.assert_close(DDPM().variational_B(out, clean, noise, u)[0], nll, rtol=1e-3, atol=1e-3)


def test_loss_is_error_plus_variational_term_and_only_the_error_moves_the_mean():
    clean, noise, out = batch()
    u = u_of(np.linspace(0, 999, len(clean)).astype(int).tolist())
    objective = DDPM()
    out.requires_grad_()
    losses = objective.losses_B(out, clean, noise, u)
    squared = ((out[:, :2] - noise) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, squared + objective.variational_B(out, clean, noise, u))
    (both,) = torch.autograd.grad(losses.mean(), out)
    (error_only,) = torch.autograd.grad(squared.mean(), out)
    torch.testing.assert_close(both[:, :2], error_only[:, :2])
    assert (both[:, 2:].abs().amax(dim=(1, 2, 3)) > 0).all()
    torch.testing.assert_close(objective.loss(out, clean, noise, u), losses.mean())


def test_ddpm_needs_the_variance_channels():
    clean, noise, out = batch()
    with pytest.raises(ValueError, match="needs 2 x 2 output channels, got 2.*model.learn_sigma=true"):
        DDPM().losses_B(out[:, :2], clean, noise, u_of([5] * len(clean)))


def test_respaced_schedule_keeps_the_noise_levels_of_its_steps():
    full, spaced = DDPMSchedule(), DDPMSchedule(11)
    assert spaced.times == [0, 100, 200, 300, 400, 500, 599, 699, 799, 899, 999]
    assert DDPMSchedule(1).times == [999] and full.times == list(range(1000))
    torch.testing.assert_close(spaced.table[:2], full.table[:2, spaced.times])
    assert spaced.table.isfinite().all() and DDPMSchedule(1).table.isfinite().all()
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"{steps} is not within 1..1000"):
            DDPMSchedule(steps)
