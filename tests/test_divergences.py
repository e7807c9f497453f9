"""The table of divergences against quadrature over two known Gaussians, in float64.

Nothing here goes through a row's own f except where f itself is tested: each divergence is defined a second
time from the textbook.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fvgen.objectives import DIVERGENCES, dmd_loss, score_difference, weight
from fvgen.objectives.divergences import MAX_LOG_WEIGHT

ROWS = list(DIVERGENCES)


def log_normal(x: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """log N(x; mean, root root^T) for x [N,D], mean [D], root [D,D] lower triangular."""
    z = torch.linalg.solve_triangular(root, (x - mean).T, upper=False)
    return -0.5 * z.square().sum(0) - root.diagonal().log().sum() - 0.5 * len(mean) * math.log(2 * math.pi)


def textbook(name: str, log_p: Tensor, log_q: Tensor, cell: float) -> Tensor:
    """The divergence that the row claims to measure, by the rectangle rule over a grid with cells of that
    volume."""
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum() * cell

    return {
        "reverse_kl": lambda: kl(log_q, log_p),
        "softened_reverse_kl": lambda: 2 * kl(log_m, log_p),
        "softened_reverse_kl_printed": lambda: 0.5 * ((2 * log_q - log_p).exp().sum() * cell - 1),
        "forward_kl": lambda: kl(log_p, log_q),
        "jensen_shannon": lambda: kl(log_p, log_m) + kl(log_q, log_m),
        "jeffreys": lambda: kl(log_p, log_q) + kl(log_q, log_p),
        "squared_hellinger": lambda: 4 * (1 - (p * q).sqrt().sum() * cell),
    }[name]()


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Teacher, then student: mean and root of the covariance, near enough that no weight reaches its bound.
PAIRS = {
    "wide student": ([0.3], [[1.0]], [-0.2], [[1.06]]),
    "narrow student": ([0.3], [[1.0]], [0.0], [[0.85]]),
    "two dimensions": ([0.3, -0.2], [[1.0, 0.0], [0.2, 0.9]], [0.0, 0.1], [[0.95, 0.0], [0.0, 0.95]]),
}


def gaussians(pair: str) -> tuple[Tensor, float, Tensor, Tensor, Tensor, Tensor]:
    """Grid [N,D], its cell volume, then mean and root of teacher and student; the student's need a
    gradient."""
    p_mean, p_root, mean, root = map(double, PAIRS[pair])
    axis = torch.linspace(-12, 12, 4001 if len(mean) == 1 else 301, dtype=torch.float64)
    x = torch.cartesian_prod(*[axis] * len(mean)).reshape(-1, len(mean))
    return (
        x,
        float(axis[1] - axis[0]) ** len(mean),
        p_mean,
        p_root,
        mean.requires_grad_(),
        root.requires_grad_(),
    )


@pytest.mark.parametrize("name", ROWS)
def test_weight_is_r_squared_times_second_derivative_of_f(name: str) -> None:
    log_r = torch.linspace(-6, 6, 49, dtype=torch.float64)
    r = log_r.exp().requires_grad_()
    f = DIVERGENCES[name].f
    (first,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(weight(name, log_r), r.detach() ** 2 * second, rtol=1e-8, atol=1e-10)
    assert (second > 0).all(), "f must be convex"
    assert f(double([1.0])).abs() < 1e-12


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", ROWS)
def test_f_integrates_to_the_divergence_it_names(name: str, pair: str) -> None:
    x, cell, p_mean, p_root, mean, root = gaussians(pair)
    log_p, log_q = log_normal(x, p_mean, p_root), log_normal(x, mean, root).detach()
    near = (log_p > -300) & (log_q > -300)  # beyond, r overflows; the mass there is nil
    f = DIVERGENCES[name].f((log_p - log_q)[near].exp())
    value = (log_q[near].exp() * f).sum() * cell
    torch.testing.assert_close(value, textbook(name, log_p, log_q, cell), rtol=1e-7, atol=1e-9)
    assert value > 1e-3


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", ROWS)
def test_weighted_score_gap_is_the_gradient_of_the_divergence(name: str, pair: str) -> None:
    """-E_q[h(r) (s_p - s_q) dx/dtheta] for x = mean + root z, against autograd through the integral."""
    x, cell, p_mean, p_root, mean, root = gaussians(pair)
    log_p, log_q = log_normal(x, p_mean, p_root), log_normal(x, mean, root)
    expected = torch.autograd.grad(textbook(name, log_p, log_q, cell), (mean, root))

    with torch.no_grad():
        z = torch.linalg.solve_triangular(root, (x - mean).T, upper=False).T
        score_q = -torch.linalg.solve_triangular(root.T, z.T, upper=True).T
        score_p = -torch.linalg.solve(p_root @ p_root.T, (x - p_mean).T).T
        pull = -(weight(name, log_p - log_q) * log_q.exp() * cell)[:, None] * (score_p - score_q)
        on_mean, on_root = pull.sum(0), (pull.T @ z).tril()
    torch.testing.assert_close(on_mean, expected[0], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(on_root, expected[1].tril(), rtol=2e-5, atol=1e-6)
    assert on_mean.abs().max() > 1e-3 and on_root.abs().max() > 1e-3


@pytest.mark.parametrize("alpha_bar", [0.9, 0.3])
@pytest.mark.parametrize("name", ROWS)
def test_clean_estimates_give_the_gradient_between_noised_gaussians(name: str, alpha_bar: float) -> None:
    """The library's whole chain: optimal denoisers -> score_difference -> weight -> dmd_loss -> d/d(mean, log
    std)."""
    a, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    p_mean, p_std = double([0.4]), double([1.0])
    mean, log_std = double([-0.2]).requires_grad_(), double([math.log(0.85)]).requires_grad_()

    def noised(m: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        return a * m, (alpha_bar * std**2 + 1 - alpha_bar).sqrt()

    def denoise(x_t: Tensor, m: Tensor, std: Tensor) -> Tensor:
        return m + a * std**2 / (alpha_bar * std**2 + 1 - alpha_bar) * (x_t - a * m)

    def log_density(x_t: Tensor, m: Tensor, std: Tensor) -> Tensor:
        m_t, std_t = noised(m, std)
        return log_normal(x_t, m_t, std_t[None])

    axis = torch.linspace(-10, 10, 8001, dtype=torch.float64)[:, None]
    logs = log_density(axis, p_mean, p_std), log_density(axis, mean, log_std.exp())
    expected = torch.autograd.grad(textbook(name, *logs, cell=20 / 8000), (mean, log_std))

    z, eps = torch.cartesian_prod(*[torch.linspace(-9, 9, 361, dtype=torch.float64)] * 2).split(1, dim=1)
    mass = (-0.5 * (z**2 + eps**2)).exp().flatten() / (2 * math.pi) * (18 / 360) ** 2
    x0 = mean + log_std.exp() * z
    with torch.no_grad():
        x_t, std = a * x0 + noise * eps, log_std.exp()
        gap = score_difference(
            denoise(x_t, p_mean, p_std), denoise(x_t, mean, std), torch.full((len(z),), alpha_bar).double()
        )
        h = weight(name, log_density(x_t, p_mean, p_std) - log_density(x_t, mean, std))
    loss = dmd_loss(x0, gradient=-h[:, None] * a * gap)
    got = torch.autograd.grad((mass * loss).sum(), (mean, log_std))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
        assert ours.abs() > 1e-3


@settings(deadline=None)
@given(st.floats(-1e30, 1e30))
def test_weights_are_finite_however_sure_the_discriminator(log_r: float) -> None:
    for dtype in torch.float32, torch.float64, torch.bfloat16:
        for name in ROWS:
            h = weight(name, torch.tensor([log_r], dtype=dtype))
            assert h.isfinite().all() and (h >= 0).all() and h.dtype != torch.bfloat16
            assert h <= 1 + math.exp(MAX_LOG_WEIGHT) * (1 + 1e-6)


@settings(deadline=None)
@given(st.floats(-30, 30))
def test_rows_are_related_as_their_divergences_are(log_r: float) -> None:
    h = {name: weight(name, double([log_r])) for name in ROWS}
    mirrored = {name: weight(name, double([-log_r])) for name in ROWS}
    assert h["reverse_kl"] == 1
    torch.testing.assert_close(h["jeffreys"], h["forward_kl"] + h["reverse_kl"])
    torch.testing.assert_close(h["softened_reverse_kl"] + h["jensen_shannon"], double([1.0]))
    torch.testing.assert_close(h["softened_reverse_kl"], mirrored["jensen_shannon"])
    torch.testing.assert_close(h["softened_reverse_kl_printed"], mirrored["forward_kl"])


def test_softening_lowers_the_weight_where_the_student_misses_mass() -> None:
    """What FVGen claims the contrary of in words: h falls in r = p/q for both softened rows, and rises for
    the others."""
    log_r = torch.linspace(-8, 8, 33)
    for name in "softened_reverse_kl", "softened_reverse_kl_printed":
        assert (weight(name, log_r).diff() < 0).all()
    for name in "forward_kl", "jensen_shannon", "jeffreys", "squared_hellinger":
        assert (weight(name, log_r).diff() > 0).all()


def test_nan_stays_nan_where_the_ratio_matters() -> None:
    for name in set(ROWS) - {"reverse_kl"}:
        assert weight(name, torch.tensor([math.nan])).isnan().all()


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'softend_reverse_kl'.*did you mean 'softened_reverse_kl'"):
        weight("softend_reverse_kl", torch.zeros(1))
