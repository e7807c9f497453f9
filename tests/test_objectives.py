"""Adversarial losses, the DMD gradient and the persistent normaliser; the divergences have their own file."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fvgen.objectives import (
    DIVERGENCES,
    RatioConstant,
    RatioNormalizer,
    approximate_r1,
    denoising_loss,
    discriminator_loss,
    dmd_gradient,
    dmd_loss,
    generator_loss,
    log_ratio,
    r1,
    score_difference,
    weight,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Adversarial losses


@settings(deadline=None)
@given(st.floats(-40, 40))
def test_discriminator_is_content_exactly_at_the_log_density_ratio(log_r: float) -> None:
    real = torch.tensor([log_r], dtype=torch.float64, requires_grad=True)
    p, q = real.detach().sigmoid(), (-real.detach()).sigmoid()
    fake = real.detach().clone().requires_grad_()
    discriminator_loss(real, fake).sum().backward()
    assert abs(p * real.grad + q * fake.grad) < 1e-8  # softplus is exact to 2e-9
    assert real.grad < 0 < fake.grad, "a positive logit says real"


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(-5, 5))
def test_a_relativistic_discriminator_is_content_at_the_log_ratio_plus_any_constant(seed: int, c: float) -> None:
    p, q = normal(7, seed=seed).softmax(0), normal(7, seed=seed + 1).softmax(0)
    logits = ((p / q).log() + c).requires_grad_()
    real, fake = (logits[:, None].expand(7, 7).flatten(), logits[None].expand(7, 7).flatten())
    (discriminator_loss(real, fake, "relativistic") * torch.outer(p, q).flatten()).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-8)


def test_adversarial_losses_by_hand() -> None:
    zero, two = torch.zeros(3), torch.full((3,), 2.0)
    assert torch.allclose(generator_loss(zero), torch.tensor(math.log(2)))
    assert torch.allclose(discriminator_loss(zero, zero), torch.tensor(2 * math.log(2)))
    assert torch.allclose(generator_loss(two), torch.tensor(math.log1p(math.exp(-2))))
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert torch.allclose(discriminator_loss(two, -two), torch.tensor(2 * right))
    assert torch.allclose(discriminator_loss(-two, two), torch.tensor(2 * wrong))
    relativistic = discriminator_loss(two, -two, kind="relativistic")
    assert torch.allclose(relativistic, torch.tensor(math.log1p(math.exp(-4))))
    shifted = generator_loss(two + 5, zero + 5, kind="relativistic")
    assert torch.allclose(shifted, torch.tensor(right)), "a common shift cannot matter"


@pytest.mark.parametrize("kind", ["non_saturating", "relativistic"])
def test_adversarial_losses_average_the_patches_of_a_sample_and_never_overflow(kind: str) -> None:
    real, fake = normal(2, 3, 4, 5, seed=1), normal(2, 3, 4, 5, seed=2)
    other = (real,) if kind == "relativistic" else ()
    patches = discriminator_loss(real.flatten(), fake.flatten(), kind).reshape(2, -1)
    assert torch.allclose(discriminator_loss(real, fake, kind), patches.mean(1))
    flat = generator_loss(fake.flatten(), *(x.flatten() for x in other), kind=kind).reshape(2, -1)
    assert torch.allclose(generator_loss(fake, *other, kind=kind), flat.mean(1))
    for sign in 1, -1:
        huge = sign * torch.full((2,), 3e38)
        assert not discriminator_loss(huge / 4, -huge / 4, kind).isnan().any()
        assert discriminator_loss(huge.clamp(-1e30, 1e30), -huge.clamp(-1e30, 1e30), kind).isfinite().all()


def test_generator_loss_refuses_what_cannot_take_effect() -> None:
    with pytest.raises(ValueError, match="needs real_logits"):
        generator_loss(torch.zeros(2), kind="relativistic")
    with pytest.raises(ValueError, match="takes no real_logits"):
        generator_loss(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="did you mean 'relativistic'"):
        generator_loss(torch.zeros(2), kind="relativstic")


def every_direction(x: Tensor) -> Tensor:
    """sqrt(n) times each unit vector [n,n]: the second moments of normal noise, without its chance."""
    return math.sqrt(x.shape[-1]) * torch.eye(x.shape[-1], dtype=x.dtype)


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 10.0])
def test_approximate_r1_of_a_linear_head_is_its_squared_slope_at_any_sigma(sigma: float) -> None:
    slope, x_t = normal(6, 4), normal(1, 6, seed=1)  # four logits per sample
    penalty = approximate_r1((x_t @ slope).expand(6, 4), (x_t + sigma * every_direction(x_t)) @ slope, sigma)
    assert penalty.shape == (6,)
    torch.testing.assert_close(penalty.mean(), slope.square().sum(0).mean())


def test_approximate_r1_tends_to_exact_r1_of_a_smooth_head() -> None:
    first, second = normal(6, 8), normal(8, seed=1)

    def head(x: Tensor) -> Tensor:
        return (x @ first).tanh() @ second

    x_t = normal(1, 6, seed=2).requires_grad_()
    exact = r1(head(x_t), x_t)
    errors = [
        abs(approximate_r1(head(x_t).expand(6), head(x_t + s * every_direction(x_t)), s).mean() - exact).item()
        for s in (1e-1, 1e-2, 1e-4)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3 * exact
    noise = normal(200_000, 6, seed=3)
    chance = approximate_r1(head(x_t).expand(len(noise)), head(x_t + 1e-4 * noise), 1e-4).mean()
    torch.testing.assert_close(chance, exact[0], rtol=0.02, atol=0)


def test_approximate_r1_is_zero_without_perturbation() -> None:
    logits = normal(3, 5)
    assert (approximate_r1(logits, logits.clone(), sigma=0.01) == 0).all()


def test_exact_r1_can_be_minimised() -> None:
    slope = normal(6).requires_grad_()
    x_t = normal(4, 6, seed=1).requires_grad_()
    penalty = r1(x_t @ slope, x_t)
    torch.testing.assert_close(penalty, slope.square().sum().expand(4))
    penalty.mean().backward()
    torch.testing.assert_close(slope.grad, 2 * slope.detach())


# DMD


def test_score_difference_of_two_gaussians_of_equal_variance_is_the_same_everywhere() -> None:
    """Clean N(m, s^2): s_real - s_fake = sqrt(ab) (m_real - m_fake) / (ab s^2 + 1 - ab), whatever x_t."""
    alpha_bar, std, m_real, m_fake = torch.tensor([0.0, 0.4, 0.9]).double(), 0.7, 1.0, -0.5
    spread = alpha_bar * std**2 + 1 - alpha_bar
    x_t = normal(3, 5)

    def denoise(mean: float) -> Tensor:
        a = alpha_bar.sqrt()[:, None]
        return mean + a * std**2 / spread[:, None] * (x_t - a * mean)

    expected = (alpha_bar.sqrt() * (m_real - m_fake) / spread)[:, None].expand(3, 5)
    torch.testing.assert_close(score_difference(denoise(m_real), denoise(m_fake), alpha_bar), expected)


def test_dmd_gradient_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    real = torch.tensor([[1.0, 3.0], [1.0, 0.0]])  # mean distances to the student: 2 and 1/2
    fake = torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    expected = torch.tensor([[0.5, -0.5], [-2.0, 0.0]])
    assert torch.equal(dmd_gradient(student, real, fake), expected)
    weighted = dmd_gradient(student, real, fake, weight=torch.tensor([3.0, 0.5]))
    assert torch.equal(weighted, expected * torch.tensor([[3.0], [0.5]]))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-2, 1e3))
def test_dmd_gradient_knows_no_neighbours_and_no_units(seed: int, unit: float) -> None:
    student, real, fake = normal(3, 4, 2, 5, 5, seed=seed).unsqueeze(1).expand(3, 3, 4, 2, 5, 5).clone() + normal(
        3, 3, 4, 2, 5, 5, seed=seed + 1
    )
    h = normal(3, seed=seed + 2).exp()
    together = dmd_gradient(student, real, fake, h)
    alone = [dmd_gradient(*(x[i : i + 1] for x in (student, real, fake, h))) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))
    torch.testing.assert_close(together, dmd_gradient(unit * student, unit * real, unit * fake, h))


def test_dmd_gradient_leaves_out_broken_samples_and_only_those() -> None:
    student, real, fake = (normal(5, 4, seed=s).float() for s in (1, 2, 3))
    h = torch.ones(5)
    clean = dmd_gradient(student, real, fake, h)
    real[1, 2], fake[2, 0], h[3] = math.nan, math.inf, math.nan
    gradient = dmd_gradient(student, real, fake, h)
    assert (gradient[1:4] == 0).all() and torch.equal(gradient[[0, 4]], clean[[0, 4]])
    student.requires_grad_()
    dmd_loss(student, gradient).sum().backward()
    assert student.grad.isfinite().all() and (student.grad[1:4] == 0).all()
    agreed = dmd_gradient(student, student, student)
    assert (agreed == 0).all(), "no distance to the teacher is no reason for a NaN"


def test_dmd_gradient_computes_in_float32_at_least() -> None:
    args = [normal(2, 64, seed=s).to(torch.bfloat16) for s in (1, 2, 3)]
    gradient = dmd_gradient(*args)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, dmd_gradient(*(x.float() for x in args)))
    assert dmd_gradient(*(x.double() for x in args)).dtype == torch.float64


def test_dmd_loss_hands_on_the_gradient_divided_by_the_elements_of_a_sample() -> None:
    x, g = normal(3, 4, 5).requires_grad_(), normal(3, 4, 5, seed=1).requires_grad_()
    loss = dmd_loss(x, g)
    torch.testing.assert_close(loss, 0.5 * g.detach().square().mean(dim=(1, 2)))
    loss.sum().backward()
    torch.testing.assert_close(x.grad, g.detach() / 20)
    assert g.grad is None


def test_denoising_loss() -> None:
    prediction, target = normal(2, 3, 4).requires_grad_(), normal(2, 3, 4, seed=1).requires_grad_()
    mse = (prediction - target).square().mean(dim=(1, 2)).detach()
    torch.testing.assert_close(denoising_loss(prediction, target), mse)
    loss = denoising_loss(prediction, target, weight=torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(loss, mse * torch.tensor([2.0, 0.0]).double())
    loss.sum().backward()
    assert target.grad is None and (prediction.grad[1] == 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_following_dmd_with_true_scores_and_ratios_finds_the_teacher(name: str) -> None:
    """A Gaussian student in 2-D, exact denoisers, all pieces of stage 2 together: any sign error diverges."""
    teacher_mean, teacher_std = torch.tensor([0.8, -0.5]).double(), 0.8
    mean, log_std = torch.zeros(2).double().requires_grad_(), torch.tensor([-0.6]).double().requires_grad_()
    optimizer = torch.optim.Adam([mean, log_std], lr=0.02)
    normalizer = RatioNormalizer(initial=weight(name, torch.zeros(1)).item())
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        z, noise = torch.randn(2, 256, 2, generator=generator, dtype=torch.float64)
        t = torch.randint(100, 900, (256,), generator=generator)
        ab = 1 - t.double()[:, None] / 1000
        x0 = mean + log_std.exp() * z

        def posterior(m: Tensor, std: Tensor | float, x_t: Tensor, ab: Tensor = ab) -> tuple[Tensor, Tensor]:
            var = ab * std**2 + 1 - ab
            gap = x_t - ab.sqrt() * m
            return m + ab.sqrt() * std**2 / var * gap, -(gap**2 / var + var.log()).sum(1) / 2

        with torch.no_grad():
            x_t = ab.sqrt() * x0 + (1 - ab).sqrt() * noise
            x0_real, log_p = posterior(teacher_mean, teacher_std, x_t)
            x0_fake, log_q = posterior(mean, log_std.exp(), x_t)
            h = normalizer.normalize(weight(name, log_p - log_q), t)
            gradient = dmd_gradient(x0, x0_real, x0_fake, h)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 300)
        optimizer.zero_grad()
        dmd_loss(x0, gradient).mean().backward()
        optimizer.step()
    torch.testing.assert_close(mean.detach(), teacher_mean, rtol=0, atol=0.03)
    assert abs(log_std.exp().item() - teacher_std) < 0.03


# The weight of a lone sample


def lone_weights(normalize: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Softened weights of 400 micro-batches of one sample, and what the normaliser makes of the last 200."""
    h = weight("softened_reverse_kl", 2 * normal(400))
    out = torch.cat([normalize(h[i : i + 1], torch.tensor([500])) for i in range(400)])
    return h[200:], out[200:]


