"""The Gaussian rasteriser: closed forms, a dense version of the same formulas, finite differences, invariances."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras, look_at, pinhole
from fvgen.geometry.gaussians import (
    LEAST_ALPHA,
    LEAST_LEFT,
    LOW_PASS,
    MOST_ALPHA,
    NEAR,
    Gaussians,
    find_pairs,
    project_gaussians,
    render_gaussians,
    rotation_matrices,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def camera(height: int = 24, width: int = 32, dtype: torch.dtype = torch.float32) -> Cameras:
    return Cameras(torch.eye(4, dtype=dtype)[None], pinhole(1, height, width, 60.0).to(dtype), height, width)


def some(count: int, dtype: torch.dtype = torch.float32, seed: int = 0, size: float = 0.1) -> Gaussians:
    """In front of `camera`, 2 to 5 units away, a few beside the picture."""
    generator = rng(seed)
    draw = {"generator": generator, "dtype": dtype}
    depth = 2 + 3 * torch.rand(count, **draw)
    side = torch.rand(count, 2, **draw) * torch.tensor([1.4, 1.1], dtype=dtype) - torch.tensor([0.7, 0.55], dtype=dtype)
    scales = size * (0.5 * torch.randn(count, 3, **draw)).exp()
    turns, shades = torch.randn(count, 4, **draw), torch.rand(count, 3, **draw)
    means = torch.cat([side * depth[:, None], depth[:, None]], dim=1)
    return Gaussians(means, scales, turns, torch.rand(count, **draw), shades)


def dense(gaussians: Gaussians, cameras: Cameras, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every Gaussian at every pixel, front to back, one at a time."""
    seen = project_gaussians(gaussians, cameras)
    kind = gaussians.means.dtype
    y, x = torch.meshgrid(
        torch.arange(cameras.height, dtype=kind) + 0.5, torch.arange(cameras.width, dtype=kind) + 0.5, indexing="ij"
    )
    image, total, depth = torch.zeros(3, *x.shape, dtype=kind), torch.zeros_like(x), torch.zeros_like(x)
    left, open_ = torch.ones_like(x), torch.ones_like(x, dtype=torch.bool)
    for n in seen.depths.argsort().tolist():
        if seen.depths[n] <= NEAR:
            continue
        dx, dy = x - seen.centers[n, 0], y - seen.centers[n, 1]
        xx, xy, yy = seen.conics[n]
        alpha = (gaussians.opacities[n] * (-(0.5 * (xx * dx**2 + yy * dy**2) + xy * dx * dy)).exp()).clamp(
            max=MOST_ALPHA
        )
        hit = (alpha >= LEAST_ALPHA) & open_
        open_ = open_ & ~(hit & (left * (1 - alpha) < LEAST_LEFT))
        hit = hit & open_
        weight = torch.where(hit, left * alpha, 0)
        image = image + weight * gaussians.colors[n][:, None, None]
        total, depth = total + weight, depth + weight * seen.depths[n]
        left = torch.where(hit, left * (1 - alpha), left)
    return image + (1 - total) * background[:, None, None], total, depth


