"""What the condition channels and the context hold for each published model, and the noise-predicting relative."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONTEXT, FRAMES, HEIGHT, TEXT_TOKENS, WIDTH, small_teacher
from torch import Tensor

from fvgen.diffusion.guidance import guided_velocity
from fvgen.diffusion.samplers import ddim
from fvgen.diffusion.schedule import NoiseSchedule, timesteps, trailing_timesteps, uniform_timesteps
from fvgen.errors import UserError
from fvgen.models.denoiser import Denoiser, Teacher
from fvgen.models.viewcrafter.conditioning import LAYOUTS, Conditioning, depth_of, disparity, with_disparity
from fvgen.models.viewcrafter.family import call
from fvgen.models.viewcrafter.leap import FVGenLeapPipeline
from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline

RGBD = {"layout": "renders_rgbd", "context": "image", "image_source": "reference", "prompt": None}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frames(channels: int = 3, batch: int = 2) -> Tensor:
    return torch.rand(batch, FRAMES, channels, HEIGHT, WIDTH, generator=rng(3))


def teacher_with(**conditioning) -> ViewCrafterPipeline:
    return small_teacher(conditioning=conditioning)


def rgbd_teacher() -> ViewCrafterPipeline:
    """A small teacher whose VAE has a fourth channel."""
    pipeline = small_teacher(conditioning=RGBD, keep_last_scale=True, spacing="uniform")
    torch.manual_seed(1)
    config = {name: value for name, value in pipeline.vae.config.items() if not name.startswith("_")}
    vae = AutoencoderKL(**config | {"in_channels": 4, "out_channels": 4})
    pipeline.register_modules(vae=vae.eval(), prompts=None)
    return pipeline


# --- Settings ---


def test_choices_that_do_not_exist_are_refused():
    assert Conditioning.of(None) == Conditioning() and Conditioning.of({"layout": "ends"}).layout == "ends"
    with pytest.raises(UserError, match="there is no layout 'end' in conditioning; did you mean 'ends'"):
        Conditioning("end")
    with pytest.raises(UserError, match="there is no context 'text'"):
        Conditioning(context="text")
    with pytest.raises(UserError, match=r"settings that are unknown here .*'mask'"):
        Conditioning.of({"mask": "all"})
    with pytest.raises(UserError, match="there is no layout 'x'"):
        small_teacher(conditioning={"layout": "x"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frames_are_checked_against_the_layout(layout):
    rules = Conditioning(layout)
    rules.check(frames(rules.channels))
    with pytest.raises(UserError, match=rf"this model's frames have {rules.channels} channels \(layout {layout}\)"):
        rules.check(frames(7 - rules.channels))
    one = frames(rules.channels)[:, :1]
    if layout == "ends":
        with pytest.raises(UserError, match="no two ends"):
            rules.check(one)
    else:
        rules.check(one)


# --- Condition channels ---


def test_every_layout_puts_latents_in_their_places():
    render = frames()
    for layout, indices in {"renders": [0, 1, 2, 3], "first_frame": [0], "ends": [0, 3]}.items():
        assert torch.equal(Conditioning(layout).frames_to_encode(render), render[:, indices])
    latents = torch.randn(2, 4, FRAMES, 2, 3, generator=rng())
    assert torch.equal(Conditioning("renders").spread(latents, FRAMES), latents)
    first = Conditioning("first_frame").spread(latents[:, :, :1], 5)
    assert first.shape == (2, 4, 5, 2, 3) and all(torch.equal(first[:, :, i], latents[:, :, 0]) for i in range(5))
    ends = Conditioning("ends").spread(latents[:, :, :2], 5)
    assert torch.equal(ends[:, :, [0, -1]], latents[:, :, :2]) and not ends[:, :, 1:-1].any()


@torch.no_grad()
def test_one_posterior_sample_is_repeated_and_nothing_lies_between_the_ends():
    render = frames()
    first = teacher_with(layout="first_frame").condition(render, rng(1))["render_latents"]
    assert first.shape == (2, 4, FRAMES, 4, 6)
    assert all(torch.equal(first[:, :, i], first[:, :, 0]) for i in range(FRAMES))
    pipeline = teacher_with(layout="ends")
    ends = pipeline.condition(render, rng(1))["render_latents"]
    assert torch.equal(ends[:, :, [0, -1]], pipeline.encode_frames(render[:, [0, -1]], rng(1)))
    assert not ends[:, :, 1:-1].any()


# --- Image branch and text ---


def test_the_reference_photograph_is_asked_for_where_it_is_seen():
    render, photograph = frames(4), torch.rand(3, 5, 7)
    beside = Conditioning(**RGBD)
    assert torch.equal(beside.photograph(render, photograph), photograph.expand(2, -1, -1, -1))
    each = torch.rand(2, 3, 5, 7)
    assert torch.equal(beside.photograph(render, each), each)
    with pytest.raises(UserError, match="give one as reference"):
        beside.photograph(render)
    with pytest.raises(UserError, match=r"reference has shape \(3, 3, 5, 7\)"):
        beside.photograph(render, torch.rand(3, 3, 5, 7))
    assert torch.equal(Conditioning().photograph(render), render[:, 0, :3])
    with pytest.raises(UserError, match="leave the reference photograph out"):
        Conditioning().photograph(render, photograph)


@torch.no_grad()
def test_a_model_without_text_sees_image_tokens_only():
    pipeline, photograph = rgbd_teacher(), torch.rand(3, 20, 30, generator=rng(4))
    condition = pipeline.condition(frames(4), rng(), reference=photograph)
    (null,) = pipeline.nulls()
    assert "text_tokens" not in condition and null.keys() == {"image_tokens"}
    assert condition["image_tokens"].shape == (2, 16 * FRAMES, CONTEXT)
    assert null["image_tokens"].shape == (1, 16 * FRAMES, CONTEXT)
    assert torch.allclose(condition["image_tokens"][:1], pipeline.image_tokens(photograph[None] * 2 - 1), atol=1e-6)
    with pytest.raises(UserError, match="prompt 'a' cannot take effect: this model sees no text"):
        pipeline.condition(frames(4), rng(), prompt="a", reference=photograph)
    with pytest.raises(UserError, match="cannot be guided by image and text apart"):
        pipeline(frames(4), rng(), reference=photograph, image_guidance_scale=2.0)


@torch.no_grad()
def test_an_rgbd_teacher_makes_colours_and_disparity():
    pipeline, photograph = rgbd_teacher(), torch.rand(3, 20, 30, generator=rng(4))
    call = partial(pipeline, frames(4), num_inference_steps=2, reference=photograph)
    video = call()
    assert video.shape == (2, FRAMES, 4, HEIGHT, WIDTH) and depth_of(video).shape == (2, FRAMES, 1, HEIGHT, WIDTH)
    assert call(output_type="pil").frames[0][0].mode == "RGB"
    other = pipeline(frames(4), num_inference_steps=2, reference=1 - photograph)
    assert not torch.allclose(other, video)
    with pytest.raises(UserError, match="this model's frames have 4 channels"):
        pipeline(frames(3), reference=photograph)
    with pytest.raises(UserError, match="the fast decoder gives 3 channels, the model's frames have 4"):
        pipeline.enable_fast_decoder(AutoencoderTiny())


def test_the_fingerprint_tells_layouts_apart():
    prints = {layout: teacher_with(layout=layout).encoder_fingerprint() for layout in ("renders", "ends")}
    assert prints["renders"] == small_teacher().encoder_fingerprint() != prints["ends"]


# --- Disparity ---


def test_disparity_of_a_known_depth():
    depth = torch.tensor([1.0, 2.0, 4.0, 0.0]).view(1, 2, 1, 1, 2)
    assert torch.allclose(disparity(depth).flatten(), torch.tensor([1.0, 1 / 3, 0.0, 0.0]))
    assert not disparity(torch.zeros(1, 2, 1, 2, 2)).any()
    assert not disparity(torch.full((1, 2, 1, 2, 2), 3.0)).any()  # one depth has no range
    assert with_disparity(torch.ones(1, 2, 3, 1, 2), depth).shape == (1, 2, 4, 1, 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_disparity_fills_the_range_whatever_the_scale(seed, scale):
    depth = torch.rand(2, 3, 1, 4, 5, generator=rng(seed)) + 0.1
    depth[torch.rand(depth.shape, generator=rng(seed + 1)) < 0.2] = 0
    found = disparity(depth)
    assert found.min() >= 0 and torch.allclose(found.flatten(1).amax(1), torch.ones(2))
    assert not found[depth == 0].any()
    torch.testing.assert_close(disparity(depth * scale), found, rtol=0, atol=1e-5)
    known = depth[0] > 0
    nearest, farthest = depth[0][known].argmin(), depth[0][known].argmax()
    assert found[0][known][nearest] == 1 and found[0][known][farthest] == 0


# --- Sampling ---


def test_spacings_by_name():
    assert timesteps("trailing", 4) == trailing_timesteps(4) and timesteps("uniform", 25) == uniform_timesteps(25)
    assert timesteps("uniform", 25)[-1] == 961 and timesteps("uniform", 50)[-1] == 981
    with pytest.raises(UserError, match="no spacing 'leading' of timesteps; choose one of trailing, uniform"):
        timesteps("leading", 4)


@torch.no_grad()
def test_the_models_spacing_and_last_scale_are_used():
    pipeline = small_teacher(spacing="uniform", keep_last_scale=True)
    condition = pipeline.condition(frames(), rng())
    seen: list[int] = []
    found = pipeline.sample(condition, rng(1), 5, on_step=lambda step: seen.append(step.timestep))
    assert seen == [801, 601, 401, 201, 1]
    denoiser = partial(pipeline.teacher(), condition=condition)
    noise = pipeline.initial_noise(condition, generator := rng(1))
    expected = ddim(
        denoiser, noise, pipeline.schedule, uniform_timesteps(5), 1.0, generator=generator, keep_last_scale=True
    )
    assert torch.equal(found, expected)


# --- Predicted noise ---


@pytest.fixture(scope="module")
def noise_schedule() -> NoiseSchedule:
    return NoiseSchedule.lvdm(None, zero_snr=False, prediction="eps")


def test_the_older_schedule_has_the_known_numbers(noise_schedule):
    known = {0: 0.99915, 999: 0.0046601}
    assert all(abs(noise_schedule.alphas_cumprod[t].item() - value) < 1e-6 for t, value in known.items())
    assert abs(noise_schedule.signal[999].item() - 0.0682649) < 1e-6
    assert noise_schedule.betas[[0, 999]].tolist() == pytest.approx([0.00085, 0.012])
    assert torch.equal(noise_schedule.scale_arr, torch.ones(1000))
    newer = NoiseSchedule.lvdm(0.7)
    assert newer.betas[999] == 1 and newer.signal[999] == 0 and newer.prediction == "v"
    assert newer.scale_arr[19].item() == pytest.approx(0.985714, abs=1e-6)
    with pytest.raises(UserError, match="prediction 'eps' cannot be with zero_snr=True"):
        NoiseSchedule.lvdm(0.7, prediction="eps")


def test_predicted_noise_is_understood_at_every_timestep(noise_schedule):
    t = torch.arange(1000)
    z0, noise = (torch.randn(1000, 4, 1, 2, 2, generator=rng(seed)) for seed in (1, 2))
    x_t = noise_schedule.add_noise(z0, noise, t)
    velocity = noise_schedule.as_velocity(x_t, noise, t)
    torch.testing.assert_close(velocity, noise_schedule.velocity(z0, noise, t), rtol=0, atol=2e-4)
    torch.testing.assert_close(noise_schedule.x0_from_v(x_t, velocity, t), z0, rtol=0, atol=2e-4)
    assert noise_schedule.to("cpu").prediction == "eps"
    assert torch.equal(NoiseSchedule.lvdm(0.7).as_velocity(x_t, noise, t), noise)


@torch.no_grad()
def test_a_noise_predicting_teacher_gives_clean_latents(noise_schedule):
    """Guidance of the noise and guidance of the velocity are the same where nothing is rescaled."""
    pipeline = small_teacher(base_scale=None, zero_snr=False, prediction="eps", guidance_rescale=0.0)
    assert torch.equal(pipeline.schedule.betas, noise_schedule.betas) and pipeline.schedule.prediction == "eps"
    condition, null = pipeline.condition(frames(), rng()), pipeline.nulls()
    x_t, t = torch.randn(condition["render_latents"].shape, generator=rng(1)), torch.tensor([37, 981])
    raw = Denoiser(pipeline.unet, NoiseSchedule.lvdm(None, zero_snr=False), call)  # gives the network's output as it is
    eps = guided_velocity(
        raw.velocity(x_t, t, condition),
        raw.velocity(x_t, t, condition.replaced(null[0])),
        7.5,
    )
    signal, sigma = (table[t].view(2, 1, 1, 1, 1) for table in (noise_schedule.signal, noise_schedule.sigma))
    expected = (x_t - sigma * eps) / signal
    guided = Teacher(pipeline.unet, noise_schedule, call, null, 7.5, 0.0)
    torch.testing.assert_close(guided(x_t, t, condition), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(guided.judge(x_t, t, condition, ())[0], expected, rtol=1e-4, atol=1e-3)
    assert null[0]["text_tokens"].shape[1] == TEXT_TOKENS and null[0]["image_tokens"].shape[1] == 16 * FRAMES


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_leap_needs_a_model_that_sees_renders(layout):
    """What starts from zeros, or from the first frame in every place, would be no leap from a render."""
    pipeline = rgbd_teacher() if layout == "renders_rgbd" else teacher_with(layout=layout)
    if layout.startswith("renders"):
        assert isinstance(FVGenLeapPipeline.from_teacher(pipeline, pipeline.unet), FVGenLeapPipeline)
    else:
        with pytest.raises(UserError, match="sees one or both ends of a clip and not its render"):
            FVGenLeapPipeline.from_teacher(pipeline, pipeline.unet)
