"""Samplers as functions: from pure noise and a denoiser to latents.

A denoiser is a callable (x_t [B, C, F, h, w], t [B] integers) -> clean latents x0 of the same shape; bind the condition
beforehand, as in `partial(teacher, condition=condition)`. Samplers know nothing of guidance: that is the denoiser's
affair (`fvgen.diffusion.guidance`).

NFE (network evaluations per clip) is the number of timesteps times the evaluations that one denoiser call takes: 1 for
a student, 2 for a guided teacher. So a 50-step guided teacher has NFE 100, a 4-step student NFE 4.

No function draws random numbers unasked: pass `noises`, one per use, or a `generator`.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fvgen.diffusion.schedule import NoiseSchedule, trailing_timesteps
from fvgen.errors import UserError

Denoise = Callable[[Tensor, Tensor], Tensor]


class SamplerStep(NamedTuple):
    """What `on_step` is told after every timestep."""

    index: int  # 0 for the first (the noisiest) timestep
    count: int  # number of timesteps
    timestep: int
    x: Tensor  # latents handed to the next step; the result after the last one
    x0: Tensor  # clean latents predicted at this step


# May return latents that replace `x`.
OnStep = Callable[[SamplerStep], Tensor | None]
Generators = torch.Generator | Sequence[torch.Generator]  # one for all clips, or one per clip


def ddim(
    denoiser: Denoise,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    eta: float = 0.0,
    noises: Sequence[Tensor] | None = None,
    generator: Generators | None = None,
    on_step: OnStep | None = None,
    denoise_last: bool = False,
    keep_last_scale: bool = False,
) -> Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16) as ViewCrafter runs it.

        x_prev = sqrt(ab_prev) k_prev x0 + sqrt(1 - ab_prev - s^2) eps + s noise,
        s = eta sqrt((1 - ab_prev) / (1 - ab_t) (1 - ab_t / ab_prev))

    The step after the smallest timestep goes to t = 0, whose ab is 0.99915 and not 1, and adds noise there as well: the
    result is therefore slightly noisy. With eta = 1 and 50 trailing timesteps this is the published sampler.

    Args:
        x_T: [B, C, F, h, w] pure noise.
        timesteps: ascending, see `trailing_timesteps` and `uniform_timesteps`.
        eta: 0 is deterministic and needs no noise, 1 is ancestral sampling.
        noises: one [B, C, F, h, w] per timestep, in the order of use.
        generator: draws the noises if they are not given.
        denoise_last: return the last predicted x0 rather than ViewCrafter's slightly noisy result.
        keep_last_scale: leave the result in the scale k_t of the smallest timestep, as ViewCrafter's separate sampler
            for three-way guidance does (a slip: the latents come out k_t times too small); only to reproduce it.

    Returns:
        Latents [B, C, F, h, w].
    """
    x, count = x_T, len(timesteps)
    levels = schedule.alphas_cumprod.cpu().double()  # once: a GPU would be waited for at every step
    previous = (0, *timesteps[:-1])
    for index, (t, t_prev) in enumerate(zip(reversed(timesteps), reversed(previous), strict=True)):
        is_last = index == count - 1
        x0 = denoiser(x, _timestep(t, x))
        eps = schedule.eps_from_x0(x, x0, t)
        s, towards_eps = _ddim_coefficients(levels, t, t_prev, eta)
        scaled_x0 = schedule.rescale(x0, t if is_last and keep_last_scale else t_prev)
        x = schedule.signal[t_prev] * scaled_x0 + towards_eps * eps
        if eta > 0:
            x = x + s * _noise(x, index, noises, generator)
        if denoise_last and is_last:
            x = x0
        x = _tell(on_step, SamplerStep(index, count, t, x, x0))
    return x