def is_a_real_weight(h: Tensor, normalized: Tensor) -> bool:
    """Follows h closely, spreads as h does, and has mean one."""
    correlation = torch.corrcoef(torch.stack([h, normalized.to(h.dtype)]))[0, 1]
    spread = normalized.std() / normalized.mean() / (h.std() / h.mean())
    return bool(correlation > 0.9 and 0.9 < spread < 1.1 and abs(normalized.mean() - 1) < 0.1)


def test_weight_stays_a_weight_at_micro_batch_one() -> None:
    assert is_a_real_weight(*lone_weights(RatioNormalizer(initial=0.5).normalize))
    with_the_batch_mean = lone_weights(lambda h, t: h / h.mean())
    assert (with_the_batch_mean[1] == 1).all(), "what public code does: reverse KL in disguise"
    assert not is_a_real_weight(*with_the_batch_mean)


def test_normalizer_divides_by_what_came_before_and_by_nothing_else() -> None:
    normalizer, t = RatioNormalizer(initial=0.5, decay=0.5, prior=2), torch.tensor([0])
    assert normalizer.normalize(torch.tensor([3.0]), t) == 3.0 / 0.5
    # decayed by 0.5: the prior counts as one observation of 0.5, then 3.0 joins
    assert normalizer.mean(t) == (0.5 + 3.0) / 2
    assert normalizer.normalize(torch.tensor([7.0]), t) == 4.0


