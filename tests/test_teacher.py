"""Denoiser and teacher: clean latents from velocities, guidance, and a network that stays frozen."""

import pytest
import torch
from viewcrafter_reference import recording, reference_unet, small_unet

from fvgen.diffusion.samplers import guided_velocity, guided_velocity_three_way
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.errors import UserError
from fvgen.models.denoiser import Condition, Denoiser, Teacher

SCHEDULE = NoiseSchedule.viewcrafter(0.3)
T = torch.tensor([999, 300])


def clips() -> tuple[torch.Tensor, Condition, torch.Tensor]:
    """Noisy latents, a condition and a null context for `small_unet`."""
    generator = torch.Generator().manual_seed(1)
    x_t, renders = torch.randn(2, 2, 4, 3, 4, 6, generator=generator)
    context = torch.randn(2, 12, 6, generator=generator)
    return x_t, Condition(renders, context, torch.tensor([10, 24])), torch.randn(1, 12, 6, generator=generator)


@torch.no_grad()
def test_training_target_and_loss_equal_the_recording(shared):
    record = recording(shared, "train_loss_tiny")
    z0, noise, t = record["z0"], record["noise"], record["t"]
    x_t = SCHEDULE.add_noise(z0, noise, t)
    torch.testing.assert_close(torch.cat([x_t, record["c_concat"]], dim=1), record["unet_in"], rtol=0, atol=1e-5)
    target = SCHEDULE.velocity(z0, noise, t)
    torch.testing.assert_close(target, record["v_target"], rtol=0, atol=1e-5)
    denoiser = Denoiser(reference_unet(shared, "tiny"), SCHEDULE)
    v = denoiser.velocity(x_t, t, Condition(record["c_concat"], record["context"], record["fs"]))
    torch.testing.assert_close(v, record["model_out"], rtol=0, atol=1e-4)
    torch.testing.assert_close((v - target).square().mean(), record["loss"][0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_denoiser_gives_the_clean_latents_of_its_velocity():
    x_t, condition, _ = clips()
    denoiser = Denoiser(small_unet(), SCHEDULE)
    sample = torch.cat([x_t, condition.render_latents], dim=1)
    v = denoiser.unet(sample, T, condition.context, condition.fps).sample
    torch.testing.assert_close(denoiser(x_t, T, condition), SCHEDULE.x0_from_v(x_t, v, T))


@torch.no_grad()
def test_guided_teacher_mixes_velocities_of_separate_passes():
    x_t, condition, null = clips()
    unet = small_unet()
    plain = Denoiser(unet, SCHEDULE)
    empty_text = torch.cat([null[:, :5].expand(2, -1, -1), condition.context[:, 5:]], dim=1)
    contexts = (condition.context, null.expand(2, -1, -1), empty_text)
    v_cond, v_uncond, v_image = (
        plain.velocity(x_t, T, Condition(condition.render_latents, context, condition.fps)) for context in contexts
    )
    two = Teacher(unet, SCHEDULE, null, guidance=7.5, rescale=0.7)
    assert two.nfe == 2
    torch.testing.assert_close(two.velocity(x_t, T, condition), guided_velocity(v_cond, v_uncond, 7.5, 0.7))
    three = Teacher(unet, SCHEDULE, null, guidance=7.5, rescale=0.7, image_guidance=2.0)
    assert three.nfe == 3
    expected = guided_velocity_three_way(v_cond, v_image, v_uncond, 7.5, 2.0, 0.7)
    torch.testing.assert_close(three.velocity(x_t, T, condition), expected)
    one = Teacher(unet, SCHEDULE, guidance=1.0)
    assert one.nfe == 1
    torch.testing.assert_close(one.velocity(x_t, T, condition), v_cond)


def test_teacher_is_frozen_but_lets_gradients_through():
    x_t, condition, null = clips()
    teacher = Teacher(small_unet(dropout=0.5), SCHEDULE, null).train()
    assert not any(module.training for module in teacher.modules())
    features = teacher.features(x_t.requires_grad_(), T, condition)
    features.sum().backward()
    assert x_t.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_features_are_those_of_the_conditional_pass():
    x_t, condition, null = clips()
    unet = small_unet()
    taps = (Denoiser(unet, SCHEDULE), Teacher(unet, SCHEDULE, null))
    first, second = (model.features(x_t, T, condition, tap="output.0") for model in taps)
    assert torch.equal(first, second) and first.shape == (2, 16, 3, 2, 3)


@torch.no_grad()
def test_half_precision_network_gives_float32_latents():
    x_t, condition, _ = clips()
    full = Denoiser(small_unet(), SCHEDULE)(x_t, T, condition)
    half = Denoiser(small_unet().bfloat16(), SCHEDULE)(x_t, T, condition)
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.05 * full.abs().mean()


def test_a_part_of_a_condition():
    _, condition, _ = clips()
    part = condition[1:]
    assert torch.equal(part.render_latents, condition.render_latents[1:]) and part.fps.tolist() == [24]
    assert Condition(condition.render_latents, condition.context)[:1].fps is None


def test_guidance_without_null_context_is_refused():
    with pytest.raises(UserError, match="no null context"):
        Teacher(small_unet(), SCHEDULE, guidance=3.0)