def test_one_gaussian_on_the_axis_has_a_closed_form():
    """A sphere of deviation s at depth z: variance (f s / z)^2 + 0.3 at its centre, where its slope is zero."""
    cameras, s, z, o = camera(25, 33), 0.2, 3.0, 0.7
    one = Gaussians(
        torch.tensor([[0.0, 0, z]]),
        torch.full((1, 3), s),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.tensor([o]),
        torch.ones(1, 3),
    )
    focal = cameras.intrinsics[0, 0, 0].item()
    variance = (focal * s / z) ** 2 + LOW_PASS
    image, alpha, depth = render_gaussians(one, cameras, torch.tensor([0.0, 0.5, 1.0]))
    y, x = torch.meshgrid(torch.arange(25) - 12.0, torch.arange(33) - 16.0, indexing="ij")
    expected = o * (-(x**2 + y**2) / (2 * variance)).exp()
    expected = torch.where(expected >= LEAST_ALPHA, expected, 0)
    near_the_limit = (expected - LEAST_ALPHA).abs() < 1e-4
    torch.testing.assert_close(alpha[0, 0][~near_the_limit], expected[~near_the_limit], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(depth, alpha * z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(image[0, 1], alpha[0, 0] + (1 - alpha[0, 0]) * 0.5, rtol=1e-5, atol=1e-6)


def test_equal_to_the_dense_version():
    gaussians, background = some(60, torch.float64, 1, 0.25), torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)
    cameras = camera(dtype=torch.float64)
    image, alpha, depth = render_gaussians(gaussians, cameras, background)
    expected = dense(gaussians, cameras, background)
    for found, wanted in zip((image[0], alpha[0, 0], depth[0, 0]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_pixels_are_done_where_nothing_shines_through():
    """A wall of nearly opaque layers: the stop at 1e-4 is in force, and still equals the dense version."""
    count = 12
    wall = Gaussians(
        torch.tensor([[0.0, 0.0, 2.0 + 0.1 * k] for k in range(count)], dtype=torch.float64),
        torch.full((count, 3), 3.0, dtype=torch.float64),
        torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64).repeat(count, 1),
        torch.full((count,), 0.9, dtype=torch.float64),
        torch.rand(count, 3, generator=rng(), dtype=torch.float64),
    )
    cameras, black = camera(dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    image, alpha, _ = render_gaussians(wall, cameras, black)
    expected = dense(wall, cameras, black)
    torch.testing.assert_close(image[0], expected[0], rtol=1e-9, atol=1e-10)
    assert 1 - 1e-3 < alpha.max() < 1


def test_gradients_are_the_finite_differences():
    gaussians, cameras = some(10, torch.float64, 3, 0.3), camera(6, 8, torch.float64)
    leaves = [getattr(gaussians, name).clone().requires_grad_() for name in gaussians.__dataclass_fields__]
    background = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64, requires_grad=True)

    def shown(background: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return render_gaussians(Gaussians(*values), cameras, background)

    assert torch.autograd.gradcheck(shown, (background, *leaves), eps=1e-6, atol=1e-5)


def test_order_does_not_matter():
    gaussians, cameras = some(200), camera()
    shuffled = gaussians[torch.randperm(200, generator=rng(5))]
    for one, other in zip(render_gaussians(gaussians, cameras), render_gaussians(shuffled, cameras), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_nearer_hides_the_farther_from_either_side():
    pair = Gaussians(
        torch.tensor([[0.0, 0, 0], [0, 0, 1.0]]), torch.full((2, 3), 0.3), torch.tensor([[1.0, 0, 0, 0]] * 2),
        torch.full((2,), 0.99), torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]),
    )  # fmt: skip
    eyes = torch.tensor([[0.0, 0, -3], [0, 0, 4.0]])
    poses = look_at(eyes, torch.zeros(2, 3) + torch.tensor([0, 0, 0.5]), torch.tensor([0.0, -1, 0]))
    image, *_ = render_gaussians(pair, Cameras(poses, pinhole(2, 25, 25, 60.0), 25, 25))
    middle = image[:, :, 12, 12]
    assert middle[0, 0] > 0.95 > 0.05 > middle[0, 1] and middle[1, 1] > 0.95 > 0.05 > middle[1, 0]


def test_what_lies_behind_or_is_clear_is_not_drawn():
    gaussians = some(50)
    for unseen in (
        Gaussians(*(-x if name == "means" else x for name, x in vars(gaussians).items())),
        Gaussians(*(x * 0 if name == "opacities" else x for name, x in vars(gaussians).items())),
    ):
        image, alpha, depth = render_gaussians(unseen, camera(), torch.tensor([0.1, 0.2, 0.3]))
        assert not alpha.any() and not depth.any() and torch.equal(image[0, 2], torch.full_like(image[0, 2], 0.3))


def test_large_pictures_sort_as_small_ones_do():
    """More than 2^16 pixels, for which the radix sort takes two passes."""
    gaussians, cameras = some(400, size=0.02), camera(300, 400)
    gaussian, pixel = find_pairs(project_gaussians(gaussians, cameras), gaussians.opacities, 300, 400)
    depth = project_gaussians(gaussians, cameras).depths[gaussian].double()
    assert pixel.max() > 1 << 16
    assert torch.equal((pixel * 100 + depth).argsort(stable=True), torch.arange(len(pixel)))


def test_rotations_are_the_quaternions():
    turn = torch.tensor([[math.cos(0.4), 0, 0, math.sin(0.4)]]) * 3  # 0.8 about z, of any length
    expected = torch.tensor([[math.cos(0.8), -math.sin(0.8), 0], [math.sin(0.8), math.cos(0.8), 0], [0, 0, 1]])
    torch.testing.assert_close(rotation_matrices(turn)[0], expected)
    matrices = rotation_matrices(torch.randn(20, 4, generator=rng()))
    torch.testing.assert_close(matrices @ matrices.transpose(1, 2), torch.eye(3).expand(20, 3, 3), rtol=0, atol=1e-6)


@pytest.mark.skipif(not find_spec("gsplat"), reason="gsplat is not installed")
def test_the_projection_is_gsplats():
    from gsplat.cuda import _torch_impl as theirs

    gaussians, cameras = some(200), camera()
    covariances, _ = theirs._quat_scale_to_covar_preci(gaussians.rotations, gaussians.scales, True, False)
    views, lenses = cameras.cam_from_world, cameras.intrinsics
    found = theirs._fully_fused_projection(gaussians.means, covariances, views, lenses, 32, 24)
    radii, centers, depths, conics = found[:4]
    ours, seen = project_gaussians(gaussians, cameras), (radii[0] > 0).reshape(len(gaussians), -1).all(dim=1)
    for one, other in ((ours.centers, centers[0]), (ours.depths, depths[0]), (ours.conics, conics[0])):
        torch.testing.assert_close(one[seen], other[seen], rtol=1e-4, atol=1e-4)