def test_processes_share_their_means_in_one_collective() -> None:
    h, t = normal(6, seed=1).exp().float(), torch.tensor([0, 999, 500, 501, 99, 100])
    whole, shared, calls = RatioNormalizer(), RatioNormalizer(), []

    def gather(x: Tensor) -> Tensor:  # of the first of two processes: the other one has the other half
        calls.append(x)
        return torch.cat([x, torch.stack([h[3:], t[3:].float()], dim=1)])

    expected = whole.normalize(h, t)
    assert torch.equal(shared.normalize(h[:3], t[:3], gather), expected[:3])
    assert len(calls) == 1 and torch.equal(shared.mean(t), whole.mean(t))


def test_normalizer_keeps_noise_levels_apart() -> None:
    normalizer = RatioNormalizer(bins=10)
    t = torch.arange(1000)
    h = 10.0 ** (t // 100).float()
    for _ in range(10):
        normalized = normalizer.normalize(h, t)
    torch.testing.assert_close(normalized, torch.ones(1000), rtol=1e-3, atol=0)
    fresh = RatioNormalizer(bins=10)
    fresh.update(torch.tensor([5.0]), torch.tensor([199]))
    untouched = fresh.mean(torch.tensor([99, 100, 200]))
    assert untouched[0] == untouched[2] == 1 and untouched[1] > 1


def test_normalizer_survives_broken_and_vanishing_weights() -> None:
    normalizer, t = RatioNormalizer(), torch.tensor([3, 3, 3])
    before = normalizer.mean(t)
    out = normalizer.normalize(torch.tensor([math.nan, math.inf, 1.0]), t)
    assert out[0].isnan() and torch.equal(normalizer.mean(t), before)
    for _ in range(2000):
        normalizer.update(torch.zeros(3), t)
    assert normalizer.normalize(torch.zeros(3), t).isfinite().all()


def test_normalizer_state_returns_from_a_checkpoint() -> None:
    one, other = RatioNormalizer(), RatioNormalizer()
    one.update(normal(50).exp(), torch.arange(50) * 20)
    other.load_state_dict(one.state_dict())
    h, t = normal(50, seed=1).exp(), torch.arange(50) * 20
    assert torch.equal(one.normalize(h, t), other.normalize(h, t))
    assert torch.equal(one.mean(t), other.mean(t))


# The constant of a relativistic logit

SHIFTS = torch.tensor([-3.0, 1.5, 4.0])  # c in three bins of timesteps


def gaussian_log_ratio(x: Tensor) -> Tensor:
    """log p/q of p = N(1, 0.8^2) and q = N(0, 1)."""
    return (x.square() - ((x - 1) / 0.8).square()) / 2 - math.log(0.8)


def fitted_constant(batches: int, decay: float = 0.999) -> RatioConstant:
    """What ``batches`` of eight pairs of Gaussian samples teach, by logits that are log r + c(t)."""
    constant, generator = RatioConstant(bins=3, decay=decay), torch.Generator().manual_seed(0)
    for _ in range(batches):
        t = torch.randint(0, 1000, (8,), generator=generator)
        x_p, x_q = 1 + 0.8 * torch.randn(8, generator=generator), torch.randn(8, generator=generator)
        c = SHIFTS[t * 3 // 1000]
        constant.update(gaussian_log_ratio(x_p) + c, gaussian_log_ratio(x_q) + c, t)
    return constant


def test_the_constant_of_a_relativistic_logit_between_gaussians() -> None:
    """E_q[h(r)] by quadrature: right with the constant off, wrong as the logit stands."""
    constant = fitted_constant(4000)
    torch.testing.assert_close(constant.constant, SHIFTS, rtol=0, atol=0.1)
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    log_r, density = gaussian_log_ratio(x), (-x.square() / 2).exp() / math.sqrt(2 * math.pi) * (x[1] - x[0])
    for name, row in DIVERGENCES.items():
        true = (density * weight(name, log_r)).sum()
        for shift, t in zip(SHIFTS, (0, 500, 999), strict=True):
            found = constant.at(torch.tensor(t))
            torch.testing.assert_close((density * weight(name, log_r + shift - found)).sum(), true, rtol=0.12, atol=0)
            if not row.constant:
                assert abs((density * weight(name, log_r + shift)).sum() / true - 1) > 0.2, name


def test_the_constant_is_where_an_absolute_head_would_stand() -> None:
    """A relativistic loss does not see c; the absolute loss of the same logits is least where c is off."""
    constant, generator = fitted_constant(4000), torch.Generator().manual_seed(1)
    real, fake = 1 + 0.8 * torch.randn(100_000, generator=generator), torch.randn(100_000, generator=generator)
    logits = [gaussian_log_ratio(x) + SHIFTS[2] for x in (real, fake)]
    torch.testing.assert_close(
        discriminator_loss(*logits, kind="relativistic").mean(),
        discriminator_loss(*(x - SHIFTS[2] for x in logits), kind="relativistic").mean(),
    )
    found = constant.constant[2]
    losses = [discriminator_loss(*(x - found - d for x in logits)).mean() for d in (-0.3, 0, 0.3)]
    assert losses[1] == min(losses) and losses[1] < discriminator_loss(*logits).mean() - 0.5


def test_the_constant_follows_forgets_and_leaves_out_what_is_broken() -> None:
    constant, t = RatioConstant(bins=2, decay=0.9), torch.tensor([10, 990])
    for shift in (0.0, 5.0, -5.0, 100.0):  # exp of the last is no number in float32
        for _ in range(400):
            constant.update(torch.tensor([1.0, 1.0]) + shift, torch.tensor([-1.0, -1.0]) + shift, t)
        torch.testing.assert_close(constant.at(t), torch.full((2,), shift), rtol=0, atol=0.01)
    before = constant.constant.clone()
    constant.update(torch.tensor([math.nan, math.inf]), torch.tensor([1.0, 1.0]), t)
    assert torch.equal(constant.constant, before)
    for _ in range(500):  # a head that is always right: no overlap, the constant between the two
        constant.update(torch.tensor([140.0, 140.0]), torch.tensor([40.0, 40.0]), t)
    assert constant.constant.isfinite().all() and (constant.constant < 140).all() and (constant.constant > 40).all()
    other = RatioConstant(bins=2)
    other.load_state_dict(constant.state_dict())
    assert torch.equal(other.at(t), constant.at(t))


def test_log_ratio_is_one_number_per_sample_without_a_graph() -> None:
    logits = normal(2, 3, 4).requires_grad_()
    assert not log_ratio(logits).requires_grad
    torch.testing.assert_close(log_ratio(logits), logits.detach().mean(dim=(1, 2)))
    assert log_ratio(logits.to(torch.bfloat16)).dtype == torch.float32


def test_nothing_waits_for_the_device() -> None:
    """Meta tensors have no values: whatever reads one (item, bool, a data-dependent shape) raises."""
    with torch.device("meta"):
        x = torch.zeros(2, 4, 3, 5, 5, dtype=torch.bfloat16, requires_grad=True)
        t, logits = torch.zeros(2, dtype=torch.long), torch.zeros(2, 3, 4)
        normalizer, constant = RatioNormalizer(), RatioConstant()
        constant.update(log_ratio(logits), log_ratio(logits), t)
    for name in DIVERGENCES:
        h = normalizer.normalize(weight(name, log_ratio(logits) - constant.at(t)), t)
    losses = [dmd_loss(x, dmd_gradient(x, x, x, h)), denoising_loss(x, x, h), generator_loss(logits)]
    losses += [discriminator_loss(logits, logits), approximate_r1(logits, logits, 0.1)]
    assert all(loss.shape == (2,) for loss in losses)
    assert score_difference(x, x, h).shape == x.shape
