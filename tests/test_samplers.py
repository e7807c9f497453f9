"""Samplers against ViewCrafter's recorded runs, and against distributions whose answer is known."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from viewcrafter_reference import recording, reference_unet, settings

from fvgen.diffusion.guidance import guided_velocity, guided_velocity_three_way, rescale_guidance
from fvgen.diffusion.samplers import SamplerStep, ddim, few_step
from fvgen.diffusion.schedule import NoiseSchedule, trailing_timesteps, uniform_timesteps
from fvgen.errors import UserError
from fvgen.models.condition import Condition
from fvgen.models.denoiser import Teacher
from fvgen.models.viewcrafter.family import call

SPACINGS = {"uniform_trailing": trailing_timesteps, "uniform": uniform_timesteps}
BASE_SCALES = {"1024": 0.3, "512": 0.7}
SCHEDULE = NoiseSchedule.viewcrafter(0.3)


def gaussian_denoiser(mean: float, std: float):
    """The exact posterior mean of clean latents that are independent N(mean, std^2)."""

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        scale, sigma = (SCHEDULE.signal * SCHEDULE.scale_arr)[t[0]], SCHEDULE.sigma[t[0]]
        gain = scale * std**2 / (scale**2 * std**2 + sigma**2)
        return mean + gain * (x_t - scale * mean)

    return denoise


def pure_noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny_unet(shared):
    return reference_unet(shared, "tiny")


def tokens(unet, context):
    """Text and image tokens of a context, apart."""
    text, image = context.tensor_split([unet.config.text_tokens], dim=1)
    return {"text_tokens": text, "image_tokens": image}


@pytest.mark.parametrize("name", "ABCDE")
@torch.no_grad()
def test_ddim_follows_the_recorded_run(shared, tiny_unet, name):
    run = settings(shared, "ddim_tiny_config")["runs"][name]
    inputs, record = recording(shared, "ddim_tiny_inputs"), recording(shared, f"ddim_tiny_run{name}")
    schedule = NoiseSchedule.viewcrafter(BASE_SCALES[run["cn"]])
    null = tokens(tiny_unet, inputs["uncond_context"])
    text = {"text_tokens": null["text_tokens"]}
    teacher = Teacher(tiny_unet, schedule, call, [null, text], run["g"], run["gr"], run.get("cfg_img"))
    assert teacher.nfe == record["model_out"].shape[1]
    condition = Condition(render_latents=inputs["c_concat"], fps=inputs["fs"], **tokens(tiny_unet, inputs["context"]))
    timesteps = SPACINGS[run["sp"]](run["S"])
    three_way = "cfg_img" in run
    sample = partial(ddim, schedule=schedule, timesteps=timesteps, eta=run["eta"], keep_last_scale=three_way)
    descending = timesteps[::-1]
    scales = schedule.scale_arr[[*descending[1:], descending[-1] if three_way else 0]]

    # Each prediction from the recorded latents, and each update from the recorded prediction.
    for x, t, scale, expected in zip(record["x"], descending, scales, record["pred_x0"], strict=False):
        x0 = teacher(x, torch.full((len(x),), t), condition)
        torch.testing.assert_close(x0 * scale, expected, rtol=0, atol=1e-4)
    predictions = iter(record["pred_x0"] / scales.view(-1, 1, 1, 1, 1, 1))
    steps: list[SamplerStep] = []
    sample(lambda x, t: next(predictions), inputs["x_T"], noises=record["noise"], on_step=steps.append)
    for step, expected in zip(steps, record["x"][1:], strict=True):
        torch.testing.assert_close(step.x, expected, rtol=0, atol=1e-4)

    # The whole run, in which rounding errors grow.
    x = sample(partial(teacher, condition=condition), inputs["x_T"], noises=record["noise"])
    torch.testing.assert_close(x, record["x"][-1], rtol=0, atol=1e-3)


def test_ddim_and_guidance_follow_recorded_velocities(recorded):
    record = load_file(recorded / "ddim_run_b.safetensors")  # 6 steps, eta 1, guidance 7.5, rescale 0.7
    velocities = iter(record["model_out"])

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        v_cond, v_uncond = next(velocities)
        return SCHEDULE.x0_from_v(x_t, guided_velocity(v_cond, v_uncond, 7.5, 0.7), t)

    steps: list[SamplerStep] = []
    x_T = record["x"][0]
    ddim(denoise, x_T, SCHEDULE, trailing_timesteps(6), eta=1.0, noises=record["noise"], on_step=steps.append)
    for step, expected in zip(steps, record["x"][1:], strict=True):
        torch.testing.assert_close(step.x, expected, rtol=0, atol=1e-4)


def test_ddim_with_many_steps_transports_noise_to_the_data():
    x_T = pure_noise(2, 4, 3, 8, 8)
    x = ddim(gaussian_denoiser(2.0, 0.5), x_T, SCHEDULE, trailing_timesteps(500), denoise_last=True)
    torch.testing.assert_close(x, 2.0 + 0.5 * x_T, rtol=0, atol=0.03)


def test_ddim_fetches_the_noise_levels_once(monkeypatch):
    fetched = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: fetched.append(self) or self)
    ddim(gaussian_denoiser(2.0, 0.5), pure_noise(1, 4, 1, 2, 2), SCHEDULE, trailing_timesteps(8))
    assert len(fetched) == 1


def test_ancestral_sampling_has_the_mean_and_spread_of_the_data():
    generator = torch.Generator().manual_seed(1)
    x = ddim(
        gaussian_denoiser(2.0, 0.5),
        pure_noise(4, 4, 8, 16, 16),
        SCHEDULE,
        trailing_timesteps(200),
        eta=1.0,
        generator=generator,
    )
    assert abs(x.mean() - 2.0) < 0.01
    assert abs(x.std() - 0.5) < 0.02


@pytest.mark.parametrize("renoise", ["sde", "ode"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_few_steps_are_exact_when_every_clip_is_the_same(count, renoise):
    seen = []
    x0 = few_step(
        gaussian_denoiser(-1.5, 0.0),
        pure_noise(2, 4, 3, 2, 2),
        SCHEDULE,
        count,
        generator=torch.Generator().manual_seed(1),
        renoise=renoise,
        on_step=seen.append,
    )
    torch.testing.assert_close(x0, torch.full_like(x0, -1.5))
    assert [step.timestep for step in seen] == trailing_timesteps(count)[::-1]
    assert [step.index for step in seen] == list(range(count)) and seen[0].count == count


def test_few_steps_noise_again_with_the_given_noise():
    x_T, noises = pure_noise(1, 4, 2, 3, 3), pure_noise(3, 1, 4, 2, 3, 3)
    inputs = []

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        inputs.append((x, int(t[0])))
        return torch.full_like(x, float(len(inputs)))

    x0 = few_step(denoise, x_T, SCHEDULE, [249, 499, 749, 999], noises=noises)
    assert torch.equal(x0, torch.full_like(x0, 4.0))
    assert [t for _, t in inputs] == [999, 749, 499, 249] and torch.equal(inputs[0][0], x_T)
    for (x, t), noise, previous in zip(inputs[1:], noises, (1.0, 2.0, 3.0), strict=True):
        torch.testing.assert_close(x, SCHEDULE.add_noise(torch.full_like(x, previous), noise, t))


def test_the_ode_variant_is_deterministic_ddim():
    x_T, denoise = pure_noise(1, 4, 2, 3, 3), gaussian_denoiser(0.5, 1.5)
    ode = few_step(denoise, x_T, SCHEDULE, 4, renoise="ode")
    torch.testing.assert_close(ode, ddim(denoise, x_T, SCHEDULE, trailing_timesteps(4), denoise_last=True))


def test_sampling_repeats_itself_from_the_generator():
    def run(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return few_step(gaussian_denoiser(0.0, 1.0), pure_noise(1, 4, 2, 3, 3), SCHEDULE, 4, generator=generator)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_unknown_way_to_noise_again_is_refused():
    with pytest.raises(UserError, match="'sde' or 'ode'"):
        few_step(gaussian_denoiser(0.0, 1.0), pure_noise(1, 4, 1, 2, 2), SCHEDULE, 4, renoise="pde")


@pytest.mark.parametrize("rescale", [0.3, 0.7])
def test_guidance_rescale_equals_the_recording(recorded, rescale):
    record = load_file(recorded / "schedule.safetensors")
    rescaled = rescale_guidance(record["cfg_rescale.cfg"], record["cfg_rescale.cond"], rescale)
    torch.testing.assert_close(rescaled, record[f"cfg_rescale.out_{rescale}"], rtol=0, atol=1e-5)


def test_guidance_arithmetic():
    cond, image, uncond = pure_noise(3, 2, 4, 2, 3, 3)
    torch.testing.assert_close(guided_velocity(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guided_velocity(cond, uncond, 3.0), uncond + 3.0 * (cond - uncond))
    full = guided_velocity(cond, uncond, 7.5, rescale=1.0)
    torch.testing.assert_close(full.flatten(1).std(dim=1), cond.flatten(1).std(dim=1))
    equal = guided_velocity_three_way(cond, image, uncond, 3.0, 3.0)  # equal weights: the image term cancels
    torch.testing.assert_close(equal, guided_velocity(cond, uncond, 3.0))
