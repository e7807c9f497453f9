"""Distribution matching: the gradient that pulls the student to the teacher, and the fake score's own loss.

Names: x0_student = the student's output G(z), clean; it is noised to x_t, and from that same x_t x0_real =
the teacher's and x0_fake = the fake score's estimate of the clean sample. All [B, ...] and in the same units,
with any rescaling of clean samples undone.
"""

import torch
from torch import Tensor

from fvgen.objectives.common import full_precision, per_sample, sample_mean

EPSILON = 1e-6
"""Smallest mean distance from student to teacher, in units of x0, to divide by."""


def score_difference(x0_real: Tensor, x0_fake: Tensor, alpha_bar: Tensor) -> Tensor:
    """score_real - score_fake at x_t, [B, ...], from clean estimates [B, ...] and alpha_bar [B] in [0, 1).

    score = -(x_t - sqrt(ab) x0)/(1 - ab) (FVGen Eq. (4), whose alpha is not cumulative in the paper but is
    here). In the difference x_t cancels: sqrt(ab)/(1 - ab) (x0_real - x0_fake), finite at alpha_bar = 0,
    where it is 0. Where a schedule scales clean samples before it noises them, x0 here means the scaled ones.
    """
    factor = full_precision(alpha_bar).sqrt() / (1 - full_precision(alpha_bar))
    return per_sample(factor, x0_real) * (full_precision(x0_real) - full_precision(x0_fake))


@torch.no_grad()
def dmd_gradient(x0_student: Tensor, x0_real: Tensor, x0_fake: Tensor, weight: Tensor | None = None) -> Tensor:
    """Descent direction on x0_student: weight * (x0_fake - x0_real) / mean|x0_student - x0_real|, [B, ...].

    FVGen Eq. (8) in clean estimates (see `score_difference`), with DMD2's normalisation (Yin et al. 2024b),
    the mean per sample, never over the batch. weight [B] is h(r) of a divergence; None means one (reverse
    KL). At least float32, no graph. A sample with any value that is not finite, its weight included, gets 0.
    (If the student's own output is what broke, `dmd_loss` still says NaN: that run is lost and must not look
    healthy.)
    """
    assert x0_student.shape == x0_real.shape == x0_fake.shape
    student, real, fake = map(full_precision, (x0_student, x0_real, x0_fake))
    scale = 1 / sample_mean((student - real).abs()).clamp(min=EPSILON)
    if weight is not None:
        scale = scale * full_precision(weight)
    gradient = per_sample(scale, real) * (fake - real)
    finite = gradient.isfinite().flatten(1).all(dim=1)
    return torch.where(per_sample(finite, gradient), gradient, 0)


def dmd_loss(x0_student: Tensor, gradient: Tensor) -> Tensor:
    """Surrogate whose derivative is the given gradient: 0.5 mean((x - stopgrad(x - g))^2), [B, ...] twice ->
    [B].

    Its value is 0.5 mean(g^2): a size, not a distance that falls to zero in a healthy run. The derivative of
    entry b with respect to x0_student[b] is gradient[b] / n, with n the number of elements of one sample.
    """
    student = full_precision(x0_student)
    target = (student - gradient).detach()
    return 0.5 * sample_mean((student - target).square())


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error per sample, [B, ...] twice -> [B]: the fake score's loss, FVGen Eq. (2).

    prediction and target in whichever parameterisation the caller likes (noise, v or x0), target without
    graph. weight [B] multiplies the result, for instance to turn an x0 error into a noise error; None means
    one.
    """
    assert prediction.shape == target.shape
    loss = sample_mean((full_precision(prediction) - full_precision(target.detach())).square())
    return loss if weight is None else full_precision(weight) * loss
