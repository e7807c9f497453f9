"""Noise schedule against ViewCrafter's recorded numbers, and its identities at every timestep."""

import pytest
import torch
from safetensors.torch import load_file

from fvgen.diffusion.schedule import (
    NoiseSchedule,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
    trailing_timesteps,
    uniform_timesteps,
)
from fvgen.errors import UserError

ALL_T = torch.arange(1000)


@pytest.fixture(scope="module")
def record(recorded):
    return load_file(recorded / "schedule.safetensors")


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.viewcrafter(0.3)


def latents(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 4, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_betas_and_alphas_equal_the_recording(record):
    betas = scaled_linear_betas()
    torch.testing.assert_close(betas, record["betas_raw_f64"], rtol=0, atol=1e-15)
    rescaled = rescale_zero_terminal_snr(betas)
    torch.testing.assert_close(rescaled, record["betas_zero_snr_f64"], rtol=0, atol=1e-14)
    torch.testing.assert_close((1 - rescaled).cumprod(0), record["alphas_cumprod_zero_snr_f64"], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("base_scale", "name"), [(0.3, "scale_arr_1024"), (0.7, "scale_arr_512")])
def test_tables_equal_the_recording(record, base_scale, name):
    schedule = NoiseSchedule.viewcrafter(base_scale)
    assert torch.equal(schedule.scale_arr, record[name])
    assert torch.equal(schedule.alphas_cumprod, record["alphas_cumprod_zero_snr_f64"].float())
    assert schedule.alphas_cumprod[999] == 0 and schedule.sigma[999] == 1
    assert schedule.scale_arr[0] == 1 and schedule.scale_arr[399] == torch.tensor(base_scale)


def test_conversions_equal_the_recording(record):
    plain = NoiseSchedule.viewcrafter(1.0)  # the recorded conversions are without dynamic rescale
    x0, noise, t, v = (record[f"conv.{name}"] for name in ("x0", "noise", "t", "v"))
    x_t = plain.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, record["conv.q_sample"], rtol=0, atol=1e-6)
    torch.testing.assert_close(plain.velocity(x0, noise, t), v, rtol=0, atol=1e-6)
    torch.testing.assert_close(plain.x0_from_v(x_t, v, t), record["conv.x0_from_v"], rtol=0, atol=1e-6)
    torch.testing.assert_close(plain.eps_from_v(x_t, v, t), record["conv.eps_from_v"], rtol=0, atol=1e-6)
    other = record["conv.rand_v"]
    torch.testing.assert_close(plain.x0_from_v(x_t, other, t), record["conv.rand_x0_from_v"], rtol=0, atol=1e-6)
    torch.testing.assert_close(plain.eps_from_v(x_t, other, t), record["conv.rand_eps_from_v"], rtol=0, atol=1e-6)


def test_true_velocity_gives_back_clean_latents_and_noise_at_every_timestep(schedule):
    z0, noise = latents(1000), latents(1000, seed=1)
    x_t, v = schedule.add_noise(z0, noise, ALL_T), schedule.velocity(z0, noise, ALL_T)
    torch.testing.assert_close(schedule.x0_from_v(x_t, v, ALL_T), z0, rtol=0, atol=1e-5)
    torch.testing.assert_close(schedule.eps_from_v(x_t, v, ALL_T), noise, rtol=0, atol=1e-5)


def test_velocity_and_clean_latents_are_inverse_for_any_prediction(schedule):
    x_t, v = latents(1000), latents(1000, seed=1)
    x0 = schedule.x0_from_v(x_t, v, ALL_T)
    torch.testing.assert_close(schedule.v_from_x0(x_t, x0, ALL_T), v, rtol=0, atol=1e-4)
    expected = schedule.eps_from_v(x_t, v, ALL_T)
    torch.testing.assert_close(schedule.eps_from_x0(x_t, x0, ALL_T), expected, rtol=0, atol=1e-4)


def test_score_is_the_gradient_of_the_log_density_of_noisy_latents(schedule):
    # One known clean latent: x_t is Gaussian around sqrt(ab) k z0, and its log-density can be differentiated.
    z0 = latents(1000).double()
    x_t = latents(1000, seed=1).double().requires_grad_()
    mean = (schedule.signal * schedule.scale_arr).double().view(-1, 1, 1, 1, 1) * z0
    variance = (schedule.sigma.double() ** 2).view(-1, 1, 1, 1, 1)
    (expected,) = torch.autograd.grad((-((x_t - mean) ** 2) / (2 * variance)).sum(), x_t)
    torch.testing.assert_close(schedule.score_from_x0(x_t.detach(), z0, ALL_T), expected, rtol=1e-5, atol=1e-5)


def test_everything_is_finite_at_pure_noise(schedule):
    x_t, x0, t = latents(2), latents(2, seed=1), torch.tensor([999, 999])
    for convert in (
        schedule.x0_from_v,
        schedule.eps_from_v,
        schedule.v_from_x0,
        schedule.eps_from_x0,
        schedule.score_from_x0,
    ):
        assert convert(x_t, x0, t).isfinite().all()
    assert torch.equal(schedule.add_noise(x0, x_t, t), x_t)
    torch.testing.assert_close(schedule.v_from_x0(x_t, x0, t), -0.3 * x0)


def test_one_integer_is_the_same_as_a_batch_of_it(schedule):
    x_t, v = latents(2), latents(2, seed=1)
    assert torch.equal(schedule.x0_from_v(x_t, v, 321), schedule.x0_from_v(x_t, v, torch.tensor([321, 321])))


@pytest.mark.parametrize("t", [5, torch.tensor([5])])
@pytest.mark.parametrize("name", ["add_noise", "velocity", "x0_from_v", "eps_from_v", "v_from_x0", "eps_from_x0"])
def test_half_precision_latents_are_converted_in_float32(schedule, name, t):
    a, b = latents(1).bfloat16(), latents(1, seed=1).bfloat16()
    converted = getattr(schedule, name)(a, b, t)
    assert converted.dtype == torch.float32
    assert torch.equal(converted, getattr(schedule, name)(a.float(), b.float(), t))


def test_timesteps_equal_the_recording(record):
    spacings = {"uniform_trailing": trailing_timesteps, "uniform": uniform_timesteps}
    compared = 0
    for key in record:
        if key.startswith("ddim."):
            _, spacing, steps, _ = key.split(".")
            assert spacings[spacing](int(steps)) == record[key].tolist()
            compared += 1
    assert compared == 7


def test_trailing_timesteps_of_few_steps():
    assert trailing_timesteps(1) == [999]
    assert trailing_timesteps(2) == [499, 999]
    assert trailing_timesteps(4) == [249, 499, 749, 999]


def test_trailing_timesteps_never_leave_the_range():
    for steps in range(1, 1001):  # 61, 103, ... gave an extra step at -1 in the original
        timesteps = trailing_timesteps(steps)
        assert len(set(timesteps)) == steps and timesteps == sorted(timesteps)
        assert timesteps[0] >= 0 and timesteps[-1] == 999


@pytest.mark.parametrize(("spacing", "steps"), [(trailing_timesteps, 0), (trailing_timesteps, 1001)])
def test_impossible_numbers_of_steps_are_refused(spacing, steps):
    with pytest.raises(UserError, match=f"with {steps} steps"):
        spacing(steps)


def test_uniform_spacing_stays_below_1000():
    assert uniform_timesteps(500)[-1] == 999
    with pytest.raises(UserError, match="1 to 500 steps"):
        uniform_timesteps(501)