def few_step(
    denoiser: Denoise,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | int = 4,
    noises: Sequence[Tensor] | None = None,
    generator: Generators | None = None,
    renoise: Literal["sde", "ode"] = "sde",
    on_step: OnStep | None = None,
) -> Tensor:
    """The student's sampler: predict clean latents, noise them again to the next timestep, and so on.

    "sde" noises with fresh noise, as DMD2 (Yin et al. 2024, section 4.4) and consistency models do; "ode" with the
    noise that the prediction implies, which makes it DDIM with eta = 0 that ends in x0.

    Args:
        x_T: [B, C, F, h, w] pure noise.
        timesteps: ascending, or the number of trailing ones (4 means 249 499 749 999); also the NFE of a student.
        noises: one [B, C, F, h, w] for each timestep but the last, in the order of use; "sde" only.
        generator: draws the noises if they are not given.

    Returns:
        The last predicted clean latents [B, C, F, h, w].
    """
    if renoise not in ("sde", "ode"):
        raise UserError(f"Few-step sampling knows no way {renoise!r} to noise again: use 'sde' or 'ode'.")
    descending = (trailing_timesteps(timesteps) if isinstance(timesteps, int) else list(timesteps))[::-1]
    x = x_T
    for index, t in enumerate(descending):
        x0 = denoiser(x, _timestep(t, x))
        if index + 1 == len(descending):
            x = x0
        else:
            eps = _noise(x, index, noises, generator) if renoise == "sde" else schedule.eps_from_x0(x, x0, t)
            x = schedule.add_noise(x0, eps, descending[index + 1])
        x = _tell(on_step, SamplerStep(index, len(descending), t, x, x0))
    return x


def leap(
    denoiser: Denoise,
    start: Tensor,
    schedule: NoiseSchedule,
    t: Tensor,
    noise: Tensor,
    steps: int = 1,
    noises: Sequence[Tensor] | None = None,
    generator: Generators | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """From an estimate of the clean latents, noised to t, in one evaluation (VideoScene, Wang et al. 2025).

        x_t = sqrt(ab_t) k_t start + sqrt(1 - ab_t) noise,   x0 = denoiser(x_t, t)

    The steps above t are leapt over: ``start`` supplies what they would have decided. With more steps the prediction is
    noised again, to (steps - i) / steps of the way, as `few_step` does.

    Args:
        start: [B, C, F, h, w] clean latents, a render's.
        t: [B] integers, one for each clip.
        noise: [B, C, F, h, w]; noises: one more for each further step.

    Returns:
        The last predicted clean latents [B, C, F, h, w].
    """
    x0 = start
    for index in range(steps):
        now = torch.div((t + 1) * (steps - index), steps, rounding_mode="floor") - 1
        fresh = noise if index == 0 else _noise(x0, index - 1, noises, generator)
        x0 = denoiser(schedule.add_noise(x0, fresh, now), now)
        x0 = _tell(on_step, SamplerStep(index, steps, int(now.max()), x0, x0))
    return x0


def _ddim_coefficients(levels: Tensor, t: int, t_prev: int, eta: float) -> tuple[Tensor, Tensor]:
    """DDIM's s and sqrt(1 - ab_prev - s^2), scalars on the CPU; ``levels`` are all ab [1000] there.

    In float32 after the first root, as in the recordings: from t = 999 with eta = 1 the second is 0 in exact arithmetic
    and, by rounding, up to 3e-4 there.
    """
    ab_t, ab_prev = levels[t], levels[t_prev]
    s = (eta * ((1 - ab_prev) / (1 - ab_t) * (1 - ab_t / ab_prev)).sqrt()).float()
    return s, (1 - ab_prev.float() - s**2).clamp(min=0).sqrt()


def normal(shape: Sequence[int], generator: Generators | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of `shape`, on the generator's device; several generators draw equal shares of the rows.

    Raises UserError for a number of generators that cannot share the rows.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
    rows, rest = divmod(shape[0], max(len(generator), 1))
    if rest or not rows:
        raise UserError(f"{len(generator)} generators cannot draw for {shape[0]} clips or frames: give one per clip.")
    return torch.cat([normal((rows, *shape[1:]), one, dtype) for one in generator])


def _tell(on_step: OnStep | None, step: SamplerStep) -> Tensor:
    """The latents to go on with."""
    changed = None if on_step is None else on_step(step)
    return step.x if changed is None else changed


def _timestep(t: int, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, dtype=torch.long, device=x.device)


def _noise(x: Tensor, index: int, noises: Sequence[Tensor] | None, generator: Generators | None) -> Tensor:
    if noises is not None:
        return noises[index]
    assert generator is not None, "this sampler adds noise: pass noises or a generator"
    drawn = normal(x.shape, generator, x.dtype)
    if x.is_cuda and not drawn.is_cuda:
        drawn = drawn.pin_memory()  # the copy then waits for the GPU alone, and the CPU goes on
    return drawn.to(x.device, non_blocking=True)
