"""Denoiser and teacher: clean latents from velocities, guidance, and a network that stays frozen."""

from functools import partial

import pytest
import torch
from viewcrafter_reference import recording, reference_unet, small_unet

from fvgen.diffusion.guidance import guided_velocity, guided_velocity_three_way
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.errors import UserError
from fvgen.models.condition import Condition, joined
from fvgen.models.denoiser import Denoiser, Teacher
from fvgen.models.viewcrafter.family import call

SCHEDULE = NoiseSchedule.viewcrafter(0.3)
T = torch.tensor([999, 300])


def clips() -> tuple[torch.Tensor, Condition, dict[str, torch.Tensor]]:
    """Noisy latents, a condition and null tokens for `small_unet`."""
    generator = torch.Generator().manual_seed(1)
    x_t, renders = torch.randn(2, 2, 4, 3, 4, 6, generator=generator)
    context = torch.randn(2, 12, 6, generator=generator)
    null = torch.randn(1, 12, 6, generator=generator)
    return x_t, conditioned(renders, context, torch.tensor([10, 24])), tokens(null)


def tokens(context: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a context of five text tokens, as `small_unet` takes them."""
    return {"text_tokens": context[:, :5], "image_tokens": context[:, 5:]}


def conditioned(renders: torch.Tensor, context: torch.Tensor, fps: torch.Tensor) -> Condition:
    return Condition(render_latents=renders, fps=fps, **tokens(context))


def nulls(null: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [null, {"text_tokens": null["text_tokens"]}]


@torch.no_grad()
def test_training_target_and_loss_equal_the_recording(shared):
    record = recording(shared, "train_loss_tiny")
    z0, noise, t = record["z0"], record["noise"], record["t"]
    x_t = SCHEDULE.add_noise(z0, noise, t)
    torch.testing.assert_close(torch.cat([x_t, record["c_concat"]], dim=1), record["unet_in"], rtol=0, atol=1e-5)
    target = SCHEDULE.velocity(z0, noise, t)
    torch.testing.assert_close(target, record["v_target"], rtol=0, atol=1e-5)
    denoiser = Denoiser(reference_unet(shared, "tiny"), SCHEDULE, call)
    v = denoiser.velocity(x_t, t, conditioned(record["c_concat"], record["context"], record["fs"]))
    torch.testing.assert_close(v, record["model_out"], rtol=0, atol=1e-4)
    torch.testing.assert_close((v - target).square().mean(), record["loss"][0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_denoiser_gives_the_clean_latents_of_its_velocity():
    x_t, condition, _ = clips()
    denoiser = Denoiser(small_unet(), SCHEDULE, call)
    sample = torch.cat([x_t, condition["render_latents"]], dim=1)
    context = torch.cat([condition["text_tokens"], condition["image_tokens"]], dim=1)
    v = denoiser.network(sample, T, context, condition["fps"]).sample
    torch.testing.assert_close(denoiser(x_t, T, condition), SCHEDULE.x0_from_v(x_t, v, T))


@torch.no_grad()
def test_guided_teacher_mixes_velocities_of_separate_passes():
    x_t, condition, null = clips()
    unet = small_unet()
    plain = Denoiser(unet, SCHEDULE, call)
    others = (condition, *(condition.replaced(null) for null in nulls(null)))
    v_cond, v_uncond, v_image = (plain.velocity(x_t, T, other) for other in others)
    two = Teacher(unet, SCHEDULE, call, nulls(null), guidance=7.5, rescale=0.7)
    assert two.nfe == 2
    # A batch of other size may be rounded otherwise: 64 eps a pass, which guidance multiplies.
    bound = 64 * torch.finfo(torch.float32).eps * v_cond.abs().max().item() * (7.5 + 2.0 + 6.5)
    close = partial(torch.testing.assert_close, rtol=0, atol=bound)
    close(two.velocity(x_t, T, condition), guided_velocity(v_cond, v_uncond, 7.5, 0.7))
    three = Teacher(unet, SCHEDULE, call, nulls(null), guidance=7.5, rescale=0.7, image_guidance=2.0)
    assert three.nfe == 3
    expected = guided_velocity_three_way(v_cond, v_image, v_uncond, 7.5, 2.0, 0.7)
    close(three.velocity(x_t, T, condition), expected)
    one = Teacher(unet, SCHEDULE, call, guidance=1.0)
    assert one.nfe == 1
    torch.testing.assert_close(one.velocity(x_t, T, condition), v_cond)
    image_alone = Teacher(unet, SCHEDULE, call, nulls(null), guidance=1.0, rescale=0.7, image_guidance=2.0)
    assert image_alone.nfe == 3
    expected = guided_velocity_three_way(v_cond, v_image, v_uncond, 1.0, 2.0, 0.7)
    close(image_alone.velocity(x_t, T, condition), expected)
    x0, _ = image_alone.judge(x_t, T, condition, ())
    torch.testing.assert_close(x0, image_alone(x_t, T, condition))
    neither = Teacher(unet, SCHEDULE, call, nulls(null), guidance=1.0, image_guidance=1.0)
    assert neither.nfe == 1
    torch.testing.assert_close(neither.velocity(x_t, T, condition), v_cond)


@torch.no_grad()
def test_what_holds_for_all_clips_may_be_one_row():
    """As a data set of one clip gives it, of which a batch draws several."""
    x_t, condition, null = clips()
    single = condition.rows([0])
    teacher = Teacher(small_unet(), SCHEDULE, call, nulls(null), guidance=7.5, rescale=0.7)
    whole = teacher.velocity(x_t, T, single.expanded(len(x_t)))
    torch.testing.assert_close(teacher.velocity(x_t, T, single), whole, rtol=0, atol=0)


def test_teacher_is_frozen_but_lets_gradients_through():
    x_t, condition, null = clips()
    teacher = Teacher(small_unet(dropout=0.5), SCHEDULE, call, nulls(null)).train()
    assert not any(module.training for module in teacher.modules())
    (features,) = teacher.features(x_t.requires_grad_(), T, condition, ["middle"])
    features.sum().backward()
    assert x_t.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_features_are_those_of_the_conditional_pass():
    x_t, condition, null = clips()
    unet = small_unet()
    taps = (Denoiser(unet, SCHEDULE, call), Teacher(unet, SCHEDULE, call, nulls(null)))
    first, second = (model.features(x_t, T, condition, ["output.0"])[0] for model in taps)
    assert torch.equal(first, second) and first.shape == (2, 16, 3, 2, 3)


@torch.no_grad()
def test_half_precision_network_gives_float32_latents():
    x_t, condition, _ = clips()
    full = Denoiser(small_unet(), SCHEDULE, call)(x_t, T, condition)
    half = Denoiser(small_unet().bfloat16(), SCHEDULE, call)(x_t, T, condition)
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.05 * full.abs().mean()


def test_a_part_of_a_condition():
    _, condition, null = clips()
    part = condition.rows(slice(1, None))
    assert torch.equal(part["render_latents"], condition["render_latents"][1:]) and part["fps"].tolist() == [24]
    assert "fps" not in Condition(render_latents=condition["render_latents"], fps=None)
    shared = condition.replaced(null)
    assert shared.clips == 2 and torch.equal(shared.rows([1])["text_tokens"], null["text_tokens"])


def test_conditions_one_after_the_other():
    _, condition, null = clips()
    both = joined([condition, condition.replaced(null)])
    assert both.clips == 4 and both["fps"].tolist() == [10, 24, 10, 24]
    assert torch.equal(both["text_tokens"][:2], condition["text_tokens"])
    assert torch.equal(both["text_tokens"][2:], null["text_tokens"].expand(2, -1, -1))


def test_guidance_without_null_context_is_refused():
    with pytest.raises(UserError, match="no null context"):
        Teacher(small_unet(), SCHEDULE, call, guidance=3.0)
